"""Table of baselines: every method with its chosen hyper-parameters, with and without privacy, on test data.

``python -m simulations.baselines simulations/configs/baselines/search.toml`` runs the configurations that
`simulations.tune` has chosen, with several seeds, and writes ``docs/baselines-table.md``. The script does not repeat
runs that are already in ``--runs``. With ``--finished`` it runs nothing: it writes the table of the finished runs, and
the page gives the number of missing ones.
"""

import argparse
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_dualpriv.cli.console import spell_out_what_cannot_be_shown
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_bytes
from fl_dualpriv.run.cpus import usable_cpus
from fl_dualpriv.run.tables import epsilon_text
from simulations.cells import Cell, run, run_all
from simulations.report import ROOT, level, spread
from simulations.tune import CHOSEN, Entry, cell_of, entries, kind_of, read, space

Summaries = Mapping[Entry, Sequence[Mapping[str, Any]]]


def chosen_of(document: Mapping[str, Any], path: Path) -> dict[Entry, dict[str, Any]]:
    """Return the choice for each entry, checked against the search, without the entries that were not tuned.

    Raises:
        ConfigError: If a choice has a value, a number of trials or a number of runs that differs from the search.
    """
    tables = {(t["base"], t["method"], t["epsilon"]): t for t in tomllib.loads(path.read_text("utf-8"))["chosen"]}
    choices = {}
    for entry, method in entries(document):
        if entry not in tables:
            continue
        chosen, offered = tables[entry], space(document, method, entry[2])
        keys = chosen["keys"]
        known = keys.keys() == offered.keys() and all(value in offered[key] for key, value in keys.items())
        if not known or (chosen["trials"], chosen["runs"]) != (document["trials"], tuning_runs(document)):
            raise ConfigError(f"{path}: {entry} was chosen in another search; run simulations.tune again")
        choices[entry] = chosen
    return choices


def tuning_runs(document: Mapping[str, Any]) -> int:
    """Return the number of tuning runs of each entry: the trials, and the finalists with the other seeds."""
    return document["trials"] + document["finalists"] * (len(document["tuning-seeds"]) - 1)


def cells_of(document: Mapping[str, Any], chosen: Mapping[Entry, Mapping[str, Any]]) -> dict[Entry, list[Cell]]:
    """Return the final runs of every tuned entry: one run per seed, on test data, with its configuration checked."""
    return {
        entry: [
            cell_of(document, entry, method, chosen[entry]["keys"], seed=seed, split="test")
            for seed in document["seeds"]
        ]
        for entry, method in entries(document)
        if entry in chosen
    }


def table(document: Mapping[str, Any], base: str, done: Summaries) -> str:
    """Return a Markdown table with a row for the un-tuned model, one for the free rival and one per method.

    The entries are mean ± standard deviation over seeds, in percent.
    """
    epsilons = document["epsilons"]
    heads = [f"ε = {epsilon_text(e)}" if kind_of(e) == "with-noise" else "no privacy" for e in epsilons]
    columns = " | ".join(f"{head}, local | neighbour" for head in heads)
    lines = [f"| method | {columns} |", "|---|" + "---|" * (2 * len(epsilons))]
    untuned = [
        next((summaries for (b, _, e), summaries in done.items() if (b, e) == (base, epsilon)), [])
        for epsilon in epsilons
    ]
    lines.append(f"| zero-shot (nothing to tune) | {' | '.join(_scores(s, 'zero_shot') for s in untuned)} |")
    rival = next((s["accuracy"]["free"]["rival"] for summaries in untuned for s in summaries), "un-tuned")
    if rival != "un-tuned":
        lines.append(f"| free rival: {rival} | {' | '.join(_scores(s, 'free') for s in untuned)} |")
    for method in document["methods"]:
        summary_lists = [done.get((base, method["name"], epsilon), []) for epsilon in epsilons]
        if base in method.get("bases", document["bases"]):
            cells = [_scores(s, "final") + _short(s, document) for s in summary_lists]
            lines.append(f"| {method['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _scores(summaries: Sequence[Mapping[str, Any]], when: str) -> str:
    return " | ".join(spread([s["accuracy"][when][where] for s in summaries]) for where in ("local", "neighbour"))


def _short(summaries: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> str:
    """Return the number of seeds in parentheses, or an empty text if all seeds are there."""
    return "" if len(summaries) == len(document["seeds"]) else f" ({len(summaries)} seeds)"


def settings(document: Mapping[str, Any], base: str, chosen: Mapping[Entry, Mapping[str, Any]], done: Summaries) -> str:
    """Return a Markdown table of each method's chosen values, its score on validation data and its accounted ε."""
    lines = ["| method | | validation | runs (failed), seconds | chosen | ε |", "|---|---|---|---|---|---|"]
    for entry, method in entries(document):
        if entry[0] != base or entry not in chosen:
            continue
        choice, summaries = chosen[entry], done.get(entry, [])
        keys = " ".join(f"`{key}={value}`" for key, value in choice["keys"].items())
        head = f"ε = {epsilon_text(entry[2])}" if kind_of(entry[2]) == "with-noise" else "no privacy"
        budget = f"{choice['runs']} ({choice['failed']}), {choice['seconds']:.0f}"
        source = f", {method['source']}" if method.get("source") else ""
        lines.append(
            f"| {method['name']}{source} | {head} | {100 * choice['validation']:.1f} | {budget} | {keys} | "
            f"{level(summaries[0]) if summaries else '-'} |"
        )
    return "\n".join(lines)


def page(
    document: Mapping[str, Any], name: str, chosen: Mapping[Entry, Mapping[str, Any]], done: Summaries, missing: int
) -> str:
    """Return the whole page, with two tables per base."""
    trials, finals, seeds = document["trials"], document["finalists"], len(document["tuning-seeds"])
    parts = [
        "# Baselines: the table\n",
        f"Written by `python -m simulations.baselines simulations/configs/baselines/{name}`; what it means is in "
        f"[baselines.md](baselines.md). Test data, in percent, mean ± standard deviation over {len(document['seeds'])} "
        "seeds. Local: images of a client's own classes; neighbour: of all others; both over all class names, but for "
        "the free rival at home, averaged over clients. "
        f"Tuning budget: {trials} trials of one seed for every method, base and ε, on validation data, "
        f"and the best {finals} of them with {seeds - 1} other seeds; the highest mean local accuracy is chosen. ε is "
        "of one final run; the trials are not accounted.",
    ]
    if missing:
        parts.append(
            f"\n**Not finished: {missing} final runs are missing.** `simulations.tune` and then this command go on."
        )
    for base, base_settings in document["bases"].items():
        finished = [s for (b, _, _), summaries in done.items() if b == base for s in summaries]
        if not finished:
            continue
        seconds = statistics.mean(s["seconds"] for s in finished)
        keys = " ".join(f"`{key}={value}`" for key, value in base_settings.get("keys", {}).items())
        parts.append(
            f"\n## {base_settings['title']}\n\n[{base_settings['config']}]"
            f"(../simulations/configs/{base_settings['config']}) with {keys}; "
            f"{seconds:.1f} seconds a run on a busy core.\n\n{table(document, base, done)}\n\nSettings:\n\n"
            f"{settings(document, base, chosen, done)}"
        )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Check all configurations, run them and write the page."""
    spell_out_what_cannot_be_shown()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("search", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "baselines")
    parser.add_argument("--workers", type=int, default=usable_cpus())
    parser.add_argument("--base", help="run only this base")
    parser.add_argument("--seeds", type=int, help="number of seeds to run, from the first")
    parser.add_argument("--finished", action="store_true", help="run nothing; write the table of the finished runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "baselines-table.md")
    args = parser.parse_args()
    document = read(args.search)
    chosen = chosen_of(document, args.search.with_name(CHOSEN))
    cells = cells_of(document, chosen)
    if not args.finished:
        now = [c for entry_cells in cells.values() for c in entry_cells[: args.seeds] if args.base in (None, c.base)]
        run_all(now, args.runs, args.workers)
    finished = {
        entry: [run(cell, args.runs) for cell in entry_cells if (args.runs / cell.folder / "summary.json").exists()]
        for entry, entry_cells in cells.items()
    }
    wanted = len(document["seeds"]) * sum(1 for _ in entries(document))
    missing = wanted - sum(len(summaries) for summaries in finished.values())
    text = page(
        document, args.search.name, chosen, {e: summaries for e, summaries in finished.items() if summaries}, missing
    )
    write_bytes(args.out, text.encode())
    sys.stdout.write(text)


if __name__ == "__main__":
    main()

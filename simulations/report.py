"""Run the results table with ``fl-dualpriv run``: every row is a configuration and a method, over several seeds.

``python -m simulations.report`` writes ``docs/results.md``. The script does not repeat runs that are already in
``--runs``, so an interrupted table can be continued. Hyper-parameters were chosen on the validation split. The table
shows the test split.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_dualpriv.cli.console import spell_out_what_cannot_be_shown
from fl_dualpriv.files import write_bytes
from fl_dualpriv.run.file_kinds import SUMMARY, TOTALS, read_totals
from fl_dualpriv.run.tables import epsilon_text

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "simulations" / "configs"


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the table."""

    label: str
    config: str
    changes: Mapping[str, str]
    main: bool = False


ROWS = (
    Row("DP-FPL, no privacy", "nonprivate.toml", {}, main=True),
    Row("DP-FPL + Dual-Priv pruning", "by-class.toml", {}, main=True),
    Row("DP-FPL", "by-class.toml", {"pruning.visual-keep-ratio": "1.0", "pruning.update-keep-ratio": "1.0"}, main=True),
    Row("full (no factorisation)", "by-class.toml", {"method": "full"}),
    Row("low rank (no residual)", "by-class.toml", {"method": "lowrank"}),
    Row("local only", "by-class.toml", {"method": "local-only"}),
    Row("PromptFL", "by-class.toml", {"method": "promptfl"}),
    Row("top-3 residuals", "by-class.toml", {"train.top-m": "3"}),
    Row("top-10 residuals", "by-class.toml", {"train.top-m": "10"}),
    Row(
        "noise at the class features",
        "by-class.toml",
        {"privacy.record.noise-space": "feature", "privacy.record.clip-norm": "12.0"},
    ),
    Row(
        "DP-FPL by the paper's formulas, **nominal** ε",
        "by-class.toml",
        {"method": "dpfpl-paper", "pruning.update-keep-ratio": "1.0"},
    ),
    Row("PromptFL, 100 clients, client level", "client-level.toml", {}),
)


def run(row: Row, seed: int, split: str, runs: Path) -> dict[str, Any]:
    """Run one row with one seed in a separate process, or read an earlier run of it, and return its summary."""
    name = "-".join([row.config.removesuffix(".toml"), *row.changes.values(), split, str(seed)]).replace("/", "_")
    out = runs / name
    if not ((out / SUMMARY).exists() and (out / TOTALS).exists()):
        sets = {"seed": str(seed), "evaluation.split": split, "evaluation.every": "1000", **row.changes}
        command = [sys.executable, "-m", "fl_dualpriv.cli.main", "run", str(CONFIGS / row.config)]
        command += ["--engine", "local", "--out", str(out), "--overwrite"]
        for key, value in sets.items():
            command += ["--set", f"{key}={value}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{name}: exit code {done.returncode}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    if failures := read_totals(out)["failures"]:
        raise RuntimeError(f"{name}: {failures} failures; a run with failures cannot be used as a result")
    return json.loads((out / SUMMARY).read_text())


def spread(values: Sequence[float | None]) -> str:
    """Return mean and standard deviation over seeds, in percent."""
    percentages = [100 * value for value in values if value is not None]
    if not percentages:
        return "-"
    if len(percentages) == 1:
        return f"{percentages[0]:.1f}"
    return f"{statistics.mean(percentages):.1f} ± {statistics.stdev(percentages):.1f}"


def level(summary: Mapping[str, Any]) -> str:
    """Return ε with its unit and δ, from the releases whose guarantee is a theorem."""
    proved = [r for r in summary["privacy"] if r["guarantee"] == "theorem"]
    if not proved:
        return "-"
    return ", ".join(sorted({f"{epsilon_text(r['epsilon'])} ({r['unit']}, δ = {r['delta']:g})" for r in proved}))


def table(results: Mapping[Row, Sequence[Mapping[str, Any]]]) -> str:
    """Return the Markdown table, with the zero-shot model and the free rival before the rows that they belong to."""
    lines = [
        "| method | config | ε | seeds | local accuracy | neighbour accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for row, summaries in results.items():
        scores = {
            f"{when} {where}": spread([s["accuracy"][when][where] for s in summaries])
            for when in ("zero_shot", "free", "final")
            for where in ("local", "neighbour")
        }
        link = f"[{row.config}](../simulations/configs/{row.config})"
        changes = "".join(f" `{key}={value}`" for key, value in row.changes.items())
        n = len(summaries)
        start = f"{scores['zero_shot local']} → " if row.config == "client-level.toml" else ""
        lines.append(
            f"| {row.label} | {link}{changes} | {level(summaries[0])} | {n} | "
            f"{start}{scores['final local']} | {scores['final neighbour']} |"
        )
        if row.config == "nonprivate.toml" or (row.config == "by-class.toml" and not row.changes):
            rival = summaries[0]["accuracy"]["free"]["rival"]
            lines[-1:-1] = [
                f"| zero-shot | {link} | 0 | {n} | {scores['zero_shot local']} | {scores['zero_shot neighbour']} |",
                f"| free rival: {rival} | {link} | 0 | {n} | {scores['free local']} | {scores['free neighbour']} |",
            ]
    return "\n".join(lines)


def main() -> None:
    """Run all rows, two at a time, and write the table."""
    spell_out_what_cannot_be_shown()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of zero-shot and DP-FPL")
    parser.add_argument("--baseline-seeds", type=int, default=3, help="number of seeds of all other rows")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "report")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    cells = [(row, seed) for row in ROWS if row.main for seed in range(args.seeds)]
    cells += [(row, seed) for seed in range(args.baseline_seeds) for row in ROWS if not row.main]
    with ThreadPoolExecutor(args.workers) as pool:
        summaries = list(pool.map(lambda cell: run(cell[0], cell[1], args.split, args.runs), cells))
    results: dict[Row, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for (row, _), summary in zip(cells, summaries, strict=True):
        results[row].append(summary)
    text = (
        f"# Results\n\nMean ± standard deviation over seeds, {args.split} split, in percent. Written by "
        f"`python -m simulations.report`; accuracies are over all class names, but for the free rival at home, each "
        f"class of a client with the same weight, averaged over clients.\n\n"
        f"{table(results)}\n"
    )
    write_bytes(ROOT / "docs" / ("results.md" if args.split == "test" else "results-val.md"), text.encode())
    sys.stdout.write(text)


if __name__ == "__main__":
    main()

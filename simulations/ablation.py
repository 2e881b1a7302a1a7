"""Ablation of Dual-Priv Pruning: run every variant at every ε with several seeds, and write the table.

``python -m simulations.ablation simulations/configs/ablation-dualpriv.toml`` writes ``docs/dualpriv-table.md``. The
script does not repeat runs that are already in ``--runs``. It checks all configurations before the first run.
"""

import argparse
import math
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_dualpriv.cli.console import spell_out_what_cannot_be_shown
from fl_dualpriv.config.schema import app_defaults, merge, read_toml
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_bytes
from fl_dualpriv.run.cpus import usable_cpus
from fl_dualpriv.run.estimates import Estimate
from fl_dualpriv.run.tables import epsilon_text
from simulations.cells import Cell, make_cell, run_all
from simulations.report import CONFIGS, ROOT, spread

_VARIANT_KEYS = ("name", "bases", "keys", "with-noise", "without-noise")


def cells_of(document: Mapping[str, Any]) -> list[Cell]:
    """Return every run of an ablation, with its configuration checked.

    Raises:
        ConfigError: If a variant has an unknown key, or the configuration of a run is not valid.
    """
    defaults, cells = app_defaults(ROOT), []
    bases = document["bases"]
    for variant in document["variants"]:
        if unknown := set(variant) - set(_VARIANT_KEYS) - set(bases):
            raise ConfigError(f"variant {variant.get('name')!r}: unknown {', '.join(sorted(unknown))}")
    for name, base in bases.items():
        start = merge(defaults, read_toml(CONFIGS / base["config"]), document["common"])
        for variant in on(document, name):
            for epsilon in document["epsilons"]:
                kind = "with-noise" if math.isfinite(epsilon) else "without-noise"
                layers = [start, base.get("keys", {}), base.get(kind, {}), variant.get("keys", {})]
                layers += [variant.get(name, {}), variant.get(kind, {})]
                for seed in document["seeds"]:
                    cell = make_cell(defaults, layers, base=name, name=variant["name"], epsilon=epsilon, seed=seed)
                    cells.append(cell)
    return cells


def on(document: Mapping[str, Any], base: str) -> list[dict[str, Any]]:
    """Return the variants that run on a base: all except those whose list ``bases`` leaves it out."""
    return [variant for variant in document["variants"] if base in variant.get("bases", [base])]


def table(document: Mapping[str, Any], base: str, scores: Mapping[tuple[str, float, int], float]) -> str:
    """Return a Markdown table: mean ± standard deviation over seeds, and the paired difference to the first variant.

    Args:
        document: The ablation.
        base: Name of the base.
        scores: (variant, ε, seed) → local accuracy.
    """
    seeds, epsilons = document["seeds"], document["epsilons"]
    first = document["variants"][0]["name"]
    head = [f"ε = {'∞' if math.isinf(e) else epsilon_text(e)}" for e in epsilons]
    lines = [f"| variant | {' | '.join(f'{h} | difference' for h in head)} |", "|---|" + "---|" * (2 * len(head))]
    for variant in on(document, base):
        entries = []
        for epsilon in epsilons:
            variant_scores, other = (
                [scores[name, epsilon, seed] for seed in seeds] for name in (variant["name"], first)
            )
            gap = difference([100 * x for x in variant_scores], [100 * x for x in other])
            entries += [spread(variant_scores), "" if variant["name"] == first else gap]
        lines.append(f"| {variant['name']} | {' | '.join(entries)} |")
    return "\n".join(lines)


def difference(values: Sequence[float], other: Sequence[float]) -> str:
    """Return the mean paired difference and its 95 % interval (Student's t over seeds), bold if it excludes zero."""
    gap = Estimate.of([a - b for a, b in zip(values, other, strict=True)])
    text = gap.text(sign=True)
    return f"**{text}**" if gap.is_clear else text


def report(
    document: Mapping[str, Any], name: str, cells: Sequence[Cell], summaries: Sequence[Mapping[str, Any]]
) -> str:
    """Return the page, with one table per base."""
    parts = [
        "# Dual-Priv Pruning, part by part: the table\n",
        f"Written by `python -m simulations.ablation simulations/configs/{name}`; what it means is in "
        "[dualpriv.md](dualpriv.md). Local accuracy on test data in percent, mean ± standard deviation over "
        f"{len(document['seeds'])} seeds. *Difference*: to the first row with the same seed, with its 95 % interval; "
        "bold where that leaves out zero. Noise on fused tokens has no ε.",
    ]
    for base, settings in document["bases"].items():
        if base not in {cell.base for cell in cells}:
            continue
        scores, zero_shot = {}, []
        for cell, summary in zip(cells, summaries, strict=True):
            if cell.base == base:
                scores[cell.name, cell.epsilon, cell.seed] = summary["accuracy"]["final"]["local"]
                if cell.name == document["variants"][0]["name"]:
                    zero_shot.append(100 * summary["accuracy"]["zero_shot"]["local"])
        keys = " ".join(f"`{key}={value}`" for key, value in settings.get("keys", {}).items())
        config = settings["config"]
        parts.append(
            f"\n## {settings['title']}\n\n[{config}](../simulations/configs/{config}) with {keys}; un-tuned model "
            f"{statistics.mean(zero_shot):.1f}.\n\n{table(document, base, scores)}"
        )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Check all configurations, run them and write the table."""
    spell_out_what_cannot_be_shown()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ablation", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--workers", type=int, default=usable_cpus())
    parser.add_argument("--seeds", type=int, help="number of seeds to run, from the first")
    parser.add_argument("--base", help="run only this base")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dualpriv-table.md")
    args = parser.parse_args()
    document = tomllib.loads(args.ablation.read_text(encoding="utf-8"))
    if args.seeds:
        document["seeds"] = document["seeds"][: args.seeds]
    cells = [cell for cell in cells_of(document) if args.base in (None, cell.base)]
    summaries = run_all(cells, args.runs, args.workers)
    text = report(document, args.ablation.name, cells, summaries)
    write_bytes(args.out, text.encode())
    sys.stdout.write(text)


if __name__ == "__main__":
    main()

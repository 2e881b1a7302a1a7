"""What each part of Dual-Priv Pruning does: runs of every variant at every ε over seeds, and the table of them.

``python -m simulations.ablation simulations/configs/ablation-dualpriv.toml`` writes ``docs/dualpriv-table.md``. Runs
that are already in ``--runs`` are not repeated. All settings are checked before the first run.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import scipy.stats

from fl_dualpriv.config import ConfigValue, RunConfig, app_defaults, merge, read_toml
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_bytes
from fl_dualpriv.tables import epsilon_text
from simulations.report import CONFIGS, ROOT, spread

_VARIANT_KEYS = ("name", "bases", "keys", "with-noise", "without-noise")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a variant on a base at an ε with a seed.

    Attributes:
        base: Name of the base.
        variant: Name of the variant.
        epsilon: ∞: neither clip nor noise.
        seed: Of everything.
        settings: The whole run configuration, flat.
        folder: Name of the run's folder: from the settings that are no defaults, so that an edited variant runs anew.
    """

    base: str
    variant: str
    epsilon: float
    seed: int
    settings: Mapping[str, ConfigValue]
    folder: str


def cells_of(document: Mapping[str, Any]) -> list[Cell]:
    """Every run of an ablation, each checked.

    Raises:
        ConfigError: If a key of the document is unknown, or a run's configuration is not valid.
    """
    defaults, found = app_defaults(ROOT), []
    bases = document["bases"]
    for variant in document["variants"]:
        if unknown := set(variant) - set(_VARIANT_KEYS) - set(bases):
            raise ConfigError(f"variant {variant.get('name')!r}: unknown {', '.join(sorted(unknown))}")
    for name, base in bases.items():
        start = merge(defaults, read_toml(CONFIGS / base["config"]), document["common"])
        for variant in on(document, name):
            for epsilon in document["epsilons"]:
                noise = _noise(epsilon)
                kind = "with-noise" if math.isfinite(epsilon) else "without-noise"
                layers = [base.get("keys", {}), base.get(kind, {}), variant.get("keys", {})]
                layers += [variant.get(name, {}), variant.get(kind, {}), noise]
                for seed in document["seeds"]:
                    settings = merge(start, *layers, {"seed": seed})
                    try:
                        RunConfig.from_run_config(settings)
                    except ConfigError as error:
                        raise ConfigError(f"variant {variant['name']!r} on {name}, ε = {epsilon:g}: {error}") from error
                    chosen = json.dumps(dict(sorted(settings.items() - defaults.items())))
                    cell = Cell(
                        base=name,
                        variant=variant["name"],
                        epsilon=epsilon,
                        seed=seed,
                        settings=settings,
                        folder=f"{name}-{epsilon:g}-{seed}-{zlib.crc32(chosen.encode()):08x}",
                    )
                    found.append(cell)
    return found


def on(document: Mapping[str, Any], base: str) -> list[dict[str, Any]]:
    """The variants of a base: all but those that name others."""
    return [variant for variant in document["variants"] if base in variant.get("bases", [base])]


def _noise(epsilon: float) -> dict[str, ConfigValue]:
    if math.isfinite(epsilon):
        return {"privacy.record.mechanism": "gaussian", "privacy.record.epsilon": epsilon}
    return {"privacy.record.mechanism": "none"}


def shared(cell: Cell) -> tuple[str, int, str, bool]:
    """What a run's data, model and features depend on: a process that keeps them runs what shares them in a row."""
    tokens = [f"{key}={value}" for key, value in sorted(cell.settings.items()) if key.startswith("pruning.visual")]
    return cell.base, cell.seed, " ".join(tokens), math.isfinite(cell.epsilon)


def run(cell: Cell, runs: Path) -> dict[str, Any]:
    """Run a cell in this process, or read it if it was run before; returns its summary.

    Raises:
        RuntimeError: If a client failed: such a run is no result.
    """
    out = runs / cell.folder
    if not (out / "summary.json").exists():
        from fl_dualpriv.local_engine import run_local

        shutil.rmtree(out, ignore_errors=True)  # of a run that was cut off: its ledgers would refuse this one
        run_local(ROOT, {**cell.settings, "output.dir": str(out)})
    summary = json.loads((out / "summary.json").read_text())
    if summary["failures"]:
        raise RuntimeError(f"{cell.folder}: {summary['failures']} failures")
    return summary


def table(document: Mapping[str, Any], base: str, scores: Mapping[tuple[str, float, int], float]) -> str:
    """Markdown: mean ± standard deviation over seeds, and the paired difference to the first variant.

    Args:
        document: The ablation.
        base: Which base.
        scores: (variant, ε, seed) → local accuracy.
    """
    seeds, epsilons = document["seeds"], document["epsilons"]
    first = document["variants"][0]["name"]
    head = [f"ε = {'∞' if math.isinf(e) else epsilon_text(e)}" for e in epsilons]
    lines = [f"| variant | {' | '.join(f'{h} | difference' for h in head)} |", "|---|" + "---|" * (2 * len(head))]
    for variant in on(document, base):
        entries = []
        for epsilon in epsilons:
            own, other = ([scores[name, epsilon, seed] for seed in seeds] for name in (variant["name"], first))
            gap = difference([100 * x for x in own], [100 * x for x in other])
            entries += [spread(own), "" if variant["name"] == first else gap]
        lines.append(f"| {variant['name']} | {' | '.join(entries)} |")
    return "\n".join(lines)


def difference(own: Sequence[float], other: Sequence[float]) -> str:
    """Mean paired difference and its 95 % interval (Student's t over seeds); bold where that leaves out zero."""
    gaps = [a - b for a, b in zip(own, other, strict=True)]
    mean = statistics.mean(gaps)
    if len(gaps) < 2:
        return f"{mean:+.1f}"
    half = scipy.stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text


def report(
    document: Mapping[str, Any], name: str, cells: Sequence[Cell], summaries: Sequence[Mapping[str, Any]]
) -> str:
    """The page: one table per base."""
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
                scores[cell.variant, cell.epsilon, cell.seed] = summary["accuracy"]["final"]["local"]
                if cell.variant == document["variants"][0]["name"]:
                    zero_shot.append(100 * summary["accuracy"]["zero_shot"]["local"])
        keys = " ".join(f"`{key}={value}`" for key, value in settings.get("keys", {}).items())
        config = settings["config"]
        parts.append(
            f"\n## {settings['title']}\n\n[{config}](../simulations/configs/{config}) with {keys}; un-tuned model "
            f"{statistics.mean(zero_shot):.1f}.\n\n{table(document, base, scores)}"
        )
    return "\n".join(parts) + "\n"


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def main() -> None:
    """Check everything, run it, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ablation", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, help="the first so many seeds only")
    parser.add_argument("--base", help="this base only")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dualpriv-table.md")
    args = parser.parse_args()
    document = tomllib.loads(args.ablation.read_text(encoding="utf-8"))
    if args.seeds:
        document["seeds"] = document["seeds"][: args.seeds]
    cells = [cell for cell in cells_of(document) if args.base in (None, cell.base)]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which import torch anew
    with ProcessPoolExecutor(args.workers, get_context("spawn"), initializer=_one_thread) as pool:
        futures = {cell.folder: pool.submit(run, cell, args.runs) for cell in sorted(cells, key=shared)}
        summaries = []
        for number, cell in enumerate(cells, start=1):
            summaries.append(futures[cell.folder].result())
            local = summaries[-1]["accuracy"]["final"]["local"]
            sys.stderr.write(
                f"{number}/{len(cells)} {cell.base} ε {cell.epsilon:g} seed {cell.seed} {cell.variant}: {local:.3f}\n"
            )
    text = report(document, args.ablation.name, cells, summaries)
    write_bytes(args.out, text.encode())
    sys.stdout.write(text)


if __name__ == "__main__":
    main()

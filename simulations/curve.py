"""The curve that shows where federating pays: DP-FPL against local training and against sharing only.

``python -m simulations.curve draw docs/results/curve.json --out docs/results/curve`` draws the paired gains of a sweep
over images per client, one panel for each ε, as PNG, SVG and PDF, and prints from and up to how many images federating
pays. ``python -m simulations.curve check simulations/sweeps/curve.toml docs/results/curve.json`` runs cells again that
a seed draws, and compares them with the file.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_dualpriv.cli.console import spell_out_what_cannot_be_shown
from fl_dualpriv.cli.sweeping import open_sweep
from fl_dualpriv.run.cpus import usable_cpus
from fl_dualpriv.sweep.cells import cells_of
from fl_dualpriv.sweep.document import value_text
from fl_dualpriv.sweep.schedule import Resources, run_cells

FIRST = "DP-FPL"
TOLERANCE = 0.5
"""Points by which a repeated cell may differ: another processor's matrix kernels move a few answers of 3,360."""
_FORMATS = ("png", "svg", "pdf")
_MARKS = {"local training only": "o", "sharing only": "s"}


def images_of(line: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of clients and of images of each, from the folder of a line's data.

    Example:
        >>> images_of({"axes": {"data.path": "build/large-shelf/60x240"}})
        (60, 240)
    """
    clients, _, images = str(line["axes"]["data.path"]).rpartition("/")[2].partition("x")
    return int(clients), int(images)


def gains(content: Mapping[str, Any]) -> dict[float, dict[str, list[tuple[int, float, float]]]]:
    """Return ε → rival → (images per client, gain of DP-FPL in points, half width of its 95 % interval), sorted."""
    found: dict[float, dict[str, list[tuple[int, float, float]]]] = {}
    for line in content["lines"]:
        gap = line["gain in local accuracy, points"].get(FIRST)  # of the rival over DP-FPL
        if gap is not None:
            epsilon = float(line["axes"]["privacy.record.epsilon"])
            point = (images_of(line)[1], -gap["mean"], gap["half"] or 0.0)
            found.setdefault(epsilon, {}).setdefault(line["row"], []).append(point)
    return {
        epsilon: {rival: sorted(points) for rival, points in rivals.items()}
        for epsilon, rivals in sorted(found.items())
    }


def sentence(content: Mapping[str, Any], rival: str = "local training only") -> str:
    """Return at which numbers of images per client DP-FPL is above a rival by more than the interval, for each ε."""
    parts = []
    for epsilon, rivals in gains(content).items():
        points = rivals.get(rival, [])
        pays = [images for images, mean, half in points if mean > half]
        all_sizes = [images for images, _, _ in points]
        if pays == all_sizes:
            where = f"at every size from {all_sizes[0]} to {all_sizes[-1]} images"
        else:
            where = f"with {', '.join(map(str, pays))} images" if pays else "at no size"
        parts.append(f"{where} at ε = {value_text(epsilon)}")
    return f"Federating pays over {rival} {'; '.join(parts)}."


def draw(content: Mapping[str, Any], out: Path) -> None:
    """Draw the figure, one panel for each ε, in three formats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = gains(content)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.2), sharey=True, squeeze=False)
    for axis, (epsilon, rivals) in zip(axes[0], panels.items(), strict=True):
        images: Sequence[int] = ()
        for rival, points in rivals.items():
            images, means, halves = zip(*points, strict=True)
            axis.errorbar(images, means, yerr=halves, marker=_MARKS.get(rival, "."), capsize=3, label=f"over {rival}")
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(images, [str(number) for number in images])
        axis.set_title(f"ε = {value_text(epsilon)}, record level")
        axis.set_xlabel("images per client")
    axes[0][0].set_ylabel(f"local accuracy, gain of {FIRST} [points]")
    axes[0][0].legend(fontsize=7)
    seeds = len(content["seeds"])
    note = f"paired means over {seeds} seeds with 95 % intervals. {content.get('note', '')}"
    figure.text(0.5, 0.005, note, ha="center", fontsize=6, wrap=True)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    for kind in _FORMATS:
        # Without a date, so that the same numbers give the same file.
        date = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
        figure.savefig(out.with_suffix(f".{kind}"), dpi=150, metadata=date)
    pyplot.close(figure)


def check(file: Path, content: Mapping[str, Any], count: int, seed: int) -> list[str]:
    """Run cells again that a seed draws, and return the ones that differ by more than the tolerance."""
    opened = open_sweep(file, None, None)
    cells = cells_of(opened.document, opened.settle)
    drawn = random.Random(seed).sample(cells, count)
    expected = {
        (line["row"], tuple(line["axes"].values()), number): value
        for line in content["lines"]
        for number, value in zip(line["seeds"], line["accuracy, percent"]["local"]["values"], strict=True)
    }
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        ended = run_cells(drawn, Path(folder), opened.app_dir, Resources(workers=usable_cpus()), lambda *_: None)
        problems += [f"{one.cell.label}: {one.error}" for one in ended if one.error]
        for cell in drawn:
            if (summary := cell.summary(Path(folder))) is None:
                continue
            point = tuple("inf" if value == math.inf else value for _, value in cell.point)
            now, then = 100 * summary["accuracy"]["final"]["local"], expected[cell.row.name, point, cell.seed]
            line = f"{cell.label}: {now:.2f} now, {then:.2f} in the file"
            print(line)
            if abs(now - then) > TOLERANCE:
                problems.append(line)
    return problems


def main(words: Sequence[str] | None = None) -> None:
    """Draw the figure, or check cells."""
    spell_out_what_cannot_be_shown()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("json", type=Path)
    drawing.add_argument("--out", type=Path, required=True, help="path without suffix")
    checking = commands.add_parser("check")
    checking.add_argument("sweep", type=Path)
    checking.add_argument("json", type=Path)
    checking.add_argument("--cells", type=int, default=3)
    checking.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    content = json.loads(args.json.read_text(encoding="utf-8"))
    if args.command == "draw":
        draw(content, args.out)
        print(sentence(content))
    elif problems := check(args.sweep, content, args.cells, args.seed):
        sys.exit("\n  ".join(["cells do not repeat:", *problems]))


if __name__ == "__main__":
    main()

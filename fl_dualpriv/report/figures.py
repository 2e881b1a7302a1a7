"""Figures for a paper: accuracy and ε by round, as PDF and SVG."""

from collections.abc import Sequence
from pathlib import Path

from fl_dualpriv.report.runs import Group

FORMATS = ("pdf", "svg")


def write_figures(folder: Path, groups: Sequence[Group]) -> list[Path]:
    """Write ``accuracy`` and, if an ε was spent, ``epsilon`` in each format, and return the files.

    Each figure is 3.3 inches wide, a column of most papers. A line is the mean over the seeds of a setting.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, label, read in (
        ("accuracy", "local accuracy [%]", lambda line: line["accuracy"] and 100 * line["accuracy"]["local"]),
        ("epsilon", "ε spent", lambda line: line["epsilon"]["record_level"] or line["epsilon"]["client_level"]),
    ):
        figure, axis = pyplot.subplots(figsize=(3.3, 2.4))
        any_line = False
        for group in groups:
            by_round: dict[int, list[float]] = {}
            for run in group.runs:
                for line in run.rounds:
                    if (value := read(line)) is not None:
                        by_round.setdefault(line["round"], []).append(value)
            points = [(number, sum(values) / len(values)) for number, values in sorted(by_round.items())]
            if points:
                any_line = True
                axis.plot(*zip(*points, strict=True), marker=".", label=group.label)
        axis.set_xlabel("round")
        axis.set_ylabel(label)
        if len(groups) > 1:
            axis.legend(fontsize=6)
        figure.tight_layout()
        if any_line:
            for kind in FORMATS:
                file = folder / f"{name}.{kind}"
                date = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
                figure.savefig(file, metadata=date)
                written.append(file)
        pyplot.close(figure)
    return written

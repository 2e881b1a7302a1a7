"""The table of a sweep: means with 95 % intervals over seeds, paired differences, and the free rivals' lines."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.run.estimates import Estimate, paired
from fl_dualpriv.run.tables import KINDS, epsilon_text
from fl_dualpriv.sweep.cells import Cell
from fl_dualpriv.sweep.document import Document, Point, Row, axis_name, value_text
from fl_dualpriv.sweep.tuning import Choices

_HEADS = {"harmonic_mean": "harmonic mean", "new_client": "new client"}
_LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "^": r"\^{}", "~": r"\~{}"}
    | {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "ε": r"$\varepsilon$", "δ": r"$\delta$"}
    | {"∞": r"$\infty$", "−": "$-$"}
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table.

    Attributes:
        name: Name of the row, the un-tuned model or the free rival.
        point: Values of the axes.
        epsilon: Proved ε with unit and δ; ``0`` for lines without training; ``-`` without a proof.
        seeds: Seeds of the finished runs.
        scores: Kind of accuracy → estimate; None if a run does not have it.
        gains: Name of a rival → paired difference of the local accuracy in points.
        published: Number that others have published.
        note: Text behind the name.
    """

    name: str
    point: Point
    epsilon: str
    seeds: tuple[int, ...]
    scores: Mapping[str, Estimate | None]
    gains: Mapping[str, Estimate]
    published: str = ""
    note: str = ""


Summaries = Mapping[int, Mapping[str, Any]]
"""Seed → summary of a finished run."""


def finished(cells: Sequence[Cell], runs: Path) -> dict[tuple[str, Point], dict[int, dict[str, Any]]]:
    """Return (row, point) → seed → summary of all finished cells.

    Raises:
        ConfigError: If calls of clients failed in a run.
    """
    found: dict[tuple[str, Point], dict[int, dict[str, Any]]] = {}
    for cell in cells:
        if (summary := cell.summary(runs)) is not None:
            found.setdefault((cell.row.name, cell.point), {})[cell.seed] = summary
    return found


def scores_of(summaries: Summaries, when: str) -> dict[str, Estimate | None]:
    """Return the estimates of all kinds of accuracy in percent; None for a kind that a run does not have."""
    scores: dict[str, Estimate | None] = {}
    for kind in KINDS:
        values = [summaries[seed]["accuracy"][when].get(kind) for seed in sorted(summaries)]
        present = [100 * value for value in values if value is not None]
        scores[kind] = Estimate.of(present) if len(present) == len(values) and present else None
    return scores


def _local(summaries: Summaries, when: str = "final") -> dict[int, float]:
    return {seed: summary["accuracy"][when]["local"] for seed, summary in summaries.items()}


def level(summary: Mapping[str, Any]) -> str:
    """Return the largest ε of each unit and δ, from the releases whose guarantee is a theorem."""
    largest: dict[tuple[str, float], float] = {}
    for release in summary["privacy"]:
        if release["guarantee"] == "theorem":
            key = release["unit"], release["delta"]
            largest[key] = max(largest.get(key, 0.0), release["epsilon"])
    texts = [f"{epsilon_text(value)} ({unit}, δ = {delta:g})" for (unit, delta), value in sorted(largest.items())]
    return ", ".join(texts) or "-"


def lines_of(document: Document, done: Mapping[tuple[str, Point], Summaries]) -> list[Line]:
    """Return the lines: at each point the un-tuned model, the free rival and every row that has a finished run.

    The un-tuned model and the free rival are those of the first row. The gain over the free rival is over a row's own.
    """
    lines: list[Line] = []
    for point in document.points:
        at = [(row, done[row.name, point]) for row in document.rows if done.get((row.name, point))]
        if not at:
            continue
        first, summaries = at[0]
        lines.append(_line("un-tuned", point, summaries, "zero_shot"))
        rival = next(iter(summaries.values()))["accuracy"]["free"].get("rival", "un-tuned")
        if rival != "un-tuned":
            lines.append(_line(f"free rival: {rival}", point, summaries, "free"))
        for row, own in at:
            rivals = {"free rival": _local(own, "free")}
            if row is not first:
                rivals[first.name] = _local(summaries)
            gains = {name: gap for name, scores in rivals.items() if (gap := paired(_local(own), scores)) is not None}
            lines.append(_line(row.name, point, own, "final", gains, row))
    return lines


def _line(
    name: str,
    point: Point,
    summaries: Summaries,
    when: str,
    gains: Mapping[str, Estimate] | None = None,
    row: Row | None = None,
) -> Line:
    published = row.published if row else {}
    values = [value_text(value) for _, value in point]
    texts = [published[key] for key in (", ".join(values), *values, "") if key in published]
    return Line(
        name=name,
        point=point,
        epsilon=level(next(iter(summaries.values()))) if row else "0",
        seeds=tuple(sorted(summaries)),
        scores=scores_of(summaries, when),
        gains=gains or {},
        published=texts[0] if texts else "",
        note=row.note if row else "",
    )


def grid_of(document: Document, lines: Sequence[Line], strong: str = "{}") -> tuple[list[str], list[list[str]]]:
    """Return the heads and the cells of the table as texts.

    Args:
        document: The sweep.
        lines: The lines.
        strong: Form of a difference whose interval leaves out zero, such as ``**{}**``.
    """
    kinds = [kind for kind in KINDS if any(line.scores.get(kind) for line in lines)]
    first = document.rows[0].name
    has_first = any(first in line.gains for line in lines)
    has_published = any(line.published for line in lines)
    heads = [axis_name(key) for key in document.axes] + ["row", "accounted ε", "seeds"]
    heads += [_HEADS.get(kind, kind) for kind in kinds] + ["gain over the free rival"]
    heads += [f"difference to {first}"] * has_first + ["published"] * has_published
    body = []
    for line in lines:
        texts = [value_text(value) for _, value in line.point]
        texts += [f"{line.name}{f' ({line.note})' if line.note else ''}", line.epsilon, str(len(line.seeds))]
        texts += ["-" if (score := line.scores[kind]) is None else score.text() for kind in kinds]
        for rival in ["free rival", *([first] if has_first else [])]:
            gap = line.gains.get(rival)
            texts.append("" if gap is None else (strong if gap.is_clear else "{}").format(gap.text(sign=True)))
        body.append(texts + [line.published] * has_published)
    return heads, body


def markdown(document: Document, lines: Sequence[Line]) -> str:
    """Return the table as Markdown. A difference whose interval leaves out zero is bold."""
    heads, body = grid_of(document, lines, "**{}**")
    rows = [[" ".join(text.split()).replace("|", "\\|") for text in texts] for texts in [heads, *body]]
    rows.insert(1, ["---"] * len(heads))
    return "\n".join("| " + " | ".join(texts) + " |" for texts in rows)


def latex(document: Document, lines: Sequence[Line]) -> str:
    """Return the table as LaTeX for the package booktabs.

    Raises:
        ConfigError: If the data are made. Such numbers must not stand in a paper.
    """
    if document.made_data:
        raise ConfigError(f"{document.file}: its data are made, not comparable: there is no LaTeX table of them")
    heads, body = grid_of(document, lines)
    texts = [" & ".join(text.translate(_LATEX) for text in row) + r" \\" for row in [heads, *body]]
    inside = "\n".join([r"\toprule", texts[0], r"\midrule", *texts[1:], r"\bottomrule"])
    return f"\\begin{{tabular}}{{{'l' * len(heads)}}}\n{inside}\n\\end{{tabular}}"


def comma_separated(document: Document, lines: Sequence[Line]) -> str:
    """Return the table as CSV: one line per line of the table and kind of accuracy, with every seed's value."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow([*document.axes, "row", "epsilon", "kind", "mean", "half_width", "seeds", "values"])
    for line in lines:
        for kind, score in line.scores.items():
            if score is not None:
                values = " ".join(f"{value:.2f}" for value in score.values)
                start = [value_text(value) for _, value in line.point]
                half = "" if score.half is None else f"{score.half:.2f}"
                write.writerow(
                    [*start, line.name, line.epsilon, kind, f"{score.mean:.2f}", half, len(line.seeds), values]
                )
    return out.getvalue().rstrip("\n")


def content_of(document: Document, lines: Sequence[Line], choices: Choices, missing: int) -> dict[str, Any]:
    """Return the table for a JSON file, with every seed's values and the chosen values of tuned rows."""
    return {
        "title": document.title,
        "note": document.note,
        "made data, not comparable": document.made_data,
        "seeds": list(document.seeds),
        "missing runs": missing,
        "lines": [
            {
                "row": line.name,
                "axes": {key: "inf" if value == math.inf else value for key, value in line.point},
                "epsilon": line.epsilon,
                "seeds": list(line.seeds),
                "accuracy, percent": {k: None if s is None else s.content() for k, s in line.scores.items()},
                "gain in local accuracy, points": {name: gap.content() for name, gap in line.gains.items()},
            }
            | ({"published": line.published} if line.published else {})
            for line in lines
        ],
        "tuning": [
            {"row": name, "axes": {key: "inf" if value == math.inf else value for key, value in point}}
            | choice.content()
            for (name, point), choice in choices.items()
        ],
    }


def page(document: Document, lines: Sequence[Line], missing: int, command: str) -> str:
    """Return the Markdown page: heading, what the numbers are, and the table."""
    warning = "**Made data, not comparable.** " if document.made_data else ""
    unfinished = f"\n\n**Not finished: {missing} runs are missing.**" if missing else ""
    note = f"\n\n{document.note.strip()}" if document.note else ""
    return (
        f"# {document.title}\n\n{warning}Written by `{command}`. Percent of held-out records, mean ± half width of the "
        f"95 % interval over seeds. Differences are paired by seed; bold where the interval leaves out zero."
        f"{note}{unfinished}\n\n{markdown(document, lines)}\n"
    )

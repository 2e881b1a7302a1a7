"""The tables that a run prints for its operator, built from its ``summary.json``. Imports only rich."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

KINDS = ("local", "neighbour", "harmonic_mean", "general", "new_client")
"""Kinds of accuracy, in the order of every table."""
SEEDED_NOTE = "reproducible noise: do not publish"
_MISSING = "-"
_UN_TUNED = "un-tuned"


def percent(fraction: float | None) -> str:
    """Format a fraction in [0, 1] as a percentage with one decimal; ``-`` for None."""
    return _MISSING if fraction is None else f"{100 * fraction:.1f} %"


def epsilon_text(epsilon: float | None) -> str:
    """Round ε *up* to three decimals, so that the printed value is never below the true one; ``-`` for None."""
    if epsilon is None:
        return _MISSING
    # The tolerance is for a target such as 4.0, which bisection may reach from above to nine digits.
    if math.isinf(epsilon):
        return "∞"
    return f"{math.ceil(epsilon * 1000 - 1e-6) / 1000:.3f}".rstrip("0").rstrip(".")


def headline(summary: Mapping[str, Any], totals: Mapping[str, Any]) -> str:
    """Describe the run in one line for its operator; mark noise that every reader of the seed can reproduce.

    Args:
        summary: Summary of the run.
        totals: Totals of the run from `read_totals`.
    """
    parts = [
        *(summary["method"], f"engine {summary['engine']}", f"seed {summary['seed']}"),
        *(f"{summary['rounds']} rounds", f"{summary['population']} clients", f"{totals['failures']} failed"),
        f"{totals['seconds']:.0f} s",
    ]
    return " · ".join(parts + ([SEEDED_NOTE] if _is_reproducible(summary) else []))


def results_table(summary: Mapping[str, Any]) -> Table:
    """Build the table of accuracy: the un-tuned model, the best rival that costs no ε, and this run.

    ``local``: each client's prompt on its own domain and classes. ``neighbour``: the same prompt on the other clients'
    records. ``general``: the shared prompt without any personal part on the records of ``local``. ``new client``: the
    shared prompt on clients that took part in no round. An accuracy that does not exist is ``-``. The gain is the
    difference to the free rival, because no ε should buy what is free. Each question type or domain has one line,
    before → after, over the clients that hold it.
    """
    table = Table(caption=SEEDED_NOTE if _is_reproducible(summary) else None, box=box.SIMPLE_HEAD)
    table.add_column("accuracy")
    for kind in KINDS:
        table.add_column(kind.replace("_", " "), justify="right")
    before, free, after = (summary["accuracy"][name] for name in ("zero_shot", "free", "final"))
    rival = f"equals {_UN_TUNED}" if free["rival"] == _UN_TUNED else free["rival"]
    rows = ((_UN_TUNED, before), (f"free rival: {escape(rival)}", free), ("this run", after))
    for name, entry in rows:
        table.add_row(name, *(percent(entry[kind]) for kind in KINDS))
    table.add_row("gain on the free rival, points", *(points(free[kind], after[kind]) for kind in KINDS))
    for name, *pair in zip(*_lines(summary, before, after), strict=True):
        row = f"  {escape(name) or 'all'}", " → ".join(percent(value) for value in pair)
        table.add_row(*row, *([_MISSING] * (len(KINDS) - 1)))
    return table


def _lines(
    summary: Mapping[str, Any], *entries: Mapping[str, Any]
) -> tuple[Sequence[str], Sequence[float | None], Sequence[float | None]]:
    """Return the names of the lines below the totals, and their accuracies: domains, or the groups without domains."""
    names, domains = summary.get("groups", []), summary.get("domains", [])
    before, after = (entry["by_group"] if names else [] for entry in entries)
    if not domains:
        return names, before, after
    size = len(names) // len(domains)
    starts = range(0, len(names), size)
    before, after = ([_mean(values[i : i + size]) for i in starts] for values in (before, after))
    return domains, before, after


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _is_reproducible(summary: Mapping[str, Any]) -> bool:
    """Return True if the run has noise from a seed and states an ε for it in the table of releases."""
    return summary["randomness"] == "seeded" and bool(summary["privacy"])


def points(before: float | None, after: float | None) -> str:
    """Format the difference of two fractions in points, with its sign; ``-`` if one of them is None."""
    return _MISSING if before is None or after is None else f"{100 * (after - before):+.1f}"


def privacy_table(releases: Sequence[Mapping[str, Any]]) -> Table:
    """Build the table of releases and of their guarantees.

    Args:
        releases: Entries of ``summary["privacy"]``.

    Returns:
        A table with one row per release. A nominal ε is no guarantee and never stands in the ε column.
    """
    table = Table(title="privacy", box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for name in ("release", "unit", "relation", "sampling", "releases", "ε", "δ", "trusts", "guarantee"):
        # fold: on a narrow terminal words break, but no word is left out
        table.add_column(name, justify="right" if name in ("releases", "ε", "δ") else "left", overflow="fold")
    notes = []
    for entry in releases:
        nominal = entry["guarantee"] != "theorem"
        epsilon = epsilon_text(entry["epsilon"])
        delta = _MISSING if entry["delta"] is None else f"{entry['delta']:.3g}"
        table.add_row(
            *(_text(entry[key]) for key in ("release", "unit", "relation", "sampling", "releases")),
            *((_MISSING, _MISSING) if nominal else (epsilon, delta)),
            _text(entry["trusts"]),
            f"{entry['guarantee']} {epsilon}" if nominal else entry["guarantee"],
        )
        if entry.get("note"):
            notes.append(f"{entry['release']}: {entry['note']}")
    table.caption = "\n".join(notes) or None
    return table


def _text(value: object) -> str:
    if value is None or value == "":
        return _MISSING
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

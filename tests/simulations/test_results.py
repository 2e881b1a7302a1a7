"""The numbers of the README are those of the checked-in results, which a sweep file and its table made."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTENT: dict[str, Any] = json.loads((ROOT / "docs" / "results" / "shelf.json").read_text(encoding="utf-8"))
KINDS = ("local", "neighbour", "general")


def line(row: str, epsilon: float) -> dict[str, Any]:
    (found,) = (
        entry
        for entry in CONTENT["lines"]
        if entry["row"].split(":")[0] == row and entry["axes"]["privacy.record.epsilon"] == epsilon
    )
    return found


def text(score: dict[str, Any] | None) -> str:
    return "-" if score is None else f"{score['mean']:.1f} ± {score['half']:.1f}"


def test_the_results_have_five_seeds_a_commit_and_their_commands() -> None:
    assert CONTENT["seeds"] == [0, 1, 2, 3, 4]
    assert all(entry["seeds"] == CONTENT["seeds"] for entry in CONTENT["lines"])
    assert re.fullmatch("[0-9a-f]{40}", CONTENT["commit"])
    assert "fl-dualpriv sweep simulations/sweeps/shelf.toml" in CONTENT["command"]


def test_the_readmes_table_has_the_numbers_of_the_checked_in_results() -> None:
    lines = [row for row in README.splitlines() if row.startswith("| shelf: ")]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in lines]
    assert len(rows) == 6
    for name, *cells in rows:
        row = name.removeprefix("shelf: ").split(" (")[0]
        for epsilon, cell in zip((4, 1), cells, strict=True):
            scores = line(row, epsilon)["accuracy, percent"]
            assert cell == " / ".join(text(scores[kind]) for kind in KINDS), (row, epsilon)


def test_the_readmes_gains_are_those_of_the_checked_in_results() -> None:
    said = " ".join(README.split())
    for row, words in (
        ("local training only", "on local training only"),
        ("sharing only", "on sharing only"),
        ("picking only", "on picking only"),
        ("free rival", "on the free rival"),
    ):
        gaps = []
        for epsilon in (4, 1):
            if row == "free rival":
                gap, sign = line("DP-FPL", epsilon)["gain in local accuracy, points"]["free rival"], 1
            else:
                gap, sign = line(row, epsilon)["gain in local accuracy, points"]["DP-FPL"], -1
            gaps.append(f"{sign * gap['mean']:.1f} ± {gap['half']:.1f}")
        assert f"{words} {gaps[0]} at ε = 4 and {gaps[1]} at ε = 1" in said, (row, gaps)

"""Paired comparisons: intervals by hand, rows that lack a value, and the checked-in results."""

import json
import re
from pathlib import Path

import pytest

from simulations.paired import compared, paired_difference, summary_of

ROOT = Path(__file__).parents[2]


def summary(local: float, free: float = 0.2, general: float | None = 0.3) -> dict:
    score = {"local": local, "neighbour": 0.1, "harmonic_mean": 0.15, "general": general, "new_client": general}
    other = {**score, "local": free}
    accuracy = {"final": score, "zero_shot": other, "free": {**other, "rival": "un-tuned"}}
    return {"accuracy": accuracy, "privacy": [{"epsilon": 3.9, "guarantee": "theorem"}]}


def test_an_interval_by_hand():
    # Differences 1, 2, 3 points: mean 2, standard deviation 1, t(0.975, 2) = 4.3027, half width 4.3027/√3 = 2.4841.
    found = paired_difference([0.11, 0.22, 0.33], [0.10, 0.20, 0.30])
    assert found == pytest.approx({"mean": 2.0, "low": -0.48, "high": 4.48}, abs=0.011)


def test_a_value_that_one_seed_lacks_is_no_result():
    assert summary_of([0.5, None]) is None
    assert summary_of([0.5, 0.7]) == {"mean": 60.0, "std": pytest.approx(14.14), "values": [50.0, 70.0]}


def test_the_first_row_is_compared_with_all_others_and_with_the_free_rival():
    rows = {"ours": [summary(0.5), summary(0.6)], "rival": [summary(0.4, general=None), summary(0.4)]}
    found = compared(rows)
    assert found["gain in local accuracy, points"].keys() == {"rival", "free rival"}
    assert found["gain in local accuracy, points"]["rival"]["mean"] == 15.0
    assert found["rows"]["rival"]["general"] is None
    assert found["rows"]["ours"]["general"]["mean"] == 30.0
    assert found["rows"]["free rival"]["names"] == ["un-tuned"]
    assert found["rows"]["un-tuned"]["epsilon"] == 0


def test_the_readmes_table_has_the_numbers_of_the_checked_in_results():
    content = json.loads((ROOT / "docs" / "results" / "shelf.json").read_text(encoding="utf-8"))
    assert content["seeds"] == [0, 1, 2, 3, 4]
    assert re.fullmatch("[0-9a-f]{40}", content["commit"])
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| shelf: ")]
    assert 4 <= len(rows) <= 6
    for name, *cells in rows:
        for group, cell in zip(("ε = 4", "ε = 1"), cells, strict=True):
            scores = content["groups"][group]["rows"][name.removeprefix("shelf: ").split(" (")[0]]
            parts = [scores[kind] for kind in ("local", "neighbour", "general")]
            assert cell == " / ".join("-" if p is None else f"{p['mean']:.1f} ± {p['std']:.1f}" for p in parts)

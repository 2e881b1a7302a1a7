"""The curve: gains and its sentence by hand, the figure in three formats, and cells that are run again."""

import json
from pathlib import Path
from typing import Any

import pytest

from simulations import curve


def line(row: str, images: int, epsilon: object, gap: float | None, half: float = 1.0) -> dict[str, Any]:
    gains = {} if gap is None else {"DP-FPL": {"mean": -gap, "half": half, "values": [-gap]}}
    axes = {"privacy.record.epsilon": epsilon, "data.path": f"build/large-shelf/60x{images}"}
    return {"row": row, "axes": axes, "gain in local accuracy, points": gains}


CONTENT: dict[str, Any] = {
    "seeds": [0, 1, 2],
    "lines": [
        line("DP-FPL", 30, 1.0, None),
        line("local training only", 60, 1.0, 0.5),
        line("local training only", 30, 1.0, 3.0),
        line("sharing only", 30, 1.0, 5.0),
        line("sharing only", 60, 1.0, 6.0),
        line("local training only", 30, "inf", 2.0),
        line("local training only", 60, "inf", 2.0),
        line("local training only", 30, 4.0, -2.0),
        line("local training only", 60, 4.0, 0.0),
    ],
}


def test_gains_are_those_of_the_first_row_sorted_by_images() -> None:
    found = curve.gains(CONTENT)
    assert list(found) == [1.0, 4.0, float("inf")]
    assert found[1.0]["local training only"] == [(30, 3.0, 1.0), (60, 0.5, 1.0)]


def test_the_sentence_says_where_it_pays() -> None:
    assert curve.sentence(CONTENT) == (
        "Federating pays over local training only with 30 images at ε = 1; at no size at ε = 4; "
        "at every size from 30 to 60 images at ε = ∞."
    )


def test_the_figure_has_three_formats_that_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "curve.json"
    file.write_text(json.dumps(CONTENT))
    for folder in ("a", "b"):
        curve.main(["draw", str(file), "--out", str(tmp_path / folder / "curve")])
    assert "Federating pays" in capsys.readouterr().out
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        first, second = ((tmp_path / folder / f"curve.{kind}").read_bytes() for folder in ("a", "b"))
        assert first.startswith(magic)
        if kind != "svg":  # its ids are random
            assert first == second


def test_the_checked_in_curve_is_that_of_its_sweep_file() -> None:
    root = Path(__file__).parents[2]
    file = root / "docs" / "results" / "curve.json"
    if not file.exists():
        pytest.skip("the curve was not made yet")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["seeds"] == [0, 1, 2]
    rows = {entry["row"] for entry in content["lines"]}
    assert {"DP-FPL", "local training only", "sharing only"} <= rows
    assert all(len(entry["seeds"]) == 3 for entry in content["lines"])

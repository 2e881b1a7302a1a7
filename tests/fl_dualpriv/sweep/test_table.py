"""The table: intervals by hand, paired differences, the free rivals' lines, and its forms."""

import csv
import io
from pathlib import Path

import pytest

from fl_dualpriv.cli.sweeping import OpenSweep, cells_to_run
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.run.estimates import Estimate, paired
from fl_dualpriv.sweep.table import Line, comma_separated, finished, latex, lines_of, markdown, page
from tests.fl_dualpriv.sweep.sweep_files import opened, pretend, summary

TEXT = """
title = "Rivals"
base = "by-class.toml"
seeds = [0, 1]
[axes]
"privacy.record.epsilon" = [4.0]
[[rows]]
name = "ours"
[[rows]]
name = "rival_b"
method = "promptfl"
note = "Some 2020"
published = { "4" = "81.2" }
"""


def with_runs(
    folder: Path, text: str = TEXT, scores: tuple[float, ...] = (0.5, 0.6, 0.4, 0.4)
) -> tuple[OpenSweep, list[Line]]:
    sweep = opened(folder, text)
    for cell, local in zip(cells_to_run(sweep, []), scores, strict=False):
        pretend(cell, sweep.runs, summary(local, general=None if cell.row.name == "rival_b" else 0.3))
    return sweep, lines_of(sweep.document, finished(cells_to_run(sweep, []), sweep.runs))


def test_an_interval_by_hand() -> None:
    # 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.3027, half width 4.3027/√3 = 2.4841.
    found = Estimate.of([1.0, 2.0, 3.0])
    assert (found.mean, found.half) == (2.0, pytest.approx(2.4841, abs=1e-4))
    assert Estimate.of([1.0]).half is None


def test_differences_are_of_the_same_seeds() -> None:
    gap = paired({0: 0.5, 1: 0.6, 2: 0.9}, {1: 0.4, 0: 0.4, 3: 0.0})
    assert gap is not None
    assert gap.values == pytest.approx((10.0, 20.0))
    assert paired({0: 0.5}, {1: 0.5}) is None


def test_lines_have_the_rivals_first_and_gains_over_both(tmp_path: Path) -> None:
    _, lines = with_runs(tmp_path)
    assert [line.name for line in lines] == ["un-tuned", "free rival: a {}", "ours", "rival_b"]
    untuned, free, ours, rival = lines
    assert [line.epsilon for line in lines] == ["0", "0", *2 * ["3.9 (record, δ = 0.0001)"]]
    for line, mean in ((untuned, 10.0), (free, 20.0), (ours, 55.0), (rival, 40.0)):
        score = line.scores["local"]
        assert score is not None
        assert score.mean == pytest.approx(mean)
    assert ours.gains.keys() == {"free rival"}
    assert rival.gains.keys() == {"free rival", "ours"}
    assert rival.gains["ours"].mean == pytest.approx(-15.0)
    assert ours.gains["free rival"].mean == pytest.approx(35.0)
    assert rival.scores["general"] is None  # a run without it has no mean
    assert rival.published == "81.2"


def test_markdown_marks_what_leaves_out_zero(tmp_path: Path) -> None:
    sweep, lines = with_runs(tmp_path)
    rows = [
        [text.strip() for text in line.strip("|").split("|")] for line in markdown(sweep.document, lines).splitlines()
    ]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert table[2]["local"] == "55.0 ± 63.5"  # t(0.975, 1) = 12.706 times 5
    assert table[2]["gain over the free rival"] == "+35.0 ± 63.5"
    assert table[3]["gain over the free rival"] == "**+20.0 ± 0.0**"
    assert table[3]["row"] == "rival_b (Some 2020)"
    assert table[3]["published"] == "81.2"
    assert {row["ε"] for row in table} == {"4"}


def test_a_page_says_what_is_missing_and_made(tmp_path: Path) -> None:
    sweep, lines = with_runs(tmp_path, scores=(0.5, 0.6, 0.4))
    assert "3 runs are missing" in page(sweep.document, lines, 3, "x")
    assert "missing" not in page(sweep.document, lines, 0, "x")
    assert "Made data" not in page(sweep.document, lines, 0, "x")


def test_made_data_are_marked_and_have_no_latex(tmp_path: Path) -> None:
    sweep, lines = with_runs(tmp_path, "made-data = true\n" + TEXT)
    assert "**Made data, not comparable.**" in page(sweep.document, lines, 0, "x")
    with pytest.raises(ConfigError, match="there is no LaTeX table"):
        latex(sweep.document, lines)


def test_latex_escapes_and_has_one_line_a_row(tmp_path: Path) -> None:
    sweep, lines = with_runs(tmp_path)
    text = latex(sweep.document, lines)
    assert r"rival\_b (Some 2020)" in text
    assert text.count(r"\\") == 1 + len(lines)
    assert r"$\pm$" in text
    assert "ε" not in text


def test_csv_has_every_seed(tmp_path: Path) -> None:
    sweep, lines = with_runs(tmp_path)
    rows = list(csv.DictReader(io.StringIO(comma_separated(sweep.document, lines))))
    (ours,) = [row for row in rows if row["row"] == "ours" and row["kind"] == "local"]
    assert (ours["mean"], ours["values"], ours["seeds"]) == ("55.00", "50.00 60.00", "2")


def test_a_run_with_failures_is_no_result(tmp_path: Path) -> None:
    sweep = opened(tmp_path, TEXT)
    cell = cells_to_run(sweep, [])[0]
    pretend(cell, sweep.runs, summary(0.5), failures=1)
    with pytest.raises(ConfigError, match="1 calls of clients failed"):
        finished([cell], sweep.runs)


def test_a_row_without_runs_has_no_line(tmp_path: Path) -> None:
    _, lines = with_runs(tmp_path, scores=(0.5, 0.6))
    assert [line.name for line in lines] == ["un-tuned", "free rival: a {}", "ours"]


def test_values_stand_in_the_order_of_their_seeds(tmp_path: Path) -> None:
    sweep, lines = with_runs(tmp_path, TEXT.replace("seeds = [0, 1]", "seeds = [3, 0]"), (0.33, 0.30, 0.4, 0.4))
    ours = next(line for line in lines if line.name == "ours")
    score = ours.scores["local"]
    assert score is not None
    assert (ours.seeds, score.values) == ((0, 3), (30.0, 33.0))
    assert ours.gains["free rival"].values == pytest.approx((10.0, 13.0))
    assert sweep.document.seeds == (3, 0)


def test_bold_is_of_differences_and_not_of_texts_that_look_like_them(tmp_path: Path) -> None:
    text = TEXT.replace('"81.2"', '"-0.5 ± 0.3"').replace('name = "rival_b"', 'name = "+ a | ± noise"')
    sweep, lines = with_runs(tmp_path, text)
    shown = markdown(sweep.document, lines)
    assert "| -0.5 ± 0.3 |" in shown
    assert "+ a \\| ± noise" in shown
    assert r"\textbackslash" not in latex(sweep.document, lines)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"accuracy": {"final": {"local": 1}}}'])
def test_a_broken_summary_names_its_folder(tmp_path: Path, content: str) -> None:
    sweep = opened(tmp_path, TEXT)
    cell = cells_to_run(sweep, [])[0]
    pretend(cell, sweep.runs, summary(0.5))
    (sweep.runs / cell.folder / "summary.json").write_text(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        finished([cell], sweep.runs)

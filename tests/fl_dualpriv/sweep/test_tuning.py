"""Tuning: every row has the same number of trials, on validation data, with seeds that the table does not use."""

from pathlib import Path

import numpy as np
import pytest

from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_json
from fl_dualpriv.privacy.accounting import COARSE_GRID
from fl_dualpriv.privacy.accounting import epsilon as epsilon_of
from fl_dualpriv.sweep.cells import FAILED, cells_of
from fl_dualpriv.sweep.tuning import Entry, charge_of, choose, draw, entries_of, finals_of
from tests.fl_dualpriv.sweep.sweep_files import opened, pretend, summary

TEXT = """
base = "by-class.toml"
seeds = [0, 1]
[axes]
"privacy.record.epsilon" = [4.0, inf]
[[rows]]
name = "ours"
tunes = ["train.global-learning-rate", "privacy.record.clip-norm"]
[[rows]]
name = "local only"
method = "local-only"
tunes = ["train.local-learning-rate"]
[[rows]]
name = "nothing to tune"
[[when]]
axes = { "privacy.record.epsilon" = inf }
grids = { "privacy.record.clip-norm" = [] }
[tune]
trials = 4
finalists = 2
seeds = [7, 8, 9]
[tune.grids]
"train.global-learning-rate" = [0.1, 0.2, 0.3, 0.4]
"train.local-learning-rate" = [0.1, 0.2, 0.3, 0.4]
"privacy.record.clip-norm" = [0.5, 1.0]
"""


def entries(folder: Path, text: str = TEXT) -> list[Entry]:
    sweep = opened(folder, text)
    return entries_of(sweep.document, sweep.settle)


def test_points_are_distinct_and_use_every_value_evenly() -> None:
    points = draw({"a": [1, 2, 3, 4], "b": ["x", "y", "z"]}, 8, np.random.default_rng(0))
    assert len(set(points)) == 8
    assert sorted(dict(p)["a"] for p in points) == [1, 1, 2, 2, 3, 3, 4, 4]
    # 8 points over three values: 3, 3 and 2 times.
    assert sorted([dict(p)["b"] for p in points].count(v) for v in "xyz") == [2, 3, 3]


def test_every_row_has_as_many_trials_as_any_other_and_none_sees_test_data(tmp_path: Path) -> None:
    found = entries(tmp_path)
    assert [(e.row.name, len(e.trials)) for e in found] == 2 * [("ours", 4), ("local only", 4)]
    for entry in found:
        assert len({cell.folder for cell in entry.trials}) == 4
        for cell in entry.trials:
            assert (cell.seed, cell.settings["evaluation.split"]) == (7, "val")
            assert dict(cell.tuned).items() <= cell.settings.items()
    # Without noise there is no clip norm to tune.
    assert [len(e.trials[0].tuned) for e in found] == [2, 1, 1, 1]


def test_a_row_more_leaves_the_trials_of_the_others_alone(tmp_path: Path) -> None:
    more = TEXT.replace(
        "[tune]", '[[rows]]\nname = "full"\nmethod = "full"\ntunes = ["train.local-learning-rate"]\n[tune]'
    )
    folders = [{c.folder for e in entries(tmp_path, text) for c in e.trials} for text in (TEXT, more)]
    assert folders[0] < folders[1]


def test_the_best_trials_run_with_the_other_seeds_and_the_best_mean_is_chosen(tmp_path: Path) -> None:
    sweep = opened(tmp_path, TEXT)
    entry = entries_of(sweep.document, sweep.settle)[0]
    for cell, local in zip(entry.trials, (0.2, None, 0.5, 0.4), strict=True):
        if local is None:
            write_json(sweep.runs / cell.folder / FAILED, {"message": "not finite"})
        else:
            pretend(cell, sweep.runs, summary(local))
    finals = finals_of(sweep.document, sweep.settle, entry, sweep.runs)
    assert [(c.tuned, c.seed, c.settings["evaluation.split"]) for c in finals] == [
        (entry.trials[i].tuned, seed, "val") for i in (2, 3) for seed in (8, 9)
    ]
    # 0.5 is the luckiest seed, and the mean of the other is higher.
    for cell, local in zip(finals, (0.1, 0.1, 0.4, 0.4), strict=True):
        pretend(cell, sweep.runs, summary(local))
    choice = choose(entry, finals, sweep.runs)
    assert choice.tuned == entry.trials[3].tuned
    assert choice.validation == pytest.approx(0.4)
    assert (len(choice.cells), choice.failed) == (8, 1)
    cells = cells_of(sweep.document, sweep.settle, {entry.key: choice.tuned})
    own = [c for c in cells if (c.row.name, c.point) == entry.key]
    assert [c.seed for c in own] == [0, 1]
    assert all(dict(choice.tuned).items() <= c.settings.items() for c in own)
    assert all(c.settings["evaluation.split"] == "test" for c in own)


def test_a_finalist_that_failed_with_one_seed_is_never_chosen(tmp_path: Path) -> None:
    sweep = opened(tmp_path, TEXT)
    entry = entries_of(sweep.document, sweep.settle)[0]
    for cell, local in zip(entry.trials, (0.2, 0.3, 0.5, 0.4), strict=True):
        pretend(cell, sweep.runs, summary(local))
    finals = finals_of(sweep.document, sweep.settle, entry, sweep.runs)
    write_json(sweep.runs / finals[0].folder / FAILED, {"message": "not finite"})
    for cell in finals[1:]:
        pretend(cell, sweep.runs, summary(0.1))
    assert choose(entry, finals, sweep.runs).tuned == entry.trials[3].tuned
    write_json(sweep.runs / finals[2].folder / FAILED, {"message": "not finite"})
    with pytest.raises(ConfigError, match="every finalist failed"):
        choose(entry, finals, sweep.runs)


def test_no_choice_if_all_trials_failed(tmp_path: Path) -> None:
    sweep = opened(tmp_path, TEXT)
    entry = entries_of(sweep.document, sweep.settle)[0]
    for cell in entry.trials:
        write_json(sweep.runs / cell.folder / FAILED, {"message": "not finite"})
    with pytest.raises(ConfigError, match="every trial failed"):
        finals_of(sweep.document, sweep.settle, entry, sweep.runs)


def test_the_charge_is_that_of_every_plan_at_its_share_of_delta(tmp_path: Path) -> None:
    with_noise, _, without, _ = entries(tmp_path)
    cells = with_noise.trials[:3]
    plan = record_level_plan(RunConfig.from_run_config(cells[0].settings))
    assert plan is not None
    each = epsilon_of(plan.sampling_rate, plan.noise_multiplier, plan.releases, plan.delta / 3, COARSE_GRID)
    assert charge_of([cell.settings for cell in cells]) == pytest.approx(3 * each)
    assert charge_of([cell.settings for cell in without.trials]) is None

"""Tuning: every method gets the same number of trials, on validation data, and the table is of what was chosen."""

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig, app_defaults, merge, read_toml
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.privacy.accounting import COARSE_GRID
from fl_dualpriv.privacy.accounting import epsilon as epsilon_of
from simulations import baselines, tune
from simulations.cells import FAILED, attempt, run, was_run
from simulations.report import CONFIGS, ROOT

SHIPPED = Path(__file__).parents[2] / "simulations" / "configs" / "baselines" / "search.toml"


Trials = dict[tune.Entry, list[tuple[tune.Point, Any]]]


@pytest.fixture
def document() -> dict[str, Any]:
    return tune.read(SHIPPED)


@pytest.fixture(scope="module")
def trials() -> Trials:
    return tune.trials_of(tune.read(SHIPPED))


def test_points_are_distinct_and_use_every_value_evenly():
    grid = {"a": [1, 2, 3, 4], "b": ["x", "y", "z"]}
    points = tune.draw(grid, 8, np.random.default_rng(0))
    assert len({tuple(p.values()) for p in points}) == 8
    assert sorted(p["a"] for p in points) == [1, 1, 2, 2, 3, 3, 4, 4]
    # 8 points over three values: 3, 3 and 2 times.
    assert sorted([p["b"] for p in points].count(v) for v in "xyz") == [2, 3, 3]


def test_a_smaller_budget_is_refused():
    with pytest.raises(ConfigError, match="8 trials, but only 6 points"):
        tune.draw({"a": [1, 2, 3], "b": [1, 2]}, 8, np.random.default_rng(0))


def test_every_method_has_as_many_trials_as_any_other_and_none_sees_test_data(document: dict[str, Any], trials: Trials):
    names = {method["name"] for method in document["methods"]}
    assert {entry[1] for entry in trials} == names
    assert {e for _, _, e in trials} == {4.0, math.inf}
    assert len(trials) == sum(1 for _ in tune.entries(document))
    for (_, name, epsilon), own in trials.items():
        assert len(own) == len({cell.folder for _, cell in own}) == document["trials"]
        for point, cell in own:
            assert cell.name == name
            assert cell.settings["evaluation.split"] == "val"
            assert point.items() <= cell.settings.items()
            mechanism = "gaussian" if math.isfinite(epsilon) else "none"
            assert cell.settings["privacy.record.mechanism"] == mechanism
            assert cell.seed == document["tuning-seeds"][0]
    assert not set(document["tuning-seeds"]) & set(document["seeds"])  # other noise than that of the final runs


def test_every_method_has_as_many_finalists_with_other_seeds_on_validation_data(
    document: dict[str, Any], trials: Trials
):
    rng = np.random.default_rng(0)
    summaries = {entry: [_summary(0.3, float(end)) for end in rng.random(len(own))] for entry, own in trials.items()}
    again = tune.finals_of(document, trials, tune.leaders(document, summaries))
    assert again.keys() == trials.keys()
    for entry, own in again.items():
        ends = [s["accuracy"]["final"]["local"] for s in summaries[entry]]
        leading = sorted(range(len(ends)), key=lambda i: -ends[i])[: document["finalists"]]
        seeds = document["tuning-seeds"][1:]
        assert [(index, cell.seed) for index, cell in own] == [(i, seed) for i in leading for seed in seeds]
        for index, cell in own:
            point, trial = trials[entry][index]
            assert point.items() <= cell.settings.items()
            assert {k for k in cell.settings if cell.settings[k] != trial.settings[k]} == {"seed"}
        assert document["trials"] + len(own) == baselines.tuning_runs(document)


def test_a_method_more_leaves_the_trials_of_the_others_alone(document: dict[str, Any], trials: Trials):
    document["methods"] = document["methods"][1:3]
    some = tune.trials_of(document)
    assert some
    assert all([p for p, _ in trials[entry]] == [p for p, _ in own] for entry, own in some.items())


def test_what_is_wrong_is_said_before_the_first_run(document: dict[str, Any], tmp_path: Path):
    text = SHIPPED.read_text()
    (tmp_path / "a.toml").write_text(text.replace("tunes = [", 'tunes = ["train.momentun", ', 1))
    with pytest.raises(ConfigError, match=r"no values to try for train\.momentun"):
        tune.read(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text(text.replace("tunes = [", "key = 1\ntunes = [", 1))
    with pytest.raises(ConfigError, match="unknown key"):
        tune.read(tmp_path / "b.toml")
    document["methods"][0]["keys"] = {"method": "promptfl", "train.local-steps": -1}
    with pytest.raises(ConfigError, match=r"on demo, ε = 4: .*\n.*train\.local-steps"):
        tune.trials_of(document)


def test_finalists_are_the_first_of_the_highest_and_never_one_that_failed():
    assert tune.finalists([0.2, None, 0.5, 0.5], 2) == [2, 3]
    assert tune.finalists([0.2, None, 0.5, 0.5], 1) == [2]
    assert tune.finalists([None, 0.0], 3) == [1]
    with pytest.raises(ValueError, match="every trial failed"):
        tune.finalists([None, None], 2)


def test_the_best_finalist_has_the_highest_mean_and_never_failed():
    # 0.5 is the luckiest seed, 0.4 the best mean; means of 0.7 and 0.9 with a seed that failed are none.
    assert tune.best({3: [0.5, 0.1], 0: [0.4, 0.4], 1: [0.4, 0.4], 2: [0.9, None]}) == (0, pytest.approx(0.4))
    with pytest.raises(ValueError, match="every finalist failed"):
        tune.best({0: [None, 0.2]})


def _chosen(trials: Trials, path: Path) -> list[dict[str, Any]]:
    """As if the first trial of each entry had been the best."""
    tables = [
        dict(zip(("base", "method", "epsilon"), entry, strict=True))
        | {"trials": len(own), "runs": len(own) + 8, "failed": 0, "validation": 0.5, "seconds": 1.0, "keys": own[0][0]}
        for entry, own in trials.items()
    ]
    path.write_bytes(tune.to_toml(tables, "of a test"))
    return tables


def test_choices_are_read_as_they_were_written_and_not_from_another_search(
    document: dict[str, Any], trials: Trials, tmp_path: Path
):
    path = tmp_path / "chosen.toml"
    tables = _chosen(trials, path)
    assert tomllib.loads(path.read_text())["chosen"] == tables
    chosen = baselines.chosen_of(document, path)
    assert list(chosen.values()) == tables
    for key, value in (
        ("trials", 9),
        ("runs", 16),
        ("keys", {"prompt.rank": 1}),
        ("keys", tables[0]["keys"] | {"rounds": 99}),
    ):
        path.write_bytes(tune.to_toml([tables[0] | {key: value}], ""))
        with pytest.raises(ConfigError, match="chosen in another search"):
            baselines.chosen_of(document, path)
    path.write_bytes(tune.to_toml(tables[:1], ""))
    assert len(baselines.chosen_of(document, path)) == 1


def test_final_runs_are_of_what_was_chosen_on_test_data(document: dict[str, Any], trials: Trials, tmp_path: Path):
    _chosen(trials, tmp_path / "chosen.toml")
    chosen = baselines.chosen_of(document, tmp_path / "chosen.toml")
    cells = baselines.cells_of(document, chosen)
    assert cells.keys() == chosen.keys()
    for entry, own in cells.items():
        assert [cell.seed for cell in own] == document["seeds"]
        assert len(own) >= 5
        assert all(cell.settings["evaluation.split"] == "test" for cell in own)
        assert all(chosen[entry]["keys"].items() <= cell.settings.items() for cell in own)


def test_a_trial_that_fails_is_noted_and_not_run_again(trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def diverge(app_dir: Path, run_config: dict[str, Any]):
        calls.append(run_config["output.dir"])
        raise FloatingPointError("the prompt is not finite")

    monkeypatch.setattr("fl_dualpriv.flower.local.run_local", diverge)
    cell = next(iter(trials.values()))[0][1]
    assert not was_run(cell, tmp_path)
    assert attempt(cell, tmp_path) == attempt(cell, tmp_path) == {}
    assert was_run(cell, tmp_path)
    assert len(calls) == 1
    assert "not finite" in (tmp_path / cell.folder / FAILED).read_text()
    with pytest.raises(FloatingPointError):
        run(cell, tmp_path)  # a final run must not fail


def _summary(start: float, end: float) -> dict[str, Any]:
    accuracy = {
        "zero_shot": {"local": start, "neighbour": start},
        "free": {"local": 2 * start, "neighbour": start, "rival": "un-tuned, own class list"},
        "final": {"local": end, "neighbour": end / 2},
    }
    return {"accuracy": accuracy, "seconds": 2.0, "privacy": []}


def test_the_table_says_what_is_missing(document: dict[str, Any]):
    document["seeds"], document["epsilons"], document["methods"] = [0, 1], [4.0, math.inf], document["methods"][:2]
    first, second = (method["name"] for method in document["methods"])
    done = {
        ("demo", first, 4.0): [_summary(0.3, 0.5), _summary(0.3, 0.51)],
        ("demo", second, math.inf): [_summary(0.31, 0.4)],
    }
    lines = baselines.table(document, "demo", done).splitlines()
    assert len(lines) == 2 + 2 + 2
    # 50 and 51: mean 50.5, standard deviation 0.7; half of that for neighbours: 25.25 ± 0.35.
    assert lines[2] == "| zero-shot (nothing to tune) | 30.0 ± 0.0 | 30.0 ± 0.0 | 31.0 | 31.0 |"
    assert lines[3] == "| free rival: un-tuned, own class list | 60.0 ± 0.0 | 30.0 ± 0.0 | 62.0 | 31.0 |"
    assert lines[4] == f"| {first} | 50.5 ± 0.7 | 25.2 ± 0.4 | - | - (0 seeds) |"
    assert lines[5] == f"| {second} | - | - (0 seeds) | 40.0 | 20.0 (1 seeds) |"
    text = baselines.page(document, "search.toml", {}, done, missing=5)
    assert "5 final runs are missing" in text
    assert "missing" not in baselines.page(document, "search.toml", {}, done, missing=0)


def test_the_output_says_what_a_filter_would_charge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Two trials and one finalist with another seed: three plans, each at a third of δ, added up. Nothing is run."""
    search = tmp_path / "search.toml"
    search.write_text(
        "trials = 2\nfinalists = 1\ntuning-seeds = [7, 8]\nseeds = [0]\nepsilons = [4.0, inf]\n[common]\n"
        '[bases.demo]\ntitle = "small"\nconfig = "by-class.toml"\n'
        '[values.with-noise]\n"train.global-learning-rate" = [0.5, 0.1]\n'
        '[values.without-noise]\n"train.global-learning-rate" = [0.5, 0.1]\n[[methods]]\nname = "one"\n'
        'keys = { "method" = "promptfl" }\ntunes = ["train.global-learning-rate"]\n'
    )
    monkeypatch.setattr(tune, "run_all", lambda cells, *_, may_fail: [_summary(0.3, 0.5) for _ in cells])
    monkeypatch.setattr("sys.argv", ["tune", str(search)])
    tune.main()
    plan = record_level_plan(RunConfig.from_run_config(merge(app_defaults(ROOT), read_toml(CONFIGS / "by-class.toml"))))
    assert plan is not None
    charge = 3 * epsilon_of(plan.sampling_rate, plan.noise_multiplier, plan.releases, plan.delta / 3, COARSE_GRID)
    said = f"3 tuning runs read validation data, outside of that ε; the filter reserve would charge ε = {charge:.4g}"
    assert said in capsys.readouterr().out
    text = search.with_name(tune.CHOSEN).read_text()
    with_noise, without = tomllib.loads(text)["chosen"]
    assert said in with_noise["privacy"]
    assert without["privacy"].endswith("no filter bounds them")
    assert "Tuning is outside of every ε" in text


@pytest.mark.slow
def test_the_commands_run_and_do_not_repeat_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    search, runs = tmp_path / "search.toml", tmp_path / "runs"
    keys = {"method": "promptfl", "rounds": 1, "train.local-steps": 1}
    search.write_text(
        "trials = 2\nfinalists = 1\ntuning-seeds = [7, 8]\nseeds = [0]\nepsilons = [inf]\n"
        '[common]\n"resources.feature-cache" = "off"\n'
        f'[bases.demo]\ntitle = "small"\nconfig = "nonprivate.toml"\n'
        '[values.without-noise]\n"train.global-learning-rate" = [0.5, 1e-6]\n[[methods]]\nname = "one"\n'
        f"keys = {{ {', '.join(f'{json.dumps(k)} = {json.dumps(v)}' for k, v in keys.items())} }}\n"
        'tunes = ["train.global-learning-rate"]\n'
    )
    common = [str(search), "--workers", "1", "--runs", str(runs)]
    monkeypatch.setattr("sys.argv", ["tune", *common])
    tune.main()
    chosen = tomllib.loads(search.with_name(tune.CHOSEN).read_text())["chosen"]
    assert [(c["trials"], c["runs"], c["failed"]) for c in chosen] == [(2, 3, 0)]
    scores = {
        (summary["seed"], summary["config"]["train.global-learning-rate"]): summary["accuracy"]["final"]["local"]
        for summary in (json.loads(path.read_text()) for path in runs.rglob("summary.json"))
    }
    rate = chosen[0]["keys"]["train.global-learning-rate"]
    assert scores.keys() == {(7, 0.5), (7, 1e-6), (8, rate)}
    assert scores[7, rate] == max(scores[7, 0.5], scores[7, 1e-6])
    assert chosen[0]["validation"] == pytest.approx((scores[7, rate] + scores[8, rate]) / 2, abs=1e-4)
    monkeypatch.setattr("sys.argv", ["baselines", *common, "--out", str(tmp_path / "table.md")])
    baselines.main()
    assert "| one | " in (tmp_path / "table.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in runs.rglob("*.json")}
    baselines.main()
    monkeypatch.setattr("sys.argv", ["tune", *common])
    tune.main()
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.json")} == stamps

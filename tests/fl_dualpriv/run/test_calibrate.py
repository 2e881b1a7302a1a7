"""The calibration beside the start of Flower answers the questions that the processes of the run ask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fl_dualpriv.config import plans
from fl_dualpriv.config.schema import RunConfig, app_defaults, merge
from fl_dualpriv.privacy import calibration
from fl_dualpriv.privacy.limits import SHARED_CALIBRATIONS

ROOT = Path(__file__).parents[3]

SELECTED = {"prompt.init": "select", "prompt.candidates": "a {}\nno {}", "privacy.record.mechanism": "gaussian"}
OF_CLIENTS = {"privacy.client.mechanism": "gaussian"}


@pytest.mark.parametrize("changes", [SELECTED, OF_CLIENTS])
def test_a_run_finds_all_its_multipliers(changes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flat = merge(app_defaults(ROOT), changes)
    file = tmp_path / "run-config.json"
    file.write_text(json.dumps(flat))
    (tmp_path / "shared").mkdir()
    environ = os.environ | {SHARED_CALIBRATIONS: str(tmp_path / "shared")}
    command = [sys.executable, "-P", "-m", "fl_dualpriv.run.calibrate", str(file)]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE) as process:
        assert process.wait(timeout=120) == 0
    monkeypatch.setenv(SHARED_CALIBRATIONS, str(tmp_path / "shared"))

    def search(*_: object) -> float:
        raise AssertionError("a process of the run would calibrate again")

    monkeypatch.setattr(calibration, "_calibrated", search)
    monkeypatch.setattr(calibration, "_found", search)
    calibration.calibrate_noise_multiplier.cache_clear()
    calibration.calibrate_beside.cache_clear()
    config = RunConfig.from_run_config(flat)
    made = [plan for plan in (plans.record_level_plan(config), plans.client_level_plan(config)) if plan]
    assert made
    assert all(plan.noise_multiplier > 0 for plan in made)


def test_it_ends_with_the_process_that_started_it(tmp_path: Path):
    file = tmp_path / "run-config.json"
    file.write_text(json.dumps(merge(app_defaults(ROOT), {"privacy.record.epsilon": 0.011})))
    environ = os.environ | {SHARED_CALIBRATIONS: str(tmp_path)}
    command = [sys.executable, "-P", "-m", "fl_dualpriv.run.calibrate", str(file)]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 1

"""Trackers: their own libraries read what a run wrote, and none can stop or delay a run."""

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.metrics import Accuracy
from fl_dualpriv.run.file_kinds import without_kind
from fl_dualpriv.run.recorder import RunRecorder
from fl_dualpriv.tracking import base
from fl_dualpriv.tracking.base import Tracker, Tracking, check_tracker

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8").split("## Trackers")[1]
CONFIG = {"rounds": 2, "privacy.record.epsilon": 4.0, **{f"key-{i}": "x" * 900 for i in range(150)}}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Save a module of trackers, and forget it afterwards."""

    def save(text: str) -> None:
        (tmp_path / "trackers_of_a_test.py").write_text(text)

    monkeypatch.syspath_prepend(str(tmp_path))
    yield save
    sys.modules.pop("trackers_of_a_test", None)


def record(folder: Path, track: str) -> None:
    """Two rounds and the end of a run, as a server app writes them."""
    recorder = RunRecorder(folder)
    with recorder.claimed(resume=False, config={**CONFIG, "output.track": track}):
        for number in (1, 2):
            score = Accuracy(local=0.2 * number, neighbour=None, by_group=[])
            recorder.add_round(number, score, 1.5 * number, None, number - 1, 3.0)
        accuracy = {"free": {"local": 0.1}, "final": {"local": 0.4}}
        recorder.write_summary({"rounds": 2, "accuracy": accuracy})


def test_tensorboard_reads_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PATIENCE", 60.0)
    record(tmp_path / "run", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tracking"))
    events.Reload()
    read = {tag: [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read == {
        "accuracy/local": [(1, 0.2), (2, 0.4)],
        "epsilon/record": [(1, 1.5), (2, 3.0)],
        "failures": [(1, 0.0), (2, 1.0)],
        "gain over the free rival/local": [(2, 0.3)],
    }
    assert without_kind(tmp_path / "run") == []


def test_mlflow_reads_every_number_and_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PATIENCE", 60.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record(tmp_path / "run", "mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((tmp_path / "run" / "tracking").as_uri())
    experiment = client.get_experiment_by_name("fl-dualpriv")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["privacy.record.epsilon"] == "4.0"
    assert len(run.data.params) == len(CONFIG) + 1
    history = client.get_metric_history(run.info.run_id, "accuracy/local")
    assert [(point.step, point.value) for point in history] == [(1, 0.2), (2, 0.4)]
    assert run.data.metrics["gain over the free rival/local"] == pytest.approx(0.3)
    assert without_kind(tmp_path / "run") == []


def test_a_server_that_does_not_answer_neither_stops_nor_delays_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://192.0.2.1:5000")  # TEST-NET-1: packets go nowhere
    start = time.monotonic()
    record(tmp_path / "run", "mlflow")
    assert time.monotonic() - start < base.PATIENCE + 5  # the import of the library may share the processor
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 2
    assert not (tmp_path / "run" / "error.json").exists()


def test_the_pages_class_is_short_and_runs(tmp_path: Path, module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(source.splitlines()) <= 40
    module(source)
    record(tmp_path / "run", "trackers_of_a_test:Printing")
    assert "2 {'accuracy/local': 0.4, 'epsilon/record': 3.0, 'failures': 1.0}" in capsys.readouterr().out


def test_ours_are_at_most_forty_lines() -> None:
    for name in base.SHIPPED:
        source = (ROOT / "fl_dualpriv" / "tracking" / f"{name}.py").read_text(encoding="utf-8")
        assert len(source[source.index("class ") :].splitlines()) <= 40


class Failing(Tracker):
    """Fails at its second round."""

    calls: ClassVar[list[int]] = []

    def log(self, server_round: int, values: Mapping[str, float]) -> None:
        self.calls.append(server_round)
        if server_round == 2:
            raise RuntimeError("the disk is full")


class Hanging(Tracker):
    """Never returns."""

    def log(self, server_round: int, values: Mapping[str, float]) -> None:
        threading.Event().wait()


def test_a_tracker_that_fails_is_said_once_and_asked_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base, "_class_of", lambda _: Failing)
    tracking = Tracking("failing", tmp_path, {})
    for number in (1, 2, 3):
        tracking.log(number, {"x": 1.0})
    with caplog.at_level(logging.WARNING, logger="fl_dualpriv"):
        tracking.close()
    assert Failing.calls == [1, 2]
    assert [r.getMessage() for r in caplog.records if "the disk is full" in r.getMessage()] != []


def test_a_tracker_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_class_of", lambda _: Hanging)
    monkeypatch.setattr(base, "PATIENCE", 0.2)
    tracking = Tracking("hanging", tmp_path, {})
    start = time.monotonic()
    tracking.log(1, {"x": 1.0})
    tracking.close()
    assert time.monotonic() - start < 2.0


def test_a_missing_package_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base.SHIPPED, "mlflow", ("no_such_package_here", "MLflow"))
    with pytest.raises(ConfigError, match=r"install fl-dualpriv\[mlflow\]"):
        check_tracker("mlflow")


@pytest.mark.parametrize("name", ["no_such_module_here:Class", "fl_dualpriv.tracking.base:Tracking"])
def test_a_class_that_is_no_tracker_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"output\.track"):
        check_tracker(name)

"""What of the Ray engine can be tried without starting Flower; the rest is in tests/app/test_flwr_run.py."""

import json
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_dualpriv.flower import engine as flower_engine
from fl_dualpriv.flower.engine import RunFailed, run_flower, to_toml
from fl_dualpriv.run.cpus import usable_cpus
from fl_dualpriv.run.folder_lock import held_alone


@pytest.mark.parametrize("cpus", [0, -1, 10_000])
def test_cpus_that_the_machine_does_not_have_are_refused(cpus: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"cpus-per-client = {cpus}: this process may use {usable_cpus()}"):
        run_flower(tmp_path, {}, num_supernodes=1, cpus_per_client=cpus, gpus_per_client=0.0, work_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flower_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_engine.programs, "find", lambda _: None)
    make, made = tempfile.mkdtemp, []
    monkeypatch.setattr(flower_engine.tempfile, "mkdtemp", lambda **words: made.append(make(**words)) or made[-1])
    with pytest.raises(RunFailed, match="make setup"):
        run_flower(tmp_path, {}, num_supernodes=1, cpus_per_client=1, gpus_per_client=0.0, work_dir=tmp_path / "out")
    assert made != []
    assert [folder for folder in made if Path(folder).exists()] == []


def test_run_config_survives_toml() -> None:
    values = {"a.b-c": 1, "a.x": 1e-05, "b": True, "c": 'q" \\ \n\t\x7f ä 😀', "d": "", "e": 0.1 + 0.2, "f": -3}
    parsed = tomllib.loads(to_toml(values))
    assert parsed == {**{key: value for key, value in values.items() if "." not in key}, "a": {"b-c": 1, "x": 1e-05}}
    assert [type(parsed[key]) for key in "bcef"] == [bool, str, float, int]


def test_the_servers_words_come_with_its_traceback_in_the_log(tmp_path: Path) -> None:
    log, error = tmp_path / "flower.log", tmp_path / "error.json"
    error.write_text(json.dumps({"type": "ConfigError", "message": "no images", "traceback": "Traceback: here\n"}))
    assert flower_engine._server_message(error, log) == "ConfigError: no images"
    assert log.read_text() == "Traceback: here\n"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_an_unreadable_error_file_is_still_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "error.json").write_text(content)
    assert "cannot be read" in flower_engine._server_message(tmp_path / "error.json", tmp_path / "log")


def test_the_log_gives_its_last_exceptions_once_and_without_colours(tmp_path: Path) -> None:
    log = tmp_path / "flower.log"
    first, last = "ValueError: one", "\x1b[36m(ClientAppActor pid=1)\x1b[0m ray.exceptions.RayTaskError: two"
    log.write_text(f"INFO: fine\n{first}\n  File 'x'\n{last}\n{last}\n")
    assert flower_engine._explain("it failed", log).splitlines() == [
        "it failed",
        "  ValueError: one",
        "  (ClientAppActor pid=1) ray.exceptions.RayTaskError: two",
        f"  the whole log: {log}",
    ]


class TestTheEndOfARun:
    """A run has ended when its results exist and its server app has let go of the folder."""

    @pytest.fixture
    def link(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[flower_engine._SuperLink]:
        monkeypatch.setattr(flower_engine, "_flwr", self.no_query)
        process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
        yield flower_engine._SuperLink(process=process, environ={}, home=tmp_path, log=tmp_path / "flower.log")
        process.communicate(b"\n")

    def no_query(self, *_: object) -> None:
        raise AssertionError("Flower was asked, which costs two seconds")

    def watch(self, link: flower_engine._SuperLink, folder: Path, seconds: float = 30.0) -> None:
        before = {"summary.json": None, "error.json": None}
        flower_engine._watch(link, "1", folder, before, time.monotonic() + seconds, lambda: True)

    def test_results_and_a_free_folder_end_it_at_once(self, link: flower_engine._SuperLink, tmp_path: Path):
        with held_alone(tmp_path):
            (tmp_path / "summary.json").write_text("{}")
        self.watch(link, tmp_path)

    def test_a_server_app_that_still_writes_is_waited_for(self, link: flower_engine._SuperLink, tmp_path: Path):
        with held_alone(tmp_path):
            (tmp_path / "summary.json").write_text("{}")
            with pytest.raises(RunFailed, match="time limit"):
                self.watch(link, tmp_path, seconds=1.0)

    def test_a_failure_after_the_results_is_a_failure(self, link: flower_engine._SuperLink, tmp_path: Path):
        with held_alone(tmp_path):
            (tmp_path / "summary.json").write_text("{}")
            error = {"type": "OSError", "message": "the disk is full", "traceback": ""}
            (tmp_path / "error.json").write_text(json.dumps(error))
        with pytest.raises(RunFailed, match="the disk is full"):
            self.watch(link, tmp_path)

    def test_an_app_without_our_lock_is_asked_about(self, link: flower_engine._SuperLink, tmp_path: Path):
        (tmp_path / "summary.json").write_text("{}")
        with pytest.raises(AssertionError, match="Flower was asked"):
            self.watch(link, tmp_path)

    def test_the_last_lines_of_the_log_are_waited_for(self, tmp_path: Path):
        log = tmp_path / "flower.log"
        script = "import sys, time\nfor i in range(4):\n  print(i, flush=True)\n  time.sleep(0.6)\ninput()"
        with log.open("ab") as stream:
            command = [sys.executable, "-S", "-c", script]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream)
        flower_engine._finish(process, log)
        assert process.poll() is None, "a stream that stays open does not keep the run from ending"
        assert log.read_text().split() == ["0", "1", "2", "3"]
        process.communicate(b"\n")

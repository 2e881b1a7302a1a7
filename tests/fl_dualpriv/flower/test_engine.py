"""What of the Ray engine can be tried without starting Flower; the rest is in tests/app/test_flwr_run.py."""

import json
import tempfile
import tomllib
from pathlib import Path

import pytest

from fl_dualpriv.flower import engine as flower_engine
from fl_dualpriv.flower.engine import RunFailed, run_flower, to_toml
from fl_dualpriv.run.cpus import usable_cpus


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

"""Flower's programs are found where they were installed, on PATH, and beside the interpreter."""

import os
from importlib import metadata
from pathlib import Path

import pytest

from fl_dualpriv.flower import engine as flower_engine
from fl_dualpriv.flower import programs
from fl_dualpriv.flower.engine import RunFailed, run_flower

NAME = "flower-superlink"


def program(folder: Path, name: str = NAME) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An interpreter beside which nothing lies, an empty PATH, and no record of an installation."""

    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(programs.metadata, "distribution", absent)
    monkeypatch.setattr(programs.sysconfig, "get_path", lambda _: str(tmp_path / "scripts"))
    monkeypatch.setattr(programs.sys, "executable", str(tmp_path / "python" / "python3"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    return monkeypatch


def install_for_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `pip install --user flwr` leaves: packages and a record in lib, programs in bin; returns the program."""
    packages = tmp_path / "user" / "lib" / "python3" / "site-packages"
    info = packages / "flwr-1.42.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 1.42.0\n")
    (info / "RECORD").write_text(f"../../../bin/{NAME},,\nflwr-1.42.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(packages)
    return program(tmp_path / "user" / "bin")


def test_an_installation_of_a_user_whose_programs_are_not_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = install_for_user(tmp_path, monkeypatch), program(tmp_path / "another" / "bin")
    monkeypatch.setenv("PATH", f"{theirs.parent}{os.pathsep}/usr/bin")
    # Not the first on PATH: it may be of another version, and of an interpreter without this library.
    assert programs.find(NAME) == str(mine)
    assert flower_engine._script(NAME) == str(mine)
    assert programs.search_path().split(os.pathsep)[:3] == [str(mine.parent), str(theirs.parent), "/usr/bin"]
    assert flower_engine._environment(tmp_path, 1, 2)["PATH"].startswith(str(mine.parent))


def test_programs_that_were_moved_are_found_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_for_user(tmp_path, monkeypatch).unlink()
    moved = program(tmp_path / "moved")
    monkeypatch.setattr(programs, "_OWNERS", ("flwr",))
    monkeypatch.setattr(programs.sysconfig, "get_path", lambda _: str(tmp_path / "scripts"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'empty'}{os.pathsep}{moved.parent}")
    assert flower_engine._script(NAME) == str(moved)


@pytest.mark.parametrize("place", ["scripts", "python"])
def test_path_then_the_interpreters_folder(place: str, tmp_path: Path, nowhere: pytest.MonkeyPatch) -> None:
    beside = program(tmp_path / place)
    assert flower_engine._script(NAME) == str(beside)
    assert str(beside.parent) in programs.search_path().split(os.pathsep)
    on_path = program(tmp_path / "empty")
    assert flower_engine._script(NAME) == str(on_path)


def test_a_file_that_cannot_be_run_is_no_program(tmp_path: Path, nowhere: pytest.MonkeyPatch) -> None:
    program(tmp_path / "empty").chmod(0o644)
    assert programs.find(NAME) is None


def test_flower_that_is_not_installed_is_named_with_the_places(tmp_path: Path, nowhere: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match=f"{NAME} is in none of .*PATH .*make setup") as caught:
        run_flower(tmp_path, {}, num_supernodes=1, cpus_per_client=1, gpus_per_client=0.0, work_dir=tmp_path / "out")
    assert str(tmp_path / "scripts") in str(caught.value)

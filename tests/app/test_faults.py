"""Faults of a run: a damaged or foreign checkpoint, a full disk, a clock that goes back, a folder in use."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.data.load import load_data
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.privacy import ledger
from fl_dualpriv.run.checkpoint import FILES, CheckpointFolder
from fl_dualpriv.run.folder_lock import held_alone
from fl_dualpriv.run.recorder import RunRecorder
from tests.app.run_folders import BOTH, Start, ending, lines, starter

ROOT = Path(__file__).parents[2]
TWO_ROUNDS = BOTH | {"rounds": 2}


@pytest.fixture(autouse=True)
def no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters of a small run's time."""
    monkeypatch.setattr(RunRecorder, "write_curve", lambda self, caption: None)


@pytest.fixture
def start(images: Path, tiny_clip_dir: Path, tmp_path: Path) -> Start:
    return starter(images, tiny_clip_dir, tmp_path)


class CutOff(BaseException):
    """Stands for the end of the process."""


def cut_off_after(start: Start, name: str, checkpoints: int) -> None:
    """End a run when so many checkpoints are written; the first is the start's."""
    write, count = CheckpointFolder.write, itertools.count(1)

    def cutting(self: CheckpointFolder, checkpoint: Any) -> None:
        write(self, checkpoint)
        if next(count) == checkpoints:
            raise CutOff

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFolder, "write", cutting)
        with pytest.raises(CutOff):
            start(name, TWO_ROUNDS)


def damaged(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    if how == "truncated":
        return content[:middle]
    return b"" if how == "empty" else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(start: Start, tmp_path: Path):
    expected = ending(start("whole", TWO_ROUNDS))
    for how in ("truncated", "empty", "one bit"):
        cut_off_after(start, how, 3)
        last, previous = (tmp_path / how / name for name in FILES)
        last.write_bytes(damaged(last.read_bytes(), how))
        kept = previous.read_bytes()
        previous.write_bytes(b"")
        with pytest.raises(ConfigError, match=r"checkpoint.bin is damaged .*; checkpoint.previous.bin is damaged"):
            start(how, TWO_ROUNDS, resume=True)
        previous.write_bytes(kept)
        assert ending(start(how, TWO_ROUNDS, resume=True)) == expected


def test_what_is_not_of_this_run_is_not_resumed(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cut_off_after(start, "cut", 2)
    out = tmp_path / "cut"
    with pytest.raises(ConfigError, match="another configuration: rounds = 3, was 2; seed = 1, was 0"):
        start("cut", TWO_ROUNDS | {"rounds": 3, "seed": 1}, resume=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fl_dualpriv.run.checkpoint.FORMAT", 3)
        with pytest.raises(ConfigError, match="has format 2, this version reads 3"):
            start("cut", TWO_ROUNDS, resume=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fl_dualpriv.run.checkpoint.version", lambda name: "0.0.1")
        with pytest.raises(ConfigError, match=r"was written by fl-dualpriv .*, this is 0\.0\.1"):
            start("cut", TWO_ROUNDS, resume=True)
    events = (out / "ledger.jsonl").read_bytes()
    (out / "ledger.jsonl").write_bytes(b"")
    with pytest.raises(ConfigError, match="ledger that lost lines under-counts"):
        start("cut", TWO_ROUNDS, resume=True)
    (out / "ledger.jsonl").write_bytes(events)
    for name in FILES:
        (out / name).rename(out / f"away-{name}")
    with pytest.raises(ConfigError, match="no checkpoint"):
        start("cut", TWO_ROUNDS, resume=True)
    for name in FILES:
        (out / f"away-{name}").rename(out / name)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        start("cut", TWO_ROUNDS)
    start("cut", TWO_ROUNDS | {"resources.workspace-mib": 512, "reply-timeout": 10.0}, resume=True)  # change no result
    with pytest.raises(ConfigError, match="its run has ended"):
        start("cut", TWO_ROUNDS, resume=True)


def test_a_run_over_other_data_is_not_resumed(images: Path, tiny_clip_dir: Path, tmp_path: Path):
    """The same numbers of records each time, so that only names and classes say it."""
    here = tmp_path / "images"
    shutil.copytree(images, here)
    start = starter(here, tiny_clip_dir, tmp_path)
    cut_off_after(start, "cut", 2)

    def refused(words: str) -> None:
        load_data.cache_clear()
        with pytest.raises(ConfigError, match=f"over other data: {words} changed since"):
            start("cut", TWO_ROUNDS, resume=True)

    (here / "cat").rename(here / "zebra")  # goes from the second class to the last
    refused("the class list, the training records, .*the held-out records")
    (here / "zebra").rename(here / "cat")
    (here / "cat" / "00.png").rename(here / "cat" / "zz.png")
    refused("the training records|the held-out records")
    (here / "cat" / "zz.png").rename(here / "cat" / "00.png")
    load_data.cache_clear()
    expected = ending(start("whole", TWO_ROUNDS))
    assert ending(start("cut", TWO_ROUNDS, resume=True)) == expected


def test_a_class_list_in_a_file_is_data_too(images: Path, tiny_clip_dir: Path, tmp_path: Path):
    file = tmp_path / "classes.json"
    names = {"cat": "cat", "dog": "dog", "bus": "bus", "tree": "tree"}
    file.write_text(json.dumps({"class-names": names}))
    start, changes = starter(images, tiny_clip_dir, tmp_path), TWO_ROUNDS | {"data.classes": str(file)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecorder, "add_round", _cut)
        with pytest.raises(CutOff):
            start("cut", changes)
    file.write_text(json.dumps({"class-names": names | {"cat": "dog", "dog": "cat"}}))
    load_data.cache_clear()
    with pytest.raises(ConfigError, match=r"over other data: the class list changed since\. Put the data back"):
        start("cut", changes, resume=True)


def _cut(*_: Any, **__: Any) -> None:
    raise CutOff


@pytest.mark.parametrize("write", ["checkpoint.bin", "rounds.jsonl", "ledger.jsonl"])
def test_a_full_disk_ends_the_run_with_its_message_and_it_goes_on_when_there_is_room(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
):
    """At the server; what clients cannot write they do not release, and are counted."""
    expected = ending(start("whole", TWO_ROUNDS))
    sync, count = os.fsync, itertools.count(1)

    def full(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink().name.removeprefix(".")
        at_server = Path(f"/proc/self/fd/{handle}").readlink().parent == tmp_path / "full"
        if at_server and name.startswith(write) and next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            start("full", TWO_ROUNDS)
    assert "No space left" in (tmp_path / "full" / "error.json").read_text()
    assert ending(start("full", TWO_ROUNDS, resume=True)) == expected


def test_a_full_disk_does_not_hide_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fl_dualpriv.run.recorder.write_json", full)
    with pytest.raises(KeyError, match="the cause"), RunRecorder(tmp_path).claimed(resume=False):
        raise KeyError("the cause")


def test_a_clock_that_goes_back_changes_no_result(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = ending(start("whole", TWO_ROUNDS))
    stamps = (f"2026-01-{day:02d}T00:00:00Z" for day in itertools.cycle(range(28, 0, -1)))
    monkeypatch.setattr(ledger, "utc_now", lambda: next(stamps))
    cut_off_after(start, "skewed", 2)
    assert ending(start("skewed", TWO_ROUNDS, resume=True)) == expected
    times = [line["time"] for path in (tmp_path / "skewed").rglob("ledger.jsonl") for line in lines(path)]
    assert times != sorted(times)


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_crashed(tmp_path: Path):
    code = f"""
import time
from pathlib import Path
from fl_dualpriv.run.folder_lock import held_alone
with held_alone(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"is in use: process {first.pid} runs in it"), held_alone(tmp_path):
        pass
    with pytest.raises(ConfigError, match="is in use"), RunRecorder(tmp_path).claimed(resume=False):
        pass
    assert not (tmp_path / "error.json").exists()  # it is the first run's, whose front watches for it
    first.kill()
    first.wait()
    with RunRecorder(tmp_path).claimed(resume=False):
        pass

"""What a process says about its memory: a local file, rewritten when it grew."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fl_dualpriv.run.peak_memory import describe_peaks, report_peak, resident_peak

MIB = 2**20


def written(folder: Path) -> float:
    (file,) = (folder / "actors").iterdir()  # no temporary file is left
    content = json.loads(file.read_text())
    assert (content["pid"], content["kind"]) == (os.getpid(), "cpu")
    return content["peak-mib"]


def test_the_peak_holds_what_was_allocated():
    before = resident_peak()
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    assert 10 * MIB < before <= resident_peak()
    assert resident_peak() > 64 * MIB


def test_what_the_starter_held_is_not_counted():
    block = bytearray(512 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    program = "from fl_dualpriv.run.peak_memory import resident_peak; print(resident_peak())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 1 * MIB < int(done.stdout) < 256 * MIB < len(block) < resident_peak()


def test_growth_of_more_than_five_percent_is_written_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="fl_dualpriv")
    for peak, expected in ((100, 100), (104, 100), (106, 106), (90, 106), (200, 200)):
        report_peak(tmp_path, "cpu", lambda size=peak: size * MIB)
        assert written(tmp_path) == expected
    assert len(caplog.records) == 3
    assert describe_peaks(tmp_path) == "peak memory: 1 actor, 200 MiB"


def test_without_a_folder_it_is_only_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="fl_dualpriv")
    report_peak(None, "cpu", lambda: 10**6 * MIB)
    assert "1000000 MiB" in caplog.text


def test_a_folder_that_cannot_be_written_to_stops_nobody(tmp_path: Path):
    (tmp_path / "file").write_text("")
    report_peak(tmp_path / "file", "cpu", lambda: 100 * MIB)
    assert describe_peaks(tmp_path / "file") is None

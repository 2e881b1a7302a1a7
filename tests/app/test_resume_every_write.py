"""A run that dies, or whose disk fills up, at any one of its writes, of the server or a client; then it is resumed."""

import errno
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.run.recorder import RunRecorder
from tests.app.run_folders import BOTH, Start, ending, starter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SMALLEST = BOTH | {"rounds": 2, "population": 2, "supernodes": 1, "privacy.client.expected-cohort": 2.0}


class Writes:
    """Counts the steps in which files below a folder are written, and lets one of them be the last.

    A write is three steps: nothing of it, half of it and all of it is in the file.
    """

    def __init__(self, root: Path, fatal: int, fail: Callable[[], None]) -> None:
        self.root, self.fatal, self.fail, self.steps = root, fatal, fail, 0
        self.full = False

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.fatal or self.full:
            self.full = True
            self.fail()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        opened = io.open

        def traced_open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            ours = isinstance(file, Path) and file.is_relative_to(self.root) and file.name != "run.lock"
            if not ours or set(mode) <= set("rbt"):
                return opened(file, mode, *rest, **named)
            self.step()
            return _Halves(opened(file, mode, *rest, **named), self)

        patch.setattr(io, "open", traced_open)
        for name in ("fsync", "replace", "link"):
            patch.setattr(os, name, self._after_a_step(getattr(os, name)))

    def _after_a_step(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*arguments: Any, **named: Any) -> Any:
            self.step()
            return call(*arguments, **named)

        return traced


class _Halves:
    """A file that is written in halves."""

    def __init__(self, file: Any, writes: Writes) -> None:
        self._file, self._writes = file, writes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Halves":
        return self

    def __exit__(self, *problem: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        middle = len(data) // 2
        self._file.write(data[:middle])
        self._file.flush()
        self._writes.step()
        self._file.write(data[middle:])
        self._file.flush()
        self._writes.step()
        return len(data)


@pytest.fixture
def start(images: Path, tiny_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setattr(RunRecorder, "write_curve", lambda self, caption: None)  # three quarters of a small run's time
    return starter(images, tiny_clip_dir, tmp_path)


def play(start: Start, root: Path, name: str, fatal: int, fail: Callable[[], None], *, resume: bool = False) -> int:
    """Run in a process of its own, whose exit status says how it ended; the number of steps if it got to its end."""
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                writes = Writes(root / name, fatal, fail)
                writes.install(patch)
                start(name, SMALLEST, resume=resume)
            (root / f"{name}.steps").write_text(str(writes.steps))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("fail", "status"), [(die, -signal.SIGKILL), (no_space, 1)], ids=["killed", "disk full"])
def test_after_any_write_a_run_goes_on_and_ends_as_if_nothing_had_happened(
    start: Start, tmp_path: Path, fail: Callable[[], None], status: int
):
    """A disk that is full stays so until the run has ended; a client that cannot write has released nothing."""
    expected = ending(start("whole", SMALLEST))
    assert play(start, tmp_path, "counted", 0, fail) == 0
    steps, torn = int((tmp_path / "counted.steps").read_text()), 0
    assert steps > 100
    for fatal in range(1, steps + 1):
        out = tmp_path / f"at-{fatal}"
        assert play(start, tmp_path, out.name, fatal, fail) == status, fatal
        if not (out / "summary.json").exists():
            start(out.name, SMALLEST, resume=True)
        contents = [Ledger(path).read() for path in sorted(out.rglob("ledger.jsonl"))]
        if any(content.damaged for content in contents):
            # Half a line, as a power cut or a full disk leaves it. Nobody can tell it from a damaged event, so it is
            # charged: its owner may have to sit out the last round of the plan, and the server's run may end before it.
            torn += 1
            summary = json.loads((out / "summary.json").read_text())
            assert [c.damaged + len(c.events) >= summary["rounds"] for c in contents] == [True] * 3, fatal
            server = Ledger(out / "ledger.jsonl").read()
            (row, *_) = [row for row in summary["privacy"] if row["unit"] == "client"]
            assert row["epsilon"] >= server.epsilon(row["delta"]) * (1 - 1e-9), fatal
        else:
            assert ending(out) == expected, fatal
        shutil.rmtree(out)
    assert torn == 6  # three ledgers, two rounds each

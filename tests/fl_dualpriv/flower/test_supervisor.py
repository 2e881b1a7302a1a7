"""The supervisor leaves nothing behind, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fl_dualpriv.flower import supervisor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="walks /proc")

# A child, and an orphan in a session of its own that ignores SIGTERM: what Ray's processes look like at worst.
STUBBORN = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / "orphan").write_text(str(os.getpid()))
        time.sleep(120)
    os._exit(0)
while not (folder / "orphan").exists() or not (folder / "orphan").read_text():
    time.sleep(0.01)
(folder / "child").write_text(str(os.getpid()))
time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


def start(folder: Path, temporary: Path, seconds: float) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", STUBBORN, str(folder), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-I", supervisor.__file__, str(temporary), *command],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def read_pid(file: Path) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if file.exists() and file.read_text():
            return int(file.read_text())
        time.sleep(0.02)
    raise AssertionError(f"{file} was not written")


@pytest.mark.slow  # waits for real processes
@pytest.mark.parametrize("how", ["input closes", "sigterm", "command ends"])
def test_nothing_is_left(how: str, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = start(tmp_path, temporary, 0.2 if how == "command ends" else 120)
    child, orphan = read_pid(tmp_path / "child"), read_pid(tmp_path / "orphan")
    if how != "command ends":
        assert supervisor.alive(child)
        assert sorted(supervisor.descendants(process.pid)) == sorted([child, orphan])
    if how == "sigterm":
        process.send_signal(signal.SIGTERM)
    elif how == "input closes":
        assert process.stdin is not None
        process.stdin.close()
    assert process.wait(timeout=30) == (7 if how == "command ends" else 0)
    assert not supervisor.alive(child)
    assert not supervisor.alive(orphan)
    assert not temporary.exists()


@pytest.mark.slow  # waits for real processes
def test_ctrl_c_and_hang_up_do_not_reach_the_command(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = start(tmp_path, temporary, 120)
    child = read_pid(tmp_path / "child")
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert supervisor.alive(child)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=30) == 0


def test_a_process_that_is_gone_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not supervisor.alive(process.pid)
    assert supervisor.command_line(process.pid) == ""
    assert supervisor.alive(os.getpid())

"""Run one command and leave no process of it behind. Standard library only: `flower.engine` starts it as a script.

Flower and Ray detach their children (in separate sessions) and leave them running when a parent dies. On Linux the
supervisor is the *child subreaper*: an orphaned descendant becomes its child. A walk down the process tree from the
supervisor therefore finds every process that it started, and no other. The supervisor ends these processes when the
command ends or when its own standard input closes. Standard input closes however the supervisor's parent ends, SIGKILL
included. On other systems the supervisor ends only the command's process group.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_PROC = Path("/proc")


def _stat(pid: int) -> tuple[str, int] | None:
    """Return state letter and parent of a process; None if there is no such process (or no ``/proc``)."""
    try:
        # The line is "PID (name) state ppid ...", and the name may hold spaces and brackets.
        state, parent = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        return state, int(parent)
    except (OSError, ValueError):
        return None


def alive(pid: int) -> bool:
    """Return True if the process exists and is not a zombie."""
    stat = _stat(pid)
    return stat is not None and stat[0] not in "ZX"


def command_line(pid: int) -> str:
    """Return the words of a process's command, joined by spaces; empty if there is no such process."""
    try:
        return (_PROC / str(pid) / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Return all descendants of ``pid`` that are alive."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.glob("[0-9]*"):
        stat = _stat(int(folder.name))
        if stat is not None:
            children.setdefault(stat[1], []).append(int(folder.name))
    pids: list[int] = []
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        pids += below
        todo += below
    return [member for member in pids if alive(member)]


def listens(pid: int, port: int) -> bool:
    """Return True if ``pid`` or a descendant listens on this TCP port (IPv4). If not, another program answers there.

    Without ``/proc`` the function cannot check this, and returns True.
    """
    table = _PROC / "net" / "tcp"
    if not table.exists():
        return True
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    # Columns: local address in hexadecimal, state (0A: listening), inode of the socket.
    sockets = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    return any(sockets & _open_files(member) for member in ([pid, *descendants(pid)] if sockets else []))


def _open_files(pid: int) -> set[str]:
    targets: set[str] = set()
    with contextlib.suppress(OSError):
        for handle in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):  # the process closed it meanwhile
                targets.add(str(handle.readlink()))
    return targets


def kill(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _reap() -> dict[int, int]:
    """Collect ended children, adopted ones included; return their exit status by process id."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (result := os.waitpid(-1, os.WNOHANG))[0] != 0:
            ended[result[0]] = os.waitstatus_to_exitcode(result[1])
    return ended


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        _reap()
        time.sleep(0.05)
    return True


def _tear_down(child: int) -> None:
    """End the command, then all descendants of this process: first by SIGTERM, then by SIGKILL until none is left."""
    me = os.getpid()
    kill([child], signal.SIGTERM)
    _wait(lambda: not alive(child), 5.0)
    if not _wait(lambda: not descendants(me), 0.3):
        kill(descendants(me), signal.SIGTERM)
        # Repeat, because a process may start another one between the look and the signal.
        while not _wait(lambda: not descendants(me), 2.0):
            kill(descendants(me), signal.SIGKILL)
    if not _PROC.is_dir():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
    _reap()


def supervise(command: list[str], temporary: Path) -> int:
    """Run ``command`` in a separate session until it ends or standard input closes, then end all that it started.

    Args:
        command: Program and arguments.
        temporary: Folder to remove at the end.

    Returns:
        The exit status of the command; 0 if standard input closed first.
    """
    stop = False

    def request(_number: int, _frame: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, request)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The child would inherit ignored signals. The new session already keeps the terminal's Ctrl-C away from it.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_default_signals).pid
    status = 0
    try:
        while not stop:
            ready, _, _ = select.select([sys.stdin], [], [], 0.2)
            if ready and not os.read(sys.stdin.fileno(), 1024):
                break
            ended = _reap()
            if child in ended:
                status = ended[child]
                break
    finally:
        _tear_down(child)
        shutil.rmtree(temporary, ignore_errors=True)
    return status


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    # Arguments: TEMPORARY COMMAND...
    sys.exit(supervise(sys.argv[2:], Path(sys.argv[1])) & 0xFF)

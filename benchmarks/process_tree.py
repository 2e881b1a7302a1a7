"""CPU seconds and memory of a whole process tree, including detached daemons; works on Linux only, by reading /proc.

A process belongs to the tree if it descends from the root, or if it was started with the tree's mark in its
environment. The mark is needed because Ray's daemons detach from their parent process, but inherit its environment.
"""

import contextlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MARK = "FDP_BENCH_TREE"
_TICKS = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class TreeUse:
    """Resources that the living processes of a tree have used so far.

    Attributes:
        cpu: User and system seconds, including those of children that ended and were waited for.
        peak_mib: Sum of the processes' peak resident memory; shared pages count once per process.
        processes: Number of living processes.
    """

    cpu: float
    peak_mib: float
    processes: int


def marked_environment(environment: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return a fresh mark, and an environment that passes it on to a tree that is started next."""
    mark = uuid.uuid4().hex
    return mark, {**environment, MARK: mark}


def tree_use(root: int, mark: str = "") -> TreeUse:
    """Measure the tree of process ``root``, and everything that carries ``mark``."""
    stats = {pid: stat for pid in _all_pids() if (stat := _stat(pid)) is not None}
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(stat.parent, []).append(pid)
    pids = {pid for pid in stats if mark and _carries(pid, mark)} | ({root} & stats.keys())
    pending = list(pids)
    while pending:
        new = [child for child in children.get(pending.pop(), []) if child not in pids]
        pids.update(new)
        pending += new
    return TreeUse(
        cpu=sum(stats[pid].cpu for pid in pids),
        peak_mib=sum(_peak_mib(pid) for pid in pids),
        processes=len(pids),
    )


@dataclass(frozen=True)
class _Stat:
    parent: int
    cpu: float


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> _Stat | None:
    """Return parent and CPU seconds of a process; None if it has just ended."""
    with contextlib.suppress(OSError):
        # The name, in parentheses, may hold spaces; the fields after it do not.
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return _Stat(parent=int(fields[1]), cpu=sum(int(field) for field in fields[11:15]) / _TICKS)
    return None


def _carries(pid: int, mark: str) -> bool:
    with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
        return f"{MARK}={mark}".encode() in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    return False


def _peak_mib(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0

"""CPU seconds and memory of a whole process tree, daemons that left it included. Linux: reads /proc.

A process belongs to the tree if it descends from the root, or if it was started with the tree's mark in its
environment: Ray's daemons detach themselves from whoever started them, but they inherit the environment.
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
    """What the living processes of a tree have used so far.

    Attributes:
        cpu: User and system seconds, with those of children that ended and were waited for.
        peak_mib: Sum of the processes' peak resident memory; pages that several share count once for each.
        processes: How many are alive.
    """

    cpu: float
    peak_mib: float
    processes: int


def marked_environment(environment: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """A fresh mark, and the environment that carries it to a tree about to be started."""
    mark = uuid.uuid4().hex
    return mark, {**environment, MARK: mark}


def tree_use(root: int, mark: str = "") -> TreeUse:
    """Measure the tree of process ``root``, and everything that carries ``mark``."""
    stats = {pid: stat for pid in _all_pids() if (stat := _stat(pid)) is not None}
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(stat.parent, []).append(pid)
    found = {pid for pid in stats if mark and _carries(pid, mark)} | ({root} & stats.keys())
    pending = list(found)
    while pending:
        new = [child for child in children.get(pending.pop(), []) if child not in found]
        found.update(new)
        pending += new
    return TreeUse(
        cpu=sum(stats[pid].cpu for pid in found),
        peak_mib=sum(_peak_mib(pid) for pid in found),
        processes=len(found),
    )


@dataclass(frozen=True)
class _Stat:
    parent: int
    cpu: float


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> _Stat | None:
    """None if the process has just ended."""
    with contextlib.suppress(OSError):
        # The name, in parentheses, may hold spaces; what follows it does not.
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return _Stat(parent=int(fields[1]), cpu=sum(int(field) for field in fields[11:15]) / _TICKS)
    return None


def _carries(pid: int, mark: str) -> bool:
    with contextlib.suppress(OSError):  # ended, or another user's
        return f"{MARK}={mark}".encode() in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    return False


def _peak_mib(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0

"""Count the CPUs that this process may use, which on a shared machine may be a part of them. Standard library only."""

import os
from pathlib import Path

from fl_dualpriv.run import cgroups

_ROOT = Path("/")


def usable_cpus(root: Path = _ROOT) -> int:
    """Count the CPUs that this process may keep busy.

    The affinity of the process (``taskset``, a job of a cluster) bounds it. So does the CPU quota of each control group
    above the process (``docker run --cpus``, a limit of Kubernetes), rounded down, because two processes on one and a
    half CPUs only wait for each other.

    Args:
        root: Root of the file system, ``/``; tests pass another folder.

    Returns:
        The number of CPUs, at least 1. Without affinity and control groups, as on macOS, it is the number of CPUs of
        the machine.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """Return the CPU quotas of this process and of the control groups above it, in CPUs."""
    groups, names = root / "sys/fs/cgroup", cgroups.group_names(root / "proc/self/cgroup")
    pairs = []
    # A machine with both versions has the second one in the folder `unified`.
    for top in (groups, groups / "unified"):
        for path in cgroups.and_above(names.get("")):
            match cgroups.words(top / path / "cpu.max"):
                case [quota, period] if quota.isdigit() and period.isdigit():  # "max 100000" means no quota
                    pairs.append((int(quota), int(period)))
    for path in cgroups.and_above(names.get("cpu")):
        folder = groups / "cpu" / path
        quotas, periods = (cgroups.numbers(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        pairs += zip(quotas, periods, strict=False)  # `numbers` skips a quota of -1, which means no quota
    return [quota / period for quota, period in pairs if period > 0]

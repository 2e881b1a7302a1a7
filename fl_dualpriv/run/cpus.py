"""Counts the CPUs that this process may use: on a shared machine fewer than it has. Standard library only."""

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
        root: ``/``; tests put another tree there.

    Returns:
        1 at least. Without affinity and control groups, as on macOS, it is the number of the machine.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """CPU quotas above this process, in CPUs."""
    groups, names = root / "sys/fs/cgroup", cgroups.group_names(root / "proc/self/cgroup")
    found = []
    # A machine with both versions has the second one in the folder `unified`.
    for top in (groups, groups / "unified"):
        for path in cgroups.and_above(names.get("")):
            match cgroups.words(top / path / "cpu.max"):
                case [quota, period] if quota.isdigit() and period.isdigit():  # "max 100000": no quota
                    found.append((int(quota), int(period)))
    for path in cgroups.and_above(names.get("cpu")):
        folder = groups / "cpu" / path
        quotas, periods = (cgroups.numbers(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        found += zip(quotas, periods, strict=False)  # a quota of -1, which is none, is no number here
    return [quota / period for quota, period in found if period > 0]

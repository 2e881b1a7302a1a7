"""Peak memory of each process, in a local file per process for the owner of the machine.

These files never leave the machine, because they depend on the sizes of batches, which are private. Light on import.
"""

import contextlib
import json
import logging
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from fl_dualpriv.run.cluster import counted, machine, machine_id

_log = logging.getLogger("fl_dualpriv")
_MIB = 2**20
_GROWTH = 1.05
_reported: dict[Path | None, float] = {}


def resident_peak() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    with contextlib.suppress(OSError):  # Linux, where getrusage would count the memory of the parent process, too
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report_peak(folder: Path | None, kind: str, peak: Callable[[], int] = resident_peak) -> None:
    """Log this process's peak, and write it to ``folder/actors/actor-*.json``, when it grew by more than 5 %.

    Args:
        folder: Folder of the run; None to log only. A failure to write there does not stop the run.
        kind: Kind of the measured memory, such as ``cpu`` or ``cuda:0``.
        peak: Function that measures the peak, in bytes.
    """
    size = peak() / _MIB
    if size <= _GROWTH * _reported.get(folder, 0.0):
        return
    _reported[folder] = size
    _log.info("peak memory of process %d: %.0f MiB (%s)", os.getpid(), size, kind)
    if folder is None:
        return
    from fl_dualpriv.files import write_json  # imported late, because it needs torch and the front does not

    with contextlib.suppress(OSError):  # a full disk must not end a round
        content = {"pid": os.getpid(), "machine": machine(), "kind": kind, "peak-mib": round(size, 1)}
        write_json(folder / "actors" / f"actor-{machine_id()}{os.getpid()}.json", content)


def describe_peaks(folder: Path) -> str | None:
    """Describe the peaks of all processes of a run in one line, and the machines if there are several.

    None if no process left a file.
    """
    peaks, machines = [], []
    for file in sorted((folder / "actors").glob("actor-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(file.read_text(encoding="utf-8"))
            peaks.append(float(content["peak-mib"]))
            machines.append(str(content.get("machine", "")))
    if not peaks:
        return None
    if len(peaks) == 1:
        return f"peak memory: 1 actor, {peaks[0]:.0f} MiB"
    where = f"; actors by machine: {counted(machines)}" if len(set(machines)) > 1 else ""
    return f"peak memory: {len(peaks)} actors, up to {max(peaks):.0f} MiB each{where}"

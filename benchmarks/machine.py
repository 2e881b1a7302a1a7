"""Facts about the machine on which the figures depend: processor, versions, and the peak rate of one thread."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "open_clip_torch", "opacus", "flwr", "ray", "numpy")


def one_thread() -> None:
    """Limit torch, and every process started from here, to one thread, because threads on busy cores wait."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    import torch

    torch.set_num_threads(1)


def facts() -> dict[str, Any]:
    """Return processor, cores, memory, load and package versions of this machine."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **_gpu(),
        **{name: _version(name) for name in PACKAGES},
    }


def _gpu() -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def sgemm_peak(seconds: float = 1.5, sides: tuple[int, ...] = (512, 1024, 2048)) -> float:
    """Measure the best rate of fp32 matrix products on one thread over square sizes, in GFLOP per CPU-second."""
    import torch

    best = 0.0
    for side in sides:
        a, b, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
        best = max(best, 2 * side**3 / _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds) / 1e9)
    return best


def _fastest(call: Callable[[], object], seconds: float) -> float:
    call()
    best, end = float("inf"), time.monotonic() + seconds / 3
    while time.monotonic() < end:
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best

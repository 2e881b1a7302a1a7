"""Return the device that a node's owner chose, or the CPU with one line that says why: a node goes on without its GPU.

A researcher's configuration of a run names a device that must exist. The owner's file names a device of a machine whose
driver may fail after an update. ``python -m fl_dualpriv.node.device cuda`` prints the device and the line, so that a
SuperNode, which needs no torch, can ask without loading torch.
"""

import os
import subprocess
import sys

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.env import TEXT

_PROBE_SECONDS = 120.0


def usable_device(device: str) -> tuple[str, str]:
    """Return the device to use.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        ``device`` and an empty text, or ``cpu`` and a line that tells the owner why.
    """
    if device in ("auto", "cpu"):
        return device, ""
    import torch

    from fl_dualpriv.models.checkpoints import resolve_device

    try:
        torch.zeros(1, device=resolve_device(device))
    except (ConfigError, RuntimeError) as error:  # there is no such GPU, or its driver cannot use it
        reason = f"torch sees {torch.cuda.device_count()} CUDA devices"
        if not isinstance(error, ConfigError):
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return "cpu", f'device = "{device}" cannot be used ({reason}); going on with the CPU, which is slower'
    return device, ""


def probe(device: str) -> tuple[str, str]:
    """Call `usable_device` in a separate process, whose GPU memory and libraries are gone when it ends."""
    if device in ("auto", "cpu"):
        return device, ""
    try:
        done = subprocess.run(  # -P: no module of the working folder is imported
            [sys.executable, "-P", "-m", "fl_dualpriv.node.device", device],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | TEXT,
            check=True,
            timeout=_PROBE_SECONDS,
        )
        working_device, _, note = done.stdout.strip().rpartition("\n")[2].partition("\t")
    except (OSError, subprocess.SubprocessError) as error:
        return "cpu", f'device = "{device}" cannot be used ({error}); going on with the CPU, which is slower'
    return working_device, note


if __name__ == "__main__":
    sys.stdout.write("\t".join(usable_device(sys.argv[1])) + "\n")

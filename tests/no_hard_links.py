"""A process whose kernel refuses hard links, as a file system without them does: vfat, exFAT, many network mounts."""

import contextlib
import ctypes
import os
import platform
import struct
import sys
import tempfile
from pathlib import Path

_NUMBERS = {"x86_64": (86, 265), "aarch64": (37,)}  # of the system calls link and linkat
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def cannot_refuse() -> str:
    """Why a test cannot have this; empty: it can."""
    if sys.platform != "linux" or platform.machine() not in _NUMBERS:
        return f"no list of system calls for {sys.platform} on {platform.machine()}"
    return ""


def refuse_hard_links(error: int) -> None:
    """From now on ``os.link`` fails with ``error`` in this process and in all that it starts; there is no way back."""
    numbers = _NUMBERS[platform.machine()]
    rows = [(_LOAD, 0, 0, 0)]  # the number of the call
    rows += [(_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    rows += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE | error)]
    program = _Program(len(rows), b"".join(struct.pack("=HBBI", *row) for row in rows))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").touch()
        with contextlib.suppress(OSError):
            os.link(Path(folder) / "a", Path(folder) / "b")
        assert not (Path(folder) / "b").exists(), "hard links are still made"

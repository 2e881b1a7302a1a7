"""Files that are never half written: a temporary neighbour first, then one rename."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


def write_bytes(path: Path, content: bytes, *, synced: bool = False, private: bool = False) -> None:
    """Replace ``path`` by ``content`` in one step, creating its folder.

    Args:
        path: The file.
        content: All of it.
        synced: Whether it is on disk when this returns.
        private: Whether only this user may read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if private:
            temporary.touch(mode=0o600)
        temporary.write_bytes(content)
        if synced:
            _sync(temporary)
        temporary.replace(path)
        if synced:
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def keep_previous(path: Path, previous: Path) -> None:
    """Make ``previous`` the file that ``path`` is now; ``path`` stays.

    A second name for the file (a hard link) is made where the file system has hard links, and a copy elsewhere, as on
    vfat, exFAT and many network mounts.

    Guarantee:
        A crash at any moment leaves whole files under both names: what was under ``previous``, or what is under
        ``path``.
    """
    temporary = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # each file system has a number of its own for "no hard links here"
            temporary.touch(mode=0o600)
            shutil.copyfile(path, temporary)
            with contextlib.suppress(OSError):
                shutil.copymode(path, temporary)
            _sync(temporary)
        temporary.replace(previous)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused (they are not JSON)."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def append_json_line(path: Path, value: Any, *, synced: bool = False) -> None:
    """Append ``value`` as one line, in one write; ``synced``: on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")
        if synced:
            file.flush()
            os.fsync(file.fileno())
    if synced:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """A file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, private: bool = False
) -> None:
    """Write a safetensors file, the same bytes for the same content; ``private``: only this user may read it."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, _in_order(save(contiguous, dict(metadata))), private=private)


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its header's names in order: safetensors writes metadata in an order of chance."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers after it stay aligned
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file alone."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})

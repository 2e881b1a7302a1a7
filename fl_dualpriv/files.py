"""Atomic file writes: write a temporary file in the same folder, then rename it once."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# torch and safetensors are imported where tensors are read or written, because most callers have none.


def write_bytes(path: Path, content: bytes, *, synced: bool = False, private: bool = False) -> None:
    """Replace ``path`` by ``content`` in one step, creating its folder.

    Args:
        path: The file.
        content: The full content of the file.
        synced: True if the file must be on disk when this returns.
        private: True if only this user may read the file.
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
    """Make ``previous`` a second name or a copy of the current file ``path``; ``path`` stays.

    Where the file system has hard links, ``previous`` becomes a hard link. Elsewhere, as on vfat, exFAT and many
    network mounts, it becomes a copy.

    Guarantee:
        A crash at any moment leaves whole files under both names. ``previous`` then holds its old content or the
        content of ``path``.
    """
    temporary = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # each file system reports "no hard links" with a different error number
            temporary.touch(mode=0o600)
            shutil.copyfile(path, temporary)
            with contextlib.suppress(OSError):
                shutil.copymode(path, temporary)
            _sync(temporary)
        temporary.replace(previous)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON. Refuse NaN and infinity, because they are not JSON."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def append_json_line(path: Path, value: Any, *, synced: bool = False) -> None:
    """Append ``value`` as one JSON line, in one write; with ``synced`` the line is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")
        if synced:
            file.flush()
            os.fsync(file.fileno())
    if synced:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(
    path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str], *, private: bool = False
) -> None:
    """Write a safetensors file, with the same bytes for the same content.

    With ``private`` only this user may read the file.
    """
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, _in_order(save(contiguous, dict(metadata))), private=private)


def _in_order(content: bytes) -> bytes:
    """Sort the names in the header of a safetensors file, because safetensors writes metadata in a random order."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensor data after the header stay aligned
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def read_tensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Return the tensors and the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """Return only the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})

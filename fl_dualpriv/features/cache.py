"""Image features on disk: computed once per data set and model, and shared by all processes of a machine. numpy only.

Layout: ``ROOT/KEY/shard-00000.npy``, float32 (images, embed_dim), `SHARD` images each. After the array follow 32 bytes
of checksum, which numpy does not read. KEY is a hash of the content of the data set and of everything that turns it
into features. A data folder that was renamed thus finds its features again.

Features of private images are private data and must be protected like the images. Only their owner can read the folders
(0700). Features that another user may have put there are not read: a folder or file of another owner, or a folder that
others may write to, is not used. Features are never sent.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import mmap
import os
import resource
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from fl_dualpriv.run.user_folders import home

SHARD = 256
"""Number of images in a shard. A shard is always encoded whole, because the size of a batch changes float rounding."""

IN_MEMORY = 2**26
"""Size of a table in bytes up to which rows come from one array in memory instead of many mapped shards."""

_OTHER_FILES = 512
"""Number of open files that a process may need in addition to the mapped shards."""

_CHECKSUM = hashlib.sha256().digest_size

Encode = Callable[[np.ndarray], tuple[np.ndarray, bool]]
"""Map from indices to features (images, embed_dim) and a flag: False if a record may be readable later."""


def cache_key(described: Sequence[object]) -> str:
    """Return a folder name for everything that features depend on: 32 hex digits of a SHA-256."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def cache_root(setting: str) -> Path | None:
    """Return the folder for ``resources.feature-cache``: empty means one in the user's home, ``off`` gives None."""
    if setting == "off":
        return None
    return Path(setting) if setting else home() / ".fl-dualpriv" / "features"


class FeatureTable:
    """The features of one data set; a shard is computed when one of its rows is first requested.

    Guarantee:
        `rows` gives bitwise the same numbers with and without a folder, for any order of requests, no matter which
        process asks first, and after any process was killed at any moment. Every shard is encoded from the same indices
        in one call and appears in the folder only by a rename. A process verifies a shard's checksum when it first
        opens the shard, and the shard is computed again if the checksum shows damage. Each shard is encoded by one
        process at a time. A folder that cannot be used costs a warning and speed, never the run.

    Args:
        size: Number of images in the data set.
        embed_dim: Width of a feature.
        encode: Function that computes the features of one shard.
        root: Folder in which features are kept; None keeps them only in memory.
        key: Name of the folder below ``root``, see `cache_key`.
    """

    def __init__(self, *, size: int, embed_dim: int, encode: Encode, root: Path | None, key: str) -> None:
        self._size, self._dim, self._encode = size, embed_dim, encode
        shards = -(-size // SHARD)
        self._present = np.zeros(shards, dtype=bool)
        self._complete = shards == 0
        self._shards: list[np.ndarray] = [np.empty((0, embed_dim), np.float32)] * shards
        small = 4 * size * embed_dim <= IN_MEMORY
        self._whole = np.empty((size, embed_dim), np.float32) if small else None
        self._maps_left = 0 if small else _spare_files(shards)
        self._root = root
        self._folder = None if root is None else root / key
        if self._folder is not None and root is not None:
            try:
                _open_private(root, self._folder)
            except OSError as error:
                self._go_without(error)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the features of some images, float32 (len(indices), embed_dim), in a new array."""
        if not self._complete:
            shards = indices // SHARD
            self._fill(np.unique(shards[~self._present[shards]]).tolist())
        if self._whole is not None:
            return self._whole[indices]
        rows = np.empty((len(indices), self._dim), dtype=np.float32)
        for row, index in enumerate(indices.tolist()):  # clients are small; grouping by shard would cost more
            rows[row] = self._shards[index // SHARD][index % SHARD]
        return rows

    def _span(self, shard: int) -> tuple[int, int]:
        return shard * SHARD, min((shard + 1) * SHARD, self._size)

    def _fill(self, shards: list[int]) -> None:
        waiting = [shard for shard in shards if not self._read(shard)]
        # Shards that no other process works on come first, so that processes with the same shards share the work.
        for wait in (False, True):
            waiting = [shard for shard in waiting if not self._make(shard, wait=wait)]
        self._complete = bool(self._present.all())

    def _make(self, shard: int, *, wait: bool) -> bool:
        """Compute a shard, or read the one that another process computed; False if that process still holds the lock.

        With ``wait`` the result is True, because the method waits for the lock.
        """
        if self._folder is None:
            self._keep(shard, self._encode(np.arange(*self._span(shard)))[0])
            return True
        try:
            lock = _acquire(self._folder / f"{_name(shard)}.lock", wait=wait)
        except BlockingIOError:
            return False
        except OSError as error:
            self._go_without(error)
            return self._make(shard, wait=wait)
        with lock:
            if self._read(shard):
                return True
            rows, final = self._encode(np.arange(*self._span(shard)))
            self._keep(shard, rows)
            if final:
                try:
                    _write(self._folder, shard, rows)
                except OSError as error:
                    self._go_without(error)
        if final and self._whole is None:
            self._read(shard)  # use the mapped file instead of the copy in memory
        return True

    def _read(self, shard: int) -> bool:
        """Map a finished shard; False if there is none or it is damaged."""
        if self._folder is None:
            return False
        start, stop = self._span(shard)
        rows = _map(self._folder / f"{_name(shard)}.npy", (stop - start, self._dim))
        if rows is None:
            return False
        if self._whole is None:
            self._maps_left -= 1
            if self._maps_left < 0:
                rows = rows.copy()  # without a map, the file is closed
        self._keep(shard, rows)
        return True

    def _keep(self, shard: int, rows: np.ndarray) -> None:
        if self._whole is None:
            self._shards[shard] = rows
        else:
            start, stop = self._span(shard)
            self._whole[start:stop] = rows
        self._present[shard] = True

    def _go_without(self, error: OSError) -> None:
        self._folder = None
        warnings.warn(
            f"image features are not kept in {self._root} (resources.feature-cache): {error.strerror or error}; every "
            "process computes its own",
            stacklevel=1,  # the same place each time, so that Python shows the same text only once
        )


def _spare_files(wanted: int) -> int:
    """Return the number of files that may stay open for maps, after raising the limit of open files if needed.

    Every map holds one open file. A process that has none left cannot read images any more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + _OTHER_FILES:
        most = wanted + _OTHER_FILES if hard == resource.RLIM_INFINITY else min(wanted + _OTHER_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return wanted if soft == resource.RLIM_INFINITY else soft - _OTHER_FILES


def _name(shard: int) -> str:
    return f"shard-{shard:05d}"


def _open_private(root: Path, folder: Path) -> None:
    """Make the folders so that only their owner can use them.

    Raises:
        OSError: If the folders cannot be made, or another user owns them or can write to them. Features in them may
            then be forged, even if from now on only their owner can write to them.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_ours(root, root.stat())  # stat follows links: the root may be a link, for example to a larger disk
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{folder} is a link or a file")
    _check_ours(folder, status)
    if status.st_mode & 0o077:
        folder.chmod(0o700)


def _check_ours(folder: Path, status: os.stat_result) -> None:
    if status.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    if status.st_mode & 0o022:
        raise PermissionError(f"others can write to {folder}; name or make a folder that only its owner can write to")


def _acquire(path: Path, *, wait: bool) -> IO[bytes]:
    """Lock a file until it is closed; the kernel releases the lock if the process is killed.

    Raises:
        BlockingIOError: If another process holds it, and ``wait`` is false.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("ab"))
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        stack.pop_all()
        return file


def _map(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Map the rows of a finished shard read-only; None if the file is missing, damaged or of another user."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None
    head = _head(shape)
    body = memoryview(content)[:-_CHECKSUM]
    if len(body) != len(head) + 4 * shape[0] * shape[1] or body[: len(head)] != head:
        return None
    if hashlib.sha256(body).digest() != content[-_CHECKSUM:]:
        return None
    return np.frombuffer(body, dtype=np.float32, offset=len(head)).reshape(shape)


def _head(shape: tuple[int, int]) -> bytes:
    """Return the header that numpy writes before the numbers; only a shard with this header is read."""
    content = io.BytesIO()
    describe = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, describe)
    return content.getvalue()


def _write(folder: Path, shard: int, rows: np.ndarray) -> None:
    """Put a finished shard in place. The caller holds its lock, so unfinished files were left by a killed process."""
    for leftover in folder.glob(f".{_name(shard)}.*.tmp"):
        leftover.unlink(missing_ok=True)
    content = _head((len(rows), rows.shape[1])) + np.ascontiguousarray(rows, dtype=np.float32).tobytes()
    temporary = folder / f".{_name(shard)}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave a file of the right length without content
        temporary.replace(folder / f"{_name(shard)}.npy")
    finally:
        temporary.unlink(missing_ok=True)

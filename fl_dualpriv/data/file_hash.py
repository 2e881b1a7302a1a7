"""The hash of a file's bytes, which exists for files that cannot be read, too. Standard library only."""

import errno
import hashlib
import os
from pathlib import Path

NO_STAMP = (0, 0, 0, 0)
_LASTING = frozenset({errno.ENOENT, errno.EACCES, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG})
"""Errors that say something about the file: it is missing, closed to us or none. Any other may pass."""


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino % 2**63


def file_hash(path: Path) -> tuple[bytes, tuple[int, ...], int | None]:
    """32 bytes, the file's stamp, and the number of the error that hid it: 0 for none, None for one that may pass.

    A file that cannot be read has a hash too, or one bad record would stop a DP run: one of its own per lasting error,
    and a new one each time if the error may pass, because the file's content is then not known.
    """
    try:
        with path.open("rb") as file:
            stamp = stamp_of(os.fstat(file.fileno()))
            content = hashlib.file_digest(file, "sha256").digest()
            if stamp_of(os.fstat(file.fileno())) == stamp:
                return content, stamp, 0
    except OSError as error:
        if error.errno in _LASTING:
            return error.errno.to_bytes(32, "big"), NO_STAMP, error.errno
    return os.urandom(32), NO_STAMP, None

"""The hash of a file's bytes. Files that cannot be read also have one. Standard library only."""

import errno
import hashlib
import os
from pathlib import Path

NO_STAMP = (0, 0, 0, 0)
_LASTING = frozenset({errno.ENOENT, errno.EACCES, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG})
"""Errors that are facts about the file: it is missing, not readable for this user, or not a file. Other errors may be
temporary."""


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """Return size, times and inode of a file. They change when the file is written or replaced."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino % 2**63


def file_hash(path: Path) -> tuple[bytes, tuple[int, ...], int | None]:
    """Hash a file's bytes.

    A file that cannot be read has a hash too. Otherwise one bad record would stop a DP run. Every lasting error has a
    fixed hash. A temporary error gives a new hash each time, because the file's content is not known.

    Returns:
        Hash of 32 bytes, the file's stamp, and an error number: 0 if the file was read, the number of a lasting error,
        or None for an error that may be temporary.
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

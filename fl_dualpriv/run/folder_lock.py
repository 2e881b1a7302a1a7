"""Lock for one run at a time in a folder; the kernel releases it when its process ends in any way."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fl_dualpriv.errors import ConfigError

NAME = "run.lock"


@contextlib.contextmanager
def held_alone(folder: Path, seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of ``folder`` for one run; create the folder if necessary.

    Args:
        folder: Folder into which a run writes.
        seconds: Time to wait for a run that is about to end.

    Raises:
        ConfigError: If another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with (folder / NAME).open("a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise ConfigError(
                        f"{folder} is in use: process {file.read(20).strip() or '?'} runs in it; wait for its end, or "
                        "give another folder (output.dir, --out)"
                    ) from None
                time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def is_held(folder: Path) -> bool | None:
    """Return True if a run holds the lock of ``folder``, False if its run has ended, None if there never was a run."""
    try:
        with (folder / NAME).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return None

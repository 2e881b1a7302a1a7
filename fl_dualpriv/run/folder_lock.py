"""One run at a time in a folder: a lock that the kernel lets go when its process ends, however that happens."""

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
    """Hold ``folder``, which is made if need be, for one run.

    Args:
        folder: Where a run writes.
        seconds: How long to wait for a run that is being ended.

    Raises:
        ConfigError: If another process holds it.
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

"""Folders of the current user: the home folder, or a replacement for it. Standard library only."""

import os
import stat
import tempfile
from pathlib import Path

from fl_dualpriv.errors import ConfigError


def home() -> Path:
    """Return the user's home folder.

    A container often runs as a user id that has no entry in the list of users, and without ``HOME``. Then a folder in
    the folder for temporary files replaces the home. Only this user may access it (0700).

    Raises:
        ConfigError: If there is no home, and the replacement cannot be made or belongs to another user. That user could
            read features of private images in it or put false ones there.
    """
    try:
        return Path.home()
    except RuntimeError:
        return _stand_in()


def settle_home() -> str:
    """Set ``HOME`` and a user name where the system has none, because other libraries ask for both.

    Returns:
        One line for the user; empty if there was a home.

    Raises:
        ConfigError: As in `home`.
    """
    try:
        Path.home()
        line = ""
    except RuntimeError:
        folder = _stand_in()
        os.environ["HOME"] = str(folder)
        line = f"this user (id {os.getuid()}) has no home folder: {folder} stands in for it; set HOME to choose another"
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):  # as getpass.getuser looks
        try:
            import pwd

            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"user-{os.getuid()}"
        except ImportError:  # a system without user ids has no such users
            pass
    return line


def expanded(path: str | Path) -> Path:
    """Return the path with ``~`` and ``~name`` replaced by home folders.

    Raises:
        ConfigError: If there is no such user, or this user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        if Path(path).parts[0] == "~":
            return _stand_in().joinpath(*Path(path).parts[1:])
        raise ConfigError(
            f"{path}: this system has no user {Path(path).parts[0][1:]!r}; write the whole path"
        ) from None


def _stand_in() -> Path:
    name = f"fl-dualpriv-{os.getuid()}"
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / name  # for the message, if no temporary folder is found
    try:
        folder = Path(tempfile.gettempdir()) / name
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
        reason = "is a link or belongs to another user"
    except OSError as error:
        reason = f"cannot be made ({error.strerror or error})"
    raise ConfigError(
        f"this user (id {os.getuid()}) has no home folder, and {folder}, which would stand in for it, {reason}: set "
        "HOME to a folder of this user"
    )

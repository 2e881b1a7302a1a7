"""Finds the programs of this installation: Flower's, and ours. Standard library only."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

_OWNERS = ("flwr", "fl-dualpriv")


def find(name: str) -> str | None:
    """Find a program.

    The places, in order: where the Flower and the fl-dualpriv that this interpreter imports have installed their
    programs (also with ``pip install --user``, ``--prefix`` or ``--target``), the folders of ``PATH``, the folder of
    the interpreter. The first place goes before ``PATH`` because another environment's Flower may stand there.

    Args:
        name: File name, such as ``flower-superlink``.

    Returns:
        Its absolute path; None if it is in none of these places.
    """
    for path in _recorded(name):
        if os.access(path, os.X_OK) and path.is_file():
            return str(path)
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(_own_folders()))
    return None if found is None else os.path.abspath(found)  # noqa: PTH100 - a program is known by its link's name


def search_path(path: str | None = None) -> str:
    """The ``PATH`` for programs that start Flower's programs by bare name: that of `find` comes first.

    Args:
        path: The ``PATH`` to put them in front of; None: that of this process.
    """
    found = find("flower-superlink")
    first = [str(Path(found).parent)] if found else []
    rest = os.environ.get("PATH", os.defpath) if path is None else path
    return os.pathsep.join(dict.fromkeys([*first, *rest.split(os.pathsep), *_own_folders()]))


def places() -> str:
    """Name the folders in which `find` looks, for a message."""
    return f"the folder where Flower was installed, PATH ({os.environ.get('PATH', os.defpath)}), {_own_folders()[0]}"


def _recorded(name: str) -> Iterator[Path]:
    """The paths of a program in the records that pip wrote when it installed Flower and this package."""
    for owner in _OWNERS:
        try:
            files = metadata.distribution(owner).files or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == name and file.suffix != ".py":
                # The record's paths are relative to site-packages, with "..".
                yield Path(os.path.abspath(file.locate()))  # noqa: PTH100 - resolve() would follow links


def _own_folders() -> list[str]:
    """The folders of this interpreter's programs; in a virtual environment they are one."""
    return list(dict.fromkeys([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]))

"""Find the programs of this installation: Flower's and this package's. Standard library only."""

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

    The function searches these places in order. First come the folders into which the imported Flower and fl-dualpriv
    have installed their programs (also with ``pip install --user``, ``--prefix`` or ``--target``). Then come the
    folders of ``PATH``, and then the folder of the interpreter. The installation folders come before ``PATH`` because
    ``PATH`` may hold another environment's Flower.

    Args:
        name: File name, such as ``flower-superlink``.

    Returns:
        Absolute path of the program; None if it is in none of these places.
    """
    for path in _recorded(name):
        if os.access(path, os.X_OK) and path.is_file():
            return str(path)
    program = shutil.which(name) or shutil.which(name, path=os.pathsep.join(_own_folders()))
    return None if program is None else os.path.abspath(program)  # noqa: PTH100 - keep the name of a link to a program


def search_path(path: str | None = None) -> str:
    """Return a ``PATH`` for programs that start Flower's programs by bare name; the folder that `find` uses is first.

    Args:
        path: ``PATH`` to extend. None means the ``PATH`` of this process.
    """
    superlink = find("flower-superlink")
    first = [str(Path(superlink).parent)] if superlink else []
    rest = os.environ.get("PATH", os.defpath) if path is None else path
    return os.pathsep.join(dict.fromkeys([*first, *rest.split(os.pathsep), *_own_folders()]))


def places() -> str:
    """Name the folders in which `find` looks, for a message."""
    return f"the folder where Flower was installed, PATH ({os.environ.get('PATH', os.defpath)}), {_own_folders()[0]}"


def _recorded(name: str) -> Iterator[Path]:
    """Yield the paths of a program from the records that pip wrote when it installed Flower and this package."""
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
    """Return the folders of this interpreter's programs. In a virtual environment there is only one."""
    return list(dict.fromkeys([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]))

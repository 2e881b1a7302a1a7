"""Runs at the start of every Python process of a virtual environment; acts only in Flower's own programs.

``python -m fl_dualpriv.flower_env install`` copies this file into the environment's site-packages, next to a ``.pth``
line that imports it and a JSON file with the variables. It imports nothing but the standard library, because it is paid
for by every start of the interpreter.
"""

import json
import os
import re
import sys
from pathlib import Path

_FLOWER = re.compile(r"(flwr|flower)(-[a-z-]+)?(\.exe)?")
_INTERPRETER_OPTIONS_WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")


def program(orig_argv: list[str]) -> str:
    """The file name of the script that ``orig_argv`` runs; empty for ``-c``, ``-m`` and interactive use."""
    words = iter(orig_argv[1:])
    for word in words:
        if word in _INTERPRETER_OPTIONS_WITH_VALUE:
            next(words, None)
        elif word.startswith("-"):
            if word in ("-c", "-m"):
                return ""
        else:
            return Path(word).name
    return ""


def apply(name: str, state: Path) -> bool:
    """Prepare this process for the Flower program ``name``.

    Args:
        name: Result of `program`.
        state: JSON file {"environment": {name: value}, "scripts": folder of the console scripts}.

    Returns:
        Whether anything was done: False for programs that are not Flower's.
    """
    if not _FLOWER.fullmatch(name):
        return False
    settings = json.loads(state.read_text(encoding="utf-8"))
    for key, value in settings["environment"].items():
        os.environ.setdefault(key, value)  # what the user has set stays
    # Flower starts flower-superlink, flower-superexec and flwr-simulation by bare name. First on PATH, they are this
    # environment's even where it is not activated, or where another one is.
    path = os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != settings["scripts"]:
        os.environ["PATH"] = settings["scripts"] + os.pathsep + path
    home = Path(os.environ["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    if name.startswith("flwr-simulation"):
        # Ray puts the working directory of its driver ahead of the app on its workers' path, so packages of the same
        # name lying there would run instead of the app. Nothing lies in an empty folder.
        empty = home / "empty"
        empty.mkdir(exist_ok=True)
        os.chdir(empty)
    if name.startswith("flower-superlink"):
        (home / "superlink.pid").write_text(str(os.getpid()), encoding="utf-8")
    return True


def main(state: Path) -> None:
    """Entry point of the ``.pth`` line; a missing or broken state file never stops an interpreter from starting."""
    name = program(sys.orig_argv)
    try:
        apply(name, state)
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"fl-dualpriv: {name} runs without this checkout's settings ({error}); run `make setup`\n")

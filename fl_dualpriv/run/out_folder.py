"""The folder that the front gives to a run: check it, clear it, and see if a run began in it."""

import json
import shutil
from pathlib import Path, PurePosixPath

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.run.file_kinds import RUN_FILES
from fl_dualpriv.run.folder_lock import held_alone

# All files of a run in its folder. --overwrite removes these and no other files; it holds the lock meanwhile.
_LEFT = [PurePosixPath(file.pattern).parts for file in RUN_FILES if file.place == "run"]
LEFT_FILES = sorted({parts[0] for parts in _LEFT if len(parts) == 1} - {"run.lock"})
LEFT_FOLDERS = sorted({parts[0] for parts in _LEFT if len(parts) > 1} | {"clients"})
_OF_A_START = ("error.json", "error.log", "flower.log", "run.json")
"""Files of a start that failed before anything ran."""


def prepare_folder(out: Path, *, overwrite: bool) -> None:
    """Create the folder of a run, and remove the files of an earlier failed start from it.

    Args:
        out: Folder of the run.
        overwrite: True to remove the results of an earlier run.

    Raises:
        ConfigError: If the folder cannot be used, or if it holds a run and ``overwrite`` is False.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give a folder with --out")
    if (out / "pyproject.toml").exists():
        # The clients/ of a project is source code, and --overwrite removes the clients/ of a run.
        raise ConfigError(f"{out} holds a project, not results: give another folder with --out")
    # A failed start leaves error.json and a log. No run began, so nothing is lost.
    marks = ("summary.json", "rounds.jsonl", "checkpoint.bin", "checkpoint.previous.bin", "ledger.jsonl")
    ran = [name for name in marks if (out / name).exists()]
    ran += ["clients/"] if any(out.glob("clients/client-*")) else []
    if ran and not overwrite:
        ended = (out / "summary.json").exists() or not (out / "run.json").exists()
        go_on = "" if ended else f", or continue it: fl-dualpriv run --resume {out}"
        raise ConfigError(
            f"{out} holds an earlier run ({ran[0]}): give another --out, or --overwrite to replace it{go_on}"
        )
    try:
        with held_alone(out):  # a run in progress loses nothing
            if ran or (out / "error.json").exists() or (out / "flower.log").exists():
                for name in LEFT_FILES if ran else _OF_A_START:
                    (out / name).unlink(missing_ok=True)
                for name in LEFT_FOLDERS if ran else ["actors"]:
                    if (out / name).is_dir() and not (out / name).is_symlink():
                        shutil.rmtree(out / name)
    except OSError as error:
        raise ConfigError(f"{out} cannot be used for results: {error.strerror or error}; give another --out") from error


def is_refusal(error: Exception, out: Path) -> bool:
    """Return True if configuration or data were refused, by an engine in this process or in ``error.json``."""
    try:
        kind = json.loads((out / "error.json").read_text(encoding="utf-8"))["type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = ""
    return bool({kind, type(error).__name__} & {ConfigError.__name__, PrivacyError.__name__})


def progress_of(out: Path) -> list[tuple[int, int] | None]:
    """Return stamps that change when a run in the folder begins or makes progress."""
    stamps: list[tuple[int, int] | None] = []
    for name in ("checkpoint.bin", "rounds.jsonl"):
        try:
            status = (out / name).stat()
            stamps.append((status.st_mtime_ns, status.st_ino))
        except OSError:
            stamps.append(None)
    return stamps

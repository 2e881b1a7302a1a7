"""A separate Python environment for pfl, which needs dp-accounting < 0.6; this project cannot use that version.

The environment sees the packages of the running one, so torch is not installed twice. It adds pfl and its requirements,
which take precedence.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.harness import BENCH_DIR

REQUIREMENT = "pfl>=0.6,<0.7"
"""Requirement of pfl, as in the extra ``bench``."""


def pfl_python(folder: Path = BENCH_DIR / "venv") -> Path:
    """Return the interpreter that has pfl; the first call makes the environment.

    Raises:
        RuntimeError: If the environment cannot be made; the message holds pip's error.
    """
    python, done = folder / "bin" / "python", folder / ".set-up"
    if done.exists():
        return python
    _call([sys.executable, "-m", "venv", "--clear", str(folder)])
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "around.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", REQUIREMENT])
    _call([str(python), "-c", "import pfl.model.pytorch"])
    done.touch()  # last, so that an interrupted set-up starts again
    return python


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")

"""An environment for pfl: it needs dp-accounting < 0.6, which this project cannot use, so it gets one beside it.

The environment sees the packages of the running one (torch is not installed twice) and adds pfl with what it needs;
its own packages come first.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.harness import BENCH_DIR

REQUIREMENT = "pfl>=0.6,<0.7"
"""What the extra ``bench`` names."""


def pfl_python(folder: Path = BENCH_DIR / "venv") -> Path:
    """The interpreter that has pfl; the environment is made at the first call and kept.

    Raises:
        RuntimeError: If it cannot be made: pip's own words say why.
    """
    python, done = folder / "bin" / "python", folder / ".set-up"
    if done.exists():
        return python
    _call([sys.executable, "-m", "venv", "--clear", str(folder)])
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "around.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", REQUIREMENT])
    _call([str(python), "-c", "import pfl.model.pytorch"])
    done.touch()  # last: a set-up that was cut off starts again
    return python


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")

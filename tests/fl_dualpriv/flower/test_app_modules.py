"""A package on PYTHONPATH that has the name of one of the app's is not imported in its place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROJECT = """[tool.flwr.app.components]
serverapp = "simulations.server_app:app"
clientapp = "clients.app:app"
"""


def write(folder: Path, says: str) -> Path:
    for package, module in (("simulations", "server_app"), ("clients", "app"), ("strategies", "mine")):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
        (folder / package / f"{module}.py").write_text(f"app = {says!r}\n")
    (folder / "attacks").mkdir()
    (folder / "attacks" / "__init__.py").touch()
    (folder / "attacks" / "report.py").write_text(f"app = {says!r}\n")
    (folder / "clients" / "app.py").write_text("import strategies.mine\napp = strategies.mine.app\n")
    (folder / "pyproject.toml").write_text(PROJECT + f"# {says} ε\n", encoding="utf-8")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "decoy", "the decoy"), write(tmp_path / "app", "the app")


def python(code: str, *path: Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    # An editable installation has the app on the module path, behind PYTHONPATH; so it is here.
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )


def test_the_local_engine_and_an_audit_import_the_apps_own(folders: tuple[Path, Path], tmp_path: Path) -> None:
    decoy, app = folders
    code = (
        "from pathlib import Path\n"
        "from fl_dualpriv.flower.local import load_apps\n"
        "from fl_dualpriv.cli.audit import load_attacks\n"
        f"app = Path({str(app)!r})\n"
        "print(*load_apps(app), load_attacks(app).app, sep='; ')"
    )
    (tmp_path / "empty").mkdir()
    for path, cwd in (((decoy, app), tmp_path / "empty"), ((app,), decoy)):  # on PYTHONPATH; where the user is
        done = python(code, *path, cwd=cwd)
        assert done.stdout.strip() == "the app; the app; the app", done.stderr


def test_one_that_was_imported_before_is_an_error_that_says_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    decoy, app = folders
    code = (
        "import simulations\n"  # as a .pth file or sitecustomize may do
        "from pathlib import Path\n"
        "from fl_dualpriv.flower.app_modules import import_from, put_first\n"
        f"put_first(Path({str(app)!r}))\n"
        f"import_from(Path({str(app)!r}), 'simulations.server_app')"
    )
    (tmp_path / "empty").mkdir()
    done = python(code, decoy, app, cwd=tmp_path / "empty")
    assert done.returncode != 0
    assert f"was imported from {decoy / 'simulations' / 'server_app.py'}" in done.stderr
    assert "PYTHONPATH" in done.stderr

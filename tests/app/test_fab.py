"""The FAB is the app alone: it builds from any folder, carries no library, and runs beside an installed one."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# As in a fresh clone: .gitignore is there, since Flower's build reads it and may stumble over it.
IGNORED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "runs", "dist", "build")


@pytest.fixture(scope="module")
def fab(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # Flower derives names from folders; a hyphen is no part of a Python name, and every clone may have one.
    tree = tmp_path_factory.mktemp("clone") / "my-check-out"
    shutil.copytree(ROOT, tree, ignore=IGNORED)
    # What `fl-dualpriv run --out sketches` and `export sketches` leave where they are called, as docs/prompts.md does.
    for name in ("clients/client-000/ledger.jsonl", "operator/totals.json", "summary.json", "plugins/notes.md"):
        (tree / "sketches" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "sketches" / name).write_text("{}")
    (tree / "sketches-client-2.md").write_text("a card")
    flwr = Path(sysconfig.get_path("scripts")) / "flwr"
    home = tmp_path_factory.mktemp("home")  # Flower writes settings there
    done = subprocess.run(
        [str(flwr), "build", "--app", str(tree)],
        cwd=home,
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = [*home.glob("*.fab"), *tree.glob("*.fab")]
    assert file.stat().st_size < 10 * 1024**2  # Flower's limit
    return zipfile.ZipFile(file)


def test_the_fab_carries_the_app(fab: zipfile.ZipFile):
    names = set(fab.namelist())
    assert {"pyproject.toml", "clients/app.py", "simulations/server_app.py", "strategies/dpfpl.py"} <= names
    modules = {p.relative_to(ROOT).as_posix() for f in ("clients", "strategies") for p in (ROOT / f).glob("*.py")}
    assert modules <= names


def test_the_fab_carries_no_library_no_tests_and_no_weights(fab: zipfile.ZipFile):
    names = fab.namelist()
    tops = {name.partition("/")[0] for name in names if "/" in name} - {".info"}
    assert tops == {"clients", "strategies", "simulations"}
    assert not [name for name in names if name.endswith((".safetensors", ".npz", ".png", ".pt"))]


def test_no_result_and_no_file_of_an_operator_travels(fab: zipfile.ZipFile):
    """Else the ledgers of all clients go to every node, and the digest that owners pinned changes with each run."""
    assert [name for name in fab.namelist() if "sketches" in name] == []


@pytest.mark.slow  # a process that imports the whole app
def test_the_fab_imports_from_itself_alone(fab: zipfile.ZipFile, tmp_path: Path):
    fab.extractall(tmp_path / "app")
    # The library as an installed one: without the checkout's clients/, strategies/ and simulations/ in reach.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "fl_dualpriv").symlink_to(ROOT / "fl_dualpriv")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path / "app")!r}, {str(tmp_path / "site")!r}]
import clients.app, simulations.server_app, strategies.dpfpl, strategies.fedavg
for module in (clients.app, simulations.server_app, strategies.dpfpl, strategies.fedavg):
    print(module.__file__)
"""
    # -P: the working directory is not on the path
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) == 4
    assert all(Path(file).is_relative_to(tmp_path / "app") for file in files)


def test_the_drivers_import_of_the_client_app_loads_no_torch(fab: zipfile.ZipFile, tmp_path: Path):
    fab.extractall(tmp_path / "app")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'app')!r}); import clients.app; "
        "print([m for m in ('torch', 'open_clip', 'matplotlib') if m in sys.modules])"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr

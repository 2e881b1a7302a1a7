"""The wheel is the library alone: nothing with a general name may reach site-packages."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def copy_tree(target: Path) -> Path:
    """What a commit of the working tree would hold."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # a file deleted but not committed is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    tree, out = copy_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    assert file.name == f"fl_dualpriv-{VERSION}-py3-none-any.whl"
    return zipfile.ZipFile(file)


def test_top_level_is_the_library_alone(wheel: zipfile.ZipFile):
    assert {name.partition("/")[0] for name in wheel.namelist()} == {
        "fl_dualpriv",
        f"fl_dualpriv-{VERSION}.dist-info",
    }


def test_every_module_is_inside(wheel: zipfile.ZipFile):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fl_dualpriv").rglob("*.py")}
    assert modules <= set(wheel.namelist())


def test_assets_are_inside_and_small(wheel: zipfile.ZipFile):
    assets = [path for path in (ROOT / "fl_dualpriv" / "assets").rglob("*") if path.is_file()]
    shipped = {path.relative_to(ROOT).as_posix() for path in assets if "__pycache__" not in path.parts}
    assert {name for name in wheel.namelist() if "/assets/" in name} == shipped
    assert sum(wheel.getinfo(name).file_size for name in shipped) <= 10 * 1024**2
    if (ROOT / "fl_dualpriv" / "assets" / "demo" / "open_clip_model.safetensors").exists():
        demo = {name.rpartition("/")[2] for name in shipped if "/demo/" in name}
        assert {"open_clip_config.json", "open_clip_model.safetensors", "vocabulary.json", "classes.json"} <= demo


def test_the_command_and_the_licence_are_inside(wheel: zipfile.ZipFile):
    info = f"fl_dualpriv-{VERSION}.dist-info"
    assert "fl-dualpriv = fl_dualpriv.cli.main:app" in wheel.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


@pytest.mark.slow  # a process that imports the whole library
def test_the_library_imports_from_the_wheel_alone(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    code = (
        "import fl_dualpriv.server.strategy, fl_dualpriv.tasks.base, fl_dualpriv.cli.main; print(fl_dualpriv.__file__)"
    )
    # -P: the working directory is not on the path; the checkout's folder is not there at all
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "fl_dualpriv" / "__init__.py")


@pytest.mark.slow  # a process that imports torch and Opacus
def test_the_readmes_plain_loop_runs_from_the_wheel(wheel: zipfile.ZipFile, tmp_path: Path):
    """Without the checkout, and without Flower being imported."""
    wheel.extractall(tmp_path / "site")
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Private steps without Flower")[1]
    loop = section.split("```python\n")[1].split("```")[0]
    (tmp_path / "work").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{loop}\nassert 'flwr' not in sys.modules"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ε = ")
    assert (tmp_path / "work" / "ledger.jsonl").exists()

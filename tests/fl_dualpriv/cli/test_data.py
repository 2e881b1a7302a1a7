"""``fl-dualpriv data``: every script is listed with its owners' page, and a check tells what a run would tell."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.data.standard import STANDARD

ROOT = Path(__file__).parents[3]
SHARED = {"__init__", "archives", "command", "layout", "png", "safe_pickle", "splits"}


def test_the_list_has_every_script_and_its_page():
    scripts = {file.stem for file in (ROOT / "tools" / "data").glob("*.py")} - SHARED
    assert {data.module for data in STANDARD} == scripts
    output = CliRunner().invoke(cli.app, ["data", "list"]).output
    for data in STANDARD:
        script = importlib.import_module(f"tools.data.{data.module}")
        assert (data.name, data.page) == (script.NAME, script.PAGE)
        line = next(line for line in output.splitlines() if line.startswith(data.name))
        assert data.page in line
        assert f"python -m tools.data.{data.module}" in line


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            file = tmp_path / "images" / name / f"{i}.png"
            Image.fromarray(np.full((6, 6, 3), i, np.uint8)).save(file)
    return tmp_path / "images"


def check(*settings: str) -> tuple[int, str]:
    words = [f"--set={setting}" for setting in settings]
    config = str(ROOT / "simulations" / "configs" / "your-data.toml")
    result = CliRunner().invoke(cli.app, ["data", "check", config, *words])
    return result.exit_code, " ".join(result.output.split())


def test_a_check_describes_and_starts_nothing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (images / "cat" / "notes.txt").touch()
    (images / "dog" / "0.png").write_bytes(b"no image")
    code, said = check(f"data.path={images}", "prompt.init=random", "population=2")
    assert code == 0
    assert "data: 10 training images of 2 classes: " in said
    assert "1 cannot be read" in said or "10 usable of 10" in said, "the bad one may be held out"
    assert "skipped because of their ending: 1 .txt" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_a_check_refuses_what_a_run_refuses(images: Path):
    code, said = check(f"data.path={images}", "population=99")
    assert code == 2
    assert "population = 99" in said
    code, said = check("data.path=/nowhere")
    assert code == 2
    assert "/nowhere does not exist; give an absolute path" in said

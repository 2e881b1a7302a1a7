"""`fl-dualpriv new-strategy` writes a strategy that runs and a test that passes, and overwrites nothing."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.cli.new_class import METHODS, STRATEGIES, title_of, write_class
from fl_dualpriv.errors import ConfigError

ROOT = Path(__file__).parents[3]


def test_both_files_are_written_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["new-strategy", "my_mean"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my_mean.py", "test_my_mean.py"]
    assert "strategy.ref=my_mean:MyMean" in done.output
    assert "class MyMean(RoundStrategy)" in (tmp_path / "my_mean.py").read_text()


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_my_mean.py").write_text("mine")
    done = CliRunner().invoke(cli.app, ["new-strategy", "my_mean"])
    assert done.exit_code == 2
    assert "exists already" in done.output
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("test_my_mean.py", "mine")]


@pytest.mark.parametrize("name", ["MyMean", "my-mean", "2means", "a/b", "", "class", "a__b", "../up"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="not a valid module name"):
        write_class(name, tmp_path, STRATEGIES)
    assert not list(tmp_path.iterdir())


def test_if_the_second_file_cannot_be_written_the_first_is_removed(tmp_path: Path):
    for file in ("simulations/server_app.py", "strategies/__init__.py"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("")
    (tmp_path / "tests").write_text("a file where the folder of tests would be")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_class("my_mean", tmp_path, STRATEGIES)
    assert [path.name for path in (tmp_path / "strategies").iterdir()] == ["__init__.py"]


def test_in_a_checkout_they_go_where_its_own_are(tmp_path: Path):
    for file in ("simulations/server_app.py", "strategies/__init__.py"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("")
    module, files = write_class("my_mean", tmp_path, STRATEGIES)
    assert module == "strategies.my_mean"
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "strategies/my_mean.py",
        "tests/strategies/test_my_mean.py",
    ]
    assert "from strategies.my_mean import MyMean" in files[1].read_text()


def test_what_is_written_passes_its_own_test_and_the_linter(tmp_path: Path):
    write_class("my_mean", tmp_path, STRATEGIES)
    sys.path.insert(0, str(tmp_path))
    try:
        import test_my_mean  # type: ignore[import-not-found]

        test_my_mean.test_it_keeps_the_contract()
        test_my_mean.test_the_learning_rate_scales_the_step()
    finally:
        sys.path.remove(str(tmp_path))
        for name in ("my_mean", "test_my_mean"):
            sys.modules.pop(name, None)
    # Tests need no docstrings, and which imports are a project's own depends on its folder.
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "D103,I001"]
    ruff.append(str(tmp_path))
    done = subprocess.run(ruff, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "module", "run", "tests"),
    [
        ("new-method", "my_step", "method=my_step:MyStep", ("keeps_the_contract", "share_scales_the_step")),
        ("new-learner", "my_map", "prompt.learner=my_map:MyMap", ("keeps_the_contract", "starts_at_the_cosines")),
    ],
)
def test_a_method_or_learner_that_is_written_passes_its_own_test_and_the_linter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, module: str, run: str, tests: tuple[str, ...]
):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, [command, module])
    assert done.exit_code == 0, done.output
    assert run in done.output
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        written = importlib.import_module(f"test_{module}")
        found = [name for name in vars(written) if name.startswith("test_")]
        assert [any(name.endswith(end) for name in found) for end in tests] == [True, True]
        for name in found:
            getattr(written, name)()
    finally:
        for name in (module, f"test_{module}"):
            sys.modules.pop(name, None)
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "D103,I001"]
    done = subprocess.run([*ruff, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_in_a_checkout_a_method_goes_beside_the_client_app(tmp_path: Path):
    for file in ("simulations/server_app.py", "clients/__init__.py"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("")
    module, files = write_class("my_step", tmp_path, METHODS)
    assert module == "clients.my_step"
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "clients/my_step.py",
        "tests/clients/test_my_step.py",
    ]


def test_titles():
    assert [title_of(name) for name in ("mean", "my_mean", "top_5")] == ["Mean", "MyMean", "Top5"]

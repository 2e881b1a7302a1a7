"""A bundle has one digest, wherever and whenever it was built, and every byte of the app counts."""

import hashlib
import os
import shutil
import subprocess
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import flwr.cli.build
import pytest
from flwr.cli.build import build_fab_from_disk

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.app_bundle import build_bundle, digest_of, load_bundle, read_bundle, travelling_copy

ROOT = Path(__file__).parents[3]

PYPROJECT = """
[project]
name = "some-app"
version = "1.2.0"
description = "A test's app."
license = "Apache-2.0"
[tool.flwr.app]
publisher = "someone"
[tool.flwr.app.components]
serverapp = "some.server_app:app"
clientapp = "some.client_app:app"
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "some").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    for name in ("server_app", "client_app"):
        (folder / "some" / f"{name}.py").write_text(f"app = None\nraise RuntimeError('{name} was imported')\n")
    return folder


def test_a_bundle_says_what_it_is_and_runs_nothing(app: Path):
    content = build_bundle(app)
    bundle = read_bundle(content)
    assert (bundle.app_id, bundle.version) == ("someone/some-app", "1.2.0")
    assert {"pyproject.toml", "some/client_app.py", "some/server_app.py"} <= set(bundle.files)
    assert bundle.digest == digest_of(content) == hashlib.sha256(content).hexdigest()


def test_the_digest_is_of_the_file_that_flwr_build_writes(app: Path, tmp_path: Path):
    environ = {**os.environ, "FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0"}
    command = [str(Path(sysconfig.get_path("scripts")) / "flwr"), "build", "--app", str(app)]
    subprocess.run(command, cwd=tmp_path, env=environ, check=True, capture_output=True)
    (file,) = tmp_path.glob("*.fab")
    content = load_bundle(file)
    assert content == load_bundle(app)
    assert file.name == f"someone.some-app.1-2-0.{digest_of(content)[:8]}.fab"


def test_another_folder_and_another_time_give_the_same_digest(app: Path, tmp_path: Path):
    other = shutil.copytree(app, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    for file in other.rglob("*.py"):
        os.utime(file, (1, 1))
    assert build_bundle(other) == build_bundle(app)


@pytest.mark.parametrize("name", ["pyproject.toml", "some/client_app.py", "some/server_app.py"])
def test_one_other_byte_gives_another_digest(app: Path, name: str):
    before = digest_of(build_bundle(app))
    file = app / name
    file.write_text(file.read_text().replace("app", "apq", 1))
    assert digest_of(build_bundle(app)) != before


def test_a_folder_that_changes_meanwhile_is_refused(app: Path, monkeypatch: pytest.MonkeyPatch):
    build: Callable[[Path], bytes] = flwr.cli.build.build_fab_from_disk

    def building(folder: Path) -> bytes:
        content = build(folder)
        (folder / "more.py").touch()
        return content

    monkeypatch.setattr(flwr.cli.build, "build_fab_from_disk", building)
    with pytest.raises(ConfigError, match=r"two builds of .* differ"):
        build_bundle(app)


def test_what_is_no_app_is_refused(app: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no pyproject\.toml"):
        load_bundle(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_bundle(tmp_path / "nothing.fab")
    (app / "pyproject.toml").write_text('[project]\nname = "x"\n')
    with pytest.raises(ConfigError, match="cannot be bundled"):
        load_bundle(app)


@pytest.mark.parametrize("pyproject", [None, "no TOML = = 1", "[project]\nname = 'x'", "tool = 1"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, pyproject: str | None):
    file = tmp_path / "x.fab"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other.py", "")
        if pyproject is not None:
            archive.writestr("pyproject.toml", pyproject)
    for content in (file.read_bytes(), b"no archive", b""):
        with pytest.raises(ConfigError, match="not the bundle of a Flower app"):
            read_bundle(content)


def listing(app: Path, patterns: str) -> None:
    """Let the app list what travels."""
    text = (app / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(text.replace("[tool.flwr.app]", f"[tool.flwr.app]\nfab-include = {patterns}"))


def test_a_copy_of_what_travels_gives_the_same_bundle(app: Path, tmp_path: Path):
    """Against Flower's own walk through the whole folder, with links and files that do not travel."""
    listing(app, '["/some/**/*.py", "/clients/**/*.py", "/notes.md"]')
    for name in ("clients/deep/one.py", "clients/data.bin", "other/two.py", "notes.md"):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(name)
    (app / "clients" / "link.py").symlink_to(app / "notes.md")
    (app / "clients" / "loop").symlink_to(app / "other")
    copy = tmp_path / "copy"
    copy.mkdir()
    assert travelling_copy(app, copy) == copy
    assert not (copy / "other").exists()
    assert build_fab_from_disk(copy) == build_fab_from_disk(app)
    names = read_bundle(build_fab_from_disk(copy)).files
    assert {"clients/deep/one.py", "notes.md", "some/client_app.py"} <= set(names)
    assert not {"other/two.py", "clients/link.py", "clients/loop/two.py"} & set(names)


def test_a_linked_folder_does_not_travel(app: Path, tmp_path: Path):
    listing(app, '["/some/**/*.py", "/linked/**/*.py"]')
    (app / "linked").symlink_to(app / "some")
    copy = tmp_path / "copy"
    copy.mkdir()
    assert travelling_copy(app, copy) == copy
    assert (copy / "some").exists()
    assert not (copy / "linked").exists()  # Flower enters no linked folder


def test_our_own_bundle_is_built_from_a_copy_without_the_environment(tmp_path: Path):
    assert travelling_copy(ROOT, tmp_path) == tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {
        *("clients", "strategies", "simulations", "README.md", "LICENSE", "pyproject.toml", ".gitignore")
    }


@pytest.mark.parametrize("patterns", ['["**/*.py"]', '["/*.py"]', '"/clients"', "[3]"])
def test_patterns_that_match_anywhere_are_left_to_flower(app: Path, tmp_path: Path, patterns: str):
    listing(app, patterns)
    assert travelling_copy(app, tmp_path) == app

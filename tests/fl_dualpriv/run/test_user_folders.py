"""A user without an entry in the list of users and without HOME, as in many containers."""

import getpass
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.features.cache import cache_root
from fl_dualpriv.run.user_folders import expanded, home, settle_home

ROOT = Path(__file__).parents[3]
NOBODY = 12345
AsNobody = Callable[[Callable[[], None]], None]
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="another user id can be taken by root only")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder for temporary files that every user can write to, as /tmp; pytest's own are for this user only."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="fdp-test-") as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


@pytest.fixture
def as_nobody(shared: Path) -> AsNobody:
    """Calls a function in a process of user 12345, without HOME and names."""

    def call(function: Callable[[], None]) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
                    os.environ.pop(name, None)
                os.environ["TMPDIR"] = tempfile.tempdir = str(shared)
                function()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    return call


@needs_root
def test_a_private_folder_stands_in_for_the_home(as_nobody: AsNobody, shared: Path) -> None:
    folder = shared / f"fl-dualpriv-{NOBODY}"

    def check() -> None:
        with pytest.raises(RuntimeError):  # the environment is the one of the fault
            Path.home()
        with pytest.raises(KeyError):
            getpass.getuser()
        assert home() == folder
        assert cache_root("") == folder / ".fl-dualpriv" / "features"
        assert expanded("~/a/b") == folder / "a" / "b"
        said = settle_home()
        assert f"id {NOBODY}" in said
        assert str(folder) in said
        assert "HOME" in said
        assert Path.home() == folder  # libraries of others find it, too
        assert getpass.getuser() == f"user-{NOBODY}"
        assert settle_home() == ""  # and programs that this one starts need not say it again

    as_nobody(check)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    as_nobody(check)  # a second time it is there


@needs_root
@pytest.mark.parametrize("there", ["another user's", "open to all", "a link", "a file", "no room"])
def test_a_stand_in_that_others_could_write_to_is_refused(there: str, as_nobody: AsNobody, shared: Path) -> None:
    folder = shared / f"fl-dualpriv-{NOBODY}"
    match there:
        case "another user's":
            folder.mkdir(mode=0o777)
        case "open to all":
            folder.mkdir()
            os.chown(folder, NOBODY, NOBODY)
            folder.chmod(0o777)
        case "a link":
            (shared / "elsewhere").mkdir()
            os.chown(shared / "elsewhere", NOBODY, NOBODY)
            folder.symlink_to(shared / "elsewhere")
        case "a file":
            folder.touch()
        case "no room":
            shared.chmod(0o755)

    def check() -> None:
        with pytest.raises(ConfigError, match="set HOME to a folder of this user"):
            home()
        result = CliRunner().invoke(cli.app, ["env"])
        assert result.exit_code == 2
        assert result.output.count("error:") == 1

    as_nobody(check)


@needs_root
def test_commands_start_and_say_it_once(as_nobody: AsNobody, shared: Path) -> None:
    def check() -> None:
        os.chdir(shared)
        first, second = (CliRunner().invoke(cli.app, ["new-strategy", name]) for name in ("one", "two"))
        assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
        assert [result.output.count("stands in for it") for result in (first, second)] == [1, 0]

    as_nobody(check)


@needs_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv")
def test_the_installed_command_as_a_container_calls_it(shared: Path) -> None:
    # The interpreter may lie where only root may look.
    may_read = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    words = ["env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME", "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}"]
    words += ["--clear-groups", *may_read, sys.executable, str(Path(sysconfig.get_path("scripts")) / "fl-dualpriv")]
    done = subprocess.run(
        [*words, "new-strategy", "mine"],
        cwd=shared,
        env=os.environ | {"TMPDIR": str(shared), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{shared}/fl-dualpriv-{NOBODY} stands in for it" in done.stderr
    assert (shared / "mine.py").stat().st_uid == NOBODY


def test_a_user_with_a_home_is_told_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    assert settle_home() == ""
    assert home() == tmp_path
    assert expanded("~/x") == tmp_path / "x"
    assert {name: value for name, value in os.environ.items() if name != "USER"} == {
        name: value for name, value in before.items() if name != "USER"
    }


@pytest.mark.parametrize(
    "words",
    [["--out", "~no-such-user/x"], ["--set", "data.path=~no-such-user/x"], ["--set", "data.classes=~no-such-user/c"]],
)
def test_a_path_of_a_user_who_is_not_there_is_one_message(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "quick.toml").write_text("rounds = 1\n")
    result = CliRunner().invoke(cli.app, ["run", str(tmp_path / "quick.toml"), "--app", str(ROOT), *words])
    assert result.exit_code == 2, result.output
    assert "this system has no user 'no-such-user'" in result.output.replace("\n", " ")
    assert app_defaults(ROOT)["output.dir"] == ""


def test_a_home_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()

    def missing() -> dict[str, str]:
        raise FileNotFoundError

    monkeypatch.setattr(cli.flower_env, "installed", missing)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # nothing can be made in it, not by root either
    result = CliRunner().invoke(cli.app, ["env"])
    assert result.exit_code == 2
    assert "set HOME to another folder" in result.output.replace("\n", " ")
    file = tmp_path / "node.toml"
    file.write_text(f'[app]\nallowed = ["{"0a" * 32}"]\n[server]\naddress = "127.0.0.1:9"\ninsecure = true\n')
    result = CliRunner().invoke(cli.app, ["node", "start", str(file)])
    assert result.exit_code == 2
    assert "set HOME to a folder of this user" in result.output.replace("\n", " ")

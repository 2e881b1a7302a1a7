"""Whole runs of the project's own app in the environments that users have, on both engines."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_dualpriv.run.cpus import usable_cpus
from fl_dualpriv.run.file_kinds import read_totals
from tests.app.run_folders import write_images
from tests.no_hard_links import cannot_refuse

ROOT = Path(__file__).parents[2]
ENGINES = pytest.mark.parametrize("engine", ["local", "ray"])
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_clip_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("environments")
    write_images(root)
    file = root / "own.toml"
    file.write_text(
        f"""
rounds = 3
population = 2
train.local-steps = 1
privacy.randomness = "seeded"
privacy.record.calibrate-to = "noise-multiplier"
privacy.record.delta = 1e-3
data.path = "{root / "images"}"
evaluation.held-out-data = "public"
backbone.name = "local-dir:{tiny_clip_dir}"
"""
    )
    return file


COMMAND = [sys.executable, "-m", "fl_dualpriv.cli.main"]


def words(config: Path, out: Path, engine: str) -> list[str]:
    return ["run", str(config), "--app", str(ROOT), "--out", str(out), "--engine", engine]


def call(
    command: list[str], *, cwd: Path, changes: dict[str, str] | None = None, without: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[bytes]":
    environ = {name: value for name, value in os.environ.items() if name not in without}
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, env=environ | paths | (changes or {}), capture_output=True, timeout=300, check=False
    )


def finished(done: "subprocess.CompletedProcess[bytes]", out: Path) -> None:
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")
    assert (out / "summary.json").is_file()
    assert read_totals(out)["failures"] == 0


DEAD = "http://127.0.0.1:9"
PROXIES = [
    {"http_proxy": DEAD},  # the others are tried in tests/fl_dualpriv/flower/test_proxies.py
    {"all_proxy": "socks://127.0.0.1:9", "https_proxy": DEAD, "no_proxy": "example.org"},
]


@pytest.mark.parametrize("proxies", PROXIES, ids=lambda proxies: " ".join(proxies))
def test_proxies(proxies: dict[str, str], config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    theirs = tuple(name for name in os.environ if name.lower().endswith("_proxy"))
    finished(call(COMMAND + words(config, out, "ray"), cwd=tmp_path, changes=proxies, without=theirs), out)


@pytest.mark.parametrize(("engine", "encoding"), [("local", "latin-1"), ("ray", "ascii")])
def test_outputs_without_utf_8(engine: str, encoding: str, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call(COMMAND + words(config, out, engine), cwd=tmp_path, changes={"PYTHONIOENCODING": encoding})
    finished(done, out)
    text = done.stdout.decode(encoding)
    assert "epsilon" in text
    heads = [line for line in text.splitlines() if line.startswith(("| release ", "| client upload "))]
    assert len(heads) == 2
    assert len(heads[0]) == len(heads[1])


@pytest.mark.skipif(usable_cpus() < 2, reason="one CPU: there is nothing to leave out")
def test_one_cpu_of_two_starts_one_actor(config: Path, tmp_path: Path) -> None:
    if shutil.which("taskset") is None:
        pytest.skip("no taskset")
    out, first = tmp_path / "out", str(min(os.sched_getaffinity(0)))
    finished(call(["taskset", "-c", first, *COMMAND, *words(config, out, "ray")], cwd=tmp_path), out)
    assert len(list(out.glob("actors/actor-*.json"))) == 1


@ENGINES
def test_a_foreign_package_on_pythonpath(engine: str, config: Path, tmp_path: Path) -> None:
    for package in ("simulations", "clients", "strategies"):
        (tmp_path / "decoy" / package).mkdir(parents=True)
        for module in ("__init__", "server_app", "app", "dpfpl"):
            code = f"raise RuntimeError('the decoy {package}.{module} was imported')\n"
            (tmp_path / "decoy" / package / f"{module}.py").write_text(code)
    out = tmp_path / "out"
    path = f"{tmp_path / 'decoy'}{os.pathsep}{ROOT}"
    finished(call(COMMAND + words(config, out, engine), cwd=tmp_path, changes={"PYTHONPATH": path}), out)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can write to, as /tmp is; pytest's own are for this user only."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="fdp-test-") as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="another user id can be taken by root only")
@ENGINES
def test_a_user_id_without_name_and_home(engine: str, config: Path, shared: Path) -> None:
    # The checkout and the interpreter may lie where only root may look.
    user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    user += ["--inh-caps", "+dac_read_search,+dac_override", "--ambient-caps", "+dac_read_search,+dac_override"]
    try:
        subprocess.run([*user, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no setpriv that can do this: {error}")
    own, out = shared / "own.toml", shared / "out"
    own.write_text(config.read_text())
    own.chmod(0o644)
    done = call(
        [*user, *COMMAND, *words(own, out, engine)],
        cwd=shared,
        changes={"TMPDIR": str(shared)},
        without=("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"),
    )
    finished(done, out)
    assert f"{shared}/fl-dualpriv-12345 stands in for it" in done.stderr.decode()
    assert (out / "summary.json").stat().st_uid == 12345


REFUSE = f"from tests.no_hard_links import refuse_hard_links; refuse_hard_links({errno.EPERM}); "
LINKLESS = [sys.executable, "-c", REFUSE + "from fl_dualpriv.cli.main import app; app()"]


@pytest.mark.skipif(bool(cannot_refuse()), reason=cannot_refuse() or "it can")
def test_no_hard_links_under_ray(config: Path, tmp_path: Path) -> None:
    finished(call([*LINKLESS, *words(config, tmp_path / "out", "ray")], cwd=ROOT), tmp_path / "out")


@pytest.mark.skipif(bool(cannot_refuse()), reason=cannot_refuse() or "it can")
def test_no_hard_links_and_resume(config: Path, tmp_path: Path) -> None:
    engine, command = "local", LINKLESS
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished(call(command + words(config, whole, engine), cwd=ROOT), whole)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command + words(config, cut, engine), cwd=ROOT, env=environ, **quiet) as running:
        deadline = time.monotonic() + 240
        while not (cut / "checkpoint.previous.bin").exists() and running.poll() is None:  # in round 2
            assert time.monotonic() < deadline
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
    if not (cut / "summary.json").exists():  # else the rest of the run was faster than this look
        finished(call([*command, "run", "--resume", str(cut)], cwd=ROOT), cut)
    prompts = [folder / "prompts" / "global.safetensors" for folder in (whole, cut)]
    tensors = [file.read_bytes().partition(b"}}")[2][-2048:] for file in prompts]  # behind the run's own words
    assert tensors[0] == tensors[1] != b""

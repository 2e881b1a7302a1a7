"""The real Flower programs and Ray, on a small Flower app that is written here: what breaks is ours, not the app's."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower.engine import RunFailed, run_flower
from fl_dualpriv.run.cpus import usable_cpus

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PYPROJECT = """
[project]
name = "toy-app"
version = "0.1.0"
description = "A test's app."
license = "Apache-2.0"
dependencies = ["no-such-package-on-any-index"]
[tool.flwr.app]
publisher = "toy"
[tool.flwr.app.components]
serverapp = "toy.server_app:app"
clientapp = "toy.client_app:app"
[tool.flwr.app.config]
population = 10
rounds = 1
fail = ""
text = ""
output.dir = ""
resources.cpus-per-client = 1
"""
SERVER = """
import json, os, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    out = Path(config["output.dir"])
    (out / "started").write_text("")
    while len(list(grid.get_node_ids())) < config["population"]:
        time.sleep(0.1)
    if config["fail"] == "told":
        (out / "part").write_text(json.dumps({"type": "ConfigError", "message": "no images in /nowhere"}))
        (out / "part").replace(out / "error.json")
    if config["fail"] in ("told", "untold"):
        raise RuntimeError("the server broke")
    for round_ in range(config["rounds"]):
        # A time limit for replies also runs while Ray starts, so the client that hangs does so in round 2.
        hang = config["fail"] == "hang" and round_ == 1
        fail = config["fail"] if config["fail"] != "hang" or hang else ""
        content = lambda: RecordDict({"ask": ConfigRecord({"fail": fail})})
        asked = [Message(content(), dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(asked, timeout=6 if hang else 90))
        (out / "round").write_text("")
    clients = [{"error": 1} if reply.has_error() else dict(reply.content["told"]) for reply in replies]
    summary = {"clients": clients, "server": __file__, "text": config["text"], "config": dict(config)}
    (out / "part").write_text(json.dumps(summary))
    (out / "part").replace(out / "summary.json")
"""
CLIENT = """
import os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    from toy.who import WHO

    fail, partition = message.content["ask"]["fail"], context.node_config["partition-id"]
    if fail == "client" and partition == 0:
        raise RuntimeError("a client broke")
    if fail == "hang" and partition == 0:
        time.sleep(600)
    if fail == "slow":
        time.sleep(0.2)
    told = {"partition": partition, "who": WHO, "file": __file__, "pid": os.getpid(), "nice": os.nice(0)}
    return Message(RecordDict({"told": ConfigRecord(told)}), reply_to=message)
"""


def write_app(folder: Path, who: str) -> Path:
    package = folder / "toy"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    for name, text in (("__init__", ""), ("server_app", SERVER), ("client_app", CLIENT), ("who", f"WHO = {who!r}\n")):
        (package / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return write_app(tmp_path / "app", "the app")


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Lists the living processes that were started from this test; there must be none at its end."""
    monkeypatch.setenv("FL_DUALPRIV_TEST", str(tmp_path))
    mark = f"FL_DUALPRIV_TEST={tmp_path}\0".encode()

    def living() -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            except OSError:
                continue
        return found

    yield living
    assert wait_for(lambda: not living(), 30), living()


def wait_for(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def homes() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("fdp-*"))


def run_app(app: Path, out: Path, *, population: int = 2, **config: str | int | float) -> dict[str, Any]:
    values = {"population": population, "output.dir": str(out), **config}
    run_flower(
        app, values, num_supernodes=population, cpus_per_client=1, gpus_per_client=0.0, work_dir=out, timeout=200
    )
    return json.loads((out / "summary.json").read_text())


def test_two_clients_one_round(app: Path, tmp_path: Path, family: Callable[[], list[str]]) -> None:
    out, before = tmp_path / "out", homes()
    text = 'quotes " and \\ and ä 😀 and\nlines'
    summary = run_app(app, out, text=text)
    assert sorted(client["partition"] for client in summary["clients"]) == [0, 1]
    assert {client["who"] for client in summary["clients"]} == {"the app"}
    assert {client["nice"] for client in summary["clients"]} == {os.nice(0)}
    assert summary["text"] == text
    assert family() == []
    assert homes() <= before
    assert "toy-app" in (out / "flower.log").read_text()


@pytest.mark.parametrize(
    ("fail", "message"), [("told", "^ConfigError: no images in /nowhere\n"), ("untold", "the server broke")]
)
def test_a_server_that_raises(
    fail: str, message: str, app: Path, tmp_path: Path, family: Callable[[], list[str]]
) -> None:
    before = homes()
    with pytest.raises(RunFailed, match=message) as caught:
        run_app(app, tmp_path / "out", fail=fail)
    assert str(tmp_path / "out" / "flower.log") in str(caught.value)
    assert family() == []
    assert homes() <= before


def test_a_client_that_raises_or_hangs_does_not_hang_the_run(
    app: Path, tmp_path: Path, family: Callable[[], list[str]]
) -> None:
    summary = run_app(app, tmp_path / "raises", fail="client")
    assert sorted("error" in client for client in summary["clients"]) == [False, True]
    start = time.monotonic()
    summary = run_app(app, tmp_path / "hangs", fail="hang", rounds=2)  # the client sleeps for ten minutes
    assert [client["partition"] for client in summary["clients"]] == [1]
    assert time.monotonic() - start < 150
    assert family() == []


def test_a_client_module_that_cannot_be_imported(app: Path, tmp_path: Path, family: Callable[[], list[str]]) -> None:
    (app / "toy" / "client_app.py").write_text("import no_such_module_anywhere\n" + CLIENT)
    with pytest.raises(RunFailed, match="no_such_module_anywhere"):
        run_app(app, tmp_path / "out")
    assert family() == []


def test_a_key_that_the_app_does_not_have(app: Path, tmp_path: Path, family: Callable[[], list[str]]) -> None:
    with pytest.raises(RunFailed, match="did not accept the run"):
        run_app(app, tmp_path / "out", colour="red")
    assert family() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_front_that_is_interrupted_or_killed_leaves_no_process(
    number: signal.Signals, app: Path, tmp_path: Path, family: Callable[[], list[str]]
) -> None:
    out, before = tmp_path / "out", homes()
    code = f"""
        from pathlib import Path
        from fl_dualpriv.flower.engine import run_flower
        app, out = Path({str(app)!r}), Path({str(out)!r})
        values = {{"population": 2, "rounds": 10000, "fail": "slow", "output.dir": str(out)}}
        run_flower(app, values, num_supernodes=2, cpus_per_client=1, gpus_per_client=0.0, work_dir=out)
    """
    front = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        # Where a shell starts tests in the background they ignore SIGINT, and hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert wait_for(lambda: (out / "round").exists(), 100)
    running = family()
    for program in ("flower-superlink", "flwr-simulation", "raylet"):
        assert any(program in command for command in running), running
    front.send_signal(number)
    front.wait(timeout=60)
    assert wait_for(lambda: not family(), 20), family()
    assert wait_for(lambda: homes() <= before, 5)


def make_venv(prefix: Path, app: Path) -> Path:
    """A second environment with the same packages and Flower's scripts, set up for ``app`` as by `make setup`."""
    venv.create(prefix, with_pip=False, symlinks=True)
    site_packages = next((prefix / "lib").glob("python*")) / "site-packages"
    (site_packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for entry in importlib.metadata.distribution("flwr").entry_points:
        script = prefix / "bin" / entry.name
        script.write_text(
            f"#!{prefix}/bin/python\nimport sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
        )
        script.chmod(0o755)
    return flower_env.install(app, site_packages, prefix)


def test_plain_flwr_run_from_a_folder_of_decoys_beside_another_run(
    app: Path, tmp_path: Path, family: Callable[[], list[str]]
) -> None:
    other = write_app(tmp_path / "other", "another checkout")
    checkouts = {"ours": app, "theirs": other}
    installed = {name: make_venv(tmp_path / f"venv-{name}", folder) for name, folder in checkouts.items()}
    out = {name: tmp_path / f"out-{name}" for name in checkouts}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_", "PYTHON"))}

    def submit(name: str, *config: str) -> "subprocess.CompletedProcess[str]":
        out[name].mkdir(exist_ok=True)
        # Not activated; the working directory holds packages with the app's names.
        command = [str(tmp_path / f"venv-{name}" / "bin" / "flwr"), "run", str(checkouts[name])]
        values = " ".join([f'output.dir="{out[name]}"', *config])
        return subprocess.run(
            [*command, "-c", values], cwd=other, env=clean, capture_output=True, text=True, check=False, timeout=100
        )

    try:
        theirs = submit("theirs", "rounds=10000", 'fail="slow"')
        assert wait_for(lambda: (out["theirs"] / "round").exists(), 100), theirs.stdout + theirs.stderr
        pyproject = (app / "pyproject.toml").read_text()
        ours = submit("ours")
        assert wait_for(lambda: (out["ours"] / "summary.json").exists(), 120), ours.stdout + ours.stderr
        summary = json.loads((out["ours"] / "summary.json").read_text())
        # All ten, in round 1, with our code, from our app folder and not from the working directory.
        assert sorted(client["partition"] for client in summary["clients"]) == list(range(10))
        assert {client["who"] for client in summary["clients"]} == {"the app"}
        assert {Path(client["file"]).parents[3] for client in summary["clients"]} == {installed["ours"]}
        # One CPU a client, so as many actors as CPUs (ten clients at most).
        assert len({client["pid"] for client in summary["clients"]}) <= usable_cpus()
        assert (app / "pyproject.toml").read_text() == pyproject
        assert not (out["theirs"] / "summary.json").exists()  # theirs was going on all the time
        assert not (installed["ours"] / "runtime-envs").exists()
    finally:
        stopped = {name: flower_env.stop(home) for name, home in installed.items()}
    assert stopped == {"ours": True, "theirs": True}

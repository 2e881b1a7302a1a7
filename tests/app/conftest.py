"""What tests of the app share: a folder of images, a count of local messages, and the programs of a deployment."""

import contextlib
import os
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from PIL import Image

from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower import hook as flower_hook
from fl_dualpriv.flower import programs, supervisor
from fl_dualpriv.flower.engine import to_toml
from fl_dualpriv.flower.local import LocalGrid


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog", "bus", "tree")):
        (root / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 128, (32, 32, 3))
            pixels[8 * label : 8 * label + 8] += 127  # a bright band: something to learn
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many messages of each kind were sent."""
    counts: Counter[str] = Counter()
    push = LocalGrid._push

    def counting(self: LocalGrid, message: Message) -> str:
        counts[message.metadata.message_type] += 1
        return push(self, message)

    monkeypatch.setattr(LocalGrid, "_push", counting)
    return counts


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program of Flower or ours that runs until it is stopped, with all that it starts."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self, text: str) -> bool:
        return text in self.log.read_text(errors="replace")

    def stop(self) -> None:
        self.end()
        self.process.wait(timeout=60)

    def end(self) -> None:
        """Do not wait: it takes seconds."""
        assert self.process.stdin is not None
        self.process.stdin.close()  # the supervisor's sign


@dataclass(frozen=True, kw_only=True)
class SuperLink:
    """A running SuperLink with a Flower home of its own."""

    port: int
    home: Path
    environ: dict[str, str]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def submit(self, app_dir: Path, config: dict[str, Any]) -> None:
        """`flwr run`: hand an app to the SuperLink; returns when it was accepted."""
        (self.home / "run.toml").write_text(to_toml(config))
        flwr = str(Path(sysconfig.get_path("scripts")) / "flwr")
        command = [flwr, "run", str(app_dir), "local", "--run-config", str(self.home / "run.toml"), "--format", "json"]
        done = subprocess.run(
            command, cwd=self.home, env=self.environ, capture_output=True, text=True, check=False, timeout=100
        )
        assert '"success": true' in done.stdout, done.stdout + done.stderr


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Starts SuperLinks and nodes on this machine, each with folders and ports of its own; ends them all."""

    root: Path
    programs: list[Program] = field(default_factory=list)

    def superlink(self, name: str) -> SuperLink:
        home = self.root / name
        port, spare = flower_env.free_ports(2)
        flower_env.write_flower_config(home, f"127.0.0.1:{port}")
        environ = self._environ(home) | flower_env.environment(home, port, spare)
        environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "0.2"
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        self._start(name, command, environ)

        directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def healthy() -> bool:
            with contextlib.suppress(OSError), directly.open(f"http://127.0.0.1:{port}/health", timeout=2):
                return True
            return False

        self.wait_until(healthy, 60)
        return SuperLink(port=port, home=home, environ=environ)

    def node(self, name: str, superlink: SuperLink, node_file: Path, *options: str) -> Program:
        """`fl-dualpriv node start`; returns when the server knows it."""
        (port,) = flower_env.free_ports(1)
        environ = self._environ(self.root / name) | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        command = ["fl-dualpriv", "node", "start", str(node_file), "--superlink", superlink.address, "--insecure"]
        program = self._start(name, [*command, "--port", str(port), *options], environ)
        self.wait_until(lambda: program.said("SuperNode ID") or program.process.poll() is not None, 60)
        assert program.process.poll() is None, program.log.read_text()
        return program

    @staticmethod
    def wait_until(condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"nothing within {seconds} s"
            time.sleep(0.1)

    def _environ(self, home: Path) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "FL_DUALPRIV"))}
        flower_hook.reach_loopback_directly(inherited)
        return inherited | {
            "HOME": str(home),
            "PATH": programs.search_path(),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }

    def _start(self, name: str, command: list[str], environ: dict[str, str]) -> Program:
        (self.root / name).mkdir(exist_ok=True)
        log = self.root / f"{name}.log"
        script = str(Path(sysconfig.get_path("scripts")) / command[0])
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, str(self.root / f"{name}-nothing"), script, *command[1:]],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=self.root / name,
                env=environ,
                start_new_session=True,
            )
        self.programs.append(Program(process=process, log=log))
        return self.programs[-1]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    made = Deployment(root=tmp_path_factory.mktemp("deployment"))
    yield made
    for program in made.programs:
        program.end()
    for program in made.programs:
        program.process.wait(timeout=60)

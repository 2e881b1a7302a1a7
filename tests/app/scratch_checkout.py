"""A fresh checkout with its virtual environment, in which the documented commands are run one after another.

It is what a reader has after ``make setup``: the files of the checkout, ``.venv`` with its programs on PATH, a home.
The environment shares the installed packages. Its programs import this checkout and no other.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from fl_dualpriv.data.demo.images import load_demo
from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower import supervisor
from tests.app.documented_commands import ROOT, blocks_of, commands_of
from tests.app.run_folders import write_images

_COPIED = (
    *(
        "attacks",
        "benchmarks",
        "clients",
        "deploy",
        "docs",
        "fl_dualpriv",
        "simulations",
        "strategies",
        "tests",
        "tools",
    ),
    *("CHANGELOG.md", "LICENSE", "CONTRIBUTING.md", "Makefile", "README.md", "constraints.txt", "pyproject.toml"),
    ".gitignore",
)
_QUESTIONS = ("what color is the circle ?", "is the square red ?", "which shape is there ?", "is there a circle ?",
              "what is this ?", "which color is there ?")  # fmt: skip
_ANSWERS = ("red", "yes", "circle", "no", "a square", "blue")
LONGEST_SECONDS = 900.0


@dataclass(kw_only=True)
class ScratchCheckout:
    """The checkout, what was made in it, and the programs that run in it.

    Attributes:
        path: The checkout.
        home: ``HOME`` of all programs.
        port: Of the server that `start_server` starts.
        programs: All that were started and may still run.
    """

    path: Path
    home: Path
    port: int
    programs: list["subprocess.Popen[str]"] = field(default_factory=list)

    # --- how it is made -----------------------------------------------------------------------------------------------

    @staticmethod
    def made(root: Path, models: Mapping[str, Path]) -> "ScratchCheckout":
        """Copy the checkout and link the models, each under its name."""
        path, home = root / "checkout", root / "home"
        path.mkdir(parents=True)
        home.mkdir()
        for name in _COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, path / name)
        for name, folder in models.items():
            (path / name).symlink_to(folder)
        write_images(path)
        (port,) = flower_env.free_ports(1)
        checkout = ScratchCheckout(path=path, home=home, port=port)
        checkout._make_environment()
        return checkout

    def _make_environment(self) -> None:
        """``.venv`` as `make setup` leaves it, but for the download of the packages."""
        prefix = self.path / ".venv"
        venv.create(prefix, with_pip=False, symlinks=True)
        site_packages = next((prefix / "lib").glob("python*")) / "site-packages"
        # A .pth of the shared folder is not read, so an editable installation there brings no other checkout.
        (site_packages / "shared.pth").write_text(f"{self.path}\n{sysconfig.get_path('purelib')}\n")
        entries = list(importlib.metadata.distribution("flwr").entry_points)
        programs = {entry.name: (entry.module, entry.attr) for entry in entries}
        for name, (module, attr) in {**programs, "fl-dualpriv": ("fl_dualpriv.cli.main", "app")}.items():
            script = prefix / "bin" / name
            script.write_text(f"#!{prefix}/bin/python\nimport sys\nfrom {module} import {attr}\nsys.exit({attr}())\n")
            script.chmod(0o755)
        flower_env.install(self.path, site_packages, prefix)
        (prefix / ".set-up").touch()  # the Makefile's stamp

    @property
    def environ(self) -> dict[str, str]:
        """Of a shell in which ``.venv`` is activated."""
        foreign = ("FLWR_", "FL_DUALPRIV", "RAY_", "PYTHON", "PYTEST", "MAKE", "VIRTUAL_ENV")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        programs = f"{self.path}/.venv/bin{os.pathsep}{inherited.get('PATH', os.defpath)}"
        return inherited | {"HOME": str(self.home), "PATH": programs, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    # --- how commands are run -----------------------------------------------------------------------------------------

    def call(self, command: str, status: int = 0) -> str:
        """Run a line of a shell to its end; what it printed."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.path,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=LONGEST_SECONDS,
        )
        assert done.returncode == status, f"{command}\nexit status {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def start(self, command: str, text: str, seconds: float = 120.0) -> str:
        """Start a line of a shell that does not end by itself; what it printed until it said ``text``.

        A supervisor ends it with everything below it when `stop_programs` closes its standard input.
        """
        log = self.path / f"program-{len(self.programs)}.log"
        with log.open("wb") as stream:
            program = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, f"{log}-nothing", "bash", "-c", f"exec {command}"],
                cwd=self.path,
                env=self.environ,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
        self.programs.append(program)
        self.wait_until(lambda: text in log.read_text(errors="replace") or program.poll() is not None, seconds, command)
        said = log.read_text(errors="replace")
        assert text in said, f"{command}\nended\n{said[-6000:]}"
        return said

    @staticmethod
    def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"nothing within {seconds:.0f} s: {what}"
            time.sleep(0.2)

    def wait_for_files(self, names: Sequence[str]) -> None:
        """Until a run that was handed over has left its results, or has failed."""
        folders = {(self.path / name).parent for name in names}

        def is_over() -> bool:
            return all((self.path / name).exists() for name in names) or any(
                (folder / "error.json").exists() for folder in folders
            )

        self.wait_until(is_over, LONGEST_SECONDS, str(names))
        for folder in folders:
            error = folder / "error.json"
            assert not error.exists(), error.read_text()

    def stop_programs(self) -> None:
        """End what was started here."""
        for program in self.programs:
            assert program.stdin is not None
            program.stdin.close()
        for program in self.programs:
            program.wait(timeout=60)
        self.programs.clear()
        flower_env.stop(self.path / ".venv" / "flower")  # the SuperLink that plain `flwr run` started

    # --- what a reader has before a command ---------------------------------------------------------------------------

    def draw_images(self) -> None:
        """Two test images of the demo, and a file that is none."""
        data = load_demo()["test"]
        for name in ("bus", "sailboat"):
            index = list(data.labels).index(data.class_names.index(name))
            data.image(index).save(self.path / f"{name}.png")
        (self.path / "broken.png").write_bytes(b"no image")

    def make_checkpoint(self) -> None:
        """All weights of open_clip's ViT-B-16, random: a trained file would come from a hub."""
        code = (
            "from fl_dualpriv.models import torchvision_shim; torchvision_shim.install(); import open_clip; "
            "from safetensors.torch import save_file; "
            "save_file(open_clip.create_model('ViT-B-16').state_dict(), 'checkpoint.safetensors')"
        )
        self.call(f'python -c "{code}"')

    def write_questions(self) -> None:
        """Sixteen images, and a question of each of six types about each."""
        rng, lines = np.random.default_rng(0), []
        for i in range(16):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(self.path / f"asked-{i}.png")
            for kind, (question, answer) in enumerate(zip(_QUESTIONS, _ANSWERS, strict=True)):
                line = {"image": f"asked-{i}.png", "question": question, "answer": answer, "type": f"type {kind}"}
                lines.append(json.dumps(line))
        (self.path / "questions.jsonl").write_text("\n".join(lines) + "\n")

    def save_momentum(self) -> None:
        """The strategy of the README, as it stands there."""
        (text,) = [block.text for block in blocks_of("README.md") if "class Momentum" in block.text]
        (self.path / "momentum.py").write_text(text)

    def save_personal_momentum(self) -> None:
        """The method of the README, as it stands there."""
        (text,) = [block.text for block in blocks_of("README.md") if "class PersonalMomentum" in block.text]
        (self.path / "personal_momentum.py").write_text(text)

    def save_adapter(self) -> None:
        """The learner of the README, as it stands there."""
        (text,) = [block.text for block in blocks_of("README.md") if "class Adapter" in block.text]
        (self.path / "adapter.py").write_text(text)

    def cut_off_the_demo(self) -> None:
        self._cut_off("runs/demo")

    def cut_off_a_run(self) -> None:
        self._cut_off("cut-off")

    def _cut_off(self, out: str) -> None:
        """Kill the demo after its first round: `supervisor` also ends what it started."""
        command = f"fl-dualpriv run simulations/configs/demo.toml --set rounds=3 --overwrite --out {out}"
        self.start(command, "round 1/3", LONGEST_SECONDS)
        program = self.programs.pop()
        family = [program.pid, *supervisor.descendants(program.pid)]
        for pid in reversed(family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.wait(timeout=60)
        assert not (self.path / out / "summary.json").exists()

    # --- a server on this machine, and its node -----------------------------------------------------------------------

    def make_etc(self) -> None:
        """What stands for /etc/fl-dualpriv."""
        (self.path / "etc").mkdir(mode=0o700)

    def start_server(self) -> None:
        """A SuperLink with the options of deploy/systemd, and the node file of docs/deploy.md for it."""
        (certificates,) = [c.text for c in commands_of("docs/deploy.md") if "certificates.py" in c.text]
        self.call(certificates.replace(" certs ", " etc "))
        connection = self._document("docs/deploy.md", "[superlink.federation]")
        connection = connection.replace("/abs/path", str(self.path / "etc"))
        file = self.path / ".venv" / "flower" / "config.toml"
        connection = connection.replace("fl.example.org:8000", f"localhost:{self.port}")
        file.write_text(f"{file.read_text()}\n{connection}")
        self._start_superlink()
        self._write_node_file(self.path / "etc" / "node.toml", self.path / "etc" / "node.key", "state")

    def _start_superlink(self) -> None:
        (unit,) = (self.path / "deploy" / "systemd").glob("*superlink.service")
        found = re.search(r"^ExecStart=\S*/(flower-superlink(?:.*\\\n)*.*)$", unit.read_text(), flags=re.MULTILINE)
        assert found is not None
        command = found[1].replace("\\\n", " ").replace("0.0.0.0 --port 8000", f"127.0.0.1 --port {self.port}")
        command = command.replace("/etc/fl-dualpriv", "etc").replace("/var/lib/fl-dualpriv-superlink/", "etc/")
        self.start(command, "", 60)
        context = ssl.create_default_context(cafile=str(self.path / "etc" / "ca.crt"))

        def answers() -> bool:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"https://localhost:{self.port}/health", timeout=2, context=context).close()
                return True
            return False

        self.wait_until(answers, 90, command)

    def _write_node_file(self, file: Path, key: Path, state: str) -> None:
        """The example of docs/deploy.md, with what is on this machine."""
        (node_port,) = flower_env.free_ports(1)
        (self.path / state).mkdir(mode=0o700)
        changes = {
            "/var/lib/fl-dualpriv/a": str(self.path / state),
            "/srv/images": str(self.path / "images"),
            'device = "cuda"': 'device = "cpu"',
            "/srv/models/vit-b-32": str(self.path / "clip"),
            "fl.example.org:8000": f"localhost:{self.port}",
            "/etc/fl-dualpriv/ca.crt": str(self.path / "etc" / "ca.crt"),
            "/etc/fl-dualpriv/node.key": str(key),
            "partition-id = 0": f"port = {node_port}\npartition-id = 0",
            "…": self.call("fl-dualpriv node hash . 2>/dev/null").strip(),
        }
        text = self._document("docs/deploy.md", "state-dir")
        head, _, app = text.rpartition("[app]")  # a comment above speaks of partitions 0, 1, 2 …
        head = head.replace("…", "...")
        for old, new in changes.items():
            assert old in head + app, old
            head, app = head.replace(old, new), app.replace(old, new)
        file.write_text(f"{head}[app]{app}")

    def register_the_node(self) -> None:
        self.call("flwr supernode register etc/node.key.pub federation")

    def make_another_key(self) -> None:
        self.call('ssh-keygen -q -t ecdsa -b 384 -N "" -f a.key')

    def write_the_run(self) -> None:
        """The run of docs/deploy.md, with one node and what is on this machine; shorter."""
        changes = {
            "population = 3": "population = 1",
            "rounds = 20": "rounds = 2",
            "/srv/server/images": str(self.path / "images"),
            "/srv/server/runs/1": str(self.path / "server-run"),
            "/srv/models/vit-b-32": str(self.path / "clip"),
        }
        text = self._document("docs/deploy.md", "reply-timeout")
        for old, new in changes.items():
            assert old in text, old
            text = text.replace(old, new)
        (self.path / "run.toml").write_text(text)

    def restart_server(self) -> None:
        """The same server with the key of docs/deploy.md's second node, for the node of the README."""
        self.stop_programs()
        self._start_superlink()
        self._write_node_file(self.path / "node.toml", self.path / "a.key", "other-state")

    @staticmethod
    def _document(document: str, text: str) -> str:
        (found,) = [block.text for block in blocks_of(document) if block.language == "toml" and text in block.text]
        return found

"""Simulated machines of a rehearsal, all on this machine: folders, certificates and programs."""

import contextlib
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import certificates
from network import Network

from fl_dualpriv.data.demo.images import demo_categories, demo_template, load_demo
from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower import programs, supervisor
from fl_dualpriv.flower.app_bundle import build_bundle, digest_of
from fl_dualpriv.flower.engine import to_toml

NODES = 3
_CATEGORIES = ("animal", "vehicle")
_SETTINGS: dict[str, Any] = {
    "reply-timeout": 300.0,  # Flower notices a dead node after a minute or two
    "train.local-steps": 2,
    "train.sampling-rate": 0.2,
    "privacy.record.calibrate-to": "noise-multiplier",
    "privacy.record.noise-multiplier": 1.0,
    "privacy.record.delta": 1e-4,
    "data.ref": "folder",
    "data.partition": "by-node",
    "backbone.name": "demo",
    "evaluation.every": 1000,  # only the last round
}
_BUDGET = """
[budget]
epsilon = 12.0
delta = 1e-4
max-sampling-rate = 0.2
min-noise-multiplier = 1.0
max-clip-norm = 1.0
scores = true
filter = "reserve"
expected-runs = 2
"""


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Check a condition five times a second until it is true.

    Raises:
        TimeoutError: If it is not true within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)


@dataclass(frozen=True, kw_only=True)
class Program:
    """Program under a supervisor, which ends all that it has started when its standard input closes."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self, text: str) -> bool:
        """Return True if the log holds ``text``."""
        return text in self.log.read_text(errors="replace")

    def lines(self, text: str) -> list[str]:
        """Return the lines of the log that hold ``text``, each from ``text`` on."""
        split_lines = (line.partition(text) for line in self.log.read_text(errors="replace").splitlines())
        return [text + rest for _, there, rest in split_lines if there]


@dataclass(kw_only=True)
class Sites:
    """Folders and programs of all simulated machines.

    Attributes:
        root: Parent of all folders: ``certs``, ``server`` and one for each node.
        app: Folder of the app.
        network: Network of the nodes.
        port: Port of the server.
        digest: Digest of the app's bundle.
        programs: All programs that were started.
    """

    root: Path
    app: Path
    network: Network
    port: int
    digest: str
    programs: list[Program] = field(default_factory=list)

    @staticmethod
    @contextlib.contextmanager
    def prepared(root: Path, app: Path, namespaces: bool) -> "Iterator[Sites]":
        """Prepare folders, images and keys. On exit, end all programs and remove all namespaces."""
        root.mkdir(parents=True)
        (port,) = flower_env.free_ports(1)
        with Network.opened(NODES + 1, wanted=namespaces) as network:
            certificates.make(root / "certs", [network.server, "127.0.0.1", "localhost"], nodes=NODES + 1)
            sites = Sites(root=root, app=app, network=network, port=port, digest=digest_of(build_bundle(app)))
            sites.write_images()
            try:
                yield sites
            finally:
                for program in sites.programs:
                    assert program.process.stdin is not None
                    program.process.stdin.close()  # tells the supervisor to end everything
                for program in sites.programs:
                    program.process.wait(timeout=60)

    @property
    def address(self) -> str:
        """Address of the server, ``HOST:PORT``."""
        return f"{self.network.server}:{self.port}"

    def home(self, node: int) -> Path:
        """Return a node's folder."""
        return self.root / f"node-{node}"

    def write_images(self) -> None:
        """Divide the demo's images of some classes among the nodes. The server gets a few that no node has."""
        names = {name.replace(" ", "_"): name for c in _CATEGORIES for name in demo_categories()[c]}
        for split, data in load_demo().items():
            seen = dict.fromkeys(names, 0)
            for index, label in enumerate(data.labels):
                folder = data.class_names[label].replace(" ", "_")
                if folder not in names or split == "val":
                    continue
                place = seen[folder] % (NODES + 1)
                seen[folder] += 1
                owner = self.root / "server" if place == NODES else self.home(place)
                file = owner / "images" / split / folder / f"{index:05d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                data.image(index).save(file)
        classes = json.dumps({"template": demo_template(), "class-names": names})
        for owner in (self.root / "server", *map(self.home, range(NODES))):
            (owner / "classes.json").write_text(classes, encoding="utf-8")

    def class_name(self, folder: str) -> str:
        """Return the class name that the prompt predicts for a class folder."""
        return folder.replace("_", " ")

    def other_ca(self) -> Path:
        """Make the certificates of another CA; return their folder."""
        folder = self.root / "other-certs"
        certificates.make(folder, [self.network.server], nodes=1)
        return folder

    def node_file(self, node: int, certs: Path) -> Path:
        """Write the owner's file of a node."""
        home = self.home(min(node, NODES - 1))  # a node that is not registered has no images
        (port,) = flower_env.free_ports(1)
        text = f"""state-dir = "{self.home(node) / "state"}"
data-path = "{home / "images"}"
classes = "{home / "classes.json"}"
device = "auto"
{_BUDGET}
[model]
name = "demo"

[server]
address = "{self.address}"
root-certificates = "{certs / "ca.crt"}"
private-key = "{self.root / "certs" / f"node-{node}.key"}"
partition-id = {node}
port = {port}

[app]
allowed = ["{self.digest}"]
"""
        self.home(node).mkdir(exist_ok=True)
        (self.home(node) / "state").mkdir(exist_ok=True, mode=0o700)
        file = self.home(node) / f"{certs.name}.toml"
        file.write_text(text, encoding="utf-8")
        return file

    def start_superlink(self) -> None:
        """Start the SuperLink over TLS with authentication of nodes, and register three of the keys."""
        home, certs = self.root / "server", self.root / "certs"
        command = ["flower-superlink", "--host", self.network.server, "--port", str(self.port)]
        command += ["--ssl-ca-certfile", str(certs / "ca.crt"), "--ssl-certfile", str(certs / "server.pem")]
        command += ["--ssl-keyfile", str(certs / "server.key"), "--enable-supernode-auth"]
        command += ["--database", str(home / "superlink.db")]
        self._write_flower_config()
        self._start("superlink", command, home)
        wait_until(self._healthy, 90, "the SuperLink")
        with ThreadPoolExecutor() as pool:
            keys = [str(certs / f"node-{node}.key.pub") for node in range(NODES)]
            list(pool.map(lambda key: self.flwr("supernode", "register", key, "rehearsal"), keys))

    def _write_flower_config(self) -> None:
        settings = {"address": self.address, "root-certificates": str(self.root / "certs" / "ca.crt")}
        text = f'[superlink]\ndefault = "rehearsal"\n\n[superlink.rehearsal]\n{to_toml(settings)}'
        (self.root / "server" / "flwr").mkdir()
        (self.root / "server" / "flwr" / "config.toml").write_text(text, encoding="utf-8")

    def _healthy(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.root / "certs" / "ca.crt"))
        https, no_proxy = urllib.request.HTTPSHandler(context=context), urllib.request.ProxyHandler({})
        directly = urllib.request.build_opener(no_proxy, https)
        with contextlib.suppress(OSError), directly.open(f"https://{self.address}/health", timeout=2):
            return True
        return False

    def flwr(self, *words: str) -> dict[str, Any]:
        """Call ``flwr`` as the operator, and return its answer.

        Raises:
            RuntimeError: If the call did not succeed.
        """
        home = self.root / "server"
        done = self._call(["flwr", *words, "--format", "json"], home)
        answer = json.loads(done.stdout[done.stdout.index("{") :]) if "{" in done.stdout else {}
        if not answer.get("success"):
            raise RuntimeError(f"flwr {' '.join(words)}: {done.stdout}{done.stderr}")
        return answer

    def check_node(self, node: int, certs: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """Run ``fl-dualpriv node check`` in the node's namespace."""
        file = self.node_file(node, certs or self.root / "certs")
        words = [*self.network.inside(node), _script("fl-dualpriv"), "node", "check", str(file)]
        return self._call(words, self.home(node))

    def start_node(
        self,
        node: int,
        *,
        name: str = "",
        certificates: Path | None = None,
        waits: bool = True,
        retries: int | None = None,
    ) -> Program:
        """Run ``fl-dualpriv node start`` in the node's namespace. With ``waits``, wait until the server knows it."""
        file = self.node_file(node, certificates or self.root / "certs")
        command = [*self.network.inside(node), _script("fl-dualpriv"), "node", "start", str(file)]
        command += [] if retries is None else ["--max-retries", str(retries)]
        program = self._start(name or f"node-{node}", command, self.home(node))
        if waits:
            self.wait_for(program)
        return program

    def wait_for(self, node: Program) -> None:
        """Wait until the server knows a node.

        Raises:
            TimeoutError: If the node ends, or the wait takes too long.
        """
        wait_until(lambda: node.said("SuperNode ID") or node.process.poll() is not None, 120, node.log.stem)
        if node.process.poll() is not None:
            raise TimeoutError(f"a node ended: {node.log.read_text(errors='replace')[-2000:]}")

    def submit(self, rounds: int) -> None:
        """Start the run with ``flwr run``."""
        server = self.root / "server"
        settings = _SETTINGS | {
            "rounds": rounds,
            "population": NODES,
            "data.path": str(server / "images"),
            "data.classes": str(server / "classes.json"),
            "output.dir": str(self.root / "run"),
        }
        (server / "run.toml").write_text(to_toml(settings), encoding="utf-8")
        self.flwr("run", str(self.app), "rehearsal", "--run-config", str(server / "run.toml"))

    def ended(self) -> str | None:
        """Return the name of the file with which the run ended; None while it goes on."""
        return next((name for name in ("summary.json", "error.json") if (self.root / "run" / name).exists()), None)

    def read(self, name: str) -> str:
        """Return the text of a file of the run; empty if the file does not exist."""
        file = self.root / "run" / name
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def rounds(self) -> list[dict[str, Any]]:
        """Return the result of each round."""
        return [json.loads(line) for line in self.read("rounds.jsonl").splitlines()]

    def progress(self) -> list[dict[str, Any]]:
        """Return the operator's line for each round."""
        return [json.loads(line) for line in self.read("operator/progress.jsonl").splitlines()]

    def ledger(self, node: int) -> list[dict[str, Any]]:
        """Return the events of a node's ledger, without the header and the reserved plans."""
        file = self.home(node) / "state" / "ledger.jsonl"
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.exists() else [])
        return [line for line in lines if "server_round" in line]

    def export(self, node: int) -> Path:
        """Export a node's prompt with ``fl-dualpriv export``; return its file."""
        prompt = self.home(node) / "prompt.safetensors"
        words = ["fl-dualpriv", "export", str(self.home(node) / "state"), "--client", str(node), "--out", str(prompt)]
        done = self._call(words, self.home(node))
        if done.returncode != 0:
            raise RuntimeError(f"export: {done.stdout}{done.stderr}")
        return prompt

    def predict(self, node: int, prompt: Path, images: Sequence[Path]) -> list[str]:
        """Return the most likely class of each image, from ``fl-dualpriv predict``."""
        done = self._call(["fl-dualpriv", "predict", str(prompt), *map(str, images), "--json"], self.home(node))
        if done.returncode != 0:
            raise RuntimeError(f"predict: {done.stdout}{done.stderr}")
        return [json.loads(line)["label"] for line in done.stdout.splitlines()]

    def _call(self, words: Sequence[str], home: Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [_script(words[0]), *words[1:]],
            cwd=home,
            env=_environment(home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def _start(self, name: str, command: Sequence[str], home: Path) -> Program:
        log = self.root / f"{name}.log"
        nothing = str(self.root / f"{name}-nothing")  # the supervisor removes this folder; there is none
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, nothing, _script(command[0]), *command[1:]],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=home,
                env=_environment(home),
                start_new_session=True,
            )
        self.programs.append(Program(process=process, log=log))
        return self.programs[-1]


def _environment(home: Path) -> dict[str, str]:
    # The user's proxies are left out, because all sites are on this machine.
    left_out = ("FLWR_", "FL_DUALPRIV")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(left_out) and not name.lower().endswith("_proxy")
    }
    return inherited | {
        "HOME": str(home),
        "PATH": programs.search_path(),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    }


def _script(name: str) -> str:
    """Return the path of a program of this environment, or the name of one of the system."""
    return programs.find(name) or name

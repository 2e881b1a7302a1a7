"""`fl-dualpriv node check`: every case that keeps a node from working, against real files, sockets and certificates."""

import datetime
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from PIL import Image
from typer.testing import CliRunner

from deploy import certificates
from fl_dualpriv.cli import main as cli
from fl_dualpriv.data.load import load_data
from fl_dualpriv.node import check as node_check
from fl_dualpriv.node.check import Finding, check
from fl_dualpriv.node.contact import contact, key_fingerprint
from fl_dualpriv.node.device import probe, usable_device
from fl_dualpriv.node.file import NodeFile, read_node_file
from fl_dualpriv.node.tables import NodeModel, NodeServer
from fl_dualpriv.privacy.filters.budget import Budget, FilterChoice
from fl_dualpriv.privacy.filters.reserve import ReserveFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent

BUDGET = Budget(
    epsilon=2.0,
    delta=1e-4,
    max_sampling_rate=0.2,
    min_noise_multiplier=1.0,
    max_clip_norm=1.0,
    trusts_server=False,
    scores=False,
    seeded_noise=False,
)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki") / "certs"
    certificates.make(folder, ["127.0.0.1"], nodes=1)
    return folder


Serve = Callable[..., int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """An HTTPS server, or an HTTP one without certificates, whose clock is wrong by some seconds; gives its port."""
    servers: list[HTTPServer] = []

    def start(folder: Path | None, behind: float = 0.0, date: str | None = None) -> int:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def date_time_string(self, timestamp: float | None = None) -> str:
                return super().date_time_string(time.time() - behind) if date is None else date

            def log_message(self, format: str, *words: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Answer)
        if folder is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "server.pem", folder / "server.key")
            # The handshake is the handler's, so that a client which refuses the certificate does not stop the server.
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server.server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def at(port: int, certs: Path, host: str = "127.0.0.1") -> NodeServer:
    return NodeServer(address=f"{host}:{port}", root_certificates=certs / "ca.crt", port=free_port())


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def test_a_server_with_its_own_certificate_and_this_clock(certs: Path, serve: Serve):
    found = contact(at(serve(certs), certs))
    assert (found.answered, found.problem) == (True, "")
    assert found.expires is not None
    assert found.ahead is not None
    assert abs(found.ahead) <= 1.5  # the header is cut to a second


def test_what_is_wrong_with_a_server_is_said(certs: Path, serve: Serve, tmp_path: Path):
    other = tmp_path / "other"
    certificates.make(other, ["127.0.0.1"])
    assert "not signed by this CA" in contact(at(serve(other), certs)).problem
    # Of the same CA each time: for another name; and expired, since it is valid for 0 days from now.
    for name, hosts, days, words in (
        ("named", ["fl.example.org"], 365, "is for fl.example.org, not for 127.0.0.1"),
        ("old", ["127.0.0.1"], 0, "the server's certificate is valid from"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("ca.crt", "ca.key"):
            (folder / file).write_bytes((certs / file).read_bytes())
        certificates.make(folder, hosts, days=days)
        assert words in contact(at(serve(folder), certs)).problem
    assert "without TLS" in contact(at(serve(None), certs)).problem
    assert "cannot be reached" in contact(at(free_port(), certs)).problem
    assert "is not known here" in contact(at(1, certs, "no-such-host.invalid")).problem


def test_without_tls_only_a_server_on_this_machine_is_good(serve: Serve):
    server = NodeServer(address=f"127.0.0.1:{serve(None)}", insecure=True)
    found = contact(server)
    assert (found.problem, found.expires) == ("", None)
    assert node_check._server(server, found).verdict == "good"
    far = replace(server, address="192.0.2.1:8000")  # an address that is kept for examples
    assert node_check._server(far, found).verdict == "note"


@pytest.mark.parametrize(
    ("behind", "verdict"), [(0.0, "good"), (8.0, "bad"), (-280.0, "good"), (-320.0, "bad")], ids=str
)
def test_a_clock_that_the_server_would_refuse(certs: Path, serve: Serve, behind: float, verdict: str):
    # Flower: a request from 5 s in the server's future or 305 s in its past is refused.
    found = node_check._clock(contact(at(serve(certs, behind), certs)))
    assert found.verdict == verdict
    assert ("ahead of" in found.says) is (behind > 0) or behind == 0


@pytest.mark.parametrize("date", ["Thu, 26 Nov 2026 01:00:00 -0000", "yesterday", ""])
def test_a_server_that_says_no_usable_time_ends_no_check(serve: Serve, date: str):
    found = contact(NodeServer(address=f"127.0.0.1:{serve(None, date=date)}", insecure=True))
    assert found.answered
    assert node_check._clock(found).verdict == "note"


def test_a_key_that_flower_takes_and_others(certs: Path, tmp_path: Path):
    assert key_fingerprint(certs / "node-0.key").startswith("SHA256:")
    loose, strange, text = tmp_path / "loose", tmp_path / "strange", tmp_path / "text"
    loose.write_bytes((certs / "node-0.key").read_bytes())
    loose.chmod(0o644)
    strange.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    )
    text.write_text("no key")
    for file, words in (
        (loose, "may be read by others"),
        (strange, "not on a NIST curve"),
        (text, "not an SSH private key"),
        (tmp_path / "absent", "cannot be read"),
    ):
        found = node_check._guarded(
            "key", lambda file=file: node_check._key(NodeServer(address="h:1", private_key=file))
        )
        assert (found.verdict, words in found.says) == ("bad", True), found.says


def whole(tmp_path: Path, images: int = 6) -> NodeFile:
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(images):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{index}.png")
    (tmp_path / "state").mkdir(mode=0o700)
    return NodeFile(
        state_dir=tmp_path / "state", data_path=tmp_path / "images", budget=BUDGET, apps=("0a" * 32,), device="cpu"
    )


def test_data_that_cannot_be_used(tmp_path: Path):
    node = whole(tmp_path)
    assert node_check._data(node) == Finding(
        what="data", verdict="good", says="12 training images of 2 classes, a separate test/"
    )
    files = sorted((tmp_path / "images" / "train").rglob("*.png"))
    files[0].write_bytes(b"no image")
    load_data.cache_clear()  # a directory that changes is not read again
    found = node_check._data(node)
    assert (found.verdict, "11 usable of 12, 1 cannot be read" in found.says) == ("note", True)
    for file in files:
        file.write_bytes(b"no image")
    load_data.cache_clear()
    assert node_check._data(node).verdict == "bad"
    missing = node_check._guarded("data", lambda: node_check._data(replace(node, data_path=tmp_path / "nowhere")))
    assert (missing.verdict, "does not exist" in missing.says) == ("bad", True)


def test_questions_are_data_too(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.png")
    rows = [{"image": f"{i}.png", "question": "What?", "answer": "this"} for i in "ab"]
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    node = NodeFile(state_dir=None, data_path=tmp_path, budget=None, apps=())
    found = node_check._data(node)
    assert (found.verdict, found.says) == ("good", "2 training questions of 1 types")


def test_a_budget_that_is_spent_or_nearly_so(tmp_path: Path):
    node = whole(tmp_path, images=1)
    assert node.budget is not None
    says = node_check._budget(node).says
    assert says.startswith(
        "reserve: whole plans of at most 10 runs, each charged before its first release at δ = 1e-05"
    )
    assert "ε = 0 is reserved for 0 of 10 runs, ε = 2 and 10 runs are left; 0 rounds so far" in says
    ledger = Ledger(tmp_path / "state" / "ledger.jsonl")
    event = LedgerEvent(run="r", unit="record", server_round=1, releases=2, sampling_rate=0.2, noise_multiplier=1.0)
    ledger.record(event)
    spent = ReserveFilter(node.budget).cost(2, 0.2, 1.0)
    for epsilon, verdict in ((spent * 1.05, "note"), (spent * 0.99, "bad"), (spent * 2, "good")):
        found = node_check._budget(replace(node, budget=replace(node.budget, epsilon=epsilon)))
        assert found.verdict == verdict
    with ledger.path.open("a") as file:
        file.write("torn\n")
    for most, verdict in ((None, "bad"), (spent, "note")):  # without a largest plan a damaged line closes the ledger
        budget = replace(node.budget, epsilon=100.0, filter=FilterChoice(max_run_epsilon=most))
        damaged = node_check._budget(replace(node, budget=budget))
        assert (damaged.verdict, "1 damaged lines" in damaged.says) == (verdict, True)


def test_a_budget_for_one_run_says_so(tmp_path: Path):
    node = whole(tmp_path, images=1)
    assert node.budget is not None
    found = node_check._budget(replace(node, budget=replace(node.budget, filter=FilterChoice(expected_runs=1))))
    assert (found.verdict, "no second run will fit" in found.says) == ("note", True)


def test_a_ledger_of_another_filter_is_bad(tmp_path: Path):
    node = whole(tmp_path, images=1)
    assert node.budget is not None
    Ledger(tmp_path / "state" / "ledger.jsonl").begin(ReserveFilter(replace(node.budget, delta=1e-6)).header)
    found = node_check._budget(node)
    assert (found.verdict, "delta was 1e-06 and is now 0.0001" in found.says) == ("bad", True)


def test_what_else_keeps_a_node_from_starting(tmp_path: Path, certs: Path):
    node = whole(tmp_path, images=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert node_check._port(taken.getsockname()[1]).verdict == "bad"
    assert node_check._port(free_port()).verdict == "good"
    assert node_check._app(replace(node, apps=())).verdict == "bad"
    assert node_check._state(node).verdict == "good"
    assert node_check._state(replace(node, state_dir=None)).verdict == "bad"  # there is a budget
    (tmp_path / "file").write_text("")
    assert node_check._state(replace(node, state_dir=tmp_path / "file" / "state")).verdict == "bad"
    (tmp_path / "state").chmod(0o755)
    assert node_check._state(node).verdict == "note"
    (tmp_path / "empty.crt").write_text("")
    for file in (tmp_path / "empty.crt", tmp_path / "absent.crt"):
        server = NodeServer(address="h:1", root_certificates=file)
        assert node_check._guarded("CA", lambda server=server: node_check._root(server)).verdict == "bad"
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)
    assert node_check._dated("CA", "x", soon).verdict == "note"


def test_a_clock_before_the_ca_was_made_is_noticed_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(certificates, "_BACKDATED", datetime.timedelta(days=-2))  # valid from the day after tomorrow
    certificates.make(tmp_path / "certs", ["localhost"])
    found = node_check._root(NodeServer(address="h:1", root_certificates=tmp_path / "certs" / "ca.crt"))
    assert (found.verdict, "is it behind?" in found.says) == ("bad", True)


@pytest.mark.slow  # a process that imports torch
def test_a_gpu_that_is_not_there_is_a_note(tmp_path: Path):
    found = node_check._device(replace(whole(tmp_path, images=1), device="cuda:99"))
    assert (found.verdict, "going on with the CPU" in found.says) == ("note", True)


def test_the_probe_runs_nothing_that_lies_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A node may be started anywhere, and with its owner's rights."""
    (tmp_path / "fl_dualpriv" / "node").mkdir(parents=True)
    for folder in ("fl_dualpriv", "fl_dualpriv/node"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "fl_dualpriv" / "node" / "device.py").write_text("print('planted\\t')")
    monkeypatch.chdir(tmp_path)
    assert probe("cuda:99")[0] == "cpu"


def test_a_gpu_that_is_not_there_is_announced_and_replaced_by_the_cpu():
    device, note = usable_device("cuda:99")
    assert device == "cpu"
    assert re.fullmatch(
        r'device = "cuda:99" cannot be used \(torch sees \d+ CUDA devices\); going on with the CPU.*', note
    )
    assert usable_device("cpu") == ("cpu", "")


def test_a_model_that_is_not_there_is_bad(tmp_path: Path):
    node = whole(tmp_path, images=1)
    model = NodeModel(name=f"local-dir:{tmp_path / 'nowhere'}")
    missing = node_check._guarded("model", lambda: node_check._model(replace(node, model=model)))
    assert (missing.verdict, "does not exist" in missing.says) == ("bad", True)


def test_a_demand_for_integers_is_shown(tmp_path: Path):
    node = replace(whole(tmp_path, images=1), budget=replace(BUDGET, integer_arithmetic=True))
    assert 'only with privacy.arithmetic = "integer"' in node_check._budget(node).says
    assert "integer" not in node_check._budget(replace(node, budget=BUDGET)).says


def test_the_command_prints_one_table_and_its_status_is_true(tmp_path: Path, certs: Path, serve: Serve):
    whole(tmp_path)
    text = f"""state-dir = "{tmp_path / "state"}"
data-path = "{tmp_path / "images"}"
device = "cpu"
[budget]
epsilon = 8.0
delta = 1e-5
max-sampling-rate = 0.2
min-noise-multiplier = 0.5
max-clip-norm = 1.0
[model]
name = "demo"
[server]
address = "127.0.0.1:{serve(certs)}"
root-certificates = "{certs / "ca.crt"}"
private-key = "{certs / "node-0.key"}"
port = {free_port()}
[app]
allowed = ["{"0a" * 32}"]
"""
    file = tmp_path / "node.toml"
    file.write_text(text)
    good = CliRunner().invoke(cli.app, ["node", "check", str(file)])
    assert good.exit_code == 0, good.output
    rows = [line.split("│")[1].strip() for line in good.stdout.splitlines() if "│" in line]
    wanted = ["app", "state", "data", "device", "model", "budget", "port", "CA", "key", "server", "clock"]
    assert [row for row in rows if row] == wanted
    assert " bad " not in good.stdout
    file.write_text(text.replace("server]\naddress", "server]\ninsecure = false\naddress").replace("0a0a", "", 1))
    refused = CliRunner().invoke(cli.app, ["node", "check", str(file)])
    assert (refused.exit_code, "64 digits" in refused.stderr) == (1, True)
    file.write_text(text.replace('address = "127.0.0.1:', 'address = "127.0.0.2:'))
    lost = CliRunner().invoke(cli.app, ["node", "check", str(file)])
    assert lost.exit_code == 1
    assert "1 of the above must be put right" in lost.stderr


def test_offline_nothing_is_asked_of_the_network(tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch):
    def nobody(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "create_connection", nobody)
    findings = list(check(whole(tmp_path, images=2), at(1, certs), offline=True))
    assert {f.what: f.verdict for f in findings if f.what in ("server", "clock")} == {"server": "note", "clock": "note"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('device = "tpu"', "it must be auto, cpu, cuda or cuda:N"),
        ("[model]\n", "model.name is missing"),
        ('[model]\nname = "demo"\nsize = 3\n', "unknown key model.size"),
        ("[server]\n", "server.address is missing"),
        ('[server]\naddress = "https://fl.example.org"\n', "give HOST:PORT, without https://"),
        ('[server]\naddress = "h:99999"\n', "give HOST:PORT"),
        ('[server]\naddress = "h:1"\nport = 0\n', "server.port = 0; it must be a whole number from 1 to 65535"),
        ('[server]\naddress = "h:1"\npartition-id = true\n', "server.partition-id = True"),
        ('[server]\naddress = "h:1"\nprivate-key = "key"\n', "give an absolute path"),
        ('[server]\naddress = "h:1"\ninsecure = true\nroot-certificates = "/ca"\n', "choose one"),
        ("server = 3", "server must be a table"),
        ('classes = "here.json"', "classes = 'here.json'; give an absolute path"),
    ],
)
def test_what_is_wrong_in_the_tables_is_said(tmp_path: Path, text: str, words: str):
    file = tmp_path / "node.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"node file") as error:
        read_node_file(file)
    assert words in str(error.value)

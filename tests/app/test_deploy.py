"""What `deploy/` holds works: certificates, compose files, systemd units, the walk-through, and the whole rehearsal."""

import contextlib
import importlib
import json
import re
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from deploy import certificates
from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.flower import supervisor
from fl_dualpriv.flower.app_bundle import build_bundle, digest_of
from fl_dualpriv.node.file import NodeFile, read_node_file
from fl_dualpriv.privacy.filters.choose import filter_of, spend_budget
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent
from fl_dualpriv.run.file_kinds import PROGRESS
from tests.app.run_folders import events_of
from tests.app.test_rogue_server import BUDGET, DEFAULTS, write_app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def test_a_certificate_names_its_server_and_keys_are_for_one_user(tmp_path: Path):
    written = certificates.make(tmp_path / "certs", ["fl.example.org", "10.0.0.5", "::1"], nodes=2)
    names = ["ca.key", "ca.crt", "server.key", "server.pem"]
    names += [f"node-{i}.key{end}" for i in (0, 1) for end in ("", ".pub")]
    assert [file.name for file in written] == names
    for file in written:
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 or file.suffix != ".key"
    pem = x509.load_pem_x509_certificate((tmp_path / "certs" / "server.pem").read_bytes())
    said = pem.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert said.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(a) for a in said.get_values_for_type(x509.IPAddress)] == ["10.0.0.5", "::1"]
    assert shaken(tmp_path / "certs", "fl.example.org")
    assert shaken(tmp_path / "certs", "10.0.0.5")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shaken(tmp_path / "certs", "10.0.0.6")
    assert certificates.make(tmp_path / "certs", ["other"], nodes=2) == []  # nothing is made twice


@pytest.mark.parametrize("hosts", [[], ["fl.example.org:8000"], ["https://fl"], [""]], ids=str)
def test_what_is_no_host_gets_no_certificate(tmp_path: Path, hosts: list[str]):
    with pytest.raises(ValueError, match="--host"):
        certificates.make(tmp_path / "certs", hosts)
    assert not (tmp_path / "certs").exists()


def shaken(certs: Path, host: str) -> bool:
    """A handshake in memory with a client as strict as Python's from 3.13 on."""
    client, server = ssl.create_default_context(cafile=certs / "ca.crt"), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server.load_cert_chain(certs / "server.pem", certs / "server.key")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there, server_hostname=host), server.wrap_bio(there, back, server_side=True)]
    for end in ends * 3:
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return ends[0].getpeercert() is not None


def commands() -> dict[str, list[str]]:
    """Of the compose files and the units, by the name of their program."""
    found = {}
    for file in DEPLOY.glob("compose.*.yaml"):
        for service in yaml.safe_load(file.read_text())["services"].values():
            if "command" in service:
                found[f"{service['command'][0]} of {file.name}"] = service["command"]
    for file in (DEPLOY / "systemd").iterdir():
        text = file.read_text().replace("\\\n", " ")
        for words in re.findall(r"^ExecStart\w*=/opt/fl-dualpriv/bin/(.*)$", text, flags=re.MULTILINE):
            found[f"{words} of {file.name}"] = words.split()
    return found


def test_flower_and_our_front_understand_the_commands_of_the_services():
    program = importlib.import_module("flwr.superlink.cli.flower_superlink")
    seen = []
    for name, (what, *words) in commands().items():
        seen.append(what)
        if what == "flower-superlink":
            parsed = vars(program._parse_args_run_superlink().parse_args(words))
            assert parsed["enable_supernode_auth"] is True, name
            assert parsed["insecure"] is False, name
            for key in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certfile", "database"):
                assert str(parsed[key]).startswith("/"), name
        else:
            assert what == "fl-dualpriv", name
            assert words[:2] in (["node", "start"], ["node", "check"]), name
            assert re.fullmatch(r"/\S+\.toml", words[-1]), name
    assert sorted(seen) == ["fl-dualpriv"] * 3 + ["flower-superlink"] * 2


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_units(tmp_path: Path):
    for file in (DEPLOY / "systemd").iterdir():
        text = file.read_text().replace("/opt/fl-dualpriv/bin", sysconfig.get_path("scripts"))
        unit = tmp_path / file.name.replace("@", "-a")
        unit.write_text(text.replace("User=fl-dualpriv\n", "").replace("%i", "a"))
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


def walk_through(folder: Path) -> tuple[str, NodeFile, dict[str, Any]]:
    """docs/deploy.md: its text, its node's file as read, and its run's settings by their full names."""
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    node = folder / "node.toml"
    node.write_text(blocks[0].replace("…", "0a" * 32), encoding="utf-8")
    return text, read_node_file(node), flat(tomllib.loads(blocks[2]))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, ``{"a.b.c": 1}``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_the_walk_through_is_a_file_that_a_node_reads(tmp_path: Path):
    text, found, run = walk_through(tmp_path)
    assert found.server is not None
    assert found.server.address == "fl.example.org:8000"
    assert found.budget is not None
    assert run.keys() <= DEFAULTS.keys()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link


def test_the_node_of_the_walk_through_admits_its_run_as_often_as_it_says(tmp_path: Path):
    """And the health line that is printed there is the one after the first such run."""
    text, node, settings = walk_through(tmp_path)
    config = RunConfig.from_run_config(DEFAULTS | settings)
    plan, budget = record_level_plan(config), node.budget
    assert plan is not None
    assert budget is not None
    budget.check_plan(plan, reproducible=False)
    ledger, runs = Ledger(tmp_path / "ledger.jsonl"), budget.filter.expected_runs
    event = LedgerEvent(
        run="0",
        unit="record",
        server_round=1,
        releases=config.train.local_steps,
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
    )
    for number in range(runs):
        spend_budget(ledger, budget, plan.reserved(str(number)), replace(event, run=str(number)))
        if number == 0:
            said = f"{config.rounds} rounds answered; {filter_of(budget).balance(ledger.read())}`"
            assert said in re.sub(r"\s+", " ", text)
    assert f"a node as above admits {runs} such runs" in text
    with pytest.raises(PrivacyError, match="0 runs are left"):
        spend_budget(ledger, budget, plan.reserved("more"), replace(event, run="more"))


# --- real programs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)  # two minutes where nothing else runs
def test_the_rehearsal(tmp_path: Path):
    """TLS, registered keys, refusals, a node killed and started anew in mid-run, exports: the script looks at all."""
    app = write_app(tmp_path / "app", rogue=False)
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "rehearsal.py"), str(tmp_path / "out"), "--app", str(app)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["failed"] == "nothing"
    assert [len(rounds) for rounds in report["rounds"]][::2] == [5, 5]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_that_stops_in_mid_round_is_a_zero_and_another_version_of_the_app_goes_on_with_its_ledger(
    deployment: Any, images: Path, tiny_clip_dir: Path, tmp_path: Path
):
    first, second = write_app(tmp_path / "app-1", rogue=False), write_app(tmp_path / "app-2", rogue=False)
    project = second / "pyproject.toml"
    project.write_text(
        re.sub(r'^version = ".*"', 'version = "9.9.9"', project.read_text(), count=1, flags=re.MULTILINE)
    )
    digests = [digest_of(build_bundle(app)) for app in (first, second)]
    assert digests[0] != digests[1]

    def owner(number: int, digest: str) -> Path:
        home = tmp_path / f"owner-{number}"
        home.mkdir(exist_ok=True)
        budget = re.sub("epsilon = .*", "epsilon = 50.0", BUDGET)
        text = f'state-dir = "{home / "state"}"\ndata-path = "{images}"\n{budget}[app]\nallowed = ["{digest}"]\n'
        (home / "node.toml").write_text(text)
        return home / "node.toml"

    def ledger(number: int) -> list[dict[str, Any]]:
        return events_of(tmp_path / f"owner-{number}" / "state" / "ledger.jsonl")

    def run(app: Path, name: str, rounds: int) -> Path:
        out = tmp_path / name
        config = DEFAULTS | {
            "rounds": rounds,
            "population": 2,
            "reply-timeout": 150.0,  # a node that is stopped is known to be gone before that
            "train.local-steps": 2,
            "train.sampling-rate": 0.25,
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.noise-multiplier": 1.5,
            "privacy.record.delta": 1e-3,
            "data.path": str(images),
            "data.partition": "by-node",
            "backbone.name": f"local-dir:{tiny_clip_dir}",
            "output.dir": str(out),
        }
        superlink.submit(app, config)
        return out

    def rounds_done(out: Path) -> list[dict[str, Any]]:
        file = out / PROGRESS
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    superlink = deployment.superlink("mixed")
    nodes = [deployment.node(f"mixed-{n}", superlink, owner(n, digests[0]), "--partition-id", str(n)) for n in range(2)]
    out = run(first, "run-1", 3)
    deployment.wait_until(lambda: nodes[1].said("ROUND 1]"), 300)
    stopped = supervisor.descendants(nodes[1].process.pid)
    supervisor.kill(stopped, signal.SIGSTOP)
    try:
        deployment.wait_until(lambda: rounds_done(out) or (out / "error.json").exists(), 400)
    finally:
        supervisor.kill(stopped, signal.SIGCONT)
    (line,) = rounds_done(out)[:1]
    assert (line["round"], line["failures"]) == (1, 1)  # the other node's upload and the noise: no stall, no abort
    deployment.wait_until((out / "summary.json").exists, 400)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"] == 3
    assert [event["server_round"] for event in ledger(0)] == [1, 2, 3]
    late = [event["server_round"] for event in ledger(1)]
    assert len(set(late)) == len(late) <= 3

    for node in nodes:
        node.stop()
    before = ledger(0)
    prompt = (tmp_path / "owner-0" / "state" / "prompt.safetensors").read_bytes()
    for n in range(2):
        deployment.node(f"mixed-{n}-again", superlink, owner(n, digests[1]), "--partition-id", str(n))
    assert (tmp_path / "owner-0" / "state" / "prompt.safetensors").read_bytes() == prompt
    refused = run(first, "run-2", 1)  # the version before is pinned no more
    deployment.wait_until((refused / "error.json").exists, 300)
    assert "is not one of them" in (refused / "error.json").read_text()
    out = run(second, "run-3", 1)
    deployment.wait_until(lambda: (out / "summary.json").exists() or (out / "error.json").exists(), 400)
    assert (out / "summary.json").exists(), (out / "error.json").read_text()
    assert ledger(0)[:3] == before
    assert [event["server_round"] for event in ledger(0)[3:]] == [1]
    assert ledger(0)[3]["run"] != before[0]["run"]

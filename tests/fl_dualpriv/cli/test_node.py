"""`fl-dualpriv node`: what it refuses to start, how it starts Flower's SuperNode, and the digests it prints."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower.app_bundle import build_bundle, digest_of
from fl_dualpriv.node.file import NodeFile
from fl_dualpriv.node.start import NodeOptions, check_options, command_line, node_config_text, server_of

ROOT = Path(__file__).parents[3]
LOOP = importlib.import_module("flwr.supernode.start_client_internal")
PROGRAM = importlib.import_module("flwr.supernode.cli.flower_supernode")
DIGEST = "0a" * 32
BUDGET = """
[budget]
epsilon = 8.0
delta = 1e-5
max-sampling-rate = 0.2
min-noise-multiplier = 0.5
max-clip-norm = 1.0
"""
APP = f'[app]\nallowed = ["{DIGEST}"]\n'


def options(tmp_path: Path, text: str, **changes: Any) -> NodeOptions:
    file = tmp_path / "node.toml"
    file.write_text(text)
    given: dict[str, Any] = {
        "node_file": file,
        "superlink": "127.0.0.1:1",
        "insecure": True,
        "root_certificates": None,
        "auth_private_key": None,
        "trusted_entities": None,
        "partition_id": 0,
        "host": "127.0.0.1",
        "port": 9094,
        "max_retries": None,
        "any_app": False,
    }
    return NodeOptions(**given | changes)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["node", *arguments])


def test_an_owners_file_that_says_all(tmp_path: Path):
    text = f'state-dir = "{tmp_path}"\ndata-path = "{tmp_path}"\n{BUDGET}\n{APP}'
    found = check_options(options(tmp_path, text))
    assert isinstance(found, NodeFile)
    assert (found.apps, found.state_dir) == ((DIGEST,), tmp_path)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("", {}, "allows no app: put"),
        ("[app]\nallowed = []\n", {}, "allows no app: put"),
        (APP, {"any_app": True}, "--any-app allows all: choose one"),
        (BUDGET + APP, {}, r"has a \[budget\] but no state-dir"),
        ('state-dir = "/mine"\n' + BUDGET + APP, {}, r"has a \[budget\] but no data-path"),
        (APP, {"root_certificates": Path("ca.crt")}, "--insecure disables TLS"),
        ("[app]\nallowed = ['short']\n", {}, "a SHA-256 digest has 64 digits"),
    ],
    ids=["no table", "empty", "both", "no folder", "no images", "TLS or not", "no digest"],
)
def test_what_would_start_without_the_protection_its_owner_expects_is_refused(
    tmp_path: Path, text: str, changes: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        check_options(options(tmp_path, text, **changes))


def test_flowers_own_parser_understands_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = options(
        tmp_path,
        APP,
        superlink="example.org:9092",
        insecure=False,
        root_certificates=Path("/etc/ca.crt"),
        auth_private_key=Path("/etc/key"),
        trusted_entities=Path("/etc/trusted.yaml"),
        port=9555,
        max_retries=3,
    )
    words = command_line(given, server_of(given, check_options(given)), Path("/tmp/node-config.toml"))
    parsed = vars(PROGRAM._parse_args_run_supernode().parse_args(words[1:]))
    expected = {
        "superlink": "example.org:9092",
        "insecure": False,
        "root_certificates": "/etc/ca.crt",
        "auth_supernode_private_key": "/etc/key",
        "trusted_entities": Path("/etc/trusted.yaml"),
        "node_config": "/tmp/node-config.toml",
        "host": "127.0.0.1",
        "port": 9555,
        "max_retries": 3,
        "isolation": "subprocess",
        "runtime_dependency_install": False,
    }
    assert {name: parsed[name] for name in expected} == expected
    given = options(tmp_path, APP)
    words = command_line(given, server_of(given, check_options(given)), Path("/x"))
    plain = vars(PROGRAM._parse_args_run_supernode().parse_args(words[1:]))
    assert (plain["insecure"], plain["root_certificates"], plain["max_retries"]) == (True, None, None)


@pytest.mark.parametrize("name", ["node.toml", "with blank.toml", "with 'both\" quotes.toml", "ä\\b.toml"])
def test_an_app_is_told_where_its_owners_file_lies(tmp_path: Path, name: str):
    given = options(tmp_path, APP, node_file=tmp_path / name, partition_id=3)
    file = tmp_path / "config-of-node.toml"
    given.node_file.write_text(APP)
    file.write_text(node_config_text(given, server_of(given, check_options(given)), "cuda:1"))
    expected = {"partition-id": 3, "node-file": str(tmp_path / name), "device": "cuda:1"}
    assert parse_config_args([str(file)]) == expected


def test_a_node_that_is_not_started_is_one_message_and_status_2(tmp_path: Path):
    file = tmp_path / "node.toml"
    missing = call("start", str(file), "--superlink", "127.0.0.1:1")
    assert (missing.exit_code, missing.stderr.count("error:")) == (2, 1)
    assert "cannot be read" in missing.stderr
    file.write_text("")
    refused = call("start", str(file), "--superlink", "127.0.0.1:1")
    assert refused.exit_code == 2
    assert "allows no app" in refused.stderr


def test_another_flower_is_one_message_and_status_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(LOOP, "_insert_message")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back at the end
    options(tmp_path, APP)
    result = call("start", str(tmp_path / "node.toml"), "--superlink", "127.0.0.1:1", "--insecure")
    assert result.exit_code == 2
    assert "the node is not started" in result.stderr
    assert not list((tmp_path / ".fl-dualpriv" / "nodes").iterdir())


@pytest.mark.slow  # Flower's own program
@pytest.mark.parametrize("any_app", [False, True])
def test_a_node_without_a_server_ends_with_flowers_status_and_leaves_nothing(tmp_path: Path, any_app: bool):
    (tmp_path / "node.toml").write_text("" if any_app else APP)
    command = [sys.executable, "-m", "fl_dualpriv.cli.main", "node", "start", str(tmp_path / "node.toml")]
    (port,) = flower_env.free_ports(1)
    command += ["--superlink", "127.0.0.1:1", "--insecure", "--max-retries", "0", "--port", str(port)]
    command += ["--any-app"] if any_app else []
    log = tmp_path / "log"
    with log.open("wb") as stream:  # no pipe: a process of Flower's that ends after this one would hold it
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)}, stdout=stream, stderr=stream, timeout=100
        )
    said = log.read_text()
    assert done.returncode == 1, said
    assert "Failed to initialize the connection to the SuperLink" in said
    assert ("it then has no budget at all" in said) is any_app
    assert "has no [budget]" in said
    assert not list((tmp_path / ".fl-dualpriv" / "nodes").iterdir())


def test_the_digest_of_an_app_stands_alone_on_standard_output(tmp_path: Path):
    app = tmp_path / "app"
    for name in ("clients", "strategies", "simulations"):
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
    text = (ROOT / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(re.sub(r"^fab-(?:in|ex)clude = .*\n", "", text, flags=re.MULTILINE))
    result = call("hash", str(app))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == digest_of(build_bundle(app)) + "\n"
    assert f'allowed = ["{result.stdout.strip()}"]' in result.stderr
    assert "fl-dualpriv/fl-dualpriv" in result.stderr


def test_what_has_no_digest_is_one_message_and_status_2(tmp_path: Path):
    result = call("hash", str(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "has no pyproject.toml" in result.stderr

"""Programs of this machine reach each other without a proxy, whatever proxies a user has set."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower import engine as flower_engine
from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower import hook as flower_hook
from fl_dualpriv.flower.hook import proxy_changes, reach_loopback_directly
from fl_dualpriv.node import start as node_start
from fl_dualpriv.node.contact import proxy_on_the_way
from fl_dualpriv.node.tables import NodeServer

NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "no_grpc_proxy")
DEAD = "http://127.0.0.1:9"  # the discard port: nothing answers there
ALL = "localhost,127.0.0.1,::1"
SET = [
    {"http_proxy": DEAD},
    {"HTTP_PROXY": DEAD},
    {"http_proxy": "127.0.0.1:9"},
    {"all_proxy": DEAD},
    {"ALL_PROXY": DEAD, "https_proxy": DEAD},
    {"http_proxy": DEAD, "no_proxy": "example.org"},
    {"http_proxy": DEAD, "NO_PROXY": "example.org, 10.0.0.0/8"},
    {"HTTP_PROXY": DEAD, "no_proxy": "a.org", "NO_PROXY": "b.org"},
    {"http_proxy": DEAD, "no_proxy": ""},
    {"all_proxy": "socks://127.0.0.1:9"},  # as GNOME writes it
    {"ALL_PROXY": "socks5h://127.0.0.1:9"},
]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.mark.parametrize("proxies", SET, ids=str)
def test_flowers_client_reaches_this_machine(proxies: dict[str, str], port: int, clean: pytest.MonkeyPatch) -> None:
    for name, value in proxies.items():
        clean.setenv(name, value)
    url = f"http://127.0.0.1:{port}/health"
    if flower_hook.is_usable_proxy(next(iter(proxies.values()))):
        with pytest.raises(httpx.TransportError):  # the fault is there before
            httpx.get(url, timeout=5, verify=False)
    else:
        with pytest.raises((ImportError, ValueError)):
            httpx.get(url, timeout=5, verify=False)
    changes = proxy_changes(os.environ)
    for name, value in changes.items():
        clean.delenv(name) if value is None else clean.setenv(name, value)
    assert httpx.get(url, timeout=5, verify=False).status_code == 200
    assert httpx.get(url.replace("127.0.0.1", "localhost"), timeout=5, verify=False).status_code == 200
    assert proxy_changes(os.environ) == {}  # a second time there is nothing to do


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ({}, {}),
        ({"no_proxy": "example.org"}, {}),  # no proxy is set: the system's own settings stay in force
        ({"https_proxy": DEAD}, {"no_proxy": ALL, "NO_PROXY": ALL}),
        ({"http_proxy": ""}, {}),
        ({"http_proxy": DEAD, "no_proxy": "*"}, {"NO_PROXY": "*"}),
        ({"http_proxy": DEAD, "NO_PROXY": "a.org"}, {"no_proxy": f"a.org,{ALL}", "NO_PROXY": f"a.org,{ALL}"}),
        (
            {"http_proxy": DEAD, "no_proxy": "a.org", "NO_PROXY": "b.org", "no_grpc_proxy": "c.org"},
            {"no_proxy": f"a.org,{ALL}", "NO_PROXY": f"b.org,{ALL}", "no_grpc_proxy": f"c.org,{ALL}"},
        ),
        (
            {"http_proxy": DEAD, "no_proxy": f"{ALL},x.org"},
            {"NO_PROXY": f"{ALL},x.org"},
        ),
        ({"all_proxy": "socks4://h:1"}, {"all_proxy": None, "no_proxy": ALL, "NO_PROXY": ALL}),
    ],
    ids=str,
)
def test_what_is_changed_and_what_stays(before: dict[str, str], changes: dict[str, str | None]) -> None:
    assert proxy_changes(before) == changes
    environ = dict(before)
    reach_loopback_directly(environ)
    assert environ == {name: value for name, value in (before | changes).items() if value is not None}


def test_the_engine_finds_its_own_superlink_and_tells_its_programs(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean.setenv("http_proxy", DEAD)
    clean.setattr(flower_engine, "_START_SECONDS", 10.0)
    (number,) = flower_env.free_ports(1)
    code = (
        "from http.server import *\n"
        "class H(BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        f"HTTPServer(('127.0.0.1', {number}), H).serve_forever()"
    )
    environ = flower_engine._environment(tmp_path, number, number)
    assert environ["no_proxy"] == environ["NO_PROXY"] == ALL
    assert environ["http_proxy"] == DEAD  # models may have to be downloaded
    (tmp_path / "log").touch()
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        try:
            link = flower_engine._SuperLink(process=process, environ=environ, home=tmp_path, log=tmp_path / "log")
            assert flower_engine._comes_up(link, number, 0)
        finally:
            process.kill()


def test_plain_flwr_run_gets_it_from_the_hook(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean.setenv("HTTP_PROXY", DEAD)
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"environment": {"FLWR_HOME": str(tmp_path)}, "scripts": "/venv/bin"}))
    clean.setenv("PATH", os.environ["PATH"])  # so that it is as before at the end
    clean.setenv("FLWR_HOME", str(tmp_path))
    clean.setenv("no_proxy", "example.org")
    flower_hook.apply("flwr", state)
    assert os.environ["no_proxy"] == f"example.org,{ALL}"
    os.environ.pop("NO_PROXY")


def test_env_prints_it_for_a_shell(clean: pytest.MonkeyPatch) -> None:
    clean.setattr(cli.flower_env, "installed", lambda: {"FLWR_HOME": "/h"})
    clean.setenv("all_proxy", "socks://127.0.0.1:9")
    printed = CliRunner().invoke(cli.app, ["env"]).output.splitlines()
    assert printed == ["export FLWR_HOME=/h", "unset all_proxy", f"export no_proxy={ALL}", f"export NO_PROXY={ALL}"]


def settled(clean: pytest.MonkeyPatch, address: str) -> dict[str, str]:
    environ = dict(os.environ)
    clean.setattr(os, "environ", environ)
    node_start.settle_proxies(NodeServer(address=address))
    return environ


@pytest.mark.parametrize("address", ["127.0.0.1:9092", "localhost:9092", "[::1]:9092", "127.0.1.1:9092"])
def test_a_node_beside_its_server_needs_no_proxy(address: str, clean: pytest.MonkeyPatch) -> None:
    clean.setenv("all_proxy", "socks://127.0.0.1:9")
    environ = settled(clean, address)
    assert "all_proxy" not in environ
    assert environ["no_proxy"] == ALL


def test_a_node_goes_to_a_server_elsewhere_as_its_owner_says(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("https_proxy", DEAD)
    environ = settled(clean, "fl.example.org:443")
    assert environ["https_proxy"] == DEAD
    clean.setenv("all_proxy", "socks://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"all_proxy = socks://.*cannot use"):
        settled(clean, "fl.example.org:443")


def test_a_check_says_which_way_it_did_not_try(clean: pytest.MonkeyPatch) -> None:
    elsewhere = NodeServer(address="fl.example.org:443")
    assert proxy_on_the_way(elsewhere) == ""
    clean.setenv("HTTPS_PROXY", DEAD)
    assert proxy_on_the_way(elsewhere) == "https_proxy"
    assert proxy_on_the_way(NodeServer(address="127.0.0.1:9092")) == ""
    clean.setenv("no_proxy", "example.org")
    assert proxy_on_the_way(elsewhere) == ""

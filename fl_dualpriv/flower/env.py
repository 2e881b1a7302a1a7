"""Environment variables and ports that Flower and Ray need, and the installation of the hook that sets them.

Flower's defaults share one SuperLink per machine, install an app's dependencies again for each run and let the working
directory shadow the app. ``python -m fl_dualpriv.flower.env install`` (part of ``make setup``) gives this virtual
environment its own Flower home and ports, so that plain ``flwr run .`` works. This module does not import Flower.
"""

import contextlib
import json
import os
import random
import shlex
import signal
import socket
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

from fl_dualpriv.flower import supervisor

# Below the range that systems hand out for outgoing connections, so a port chosen at set-up is still free later.
_PORTS = range(20_000, 32_000)
_HOOK = "_fl_dualpriv_flower"
TEXT = {"PYTHONIOENCODING": "utf-8"}
"""Variables for programs whose output this package reads: UTF-8 on any terminal, because Flower writes emoji."""
_HEADER = (
    "# Written by `make setup`: the simulation that plain `flwr run` starts. Yours to edit; the last set-up wins.\n"
)


RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # otherwise other programs of the machine starve Ray's workers
}
"""Variables of every Ray that this package starts."""
_SOCKET_SUFFIX = len("/fdp-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.lock")


def make_home() -> Path:
    """Make a folder for Ray whose path is short enough: that of a Unix socket holds 107 characters (103 on macOS)."""
    root = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="fdp-", dir=root if len(root) + _SOCKET_SUFFIX <= 103 else "/tmp"))


def environment(home: Path, http_port: int, control_port: int) -> dict[str, str]:
    """Return the variables for every Flower and Ray process of one SuperLink.

    Args:
        home: Flower's folder: connection settings, unpacked apps, state and log of the SuperLink.
        http_port: TCP port of the SuperLink.
        control_port: TCP port of its control API.

    Returns:
        Variables by name. Set them in the process that starts the SuperLink, because its children inherit them. A later
        ``flwr run`` against a running SuperLink changes nothing.
    """
    return {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http_port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control_port),
        # Otherwise the SuperLink installs the app's dependencies anew for each run and puts them first on the path.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **RAY,
        "RAY_ADDRESS": "local",  # never join a Ray cluster that happens to run on this machine
        # Flower's actors need other workers than the ones that Ray starts in advance.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        # Ray kills workers when the machine's memory is nearly full, also if another program fills it. Flower goes on
        # to send clients to dead workers.
        "RAY_memory_monitor_refresh_ms": "0",
        # Messages hold prompts, not models; the default reserves 30 % of the memory.
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(512 * 1024**2),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_ports(count: int) -> list[int]:
    """Return distinct TCP ports on 127.0.0.1 that are free now.

    Raises:
        OSError: If fewer than ``count`` ports are free.
    """
    chosen: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        if len(chosen) == count:
            break
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            chosen.append(port)
    if len(chosen) < count:
        raise OSError(f"only {len(chosen)} of {count} TCP ports are free on 127.0.0.1 between 20000 and 32000")
    return chosen


def write_flower_config(home: Path, address: str, options: Mapping[str, int | float] | None = None) -> None:
    """Write the connection ``local`` to Flower's ``config.toml`` and make it the default; other connections stay.

    Args:
        home: Flower's folder.
        address: ``:local:`` (``flwr run`` starts the SuperLink) or ``127.0.0.1:PORT`` (the SuperLink runs already).
        options: Simulation options of the connection: ``num-supernodes``, ``num-cpus`` per client.
    """
    home.mkdir(parents=True, exist_ok=True)
    file = home / "config.toml"
    old = tomllib.loads(file.read_text(encoding="utf-8")).get("superlink", {}) if file.exists() else {}
    others = {name: table for name, table in old.items() if isinstance(table, dict) and name != "local"}
    lines = [_HEADER + '[superlink]\ndefault = "local"\n', f'[superlink.local]\naddress = "{address}"']
    if options:
        lines += [
            f"options.num-supernodes = {options['num-supernodes']}",
            f"options.backend.client-resources.num-cpus = {options['num-cpus']}",
        ]
    else:
        lines.append("insecure = true")
    for name, table in others.items():
        lines.append(f"\n[superlink.{json.dumps(name)}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in _flatten(table).items()]
    write_atomically(file, "\n".join(lines) + "\n")


def _flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def write_atomically(file: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never half of it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def install(app_dir: Path, site_packages: Path | None = None, prefix: Path | None = None) -> Path:
    """Give this virtual environment its own Flower home, ports and the hook that sets them. Idempotent.

    Args:
        app_dir: Checkout whose ``pyproject.toml`` gives the default population and CPUs per client.
        site_packages: Folder for the hook. The default is that of the running interpreter.
        prefix: Root of the environment. The default is ``sys.prefix``.

    Returns:
        The Flower home. The ports of an earlier call are kept, so a running SuperLink stays reachable.
    """
    prefix = prefix or Path(sys.prefix)
    site_packages = site_packages or Path(sysconfig.get_path("purelib"))
    state = site_packages / f"{_HOOK}.json"
    home = prefix / "flower"
    known: dict[str, str] = json.loads(state.read_text(encoding="utf-8"))["environment"] if state.exists() else {}
    names = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
    # A copied environment holds another checkout's ports. Its Flower home then differs from this one.
    is_same_home = known.get("FLWR_HOME") == str(home)
    ports = [int(known[name]) for name in names] if is_same_home else free_ports(2)
    settings = {
        "environment": environment(home, *ports),
        "scripts": str(prefix / Path(sysconfig.get_path("scripts")).name),
    }
    app = tomllib.loads((app_dir / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    options = {"num-supernodes": app["population"], "num-cpus": app["resources"]["cpus-per-client"]}
    write_flower_config(home, ":local:", options)
    write_atomically(state, json.dumps(settings, indent=1))
    write_atomically(site_packages / f"{_HOOK}.py", Path(__file__).with_name("hook.py").read_text(encoding="utf-8"))
    line = f"import pathlib, {_HOOK}; {_HOOK}.main(pathlib.Path({_HOOK}.__file__).with_suffix('.json'))\n"
    write_atomically(site_packages / f"{_HOOK}.pth", line)
    return home


def installed() -> dict[str, str]:
    """Return the variables that the hook sets in this virtual environment.

    Raises:
        FileNotFoundError: If the hook is not installed.
    """
    state = Path(sysconfig.get_path("purelib")) / f"{_HOOK}.json"
    if not state.exists():
        raise FileNotFoundError(
            "Flower is not set up in this environment: run `python -m fl_dualpriv.flower.env install`"
        )
    return json.loads(state.read_text(encoding="utf-8"))["environment"]


def for_user(home: Path) -> dict[str, str]:
    """Return the variables for a user without the hook. They are chosen once and kept in ``home``: all shells agree."""
    state = home / "environment.json"
    if not state.exists():
        home.mkdir(parents=True, exist_ok=True)
        write_atomically(state, json.dumps(environment(home, *free_ports(2)), indent=1))
    return json.loads(state.read_text(encoding="utf-8"))


def exports(variables: Mapping[str, str | None]) -> str:
    """Return shell lines that set ``variables``, and unset those that are None."""
    return "\n".join(
        f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}" for name, value in variables.items()
    )


def stop(home: Path, timeout: float = 20.0) -> bool:
    """Stop the SuperLink that ``flwr run`` started in ``home``, with its simulation.

    Returns:
        False if none runs. The function ends only the process that wrote ``superlink.pid`` there and its descendants.
    """
    file = home / "superlink.pid"
    if not file.exists():
        return False
    pid = int(file.read_text(encoding="utf-8"))
    file.unlink()
    if "flower-superlink" not in supervisor.command_line(pid):
        return False  # it ended by itself, and another program may have its id by now
    family = [pid, *supervisor.descendants(pid)]
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and any(supervisor.alive(member) for member in family):
        time.sleep(0.2)
    supervisor.kill(family)
    return True


def main() -> None:
    """Run ``python -m fl_dualpriv.flower.env install|stop``."""
    match sys.argv[1:]:
        case ["install"]:
            if sys.prefix == sys.base_prefix:
                sys.exit("this is not a virtual environment: run `make setup`, or see `fl-dualpriv env`")
            home = install(Path.cwd())
            # The folder's name may have characters that the output's encoding lacks.
            shown = str(home).encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(errors="replace")
            sys.stdout.write(f"`flwr run` in this environment uses {shown}\n")
        case ["stop"]:
            done = stop(Path(installed()["FLWR_HOME"]))
            sys.stdout.write("stopped the SuperLink\n" if done else "no SuperLink runs\n")
        case _:
            sys.exit("usage: python -m fl_dualpriv.flower.env install|stop")


if __name__ == "__main__":
    main()

"""Engine ``ray``: one run of a Flower app in a SuperLink of its own, with a true outcome and no process left behind.

Uses Flower's public programs only (``flower-superlink``, ``flwr run``, ``flwr list``); the exit status of ``flwr run``
says that a run was accepted, not how it ended. Imports no Flower.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower import hook as flower_hook
from fl_dualpriv.flower import programs, supervisor
from fl_dualpriv.run.cpus import usable_cpus

RunConfigValues = Mapping[str, bool | int | float | str]

_START_SECONDS = 60.0
_PORT_TRIES = 3
_TAKEN = b"address already in use"
_CALL_SECONDS = 120.0
_STATUS_SECONDS = 60.0  # between looks at the status: each costs a second of CPU, watching files costs nothing
_ENDED_SECONDS = 2.0  # after the log has ended
_FINISH_SECONDS = 20.0  # a hung client keeps a simulation from ending after its results are written
_SOCKET_SUFFIX = len("/fdp-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.lock")
_LOG_SECONDS = 5.0  # Flower hands log lines over every few seconds
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"^(?:\([^)]*\)\s*)?(?:\w+\.)*\w*(?:Error|Exception|Exit|Failed)(?::.*)?$")


class RunFailed(RuntimeError):
    """A run that gave no result. The message is for the user: what happened, and where the whole log lies."""


def run_flower(
    app_dir: Path,
    run_config: RunConfigValues,
    *,
    num_supernodes: int,
    cpus_per_client: int,
    gpus_per_client: float,
    work_dir: Path,
    timeout: float | None = None,
) -> None:
    """Run a Flower app on the simulation runtime (Ray) and wait for its end.

    The SuperLink has its own home, ports and Ray folder. It and all its descendants are ended before this returns,
    also on errors and Ctrl-C, and by themselves if this process is killed.

    Args:
        app_dir: Folder whose ``pyproject.toml`` has ``[tool.flwr.app]``.
        run_config: Flat keys; the app's ``pyproject.toml`` must have each.
        num_supernodes: Flower nodes; each hosts one client or more.
        cpus_per_client: CPUs of one Ray actor.
        gpus_per_client: GPUs of one Ray actor; a fraction shares a GPU.
        work_dir: Where ``flower.log`` goes, and where the server app writes ``summary.json`` or ``error.json``.
        timeout: Seconds after which the run is given up; None: never.

    Raises:
        RunFailed: With the server app's own message if it left one, else with Flower's.
        ValueError: If the resources can never be met.
    """
    federation = federation_config(num_supernodes, cpus_per_client, gpus_per_client)
    work_dir.mkdir(parents=True, exist_ok=True)
    before = {name: _stamp(work_dir / name) for name in ("summary.json", "error.json")}
    deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
    with _superlink(work_dir / "flower.log") as link:
        run_id = _submit(link, app_dir, run_config, federation)
        with _copied_log(link, run_id) as copying:
            _watch(link, run_id, work_dir, before, deadline, copying)


def federation_config(num_supernodes: int, cpus_per_client: int, gpus_per_client: float) -> dict[str, int | float]:
    """Settings of Flower's simulation: as many actors as the CPUs that this process may use allow.

    Raises:
        ValueError: If the resources can never be met.
    """
    cpus = usable_cpus()
    if not 1 <= cpus_per_client <= cpus:
        raise ValueError(
            f"resources.cpus-per-client = {cpus_per_client}: this process may use {cpus} CPUs; give 1 to {cpus}"
        )
    return {
        "num-supernodes": num_supernodes,
        "client-resources-num-cpus": cpus_per_client,
        "client-resources-num-gpus": float(gpus_per_client),
        # More actors than nodes would only cost memory: each loads its own backbone.
        "init-args-num-cpus": min(cpus // cpus_per_client, num_supernodes) * cpus_per_client,
    }


@dataclass(frozen=True, kw_only=True)
class _SuperLink:
    """A running SuperLink: its supervisor, the environment of programs that talk to it, its folder and log."""

    process: "subprocess.Popen[bytes]"
    environ: Mapping[str, str]
    home: Path
    log: Path


@contextlib.contextmanager
def _superlink(log: Path) -> Iterator[_SuperLink]:
    """Start a SuperLink on a free port; end all of it on the way out.

    Between the choice of a port and Flower's use of it another program may take it: then another one is tried.

    Raises:
        RunFailed: If it does not come up.
    """
    log.write_bytes(b"")
    for _ in range(_PORT_TRIES):
        port, control_port = flower_env.free_ports(2)
        logged = log.stat().st_size
        with _superlink_on(log, port, control_port) as link:
            if _comes_up(link, port, logged):
                yield link
                return
    raise RunFailed(
        f"{_PORT_TRIES} free ports of 127.0.0.1 were taken by other programs before Flower's SuperLink could use them: "
        f"look for what starts so many servers on this machine, and run again\n  the whole log: {log}"
    )


@contextlib.contextmanager
def _superlink_on(log: Path, port: int, control_port: int) -> Iterator[_SuperLink]:
    """A SuperLink that is about to start, under a supervisor, in a folder of its own."""
    root = tempfile.gettempdir()
    # The path of a Unix socket holds at most 107 characters (103 on macOS); Ray keeps its own in this folder.
    home = Path(tempfile.mkdtemp(prefix="fdp-", dir=root if len(root) + _SOCKET_SUFFIX <= 103 else "/tmp"))
    try:
        flower_env.write_flower_config(home, f"127.0.0.1:{port}")
        environ = _environment(home, port, control_port)
        process = _start(log, home, port, environ)
        try:
            yield _SuperLink(process=process, environ=environ, home=home, log=log)
        finally:
            assert process.stdin is not None
            process.stdin.close()  # the supervisor's sign to end everything
            process.wait(timeout=60)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _environment(home: Path, http_port: int, control_port: int) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    flower_hook.reach_loopback_directly(inherited)
    return {
        **inherited,
        **flower_env.environment(home, http_port, control_port),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "RAY_TMPDIR": str(home),  # removed with it
        # Flower starts its programs by bare name.
        "PATH": programs.search_path(),
        **flower_env.TEXT,
        "PYTHONUNBUFFERED": "1",
    }


def _start(log: Path, home: Path, port: int, environ: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start the supervisor with a SuperLink under it."""
    empty = home / "empty"  # Ray puts the working directory before the app on the clients' path
    empty.mkdir()
    command = [_script("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("ab") as stream:
        return subprocess.Popen(
            # -I keeps the supervisor's own folder, this package, off its module path.
            [sys.executable, "-I", supervisor.__file__, str(home), *command],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=empty,
            env=dict(environ),
            start_new_session=True,  # the terminal's Ctrl-C is for us alone
        )


@contextlib.contextmanager
def _copied_log(link: _SuperLink, run_id: str) -> Iterator[Callable[[], bool]]:
    """Append what the apps print to the log: the SuperLink keeps it to itself. Gives whether it is still doing so."""
    with link.log.open("ab") as stream:
        process = subprocess.Popen(
            [_script("flwr"), "log", run_id, "--stream"],
            env=dict(link.environ),
            cwd=link.home,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield lambda: process.poll() is None
        _finish(process)
    except RunFailed:
        _finish(process)  # the traceback is on its way
        raise
    finally:
        process.kill()
        process.wait()


def _finish(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_LOG_SECONDS)


def _script(name: str) -> str:
    path = programs.find(name)
    if path is None:
        raise RunFailed(
            f"{name} is in none of {programs.places()}: install Flower for this Python, or run `make setup`"
        )
    return path


def _comes_up(link: _SuperLink, port: int, logged: int) -> bool:
    """Wait until the SuperLink answers; False if another program has its port. ``logged``: bytes of earlier tries.

    Raises:
        RunFailed: If it ended for another reason, or does not answer.
    """
    deadline = time.monotonic() + _START_SECONDS
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy this process has
    while time.monotonic() < deadline:
        if link.process.poll() is not None:
            if _TAKEN in link.log.read_bytes()[logged:].lower():
                return False
            raise RunFailed(_explain("Flower's SuperLink ended at once", link.log))
        # Only our own is asked. URLError and time-outs are OSErrors.
        if supervisor.listens(link.process.pid, port):
            with contextlib.suppress(OSError), directly.open(f"http://127.0.0.1:{port}/health", timeout=2):
                return True
        time.sleep(0.1)
    raise RunFailed(_explain(f"Flower's SuperLink did not answer within {_START_SECONDS:.0f} s", link.log))


def _flwr(link: _SuperLink, arguments: list[str]) -> dict[str, Any]:
    """Call ``flwr ... --format json``; {} if it answers no JSON, with what it said instead in the log."""
    try:
        done = subprocess.run(
            [_script("flwr"), *arguments, "--format", "json"],
            env=dict(link.environ),
            cwd=link.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_CALL_SECONDS,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
    with contextlib.suppress(json.JSONDecodeError):  # pretty-printed, or after a line of greeting
        return json.loads(done.stdout[done.stdout.index("{") :]) if "{" in done.stdout else {}
    return {}


def _submit(link: _SuperLink, app_dir: Path, run_config: RunConfigValues, federation: Mapping[str, int | float]) -> str:
    file = link.home / "run-config.toml"
    file.write_text(to_toml(run_config), encoding="utf-8")
    settings = " ".join(f"{key}={value}" for key, value in federation.items())
    app = str(app_dir.resolve())
    answer = _flwr(link, ["run", app, "--run-config", str(file), "--federation-config", settings])
    if not answer.get("success"):
        said = str(answer.get("error-message") or "no answer").splitlines()
        reason = "\n  ".join(line for line in said if line.strip() and not line.startswith("Using SuperLink"))
        raise RunFailed(f"Flower did not accept the run: {reason}\n  the whole log: {link.log}")
    return str(answer["run-id"])


def to_toml(flat: RunConfigValues) -> str:
    """Write flat dotted keys as TOML, so that parsing gives back the same values and types."""
    lines = []
    for key, value in flat.items():
        # JSON's strings are TOML's except for DEL; repr gives all digits of a float, and TOML's names for inf and nan.
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, bool | str) else repr(value)
        lines.append(f"{key} = " + text.replace("\x7f", "\\u007f"))
    return "\n".join(lines) + "\n"


def _watch(
    link: _SuperLink,
    run_id: str,
    work_dir: Path,
    before: Mapping[str, object],
    deadline: float,
    copying: Callable[[], bool],
) -> None:
    """Return when the run has completed or its results are there; raise when it failed.

    Asking Flower costs a second of CPU. The copy of the log ends with the run; while it goes on, looks are seldom.
    """
    look = time.monotonic() + _STATUS_SECONDS
    finish = None
    while True:
        if _stamp(work_dir / "error.json") != before["error.json"]:
            raise RunFailed(_explain(_server_message(work_dir / "error.json", link.log), link.log, read_log=False))
        if link.process.poll() is not None:
            raise RunFailed(_explain("Flower's SuperLink ended before the run did", link.log))
        now = time.monotonic()
        if now > deadline:
            raise RunFailed(_explain("the run was given up: its time limit has passed", link.log))
        if finish is None and _stamp(work_dir / "summary.json") != before["summary.json"]:
            finish = now + _FINISH_SECONDS
            look = now
        if finish is not None and now > finish:
            return
        if now >= look:
            runs = _flwr(link, ["list", "--run-id", run_id]).get("runs") or [{}]
            status = str(runs[0].get("status", ""))
            if status == "finished:completed":
                return
            if status.startswith("finished"):
                time.sleep(0.5)  # the server app's own words come first, if it got to write them
                if _stamp(work_dir / "error.json") == before["error.json"]:
                    details = str(runs[0].get("status-details", "")).strip()
                    raise RunFailed(
                        _explain(f"Flower reports {status}" + (f": {details}" if details else ""), link.log)
                    )
                continue
            look = time.monotonic() + (1.0 if finish is not None else _STATUS_SECONDS)
        if not copying():
            look = min(look, now + _ENDED_SECONDS)
        time.sleep(0.2)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes when the file is written anew, so that one from an earlier run is not taken for this run's."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino


def _server_message(path: Path, log: Path) -> str:
    """The server app's own words; its traceback, if it left one, goes to the log: Flower's copy comes too late."""
    try:
        error = json.loads(path.read_text(encoding="utf-8"))
        with log.open("a", encoding="utf-8") as stream:
            stream.write(error.get("traceback", ""))
        return f"{error['type']}: {error['message']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"the server app failed; what it left in {path} cannot be read"


def _explain(what: str, log: Path, *, read_log: bool = True) -> str:
    """One message: what happened, the last exceptions that the log names, and where the log is."""
    found: list[str] = []
    if read_log and log.exists():
        for line in _ANSI.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines():
            text = line.strip()
            if _EXCEPTION.match(text) and text not in found:
                found.append(text)
    return "\n  ".join([what, *found[-3:], f"the whole log: {log}"])

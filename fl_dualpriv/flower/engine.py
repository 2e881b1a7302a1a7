"""Engine ``ray``: run a Flower app in a separate SuperLink, report the true outcome and leave no process behind.

The engine uses only Flower's public programs (``flower-superlink``, ``flwr run``, ``flwr list``). The exit status of
``flwr run`` says that Flower accepted a run, not how the run ended. This module does not import Flower.
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
from fl_dualpriv.flower.app_bundle import travelling_copy
from fl_dualpriv.privacy.limits import SHARED_CALIBRATIONS
from fl_dualpriv.run.cpus import usable_cpus
from fl_dualpriv.run.folder_lock import is_held

RunConfigValues = Mapping[str, bool | int | float | str]

_START_SECONDS = 60.0
_PORT_TRIES = 3
_TAKEN = b"address already in use"
_CALL_SECONDS = 120.0
_LONGEST_OUTPUT = 2000  # letters of a failed call that are shown
_STATUS_SECONDS = 60.0  # between status queries: a query costs a second of CPU, watching files costs nothing
_ENDED_SECONDS = 2.0  # from the end of the log to the next status query
_FINISH_SECONDS = 20.0  # a hung client keeps a simulation from ending after its results are written
_LOG_SECONDS = 5.0  # time for the last log lines
_QUIET_SECONDS = 1.2  # a line takes Flower 0.7 s at most: 0.2 s to the SuperLink and 0.5 s from it
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"^(?:\([^)]*\)\s*)?(?:\w+\.)*\w*(?:Error|Exception|Exit|Failed)(?::.*)?$")


class RunFailed(RuntimeError):
    """The run gave no result. The message tells the user what happened and where the full log is."""


def run_flower(
    app_dir: Path,
    run_config: RunConfigValues,
    *,
    num_supernodes: int,
    cpus_per_client: int,
    gpus_per_client: float,
    work_dir: Path,
    timeout: float | None = None,
    ray_address: str = "",
) -> None:
    """Run a Flower app on the simulation runtime (Ray) and wait for its end.

    The SuperLink has its own home, ports and Ray folder. The SuperLink and all its descendants are ended before this
    function returns, also on errors and Ctrl-C. If this process is killed, they end by themselves.

    Args:
        app_dir: Folder whose ``pyproject.toml`` has ``[tool.flwr.app]``.
        run_config: Flat run configuration. The app's ``pyproject.toml`` must define each key.
        num_supernodes: Number of Flower nodes; each hosts one client or more.
        cpus_per_client: CPUs of one Ray actor.
        gpus_per_client: GPUs of one Ray actor; a fraction shares a GPU.
        work_dir: Folder for ``flower.log``. The server app writes ``summary.json`` or ``error.json`` there.
        timeout: Time limit of the run in seconds. None means no limit.
        ray_address: ``HOST:PORT`` of an existing Ray cluster, whose machines see ``work_dir`` and this installation
            under the same paths; empty starts Ray on this machine.

    Raises:
        RunFailed: If the run gave no result. The message is the server app's if there is one, otherwise Flower's.
        ValueError: If this process can never provide the resources.
    """
    federation = federation_config(num_supernodes, cpus_per_client, gpus_per_client, on_cluster=bool(ray_address))
    work_dir.mkdir(parents=True, exist_ok=True)
    before = {name: _stamp(work_dir / name) for name in ("summary.json", "error.json")}
    deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
    with _superlink(work_dir / "flower.log", run_config, work_dir if ray_address else None, ray_address) as link:
        run_id = _submit(link, app_dir, run_config, federation)
        with _copied_log(link, run_id) as copying:
            _watch(link, run_id, work_dir, before, deadline, copying)


def federation_config(
    num_supernodes: int, cpus_per_client: int, gpus_per_client: float, *, on_cluster: bool = False
) -> dict[str, int | float]:
    """Return the settings of Flower's simulation: as many actors as the CPUs that this process may use allow.

    On an existing cluster Ray counts the CPUs, and refuses to be told.

    Raises:
        ValueError: If this process can never provide the resources.
    """
    cpus = usable_cpus()
    settings = {
        "num-supernodes": num_supernodes,
        "client-resources-num-cpus": cpus_per_client,
        "client-resources-num-gpus": float(gpus_per_client),
    }
    if on_cluster:
        return settings
    if not 1 <= cpus_per_client <= cpus:
        raise ValueError(
            f"resources.cpus-per-client = {cpus_per_client}: this process may use {cpus} CPUs; give 1 to {cpus}"
        )
    # More actors than nodes would only cost memory, because each actor loads its own backbone.
    return {**settings, "init-args-num-cpus": min(cpus // cpus_per_client, num_supernodes) * cpus_per_client}


@dataclass(frozen=True, kw_only=True)
class _SuperLink:
    """Running SuperLink: its supervisor, the environment of programs that talk to it, its folder and its log."""

    process: "subprocess.Popen[bytes]"
    environ: Mapping[str, str]
    home: Path
    log: Path


@contextlib.contextmanager
def _calibrating(run_config: RunConfigValues, folder: Path) -> Iterator[Mapping[str, str]]:
    """Calibrate the noise of the run in another process while Flower starts.

    If that process fails, the processes of the run calibrate by themselves and show the reason. If this process is
    killed, that one ends, because its standard input closes.

    Args:
        run_config: Flat run configuration.
        folder: New folder for the multipliers.

    Yields:
        Variables for the processes of the run.
    """
    folder.mkdir()
    file, variables = folder / "run-config.json", {SHARED_CALIBRATIONS: str(folder)}
    process = None
    try:
        with contextlib.suppress(OSError):
            file.write_text(json.dumps(dict(run_config)), encoding="utf-8")
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fl_dualpriv.run.calibrate", str(file)],  # -P: no module of this folder
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        yield variables
    finally:
        if process is not None:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def _superlink(
    log: Path, run_config: RunConfigValues, shared: Path | None = None, ray_address: str = ""
) -> Iterator[_SuperLink]:
    """Start a SuperLink on a free port, and end all its processes on exit.

    Another program may take the port before Flower uses it. Then the function tries another port.

    Args:
        log: File for the output of all processes.
        run_config: Flat run configuration, whose noise is calibrated meanwhile.
        shared: Folder that all machines of a cluster see, for the unpacked app; None for a local folder.
        ray_address: Address of the cluster; empty for a new Ray.

    Raises:
        RunFailed: If the SuperLink does not start.
    """
    log.write_bytes(b"")
    for _ in range(_PORT_TRIES):
        port, control_port = flower_env.free_ports(2)
        logged = log.stat().st_size
        with _superlink_on(log, (port, control_port), run_config, shared, ray_address) as link:
            if _comes_up(link, port, logged):
                yield link
                return
    raise RunFailed(
        f"{_PORT_TRIES} free ports of 127.0.0.1 were taken by other programs before Flower's SuperLink could use them: "
        f"look for what starts so many servers on this machine, and run again\n  the whole log: {log}"
    )


@contextlib.contextmanager
def _superlink_on(
    log: Path, ports: tuple[int, int], run_config: RunConfigValues, shared: Path | None, ray_address: str
) -> Iterator[_SuperLink]:
    """Start a SuperLink under a supervisor, in a separate folder. The SuperLink may not answer yet."""
    port, control_port = ports
    # Ray puts its sockets in this folder. On a cluster it has none here, and its machines import the app from it.
    home = Path(tempfile.mkdtemp(prefix="fdp-", dir=shared)) if shared else flower_env.make_home()
    try:
        flower_env.write_flower_config(home, f"127.0.0.1:{port}")
        with _calibrating(run_config, home / "calibrations") as variables:  # the supervisor removes its home
            environ = {**_environment(home, port, control_port), **variables}
            if ray_address:
                environ["RAY_ADDRESS"] = ray_address
            process = _start(log, home, port, environ)
            try:
                yield _SuperLink(process=process, environ=environ, home=home, log=log)
            finally:
                assert process.stdin is not None
                process.stdin.close()  # tells the supervisor to end everything
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
        "RAY_TMPDIR": str(home),  # removed with the home folder
        # Flower starts its programs by bare name.
        "PATH": programs.search_path(),
        **flower_env.TEXT,
        "PYTHONUNBUFFERED": "1",
    }


def _start(log: Path, home: Path, port: int, environ: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start the supervisor, which starts the SuperLink."""
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
            start_new_session=True,  # the terminal's Ctrl-C must reach only this process
        )


@contextlib.contextmanager
def _copied_log(link: _SuperLink, run_id: str) -> Iterator[Callable[[], bool]]:
    """Append the apps' output to the log, because the SuperLink does not.

    Yields:
        Function that returns True while the copy goes on.
    """
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
        _finish(process, link.log)
    except RunFailed:
        _finish(process, link.log)  # the traceback may still have to be copied
        raise
    finally:
        process.kill()
        process.wait()


def _finish(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the copy of the log has ended, or no line has come for a while."""
    now = time.monotonic()
    deadline, quiet, size = now + _LOG_SECONDS, now + _QUIET_SECONDS, log.stat().st_size
    while process.poll() is None and time.monotonic() < min(deadline, quiet):
        time.sleep(0.05)
        if log.stat().st_size != size:
            quiet, size = time.monotonic() + _QUIET_SECONDS, log.stat().st_size


def _script(name: str) -> str:
    path = programs.find(name)
    if path is None:
        raise RunFailed(
            f"{name} is in none of {programs.places()}: install Flower for this Python, or run `make setup`"
        )
    return path


def _comes_up(link: _SuperLink, port: int, logged: int) -> bool:
    """Wait until the SuperLink answers.

    Args:
        link: SuperLink that was started.
        port: Port of the SuperLink.
        logged: Length in bytes of the log before this try.

    Returns:
        False if another program has the port.

    Raises:
        RunFailed: If the SuperLink ended for another reason, or does not answer.
    """
    deadline = time.monotonic() + _START_SECONDS
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores the proxies of this process
    while time.monotonic() < deadline:
        if link.process.poll() is not None:
            if _TAKEN in link.log.read_bytes()[logged:].lower():
                return False
            raise RunFailed(_explain("Flower's SuperLink ended at once", link.log))
        # Ask only the SuperLink that was started here. URLError and time-outs are OSErrors.
        if supervisor.listens(link.process.pid, port):
            with contextlib.suppress(OSError), directly.open(f"http://127.0.0.1:{port}/health", timeout=2):
                return True
        time.sleep(0.1)
    raise RunFailed(_explain(f"Flower's SuperLink did not answer within {_START_SECONDS:.0f} s", link.log))


def _flwr(link: _SuperLink, arguments: list[str]) -> dict[str, Any]:
    """Call ``flwr ... --format json`` and return its answer.

    If it times out or prints no JSON, the answer has one key, ``error-message``, with the end of its output.
    """
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
        return {"error-message": f"flwr {arguments[0]} did not answer within {_CALL_SECONDS:g} s"}
    for line in done.stdout.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
    with contextlib.suppress(json.JSONDecodeError):  # pretty-printed, or preceded by other output
        if "{" in done.stdout:
            return json.loads(done.stdout[done.stdout.index("{") :])
    output = (done.stderr.strip() or done.stdout.strip())[-_LONGEST_OUTPUT:]
    return {"error-message": output or f"flwr {arguments[0]} ended with status {done.returncode} and no output"}


def _submit(link: _SuperLink, app_dir: Path, run_config: RunConfigValues, federation: Mapping[str, int | float]) -> str:
    file = link.home / "run-config.toml"
    file.write_text(to_toml(run_config), encoding="utf-8")
    settings = " ".join(f"{key}={value}" for key, value in federation.items())
    (link.home / "app").mkdir(exist_ok=True)
    app = str(travelling_copy(app_dir.resolve(), link.home / "app"))
    answer = _flwr(link, ["run", app, "--run-config", str(file), "--federation-config", settings])
    if not answer.get("success"):
        error_lines = str(answer.get("error-message") or "no answer").splitlines()
        reason = "\n  ".join(line for line in error_lines if line.strip() and not line.startswith("Using SuperLink"))
        raise RunFailed(f"Flower did not accept the run: {reason}\n  the whole log: {link.log}")
    return str(answer["run-id"])


def to_toml(flat: RunConfigValues) -> str:
    """Write flat dotted keys as TOML, so that parsing gives back the same values and types."""
    lines = []
    for key, value in flat.items():
        # JSON strings are valid TOML except for DEL. repr gives all digits of a float, and inf and nan as in TOML.
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
    """Return when the run has completed or its results exist; raise RunFailed when it failed.

    A server app that holds the lock of its folder has ended when its results exist and the lock is free. Flower and Ray
    then need several seconds to end, which change nothing.

    A status query costs a second of CPU. The copy of the log ends with the run, so queries are rare until then.
    """
    look = time.monotonic() + _STATUS_SECONDS
    finish = None
    while True:
        has_ended = finish is not None and is_held(work_dir) is False  # asked before the look for an error
        if _stamp(work_dir / "error.json") != before["error.json"]:
            raise RunFailed(_explain(_server_message(work_dir / "error.json", link.log), link.log, read_log=False))
        if has_ended:
            return
        if link.process.poll() is not None:
            raise RunFailed(_explain("Flower's SuperLink ended before the run did", link.log))
        now = time.monotonic()
        if now > deadline:
            raise RunFailed(_explain("the run was given up: its time limit has passed", link.log))
        if finish is None and _stamp(work_dir / "summary.json") != before["summary.json"]:
            finish = now + _FINISH_SECONDS
            look = now + _ENDED_SECONDS
        if finish is not None and now > finish:
            return
        if now >= look:
            runs = _flwr(link, ["list", "--run-id", run_id]).get("runs") or [{}]
            status = str(runs[0].get("status", ""))
            if status == "finished:completed":
                return
            if status.startswith("finished"):
                time.sleep(0.5)  # the server app's own message is better, if it is being written
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
    """Return a value that changes when the file is rewritten, to tell this run's file from an earlier run's."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino


def _server_message(path: Path, log: Path) -> str:
    """Return the server app's message. Append its traceback to the log, because Flower's copy comes too late."""
    try:
        error = json.loads(path.read_text(encoding="utf-8"))
        with log.open("a", encoding="utf-8") as stream:
            stream.write(error.get("traceback", ""))
        return f"{error['type']}: {error['message']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"the server app failed, and its error file {path} cannot be read"


def _explain(what: str, log: Path, *, read_log: bool = True) -> str:
    """Return one message: what happened, the last exceptions in the log, and the path of the log."""
    exceptions: list[str] = []
    if read_log and log.exists():
        for line in _ANSI.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines():
            text = line.strip()
            if _EXCEPTION.match(text) and text not in exceptions:
                exceptions.append(text)
    return "\n  ".join([what, *exceptions[-3:], f"the whole log: {log}"])

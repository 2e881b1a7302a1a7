"""Start-up hook of every Python process of a virtual environment; it acts only in Flower's own programs.

``python -m fl_dualpriv.flower.env install`` copies this file into the environment's site-packages, next to a ``.pth``
line that imports it and a JSON file with the variables. The file imports only the standard library, because every start
of the interpreter pays for it.
"""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_FLOWER = re.compile(r"(flwr|flower)(-[a-z-]+)?(\.exe)?")
_INTERPRETER_OPTIONS_WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def program(orig_argv: list[str]) -> str:
    """Return the file name of the script that ``orig_argv`` runs; empty for ``-c``, ``-m`` and interactive use."""
    words = iter(orig_argv[1:])
    for word in words:
        if word in _INTERPRETER_OPTIONS_WITH_VALUE:
            next(words, None)
        elif word.startswith("-"):
            if word in ("-c", "-m"):
                return ""
        else:
            return Path(word).name
    return ""


def proxy_changes(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Return the variables to change so that programs on this machine reach each other without a proxy.

    Flower's client (httpx) sends requests to 127.0.0.1 through ``http_proxy`` or ``all_proxy`` unless ``no_proxy``
    names the address. It cannot even start with a proxy of a scheme that it does not know, such as ``socks://``.

    Args:
        environ: The environment of a process. Names of proxy variables count in upper and in lower case.

    Returns:
        New values by name. None means that the variable must be removed. The result is empty if no proxy is set. A list
        that the user has set keeps its entries, and a proxy for other addresses stays.
    """
    proxies = {name: value for name, value in environ.items() if name.lower() in _PROXIES and value}
    if not proxies:
        return {}
    changes: dict[str, str | None] = {name: None for name, value in proxies.items() if not is_usable_proxy(value)}
    lists = {name: environ[name] for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy") if name in environ}
    # Some programs read only one of the two names. Programs that read both stop at the first one that is set.
    theirs = lists.get("no_proxy") or lists.get("NO_PROXY") or ""
    for name, value in ({"no_proxy": theirs, "NO_PROXY": theirs} | {n: v for n, v in lists.items() if v}).items():
        entries = [entry.strip() for entry in value.split(",") if entry.strip()]
        missing = [] if "*" in entries else [address for address in _LOOPBACK if address not in entries]
        changes[name] = ",".join([*entries, *missing])
    return {name: value for name, value in changes.items() if value is None or environ.get(name) != value}


def is_usable_proxy(value: str) -> bool:
    """Return True if Flower's client (httpx) can use a proxy. It supports SOCKS only with the package socksio."""
    scheme = value.partition("://")[0].lower() if "://" in value else "http"
    socks = scheme in ("socks5", "socks5h") and importlib.util.find_spec("socksio") is not None
    return scheme in ("http", "https") or socks


def reach_loopback_directly(environ: MutableMapping[str, str]) -> None:
    """Apply the changes of `proxy_changes` to ``environ``."""
    for name, value in proxy_changes(environ).items():
        if value is None:
            del environ[name]
        else:
            environ[name] = value


def apply(name: str, state: Path) -> bool:
    """Prepare this process for the Flower program ``name``.

    Args:
        name: Result of `program`.
        state: JSON file {"environment": {name: value}, "scripts": folder of the console scripts}.

    Returns:
        True if the process was prepared; False if the program is not Flower's.
    """
    if not _FLOWER.fullmatch(name):
        return False
    settings = json.loads(state.read_text(encoding="utf-8"))
    for key, value in settings["environment"].items():
        os.environ.setdefault(key, value)  # the user's values stay
    reach_loopback_directly(os.environ)
    # Flower starts flower-superlink, flower-superexec and flwr-simulation by bare name. With this environment's folder
    # first on PATH, Flower finds them there even if the environment is not activated, or if another one is.
    path = os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != settings["scripts"]:
        os.environ["PATH"] = settings["scripts"] + os.pathsep + path
    home = Path(os.environ["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    if name.startswith("flwr-simulation"):
        # Ray puts the working directory of its driver ahead of the app on its workers' path, so a package of the same
        # name in that directory would run instead of the app. An empty folder prevents that.
        empty = home / "empty"
        empty.mkdir(exist_ok=True)
        os.chdir(empty)
        _tell_ray_of_affinity()
    if name.startswith("flower-superlink"):
        (home / "superlink.pid").write_text(str(os.getpid()), encoding="utf-8")
    return True


def _tell_ray_of_affinity() -> None:
    """Make Ray count the CPUs that this process may use, because Ray knows CPU quotas but not CPU affinity."""
    if hasattr(os, "sched_getaffinity") and (allowed := len(os.sched_getaffinity(0))) < (os.cpu_count() or 1):
        os.environ.setdefault("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": allowed}))


def main(state: Path) -> None:
    """Run the hook from the ``.pth`` line. A missing or broken state file never stops an interpreter from starting."""
    name = program(sys.orig_argv)
    try:
        apply(name, state)
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"fl-dualpriv: {name} runs without this checkout's settings ({error}); run `make setup`\n")

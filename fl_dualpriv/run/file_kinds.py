"""Every file that a run writes, and its kind: a *result* or an *operator's file*. Standard library only.

A *result* may be published under the ε that the run states. It is a function of releases and of public numbers. Under
differential privacy it holds no duration, no clock reading that was taken after private data were first read, and no
hash, size or count of private data that docs/privacy.md §1 does not call public.

An *operator's file* holds information that the releases do not cover: times, logs, failures, memory, ledgers, a
client's own state. It stays with the owner of the machine on which it lies.
"""

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

Kind = Literal["result", "operator"]
Place = Literal["run", "client", "cache", "export"]

SUMMARY, ROUNDS, CURVE, PROMPT = "summary.json", "rounds.jsonl", "curve.png", "prompts/global.safetensors"
REPORT = "report.html"
PROGRESS, TOTALS, CLIENTS = "operator/progress.jsonl", "operator/totals.json", "operator/clients.json"
PLUGINS = "plugins"
"""The folder of plug-ins in the folder of a run."""


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """One line of the table.

    Attributes:
        pattern: Path below the place, with ``/``. ``*`` stands for a part of one name; ``**`` at the end stands for
            everything below.
        kind: Kind of the file, which decides the people that may see it.
        why: Reason for the kind, in one line.
        place: Folder in which the path begins. ``run``: the folder of a run. ``client``: the folder of a client, which
            is below ``clients/`` in a run's folder or is the state folder of a deployed node. ``cache``: the cache of
            features. ``export``: the target folder of `fl-dualpriv export`.
    """

    pattern: str
    kind: Kind
    why: str
    place: Place = "run"


RUN_FILES: tuple[RunFile, ...] = (
    RunFile(pattern=SUMMARY, kind="result", why="scores on public images, ε, versions and the configuration"),
    RunFile(pattern=ROUNDS, kind="result", why="scores on public images and ε of each round"),
    RunFile(pattern=CURVE, kind="result", why="a picture of rounds.jsonl"),
    RunFile(pattern=REPORT, kind="result", why="a page of the results above only, if the run states an ε"),
    RunFile(pattern=PROMPT, kind="result", why="the released prompt, and how it is used"),
    RunFile(pattern=PROGRESS, kind="operator", why="time and failures of each round: both can depend on private data"),
    RunFile(pattern=TOTALS, kind="operator", why="time and failures of the run: both can depend on private data"),
    RunFile(pattern=CLIENTS, kind="operator", why="scores of each client on held-out records that are private"),
    RunFile(pattern="ledger.jsonl", kind="operator", why="releases of the server, with times"),
    RunFile(pattern="ledger.lock", kind="operator", why="lock of the ledger"),
    RunFile(pattern="checkpoint.bin", kind="operator", why="secret noise, failures, hashes of file names"),
    RunFile(pattern="checkpoint.previous.bin", kind="operator", why="secret noise, failures, hashes of file names"),
    RunFile(pattern="run.json", kind="operator", why="paths of the machine, for --resume"),
    RunFile(pattern="run.lock", kind="operator", why="id of the process"),
    RunFile(pattern="flower.log", kind="operator", why="times, failures and their messages"),
    RunFile(pattern="error.json", kind="operator", why="the message of an error may quote data"),
    RunFile(pattern="error.log", kind="operator", why="the message of an error may quote data"),
    RunFile(pattern="actors/actor-*.json", kind="operator", why="memory: it grows with a batch, whose size is private"),
    RunFile(pattern="tracking/**", kind="operator", why="trackers write clock readings and failures"),
    RunFile(pattern=f"{PLUGINS}/**", kind="operator", why="no proof covers what a plug-in writes"),
    RunFile(pattern="prompt.safetensors", kind="operator", why="memory of a client", place="client"),
    RunFile(pattern="prompt.previous.safetensors", kind="operator", why="memory of a client", place="client"),
    RunFile(pattern="sent.safetensors", kind="operator", why="uploads, which may be clean sums", place="client"),
    RunFile(pattern="part.safetensors", kind="operator", why="personal prompt of a client", place="client"),
    RunFile(pattern="scored.safetensors", kind="operator", why="counts of held-out images", place="client"),
    RunFile(pattern="ledger.jsonl", kind="operator", why="releases of the client, with times", place="client"),
    RunFile(pattern="ledger.lock", kind="operator", why="lock of the ledger", place="client"),
    RunFile(pattern="refusals.jsonl", kind="operator", why="what a server asked for, with times", place="client"),
    RunFile(pattern="node-run.json", kind="operator", why="purpose of the prompt, names on machines", place="client"),
    RunFile(pattern="*/shard-*.npy", kind="operator", why="features of private images", place="cache"),
    RunFile(pattern="*/shard-*.lock", kind="operator", why="lock of a shard", place="cache"),
    RunFile(pattern="*.safetensors", kind="result", why="a prompt with its guarantee", place="export"),
    RunFile(pattern="*.md", kind="result", why="the card of a prompt, from the same facts", place="export"),
)
"""All files of a run. A file that is not in this table has no kind, and a test then fails."""

_CLIENT_FOLDERS = "clients/client-*/"


def kind_of(name: str, place: Place = "run") -> Kind | None:
    """Return the kind of a file; None if the table does not have it.

    Args:
        name: Path below the place. The temporary file of a killed write (``.NAME.PID.tmp``) is an operator's file if
            NAME has a kind, because its content was never checked.
        place: Folder in which the path begins.
    """
    path = PurePosixPath(name)
    if path.name.startswith(".") and path.name.endswith(".tmp"):
        whole = path.name[1:].removesuffix(".tmp").rpartition(".")[0]
        return "operator" if whole and kind_of(str(path.with_name(whole)), place) else None
    if place == "run" and _matches(name, f"{_CLIENT_FOLDERS}*"):
        return kind_of(path.name, "client")
    return next((f.kind for f in RUN_FILES if f.place == place and _matches(name, f.pattern)), None)


def _matches(name: str, pattern: str) -> bool:
    if pattern.endswith("/**"):
        return name.startswith(pattern.removesuffix("**"))
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def path_of(folder: Path, name: str, kind: Kind) -> Path:
    """Return the path of a file of a run. Every writer of a result calls this function.

    Raises:
        ValueError: If the table does not list the file as this kind. The caller must then not write it.
    """
    if (listed_kind := kind_of(name)) != kind:
        raise ValueError(f"{name} is written as kind {kind!r}, but file_kinds.py lists it as {listed_kind!r}")
    return folder / name


def kinds_in(folder: Path, place: Place = "run") -> dict[str, Kind | None]:
    """Return the files in a folder with their kinds."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return {name: kind_of(name, place) for name in names}


def results_in(folder: Path) -> list[str]:
    """Return the files in the folder of a run that may be published under its ε."""
    return [name for name, kind in kinds_in(folder).items() if kind == "result"]


def without_kind(folder: Path) -> list[str]:
    """Return the files in the folder of a run that match no line of the table."""
    return [name for name, kind in kinds_in(folder).items() if kind is None]


def read_totals(folder: Path) -> Mapping[str, Any]:
    """Read ``seconds`` and ``failures`` of a run that has ended, for its operator.

    Raises:
        OSError: If the folder has no such file.
    """
    return json.loads((folder / TOTALS).read_text(encoding="utf-8"))

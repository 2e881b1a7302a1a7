"""Read the folders of finished runs, and group runs that differ in their seed only. Standard library only."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.run.file_kinds import PROMPT, REPORT, ROUNDS, SUMMARY, read_totals, results_in
from fl_dualpriv.run.folder_lock import is_held
from fl_dualpriv.run.tables import KINDS, points

_OF_NO_SETTING = ("seed", "output.dir", "output.resume", "resources.ray-address")


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A finished run.

    Attributes:
        folder: Its folder.
        summary: Content of ``summary.json``.
        rounds: Lines of ``rounds.jsonl``.
        seconds: Duration; None if the run states an ε, because a time can depend on private data.
        shape: Shape of the shared prompt; None if there is none.
    """

    folder: Path
    summary: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]
    seconds: float | None
    shape: tuple[int, ...] | None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def config(self) -> Mapping[str, Any]:
        """Flat run configuration."""
        return self.summary["config"]

    @property
    def epsilon(self) -> float | None:
        """Largest proved ε; None without one."""
        proved = [release["epsilon"] for release in self.summary["privacy"] if release["guarantee"] == "theorem"]
        return max(proved, default=None)

    @property
    def setting(self) -> str:
        """Configuration without the seed, as a key."""
        return json.dumps({k: v for k, v in sorted(self.config.items()) if k not in _OF_NO_SETTING})

    @property
    def results(self) -> list[str]:
        """Files of the folder that may be published under the ε of the run."""
        return [name for name in results_in(self.folder) if name != REPORT]

    def score(self, when: str, kind: str) -> float | None:
        """Return an accuracy, a fraction: ``when`` is zero_shot, free or final."""
        return self.summary["accuracy"][when].get(kind)

    def gain(self, kind: str = "local") -> str:
        """Return the gain over the free rival in points, as a text."""
        return points(self.score("free", kind), self.score("final", kind))


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        ConfigError: If the folder holds no finished run, or a file of it cannot be read.
    """
    summary_file = folder / SUMMARY
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the folder of a run, as `fl-dualpriv run --out` named it")
    if not summary_file.exists():
        if is_held(folder):
            raise ConfigError(f"{folder}: its run still goes on; wait for its end")
        if (folder / "error.json").exists():
            raise ConfigError(f"{folder}: its run failed (error.json), so there are no results")
        ran = any((folder / name).exists() for name in (ROUNDS, "run.json", "checkpoint.bin"))
        why = "its run was cut off; finish it with `fl-dualpriv run --resume`" if ran else f"no run ({SUMMARY})"
        raise ConfigError(f"{folder}: {why}")
    try:
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
        lines = (folder / ROUNDS).read_text(encoding="utf-8").splitlines() if (folder / ROUNDS).exists() else []
        rounds = tuple(json.loads(line) for line in lines)
        _check(summary, rounds)
        shape = _shape(folder / PROMPT) if (folder / PROMPT).exists() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder}: {SUMMARY} or {ROUNDS} cannot be read ({type(error).__name__}: {error}); run it again"
        ) from error
    seconds = None
    if not summary["privacy"]:
        try:
            seconds = float(read_totals(folder)["seconds"])
        except (OSError, ValueError, KeyError):
            seconds = None  # its owner removed the operator's files
    return Run(folder=folder, summary=summary, rounds=rounds, seconds=seconds, shape=shape)


def _check(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> None:
    """Look for everything that a report reads.

    Raises:
        KeyError: If a part is missing.
        TypeError: If a part has another type.
    """
    parts = {"config": dict, "accuracy": dict, "privacy": list, "notes": list, "versions": dict, "method": str}
    for part, kind in (parts | {"seed": int, "rounds": int, "population": int, "randomness": str}).items():
        if not isinstance(summary[part], kind):
            raise TypeError(f"{part} is no {kind.__name__}")
    for when in ("zero_shot", "free", "final"):
        scores = summary["accuracy"][when]
        if not all(scores.get(kind) is None or isinstance(scores[kind], int | float) for kind in KINDS):
            raise TypeError(f"an accuracy of {when} is no number")
    for release in summary["privacy"]:
        for key in ("release", "unit", "relation", "sampling", "releases", "delta", "trusts", "guarantee"):
            release[key]
        if not isinstance(release["epsilon"], int | float):
            raise TypeError("an ε is no number")
    for key in ("rounds", "train.local-steps"):
        summary["config"][key]
    for line in rounds:
        if not isinstance(line["round"], int) or not isinstance(line["epsilon"], dict):
            raise TypeError("a line of rounds.jsonl is none")
        line["accuracy"]


def _shape(file: Path) -> tuple[int, ...]:
    """Read the shape of the shared prompt from the header of a safetensors file."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        if size > 2**20:
            raise ValueError(f"{file.name} is no safetensors file")
        return tuple(json.loads(content.read(size))["global"]["shape"])


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the folders below a folder that hold a run, finished or not, in order of their names."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and any((path / name).exists() for name in (SUMMARY, "run.json", "error.json", ROUNDS)):
            yield path


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return key → value of each run, for the keys of the configuration whose values differ."""
    keys = sorted({key for run in runs for key in run.config} - set(_OF_NO_SETTING))
    values = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len(set(map(repr, row))) > 1}


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        label: Text that tells the group from the others.
        runs: The runs, by seed.
    """

    label: str
    runs: tuple[Run, ...]

    def scores(self, when: str, kind: str) -> dict[int, float]:
        """Return seed → accuracy, for the runs that have it."""
        values = {run.summary["seed"]: run.score(when, kind) for run in self.runs}
        return {seed: value for seed, value in values.items() if value is not None}


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs by their configuration without the seed, in the order of their first run.

    Raises:
        ConfigError: If a configuration has a seed twice.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    result = []
    firsts = [own[0] for own in groups.values()]
    different = differences(firsts)
    for place, own in enumerate(groups.values()):
        seeds = [run.summary["seed"] for run in own]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(str(run.folder) for run in own)
            raise ConfigError(f"{names}: two of these runs have the same configuration and seed; give one of them")
        words = [f"{key} = {_short(row[place])}" for key, row in different.items()]
        label = ", ".join(words) if 0 < len(words) <= 3 else own[0].name
        result.append(Group(label=label, runs=tuple(sorted(own, key=lambda run: run.summary["seed"]))))
    return result


def _short(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"

"""Kinds of the files that a run leaves, and contents of its results, checked on whole runs of the app.

The releases are fixed. Then a result that two data sets leave with different bytes was not made of releases and public
numbers. The second run also has what is secret beside the data: clocks that go faster, another cohort, a client that
fails, more unusable records.
"""

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import fl_dualpriv.client.round
import fl_dualpriv.client.step
import fl_dualpriv.privacy.step
from fl_dualpriv.data.load import load_data
from fl_dualpriv.privacy.clipping import ClippedSum
from fl_dualpriv.privacy.noise import RandomSource, gaussian_noise
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.publish.file import card_path, write_published
from fl_dualpriv.publish.rules import publish
from fl_dualpriv.run.file_kinds import read_totals, results_in, without_kind
from fl_dualpriv.server import strategy as server
from fl_dualpriv.server.strategy import RoundStrategy, Update
from tests.guarantees.run_checks import Federation

Level = Literal["record", "client", "both"]
CLIENT: dict[str, Any] = {
    "privacy.client.mechanism": "gaussian",
    "privacy.client.calibrate-to": "noise-multiplier",
    "privacy.client.noise-multiplier": 1.5,
    "privacy.client.expected-cohort": 1.0,
}
LEVELS: dict[Level, dict[str, Any]] = {
    "record": {},
    "client": CLIENT | {"privacy.record.mechanism": "none", "method": "promptfl"},
    "both": CLIENT | {"privacy.client.expected-cohort": 2.0},
}
EXPORTED: dict[Level, tuple[int | None, ...]] = {"record": (None, 0), "client": (None,), "both": (None,)}
RUN: dict[str, Any] = {
    "rounds": 2,
    "privacy.randomness": "seeded",
    "evaluation.split": "test",
    "evaluation.held-out-data": "auto",
}
_SECRET = re.compile(r"second|time|clock|date|duration|fail|error|cohort|hash|sha|digest|memory|mib|bytes|pid|unusable")
"""Words that no key of a result has, but for keys of the configuration."""


def write_data(folder: Path, *, other: bool) -> None:
    """Four classes for two clients, with public test images that stay.

    Of the private images only what docs/privacy.md §1 calls public is equal: each client's number of records and its
    classes. Pixels, sizes, class counts and the number of unreadable files differ.
    """
    shutil.rmtree(folder, ignore_errors=True)
    rng, public = np.random.default_rng(7 if other else 3), np.random.default_rng(0)
    counts = (5, 9, 8, 6) if other else (8, 6, 7, 7)
    side = 96 if other else 32
    for name, count in zip(("bus", "cat", "dog", "tree"), counts, strict=True):
        for split, images, source, size in (("train", count, rng, side), ("test", 4, public, 32)):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(images):
                pixels = source.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    if other:
        (folder / "train" / "bus" / "0.png").write_bytes(b"no image")


# --- fixed releases, moving secrets -----------------------------------------------------------------------------------


@contextmanager
def releases_fixed() -> Iterator[None]:
    """Each release is its noise: it no longer depends on data. The token of the run, a coin, is the same, too."""

    def of_records(clean: ClippedSum, plan: RecordLevelPlan, source: RandomSource) -> Tensor:
        return gaussian_noise(source, tuple(clean.value.shape), 0.1)

    def of_clients(self: RoundStrategy, partitions: Any, diffs: Tensor, privacy: Any, source: RandomSource) -> Tensor:
        return gaussian_noise(source, tuple(self.prompt.shape), 0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fl_dualpriv.privacy.step, "release", of_records)
        patch.setattr(RoundStrategy, "_noised", of_clients)
        patch.setattr(secrets, "token_hex", lambda nbytes=None: "5" * 16)
        yield


@contextmanager
def secrets_moved(level: Level) -> Iterator[None]:
    """All clocks are elsewhere and go three times as fast; under client level another cohort, and a client fails."""

    def hurried(clock: Callable[[], float]) -> Callable[[], float]:
        start = clock()
        return lambda: start + 86_400 + 3 * (clock() - start)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("time", "monotonic", "perf_counter", "process_time"):
            patch.setattr(time, name, hurried(getattr(time, name)))
        gmtime, now = time.gmtime, time.time
        patch.setattr(time, "gmtime", lambda seconds=None: gmtime(now() if seconds is None else seconds))
        if level == "client":
            participant = fl_dualpriv.client.round.TrainRound._participant

            def failing(self: fl_dualpriv.client.round.TrainRound, partition: int, state: Any) -> Any:
                if partition == 1:
                    raise RuntimeError("a crash")
                return participant(self, partition, state)

            patch.setattr(fl_dualpriv.client.round.TrainRound, "_participant", failing)
            patch.setattr(server, "poisson_sample", lambda source, population, rate: np.arange(population))
        yield


def _run(federation: Federation, changes: dict[str, Any], *, other: bool) -> Path:
    """A run over one of two data sets that lie at the same place, into the same place."""
    data = federation.folder / "data"
    write_data(data, other=other)
    load_data.cache_clear()  # it keeps a folder that it has read
    return federation.run("out", RUN | {"data.path": str(data)} | changes)


def _published(out: Path, level: Level, folder: Path) -> dict[str, bytes]:
    """Every file of a run that may be published, and what `fl-dualpriv export` makes of it."""
    found = {name: (out / name).read_bytes() for name in results_in(out)}
    for client in EXPORTED[level]:
        file = folder / "exported" / f"of-{'all' if client is None else client}.safetensors"
        write_published(file, publish(out, client, allow_reproducible_noise=True, device="cpu"))
        found |= {path.name: path.read_bytes() for path in (file, card_path(file))}
    return found


def _two_runs(federation: Federation, level: Level) -> tuple[dict[str, bytes], dict[str, bytes]]:
    with releases_fixed():
        out = _run(federation, LEVELS[level], other=False)
        first, told = _published(out, level, federation.folder), read_totals(out)
        out.rename(out.with_name("first"))
        with secrets_moved(level):
            out = _run(federation, LEVELS[level], other=True)
        second, now = _published(out, level, federation.folder), read_totals(out)
    # What the operator is told does depend on what is secret: else the two runs would show nothing.
    assert told["seconds"] != now["seconds"], "both runs took the same time"
    assert (told["failures"], now["failures"] > 0) == (0, level == "client"), "no client failed, or another did"
    return first, second


def _compare(federation: Federation, level: Level) -> None:
    first, second = _two_runs(federation, level)
    expected = {"summary.json", "rounds.jsonl", "curve.png", "prompts/global.safetensors", "of-all.md"}
    assert expected <= first.keys(), "a result is missing"
    assert json.loads(first["summary.json"])["accuracy"]["final"]["local"] is not None, "nothing was scored"
    assert first.keys() == second.keys(), f"two data sets left other files: {sorted(first.keys() ^ second.keys())}"
    different = sorted(name for name in first if first[name] != second[name])
    assert not different, f"with the releases fixed, two data sets left other bytes in {', '.join(different)}"


def results_at_record_level_are_functions_of_releases(federation: Federation) -> None:
    _compare(federation, "record")


def results_at_client_level_are_functions_of_releases(federation: Federation) -> None:
    _compare(federation, "client")


def results_at_both_levels_are_functions_of_releases(federation: Federation) -> None:
    _compare(federation, "both")


# --- names ------------------------------------------------------------------------------------------------------------


def names_in(content: Any) -> Iterator[str]:
    """All keys of a JSON value, but for those of the run's configuration, which is public."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            if key != "config":
                yield from names_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from names_in(value)


def json_of(name: str, content: bytes) -> list[Any]:
    """What a result says in JSON; of a safetensors file its metadata, and the facts in them."""
    if name.endswith(".safetensors"):
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        return [metadata, *(json.loads(text) for text in metadata.values() if text.startswith("{"))]
    if name.endswith((".json", ".jsonl")):
        lines = content.decode().splitlines() if name.endswith(".jsonl") else [content.decode()]
        return [json.loads(line) for line in lines]
    return []


def no_result_names_a_secret(federation: Federation) -> None:
    """A key that is called after a time, a failure, a hash or a size is none of a result's, whatever its value."""
    out = _run(federation, LEVELS["both"], other=False)
    for name, content in _published(out, "both", federation.folder).items():
        for value in json_of(name, content):
            found = sorted({key for key in names_in(value) if _SECRET.search(key)})
            assert not found, f"{name} has {', '.join(found)}"


# --- kinds ------------------------------------------------------------------------------------------------------------


def run_with_a_plugins_file(federation: Federation) -> Path:
    """A run whose strategy writes a file into the folder that it is given."""
    combine: Callable[[Any, Any], Tensor] = RoundStrategy.combine

    def writing(self: RoundStrategy, updates: list[Update]) -> Tensor:
        assert self.plugin_folder is not None
        self.plugin_folder.mkdir(exist_ok=True)
        (self.plugin_folder / "norms.csv").write_text("1.0\n")
        return combine(self, updates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundStrategy, "combine", writing)
        return _run(federation, LEVELS["record"], other=False)


def every_file_has_a_kind(federation: Federation) -> None:
    out = run_with_a_plugins_file(federation)
    strays = without_kind(out)
    assert not strays, f"neither a result nor an operator's file: {', '.join(strays)}"
    assert (out / "plugins" / "norms.csv").exists(), "the plug-in wrote nothing"
    expected = ["curve.png", "prompts/global.safetensors", "rounds.jsonl", "summary.json"]
    assert results_in(out) == expected, f"results: {', '.join(results_in(out))}"

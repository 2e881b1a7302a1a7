"""Each file of a run has a kind, and results are functions of releases and public numbers, byte by byte."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_dualpriv.config.schema import app_defaults, read_toml
from fl_dualpriv.data.demo.images import DemoSplit, load_demo
from fl_dualpriv.data.load import load_data
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.local import run_local
from fl_dualpriv.run.file_kinds import (
    PROGRESS,
    RUN_FILES,
    kind_of,
    kinds_in,
    path_of,
    read_totals,
    results_in,
    without_kind,
)
from tests.guarantees import result_checks, run_checks
from tests.guarantees.run_checks import APP_DIR, Federation

CONFIGS = APP_DIR / "simulations" / "configs"
CLIENT_FILES = {"prompt.safetensors", "prompt.previous.safetensors", "sent.safetensors", "ledger.jsonl", "ledger.lock"}


@pytest.fixture
def federation(tmp_path: Path, tiny_clip_dir: Path) -> Federation:
    return Federation(folder=tmp_path, images=tmp_path / "data", clip=tiny_clip_dir)


# --- what results hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        result_checks.results_at_record_level_are_functions_of_releases,
        result_checks.results_at_client_level_are_functions_of_releases,
        result_checks.results_at_both_levels_are_functions_of_releases,
        result_checks.no_result_names_a_secret,
    ],
    ids=lambda check: check.__name__,
)
def test_holds(federation: Federation, check: Callable[[Federation], None]) -> None:
    check(federation)


def few(split: DemoSplit, step: int) -> DemoSplit:
    """Every so manieth image of each class."""
    rank = np.empty(len(split.labels), np.int64)
    for label in np.unique(split.labels):
        own = np.flatnonzero(split.labels == label)
        rank[own] = np.arange(len(own))
    kept = np.flatnonzero(rank % step == 0)
    columns = {name: getattr(split, name)[kept] for name in ("labels", "sketches", "domains", "seeds")}
    return replace(split, **columns)


def exchanged(train: DemoSplit) -> DemoSplit:
    """Other images for the same clients: each has as many records, of the same classes, and other class counts."""
    labels, rng = train.labels.copy(), np.random.default_rng(1)
    for first in range(0, len(train.class_names), 10):  # of a client's ten classes one gets an image of another
        labels[rng.choice(np.flatnonzero(train.labels == first))] = first + 1
    order = rng.permutation(len(labels))
    return replace(train, labels=labels, sketches=255 - train.sketches[order], domains=train.domains[order])


@pytest.mark.parametrize(("level", "config"), [("record", "by-class.toml"), ("client", "client-level.toml")])
@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_the_demo_over_other_images_leaves_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: Any, config: str, step: int
) -> None:
    """With the releases fixed. Images, clocks, the cohort and a failing client are all that differ."""
    quick = {
        "rounds": 2,
        "evaluation.every": 1,
        "resources.feature-cache": "off",
        "resources.device": "cpu",
        "data.partition": "by-class",  # each client keeps its number of records and its classes
        "population": 10,
        "output.dir": str(tmp_path / "out"),
        "privacy.client.expected-cohort": 3.0,
        "privacy.record.calibrate-to": "noise-multiplier",
        "privacy.client.calibrate-to": "noise-multiplier",
    }
    flat, out = app_defaults(APP_DIR) | read_toml(CONFIGS / config) | quick, tmp_path / "out"
    splits = {name: few(split, step) for name, split in load_demo().items()}
    found, told = [], []
    with result_checks.releases_fixed():
        for train, moved in ((splits["train"], False), (exchanged(splits["train"]), True)):
            monkeypatch.setattr("fl_dualpriv.data.demo.images.load_demo", lambda train=train: splits | {"train": train})
            load_data.cache_clear()
            with result_checks.secrets_moved(level) if moved else contextlib.nullcontext():
                run_local(APP_DIR, flat)
            found.append({name: (out / name).read_bytes() for name in results_in(out)})
            told.append(read_totals(out))
            out.rename(tmp_path / f"moved-{moved}")
    load_data.cache_clear()
    assert told[0]["seconds"] != told[1]["seconds"]
    assert (told[0]["failures"], told[1]["failures"] > 0) == (0, level == "client")
    assert json.loads(found[0]["summary.json"])["accuracy"]["final"]["local"] is not None
    assert list(found[0]) == ["curve.png", "prompts/global.safetensors", "rounds.jsonl", "summary.json"]
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_every_file_has_a_kind_a_plug_ins_too(federation: Federation) -> None:
    result_checks.every_file_has_a_kind(federation)


LEVELS: dict[str, dict[str, Any]] = {
    "record": {},
    "client": result_checks.CLIENT | {"privacy.record.mechanism": "none", "method": "promptfl"},
    "trusts-server": {"privacy.record.trusts-server": True, "train.local-steps": 1},
    "no privacy": {"privacy.record.mechanism": "none"},
    "no training": {"method": "zero-shot"},
    "private test images": {"evaluation.held-out-data": "private"},
}


@pytest.mark.parametrize("level", LEVELS)
def test_every_file_of_a_run_has_a_kind(federation: Federation, level: str) -> None:
    result_checks.write_data(federation.folder / "data", other=False)
    changes = result_checks.RUN | {"data.path": str(federation.folder / "data")} | LEVELS[level]
    cache = federation.folder / "cache"
    out = federation.run("out", changes | {"resources.feature-cache": str(cache)})
    kinds = kinds_in(out)
    assert [name for name, kind in kinds.items() if kind is None] == []
    assert [name for name, kind in kinds.items() if kind == "result"] == [
        "curve.png",
        "prompts/global.safetensors",
        "rounds.jsonl",
        "summary.json",
    ]
    assert kinds["operator/totals.json"] == "operator"
    assert set(kinds_in(cache, "cache").values()) == {"operator"}


def test_every_file_of_a_run_that_failed_and_went_on_has_a_kind(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is there while it runs, and what a killed write left."""
    result_checks.write_data(federation.folder / "data", other=False)
    changes = result_checks.RUN | {"data.path": str(federation.folder / "data")}
    out = federation.folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fl_dualpriv.run.recorder.RunRecorder.write_curve", lambda self, caption: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            federation.run("out", changes)
    (out / f".{'summary.json'}.123.tmp").write_text("{")
    assert {"error.json", "checkpoint.bin", "checkpoint.previous.bin"} <= kinds_in(out).keys()
    assert without_kind(out) == []
    assert {kind for name, kind in kinds_in(out).items() if name.startswith((".", "error", "check"))} == {"operator"}
    before = (out / "operator" / "progress.jsonl").read_text()
    federation.run("out", changes | {"output.resume": True})
    assert without_kind(out) == []
    assert (out / "operator" / "progress.jsonl").read_text() == before


def test_a_refused_client_leaves_files_of_a_kind(federation: Federation) -> None:
    result_checks.write_data(federation.folder / "data", other=False)
    grid = federation.nodes(**{"data.path": str(federation.folder / "data")})
    terms = replace(run_checks.TERMS, noise_multiplier=0.1)
    assert run_checks.upload_of(run_checks.train(grid, 1, terms)) is None
    names = {Path(name).name for name in kinds_in(federation.folder) if name.startswith("clients/")}
    assert "refusals.jsonl" in names
    assert all(kind_of(f"clients/client-000/{name}") == "operator" for name in names)


def test_a_file_without_a_kind_is_named_at_the_end(
    federation: Federation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from strategies.dpfpl import DPFPL

    update = DPFPL.server_update

    def writing(self: DPFPL, prompt: Any, diff: Any) -> Any:
        assert self.plugin_folder is not None
        (self.plugin_folder.parent / "norms.csv").write_text("1.0\n")
        return update(self, prompt, diff)

    monkeypatch.setattr(DPFPL, "server_update", writing)
    result_checks.write_data(federation.folder / "data", other=False)
    federation.run("out", {"rounds": 1, "data.path": str(federation.folder / "data")})
    (record,) = [r for r in caplog.records if "neither results nor operator's files" in r.getMessage()]
    assert "norms.csv" in record.getMessage()


def test_the_table_says_each_file_once_and_why() -> None:
    names = [(file.place, file.pattern) for file in RUN_FILES]
    assert len(set(names)) == len(names)
    assert all(file.why for file in RUN_FILES)
    # Of a client and of the cache nothing is a result.
    assert {file.kind for file in RUN_FILES if file.place in ("client", "cache")} == {"operator"}
    for name in CLIENT_FILES:
        assert kind_of(f"clients/client-007/{name}") == kind_of(name, "client") == "operator"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("summary.json", "result"),
        (".summary.json.77.tmp", "operator"),  # it was never checked
        ("clients/client-000/.prompt.safetensors.77.tmp", "operator"),
        ("plugins/a/b.csv", "operator"),
        ("plugins/.b.csv.77.tmp", "operator"),
        ("norms.csv", None),
        (".norms.csv.77.tmp", None),
        ("prompts/summary.json", None),
        ("clients/client-000/images.npz", None),
        ("clients/client-000/deeper/prompt.safetensors", None),
        ("operator/else.json", None),
    ],
)
def test_kinds(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_a_writer_must_mean_the_kind_that_is_declared(tmp_path: Path) -> None:
    assert path_of(tmp_path, "summary.json", "result") == tmp_path / "summary.json"
    with pytest.raises(ValueError, match=r"kind 'result', but file_kinds\.py lists it as 'operator'"):
        path_of(tmp_path, "operator/totals.json", "result")
    with pytest.raises(ValueError, match="lists it as None"):
        path_of(tmp_path, "norms.csv", "result")


def test_results_of_an_earlier_run_are_refused_and_its_times_forgotten(federation: Federation) -> None:
    """Without results in the folder, the times there are of a run that was removed."""
    result_checks.write_data(federation.folder / "data", other=False)
    file = federation.folder / "out" / PROGRESS
    file.parent.mkdir(parents=True)
    file.write_text('{"round": 9, "failures": 9, "seconds": 9}\n')
    changes = {"rounds": 1, "data.path": str(federation.folder / "data")}
    federation.run("out", changes)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["failures"] for line in lines] == [0] * len(lines)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        federation.run("out", changes)

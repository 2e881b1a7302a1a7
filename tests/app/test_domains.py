"""Whole runs by domain and with clients that are held out: accuracies that exist or not, nodes, resuming, refusals."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.data.load import load_data
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.run.tables import results_table
from fl_dualpriv.tasks.survey import survey
from tests.guarantees.run_checks import Federation
from tests.guarantees.score_checks import CLASSES, DOMAINS, NEW, POPULATION, RUN, features_apart, run_by_domain


@pytest.fixture
def federation(tmp_path: Path, tiny_clip_dir: Path) -> Federation:
    return Federation(folder=tmp_path, images=tmp_path / "data", clip=tiny_clip_dir)


def accuracies(federation: Federation, **changes: Any) -> dict[str, dict[str, Any]]:
    with features_apart():
        return run_by_domain(federation, **changes)[1]["accuracy"]


@pytest.mark.parametrize("method", ["dpfpl", "promptfl", "local-only", "zero-shot"])
def test_an_accuracy_that_does_not_exist_is_null(federation: Federation, method: str):
    found = accuracies(federation, method=method)
    for when in ("zero_shot", "free"):
        assert found[when]["general"] == found[when]["local"]
        assert found[when]["new_client"] is not None
    assert found["free"]["rival"] == "un-tuned"  # every client holds every class
    assert {k: v for k, v in found["free"].items() if k != "rival"} == found["zero_shot"]
    final = found["final"]
    assert (final["general"] is None, final["new_client"] is None) == (method == "local-only",) * 2
    if method in ("promptfl", "zero-shot"):
        assert final["general"] == final["local"]


def test_a_division_by_class_leaves_new_clients_with_new_classes(federation: Federation):
    images = federation.folder / "flat"
    for i in range(12):
        for name in CLASSES:
            place = images / name / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(place)
    changes = RUN | {
        **{"data.path": str(images), "data.partition": "by-class", "population": 2, "evaluation.new-clients": 1},
        "evaluation.held-out-data": "public",
    }
    out = federation.run("out", changes)
    found = json.loads((out / "summary.json").read_text())
    assert {entry["new_client"] for entry in found["accuracy"].values()} == {None}
    assert found["clients"]["final"]["new_client"] == [None]
    assert found["accuracy"]["final"]["local"] is not None


def test_the_number_of_nodes_changes_no_score(federation: Federation):
    seeded = {"privacy.randomness": "seeded"}
    one = accuracies(federation, **seeded)
    other = Federation(folder=federation.folder / "few", images=federation.images, clip=federation.clip)
    assert accuracies(other, supernodes=2, **seeded) == one


def test_new_clients_change_no_epsilon(federation: Federation):
    client = {
        "privacy.client.mechanism": "gaussian",
        "privacy.client.calibrate-to": "noise-multiplier",
        "privacy.client.expected-cohort": 2.0,
        "method": "promptfl",
    }
    _, one = run_by_domain(federation, **client)
    other = Federation(folder=federation.folder / "without", images=federation.images, clip=federation.clip)
    _, two = run_by_domain(other, **client, **{"evaluation.new-clients": 0})
    assert one["privacy"] == two["privacy"]
    assert (one["population"], one["new_clients"], two["new_clients"]) == (POPULATION, NEW, 0)


@pytest.mark.parametrize("method", ["dpfpl", "zero-shot"])
def test_a_resumed_run_has_the_same_scores(federation: Federation, method: str):
    """Cut off after the last round was scored: the scores of single clients are then asked for again."""
    changes = {"method": method, "privacy.randomness": "seeded"}
    _, whole = run_by_domain(federation, **changes)
    cut = Federation(folder=federation.folder / "cut", images=federation.images, clip=federation.clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fl_dualpriv.run.recorder.RunRecorder.write_curve", lambda self, caption: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_by_domain(cut, **changes)
    _, resumed = run_by_domain(cut, **changes, **{"output.resume": True})
    assert {k: resumed[k] for k in ("accuracy", "clients", "spread")} == {
        k: whole[k] for k in ("accuracy", "clients", "spread")
    }


def test_the_table_has_a_line_per_domain_and_every_accuracy(federation: Federation):
    _, summary = run_by_domain(federation)
    assert summary["domains"] == list(DOMAINS)
    assert summary["groups"] == [f"{domain}: {name}" for domain in DOMAINS for name in CLASSES]
    console = Console(width=160, file=io.StringIO())
    console.print(results_table(summary))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(name in text for name in ("general", "new client", "equals un-tuned", *DOMAINS))


def config(federation: Federation, **changes: Any) -> RunConfig:
    load_data.cache_clear()
    given = RUN | {"data.path": str(federation.folder / "data"), "prompt.init": "random"}
    return RunConfig.from_run_config(federation.config(given | changes))


def test_the_survey_names_domains_and_what_they_lack(federation: Federation):
    run_by_domain(federation, method="zero-shot")
    data = federation.folder / "data"
    for file in (data / "train" / "attic" / "dog").iterdir():
        file.unlink()
    (data / "train" / "attic" / "dog").rmdir()
    said = "\n".join(survey(config(federation)))
    assert "domains, with training records: attic (" in said
    assert "domain 'attic' has no training record of 'dog': its clients do not hold these" in said
    assert f"clients: {POPULATION + NEW}, {NEW} of them take part in no round" in said


def test_too_few_clients_for_the_domains_are_refused(federation: Federation):
    run_by_domain(federation, method="zero-shot")
    with pytest.raises(ConfigError, match="population = 1: there are 2 domains"):
        survey(config(federation, population=1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data.ref": "demo-vqa", "backbone.name": "demo-vqa", "data.path": ""}, "which have no domains"),
        ({"data.partition": "by-node"}, "a client that joins no round has no node"),
        ({"evaluation.new-clients": -1}, "a whole number from 0"),
    ],
)
def test_keys_that_do_not_fit_are_refused(federation: Federation, changes: dict[str, Any], reason: str):
    with pytest.raises(ConfigError, match=reason):
        config(federation, **changes)

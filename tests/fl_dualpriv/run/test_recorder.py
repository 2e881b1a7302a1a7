"""The files of a run: their keys, strict JSON, and a picture."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fl_dualpriv.files import read_tensors
from fl_dualpriv.metrics import Accuracy
from fl_dualpriv.privacy.plan import Release
from fl_dualpriv.run.file_kinds import PROGRESS, read_totals
from fl_dualpriv.run.recorder import PACKAGES, RunRecorder, build_summary, versions
from fl_dualpriv.run.tables import results_table

RELEASE = Release(
    release="client upload",
    unit="record",
    relation="add-or-remove-one",
    sampling="Poisson, q = 0.1 per step",
    releases=5,
    epsilon=1.5,
    delta=1e-5,
    trusts="nobody",
)


CLIENT_ACCURACIES = {"final": {"local": (0.5, None, 1.0), "general": ()}}


def summary(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "method": "dpfpl",
        "engine": "local",
        "seed": 1,
        "rounds": 2,
        "population": 3,
        "new_clients": 1,
        "randomness": "os",
        "zero_shot": Accuracy(local=0.5, neighbour=0.25, general=0.5, new_client=0.75),
        "free": Accuracy(local=0.625, neighbour=0.25),
        "rival": "un-tuned, own class list",
        "final": Accuracy(local=0.75, neighbour=None),
        "clients": CLIENT_ACCURACIES,
        "group_names": ("cat", "dog"),
        "domain_names": (),
        "split": "test",
        "releases": [RELEASE],
        "rows": {"together": 3},
        "notes": ["a note"],
        "config": {"rounds": 2, "train.sampling-rate": 0.1},
    }
    return build_summary(**(given | changes))


TOLD = Accuracy(local=0.5, neighbour=None, by_group=(0.5, None))


@pytest.mark.parametrize(
    ("zero_shot", "final", "named"),
    [(TOLD, TOLD, 2), (TOLD, replace(TOLD, by_group=()), 0), (None, TOLD, 0), (TOLD, None, 0),
     (replace(TOLD, by_group=(0.5,) * 3), TOLD, 0)],
)  # fmt: skip
def test_groups_are_named_if_all_scores_are_of_them(zero_shot: Accuracy, final: Accuracy, named: int):
    found = summary(zero_shot=zero_shot, final=final, group_names=["color", "shape"], domain_names=["hall"])
    assert len(found["groups"]) == named
    assert len(found["domains"]) == named // 2
    results_table(found)


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_summary_has_the_promised_keys(tmp_path: Path):
    RunRecorder(tmp_path).write_summary(summary())
    found = strict((tmp_path / "summary.json").read_text())
    promised = {"method", "engine", "seed", "rounds", "population", "randomness", "evaluation_split", "groups", "notes"}
    # No more: each key is a function of releases and public numbers; "rows" of the machine and of public shapes.
    promised |= {"rows", "new_clients", "domains", "clients", "spread"}
    assert found.keys() == promised | {"accuracy", "privacy", "versions", "config"}
    assert found["accuracy"] == {
        # 2 * 0.5 * 0.25 / 0.75 = 1/3; 2 * 0.625 * 0.25 / 0.875 = 5/14
        "zero_shot": {
            **{"local": 0.5, "neighbour": 0.25, "harmonic_mean": pytest.approx(1 / 3)},
            **{"general": 0.5, "new_client": 0.75},
        },
        "free": {
            "local": 0.625,
            "neighbour": 0.25,
            "harmonic_mean": pytest.approx(5 / 14),
            "rival": "un-tuned, own class list",
            **{"general": None, "new_client": None},
        },
        "final": {"local": 0.75, "neighbour": None, "harmonic_mean": None, "general": None, "new_client": None},
    }
    assert found["clients"] == {"final": {"local": [0.5, None, 1.0], "general": []}}
    assert found["spread"]["final"]["local"]["median"] == 0.75
    assert found["spread"]["final"]["general"] is None
    keys = {"release", "unit", "relation", "sampling", "releases", "epsilon", "delta", "trusts", "guarantee"}
    assert keys <= found["privacy"][0].keys()
    assert found["privacy"][0]["guarantee"] == "theorem"
    assert found["config"] == {"rounds": 2, "train.sampling-rate": 0.1}
    assert found["versions"].keys() == set(PACKAGES)


def test_unscored_runs_have_the_same_keys():
    nothing = dict.fromkeys(("local", "neighbour", "harmonic_mean", "general", "new_client"))
    assert summary(zero_shot=None, free=None, final=None)["accuracy"] == {
        "zero_shot": nothing,
        "free": nothing | {"rival": "un-tuned, own class list"},
        "final": nothing,
    }


def test_versions_are_those_installed():
    assert versions()["torch"] == torch.__version__


def test_a_number_that_is_not_json_never_half_writes_a_summary(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        RunRecorder(tmp_path).write_summary(summary(config={"rounds": math.inf}))
    assert not (tmp_path / "summary.json").exists()


def test_rounds_are_one_line_each(tmp_path: Path):
    recorder = RunRecorder(tmp_path)
    recorder.add_round(1, Accuracy(local=0.5, neighbour=None), 1.5, None, 2, 0.12345)
    recorder.add_round(2, None, None, 2.5, 0, 1.0)
    lines = [strict(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert lines == [
        {
            "round": 1,
            "accuracy": {"local": 0.5, "neighbour": None},
            "epsilon": {"record_level": 1.5, "client_level": None},
        },
        {
            "round": 2,
            "accuracy": None,
            "epsilon": {"record_level": None, "client_level": 2.5},
        },
    ]
    assert recorder.rounds == lines
    told = [strict(line) for line in (tmp_path / PROGRESS).read_text().splitlines()]
    assert told == [{"round": 1, "failures": 2, "seconds": 0.123}, {"round": 2, "failures": 0, "seconds": 1.0}]
    assert recorder.progress == told
    recorder.write_totals(2, 1.23456)
    assert read_totals(tmp_path) == {"failures": 2, "seconds": 1.235}


def test_error_and_prompt(tmp_path: Path):
    recorder = RunRecorder(tmp_path / "new")
    recorder.write_error(ValueError("broken"))
    error = strict((tmp_path / "new" / "error.json").read_text())
    assert (error["type"], error["message"]) == ("ValueError", "broken")
    recorder.write_prompt(torch.ones(2, 3), torch.zeros(4, 3), {"method": "full"})
    tensors, metadata = read_tensors(tmp_path / "new" / "prompts" / "global.safetensors")
    assert torch.equal(tensors["global"], torch.ones(2, 3))
    assert torch.equal(tensors["context"], torch.zeros(4, 3))
    assert metadata == {"method": "full"}


ROUNDS = {
    "no rounds": [],
    "scores and both levels": [
        (1, Accuracy(local=0.5, neighbour=0.2), 1.0, 2.0),
        (2, Accuracy(local=0.6, neighbour=0.3), 1.5, 2.5),
    ],
    "no scores": [(1, None, 1.0, None), (2, None, 2.0, None)],
    "no neighbours": [(1, Accuracy(local=0.5, neighbour=None), None, None)],
}


@pytest.mark.parametrize("name", ROUNDS)
def test_the_curve_is_a_picture(tmp_path: Path, name: str):
    recorder = RunRecorder(tmp_path)
    for server_round, accuracy, record, client in ROUNDS[name]:
        recorder.add_round(server_round, accuracy, record, client, 0, 0.0)
    recorder.write_curve()
    with Image.open(tmp_path / "curve.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 300

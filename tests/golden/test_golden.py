"""The golden cases cover every method, and the comparison notices a prompt or a ledger that differs."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fl_dualpriv.config.methods import METHODS

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("golden_compare", HERE / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    path = list(sys.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_every_method_has_a_case(compare):
    assert set(METHODS) <= {case.name for case in compare.CASES}


def test_every_configuration_exists(compare):
    assert all((HERE.parents[1] / case.config).is_file() for case in compare.CASES)


def _folder(path: Path, value: float, releases: int, time: str) -> Path:
    path.mkdir()
    save_file({"prompt": np.full(3, value, dtype=np.float32)}, path / "global.safetensors")
    (path / "ledger.jsonl").write_text(f'{{"time": "{time}", "run": "RUN", "releases": {releases}}}\n')
    return path


@pytest.mark.parametrize(
    ("value", "releases", "time", "equal"),
    [
        (1.0, 4, "later", True),  # only the clock differs
        (float(np.nextafter(np.float32(1), np.float32(2))), 4, "now", False),  # the last bit
        (1.0, 5, "now", False),
    ],
)
def test_a_difference_is_noticed(compare, tmp_path: Path, value: float, releases: int, time: str, equal: bool):
    case = compare.CASES[0]
    start = {case.name: compare.digests(_folder(tmp_path / "start", 1.0, 4, "now"))}
    end = {case.name: compare.digests(_folder(tmp_path / "end", value, releases, time))}
    assert (compare.differences(start, end, [case]) == []) is equal


def test_a_failed_run_is_a_difference(compare):
    case = compare.CASES[0]
    assert compare.differences({case.name: {"error": "x"}}, {case.name: {"error": "x"}}, [case])
    assert compare.differences({case.name: {}}, {case.name: {}}, [case])  # a run that left nothing


@pytest.mark.parametrize(("token", "terms", "equal"), [("another", "same", True), ("one", "other", False)])
def test_metadata_are_compared_without_the_runs_token(compare, tmp_path: Path, token: str, terms: str, equal: bool):
    found = []
    for name, metadata in (("start", ("one", "same")), ("end", (token, terms))):
        (tmp_path / name).mkdir()
        tensors = {"personal": np.zeros(2, dtype=np.float32)}
        save_file(
            tensors, tmp_path / name / "prompt.safetensors", dict(zip(("run-token", "terms"), metadata, strict=True))
        )
        found.append(compare.digests(tmp_path / name))
    assert (found[0] == found[1]) is equal


@pytest.mark.parametrize(("epsilon", "seconds", "equal"), [(1.0, 9, True), (2.0, 5, False)])
def test_results_are_compared_without_what_a_run_does_not_repeat(
    compare, tmp_path: Path, epsilon: float, seconds: int, equal: bool
):
    found = []
    for name, (spent, version) in {"start": (1.0, 5), "end": (epsilon, seconds)}.items():
        (tmp_path / name).mkdir()
        scores = {"local": 0.5, "neighbour": 0.25}
        summary = {"accuracy": {"zero_shot": scores, "final": scores}, "notes": [], "rounds": 1, "versions": version}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary | {"privacy": [{"epsilon": spent}]}))
        (tmp_path / name / "rounds.jsonl").write_text('{"round": 0}\n')
        found.append(compare.digests(tmp_path / name))
    assert (found[0] == found[1]) is equal

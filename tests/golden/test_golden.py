"""The golden cases cover every method, and the comparison notices a prompt or a ledger that differs."""

import importlib.util
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import save_file

from fl_dualpriv.config.methods import Method

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
    assert set(get_args(Method)) <= {case.name for case in compare.CASES}


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

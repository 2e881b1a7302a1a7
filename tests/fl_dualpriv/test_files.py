"""A file is there whole or not at all."""

import json
import math
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from fl_dualpriv import files


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folders_are_made_and_nothing_else_is_left(tmp_path: Path):
    path = tmp_path / "a" / "b" / "x.bin"
    files.write_bytes(path, b"one")
    files.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert entries(path.parent) == ["x.bin"]


def test_a_failing_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.bin"
    files.write_bytes(path, b"old")

    def fail(self: Path, target: Path) -> NoReturn:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"


def half_written(self: Path, content: bytes) -> NoReturn:
    with self.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError("no space left")


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "prompt.safetensors"
    files.write_tensors(path, {"p": torch.ones(3)}, {"round": "1"})
    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(OSError, match="no space left"):
        files.write_tensors(path, {"p": torch.zeros(3)}, {"round": "2"})
    tensors, metadata = files.read_tensors(path)
    assert torch.equal(tensors["p"], torch.ones(3))
    assert metadata == {"round": "1"}


def test_a_failing_write_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(OSError, match="no space left"):
        files.write_bytes(tmp_path / "x.bin", b"content")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_is_strict_and_a_refused_value_leaves_the_old_file(tmp_path: Path, value: float):
    path = tmp_path / "x.json"
    files.write_json(path, {"ok": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"accuracy": value})
    with pytest.raises(ValueError, match="JSON"):
        files.append_json_line(path, {"accuracy": value})
    assert json.loads(path.read_text()) == {"ok": 1}


def test_json_lines_are_appended(tmp_path: Path):
    path = tmp_path / "new" / "rounds.jsonl"
    for i in range(3):
        files.append_json_line(path, {"round": i, "text": "ε\n"})
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"round": i, "text": "ε\n"} for i in range(3)]


def test_tensors_survive_bitwise_with_their_metadata(tmp_path: Path):
    path = tmp_path / "t.safetensors"
    whole = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    given = {"transposed": whole.T, "half": torch.tensor([1.5], dtype=torch.float16), "none": torch.zeros(0, 4)}
    files.write_tensors(path, given, {"run-token": "abc"})
    tensors, metadata = files.read_tensors(path)
    assert metadata == {"run-token": "abc"}
    assert tensors.keys() == given.keys()
    assert all(torch.equal(tensors[name], given[name]) and tensors[name].dtype == given[name].dtype for name in given)
    files.write_tensors(path, {"x": torch.ones(1)}, {})
    assert files.read_tensors(path)[1] == {}

"""Who may have written what is read: features in a folder or file that others own or can write to are not believed."""

import os
from pathlib import Path

import numpy as np
import pytest

from fl_dualpriv.features.cache import SHARD, FeatureTable

DIM, SIZE = 3, 2 * SHARD + 10  # three shards
ALL = np.arange(SIZE)


def truth(indices: np.ndarray) -> np.ndarray:
    return np.stack([indices, indices + 0.5, -indices], axis=1).astype(np.float32)


class Encoder:
    """Counts what it encodes."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, indices: np.ndarray) -> tuple[np.ndarray, bool]:
        self.calls.append((int(indices[0]), len(indices)))
        return truth(indices), True


def table(root: Path, encoder: Encoder) -> FeatureTable:
    return FeatureTable(size=SIZE, embed_dim=DIM, encode=encoder, root=root, key="key")


def test_folders_are_their_owners_alone(tmp_path: Path):
    (tmp_path / "features").mkdir(mode=0o755)
    (tmp_path / "features" / "key").mkdir(mode=0o755)
    for folder in ("features", "other"):
        table(tmp_path / folder, Encoder()).rows(ALL)
    for folder in ("features/key", "other", "other/key"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700


def test_somebody_elses_folder_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table(tmp_path, Encoder()).rows(ALL)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    not_believed(tmp_path, r"resources\.feature-cache.*(?<!key) belongs to another user")


def not_believed(root: Path, reason: str) -> None:
    encoder = Encoder()
    with pytest.warns(UserWarning, match=reason) as caught:
        assert np.array_equal(table(root, encoder).rows(ALL), truth(ALL))
    assert len(caught) == 1
    assert len(encoder.calls) == 3


def owned_by(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one file look like another user's, however it is asked for."""
    number = path.stat().st_ino

    def other(found: os.stat_result) -> os.stat_result:
        return os.stat_result((*found[:4], 54321, *found[5:10])) if found.st_ino == number else found

    stat, lstat, fstat = Path.stat, Path.lstat, os.fstat
    monkeypatch.setattr(Path, "stat", lambda self, **options: other(stat(self, **options)))
    monkeypatch.setattr(Path, "lstat", lambda self: other(lstat(self)))
    monkeypatch.setattr(os, "fstat", lambda file: other(fstat(file)))


@pytest.mark.parametrize("folder", ["", "key"], ids=["root", "key"])
def test_each_folder_is_asked_for_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str):
    table(tmp_path, Encoder()).rows(ALL)
    owned_by(tmp_path / folder, monkeypatch)
    not_believed(tmp_path, "belongs to another user")


def test_somebody_elses_shard_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table(tmp_path, Encoder()).rows(ALL)
    owned_by(tmp_path / "key" / "shard-00001.npy", monkeypatch)
    encoder = Encoder()
    assert np.array_equal(table(tmp_path, encoder).rows(ALL), truth(ALL))
    assert encoder.calls == [(SHARD, SHARD)]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777], ids=oct)
@pytest.mark.parametrize("folder", ["", "key"], ids=["root", "key"])
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, folder: str, mode: int):
    table(tmp_path, Encoder()).rows(ALL)
    (tmp_path / folder).chmod(mode)
    for _ in range(2):  # it is not made believable by the first one who refuses it
        not_believed(tmp_path, "others can write to")


def test_a_link_is_no_folder_and_no_shard(tmp_path: Path):
    table(tmp_path / "some", Encoder()).rows(ALL)
    (tmp_path / "links").mkdir(mode=0o700)
    (tmp_path / "links" / "key").symlink_to(tmp_path / "some" / "key")
    not_believed(tmp_path / "links", "is a link")
    shard = tmp_path / "some" / "key" / "shard-00000.npy"
    shard.rename(tmp_path / "shard")
    shard.symlink_to(tmp_path / "shard")
    encoder = Encoder()
    table(tmp_path / "some", encoder).rows(ALL)
    assert encoder.calls == [(0, SHARD)]
    (tmp_path / "disk").symlink_to(tmp_path / "some")  # the root itself may lie elsewhere
    again = Encoder()
    table(tmp_path / "disk", again).rows(ALL)
    assert not again.calls

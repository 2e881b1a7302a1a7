"""The cache of image features: the same bits with and without it, for any number of processes, killed or not."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fl_dualpriv.features import cache as feature_cache
from fl_dualpriv.features.cache import SHARD, FeatureTable, cache_key, cache_root

ROOT = Path(__file__).parents[3]
DIM, SIZE = 3, 2 * SHARD + 10  # three shards, the last one short

PREAMBLE = f"""
import os, sys, time
from pathlib import Path
import numpy as np
from fl_dualpriv.features import cache as feature_cache
from fl_dualpriv.features.cache import FeatureTable

root, log = Path(sys.argv[1]), Path(sys.argv[2])

def encode(indices):
    with log.open("a") as file:
        file.write(f"{{os.getpid()}} {{indices[0]}}\\n")
    time.sleep(0.2)
    return np.stack([indices, indices + 0.5, -indices], axis=1).astype(np.float32), True

def table(encode=encode):
    return FeatureTable(size={SIZE}, embed_dim={DIM}, encode=encode, root=root, key="key")
"""
"""A process of its own, with the features of `truth`."""


def truth(indices: np.ndarray) -> np.ndarray:
    return np.stack([indices, indices + 0.5, -indices], axis=1).astype(np.float32)


class Encoder:
    """Counts what it encodes."""

    def __init__(self, *, final: bool = True) -> None:
        self.calls: list[tuple[int, int]] = []
        self.final = final

    def __call__(self, indices: np.ndarray) -> tuple[np.ndarray, bool]:
        self.calls.append((int(indices[0]), len(indices)))
        return truth(indices), self.final


def table(root: Path | None, encoder: Encoder) -> FeatureTable:
    return FeatureTable(size=SIZE, embed_dim=DIM, encode=encoder, root=root, key="key")


def python(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PREAMBLE + code, *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


ALL = np.arange(SIZE)
SOME = np.array([SHARD + 3, 2, SIZE - 1, 2, SHARD - 1])


@pytest.mark.parametrize("in_memory", [2**26, 0], ids=["one array", "mapped shards"])
@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "off"])
def test_rows_are_the_features_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int, on_disk: bool
):
    monkeypatch.setattr(feature_cache, "IN_MEMORY", in_memory)
    features = table(tmp_path if on_disk else None, Encoder())
    for indices in (SOME, ALL, ALL[:0], ALL[::-1]):
        assert np.array_equal(features.rows(indices), truth(indices))
    rows = features.rows(SOME)
    rows[:] = 0  # a caller's own copy
    assert np.array_equal(features.rows(SOME), truth(SOME))


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "off"])
def test_only_shards_that_are_asked_for_are_encoded_and_only_once(tmp_path: Path, on_disk: bool):
    encoder = Encoder()
    features = table(tmp_path if on_disk else None, encoder)
    for indices in (np.array([SIZE - 1]), SOME, SOME, ALL):
        features.rows(indices)
    # Whole shards, whoever asks for what: the last one first, then the two others.
    assert encoder.calls == [(2 * SHARD, 10), (0, SHARD), (SHARD, SHARD)]


def test_the_next_process_encodes_nothing(tmp_path: Path):
    table(tmp_path, Encoder()).rows(ALL)
    again = Encoder()
    assert np.array_equal(table(tmp_path, again).rows(ALL), truth(ALL))
    assert not again.calls


@pytest.mark.parametrize("in_memory", [2**26, 0], ids=["one array", "mapped shards"])
def test_a_checksum_is_verified_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int):
    table(tmp_path, Encoder()).rows(ALL)
    monkeypatch.setattr(feature_cache, "IN_MEMORY", in_memory)
    hashed, sha256 = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda content: hashed.append(len(content)) or sha256(content))
    features = table(tmp_path, Encoder())
    for _ in range(2):
        assert np.array_equal(features.rows(ALL), truth(ALL))
    assert len(hashed) == 3
    assert np.array_equal(np.load(tmp_path / "key" / "shard-00001.npy"), truth(ALL[SHARD : 2 * SHARD]))


def test_an_empty_data_set_has_no_features(tmp_path: Path):
    empty = FeatureTable(size=0, embed_dim=DIM, encode=Encoder(), root=tmp_path, key="key")
    assert empty.rows(np.zeros(0, dtype=np.int64)).shape == (0, DIM)


# --- several processes ------------------------------------------------------------------------------------------------


def test_processes_at_once_share_the_work(tmp_path: Path):
    root, log = tmp_path / "features", tmp_path / "log"
    code = """

deadline = time.monotonic() + 60
ready, total = Path(sys.argv[3]), int(sys.argv[4])
(ready / str(os.getpid())).touch()
while len(list(ready.iterdir())) < total and time.monotonic() < deadline:
    time.sleep(0.005)
rows = table().rows(np.arange({size}))
assert np.array_equal(rows[:, 0], np.arange({size}))
""".replace("{size}", str(SIZE))
    ready = tmp_path / "ready"
    ready.mkdir()
    processes = [python(code, root, log, ready, 3) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(start) for _, start in lines) == [0, SHARD, 2 * SHARD]  # each shard once in total
    assert len({pid for pid, _ in lines}) > 1  # and not all by the first one
    assert np.array_equal(table(root, Encoder()).rows(ALL), truth(ALL))


KILLED_WHILE_ENCODING = """
def dies(indices):
    if indices[0] > 0:
        os._exit(9)
    return encode(indices)
table(dies).rows(np.arange(300))
"""
KILLED_WHILE_WRITING = """
feature_cache.os.fsync = lambda file: os._exit(9)
table().rows(np.arange(300))
"""
KILLED_BEFORE_THE_RENAME = """
Path.replace = lambda self, target: os._exit(9)
table().rows(np.arange(300))
"""


@pytest.mark.parametrize(
    ("code", "finished", "leftovers"),
    [(KILLED_WHILE_ENCODING, 1, 0), (KILLED_WHILE_WRITING, 0, 1), (KILLED_BEFORE_THE_RENAME, 0, 1)],
    ids=["encoding", "writing", "before the rename"],
)
def test_a_killed_writer_leaves_nothing_wrong(tmp_path: Path, code: str, finished: int, leftovers: int):
    root = tmp_path / "features"
    process = python(code, root, tmp_path / "log")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 9, error
    assert len(list((root / "key").glob("*.npy"))) == finished
    assert len(list((root / "key").glob(".*.tmp"))) == leftovers
    encoder = Encoder()
    assert np.array_equal(table(root, encoder).rows(ALL), truth(ALL))
    assert len(encoder.calls) == 3 - finished
    assert not list((root / "key").glob(".*.tmp"))


def test_who_waits_for_a_killed_writer_takes_over(tmp_path: Path):
    root, log = tmp_path / "features", tmp_path / "log"
    dies = """
def dies(indices):
    encode(indices)
    time.sleep(0.5)
    os._exit(9)
table(dies).rows(np.arange(10))
"""
    process = python(dies, root, log)
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    encoder = Encoder()
    rows = table(root, encoder).rows(np.arange(10))  # waits for the lock, which the kernel frees
    assert process.wait(timeout=60) == 9
    assert np.array_equal(rows, truth(np.arange(10)))
    assert encoder.calls == [(0, SHARD)]


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def seal(path: Path) -> None:
    """Append the checksum of whatever there is."""
    path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())


def other_shape(path: Path) -> None:
    np.save(path, np.zeros((SHARD, DIM + 1), np.float32))
    seal(path)


def other_type(path: Path) -> None:
    np.save(path, np.zeros((SHARD, DIM), np.float64))
    seal(path)


def same_size(path: Path) -> None:
    np.save(path, np.zeros((SHARD, DIM), np.int32))
    seal(path)


def pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    seal(path)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-32] + b"more")
    seal(path)


def flip(place: int) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return damage


def without_checksum(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-32])


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        other_shape,
        other_type,
        same_size,
        pickled,
        longer,
        flip(200),
        flip(-40),
        flip(-1),
        without_checksum,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"nonsense" * 100),
    ],
    ids=[
        "truncated",
        "other shape",
        "other type",
        "same size",
        "pickled",
        "longer",
        "first flipped",
        "last flipped",
        "checksum flipped",
        "no checksum",
        "empty",
        "no array",
    ],
)
def test_a_damaged_shard_is_made_anew(tmp_path: Path, damage: Callable[[Path], object]):
    table(tmp_path, Encoder()).rows(ALL)
    damage(tmp_path / "key" / "shard-00000.npy")
    encoder = Encoder()
    assert np.array_equal(table(tmp_path, encoder).rows(ALL), truth(ALL))
    assert encoder.calls == [(0, SHARD)]
    after = Encoder()
    table(tmp_path, after).rows(ALL)
    assert not after.calls


def test_features_that_may_change_are_not_kept_for_others(tmp_path: Path):
    encoder = Encoder(final=False)
    features = table(tmp_path, encoder)
    features.rows(ALL)
    assert np.array_equal(features.rows(SOME), truth(SOME))
    assert len(encoder.calls) == 3
    assert not list((tmp_path / "key").glob("*.npy"))


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path):
    (tmp_path / "file").write_text("")
    encoder = Encoder()
    with pytest.warns(UserWarning, match="image features are not kept in .*Not a directory") as caught:
        rows = table(tmp_path / "file" / "features", encoder).rows(ALL)
    assert np.array_equal(rows, truth(ALL))
    assert len(caught) == 1
    assert len(encoder.calls) == 3


@pytest.mark.parametrize("broken", ["_write", "_acquire"])
def test_a_folder_that_cannot_be_written_costs_a_warning_and_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    table(tmp_path, Encoder()).rows(ALL[:SHARD])

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, broken, refuse)
    encoder = Encoder()
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        assert np.array_equal(table(tmp_path, encoder).rows(ALL), truth(ALL))
    assert len(caught) == 1
    assert encoder.calls == [(SHARD, SHARD), (2 * SHARD, 10)]


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        table(tmp_path, Encoder()).rows(ALL)
    assert {path.suffix for path in (tmp_path / "key").iterdir()} == {".lock"}


# --- names ------------------------------------------------------------------------------------------------------------


def test_keys_are_names_of_folders():
    assert cache_key(["a", 1]) == cache_key(["a", 1]) != cache_key(["a", 2])
    assert len(cache_key([])) == 32
    assert cache_key([]).isalnum()


def test_what_the_setting_means(tmp_path: Path):
    assert cache_root("off") is None
    assert cache_root("") == Path.home() / ".fl-dualpriv" / "features"
    assert cache_root(str(tmp_path)) == tmp_path


def test_shards_beyond_the_open_files_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A map holds a file; a process without files left would read no image, and a private record would become zero."""
    monkeypatch.setattr(feature_cache, "IN_MEMORY", 0)
    monkeypatch.setattr(feature_cache, "_spare_files", lambda wanted: 1)
    table(tmp_path, Encoder()).rows(ALL)
    features = table(tmp_path, encoder := Encoder())
    assert np.array_equal(features.rows(ALL), truth(ALL))
    assert encoder.calls == []
    assert [shard.base is None or shard.flags.owndata for shard in features._shards] == [False, True, True]


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch):
    limits = [1024, 4096]

    def set_limit(kind: int, wanted: tuple[int, int]) -> None:
        limits[:] = wanted

    monkeypatch.setattr(feature_cache.resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(feature_cache.resource, "setrlimit", set_limit)
    assert feature_cache._spare_files(100) == 512  # 1024 suffices
    assert limits == [1024, 4096]
    assert feature_cache._spare_files(1000) == 1000
    assert limits == [1512, 4096]
    assert feature_cache._spare_files(100_000) == 4096 - 512
    assert limits == [4096, 4096]

"""Images to features with a real (tiny) CLIP: the same bits with the cache on and off, keyed by all they need."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fl_dualpriv.data.folder import FolderSplit, load_folder
from fl_dualpriv.features.cache import SHARD
from fl_dualpriv.features.images import BATCH, ImageFeatures, feature_cache_key
from fl_dualpriv.models.base import Backbone
from fl_dualpriv.models.load import load_backbone
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner


@dataclass
class Drawn:
    """Images out of numbers; those in ``broken`` cannot be read."""

    size: int
    broken: tuple[int, ...] = ()
    error: Exception = field(default_factory=lambda: ValueError("no picture"))
    class_names: tuple[str, ...] = ("a", "b")
    reads: list[int] = field(default_factory=list)
    hash_error: int | None = None
    checks: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return self.size

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.size) % 2

    @property
    def content_hash(self) -> str:
        return f"{self.size} {self.broken}"

    def unchanged(self, index: int) -> bool:
        return self.checks.pop(0) if self.checks else True

    def unreadable(self, index: int) -> int | None:
        return self.hash_error if index in self.broken else None

    def image(self, index: int) -> Image.Image:
        self.reads.append(index)
        if index in self.broken:
            raise self.error
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def backbone(tiny_clip_dir: Path) -> Backbone:
    return load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", None, "fp32")


SIZE = SHARD + 40
ALL = np.arange(SIZE)


def test_the_cache_changes_no_bit(backbone: Backbone, tmp_path: Path):
    rng = np.random.default_rng(0)
    clients = np.array_split(rng.permutation(SIZE), 7)
    off = ImageFeatures(backbone, Drawn(SIZE, (3, 270)), None)
    expected = [off.rows(np.sort(client)) for client in clients]
    for _ in range(2):  # cold, then warm, and in another order
        on = ImageFeatures(backbone, Drawn(SIZE, (3, 270)), tmp_path)
        for client, rows in reversed(list(zip(clients, expected, strict=True))):
            assert np.array_equal(on.rows(np.sort(client)), rows, equal_nan=True)
    warm = Drawn(SIZE, (3, 270))
    ImageFeatures(backbone, warm, tmp_path).rows(ALL)
    assert not warm.reads


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "off"])
def test_an_unreadable_image_is_a_row_of_nan(backbone: Backbone, tmp_path: Path, on_disk: bool):
    for _ in range(2):
        rows = ImageFeatures(backbone, Drawn(50, (3, 40)), tmp_path if on_disk else None).rows(np.arange(50))
        bad = np.isnan(rows)
        assert np.flatnonzero(bad.all(axis=1)).tolist() == np.flatnonzero(bad.any(axis=1)).tolist() == [3, 40]
        assert np.allclose(np.linalg.norm(np.delete(rows, [3, 40], axis=0), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "hash_error", "kept"),
    [
        (ValueError("damaged"), None, True),
        (OSError("image file is truncated"), None, True),
        (FileNotFoundError(2, "gone"), 2, True),
        (FileNotFoundError(2, "gone"), None, False),  # the hash read it
        (FileNotFoundError(2, "gone"), 13, False),
        (PermissionError(13, "closed"), None, False),
        (ValueError("damaged"), 2, False),  # it is there now
        (OSError(5, "Input/output error"), None, False),
        (OSError(24, "Too many open files"), None, False),
        (MemoryError(), None, False),
    ],
    ids=str,
)
def test_an_error_that_may_pass_is_not_kept(
    backbone: Backbone, tmp_path: Path, error: Exception, hash_error: int | None, kept: bool
):
    wrapped = ValueError("image cannot be read")
    wrapped.__cause__ = error  # as the folder's decoder raises it
    images = Drawn(20, (3,), wrapped, hash_error=hash_error)
    rows = ImageFeatures(backbone, images, tmp_path).rows(np.arange(20))
    assert np.isnan(rows[3]).all()
    assert len(list(tmp_path.glob("*/*.npy"))) == kept


@pytest.mark.parametrize("checks", [(True, True), (False, True), (True, False)], ids=str)
def test_an_image_that_is_not_the_hashed_one_is_not_kept(backbone: Backbone, tmp_path: Path, checks: tuple[bool, bool]):
    images = Drawn(3, checks=[True, True, *checks])  # before and after each of two images
    assert np.isfinite(ImageFeatures(backbone, images, tmp_path).rows(np.arange(3))).all()
    assert len(list(tmp_path.glob("*/*.npy"))) == all(checks)


@pytest.mark.parametrize("size", [BATCH + 9, 3])
def test_an_unreadable_image_changes_no_bit_of_another(backbone: Backbone, size: int):
    sound = ImageFeatures(backbone, Drawn(size), None).rows(np.arange(size))
    for broken in ((0,), (size - 1,), (0, 1), tuple(range(size - 1))):
        rows = ImageFeatures(backbone, Drawn(size, broken), None).rows(np.arange(size))
        usable = np.delete(np.arange(size), broken)
        assert np.array_equal(rows[usable], sound[usable])
        assert np.isnan(rows[list(broken)]).all()


def test_all_batches_of_a_shard_have_one_size(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    sizes, encode = [], backbone.image_features
    monkeypatch.setattr(backbone, "image_features", lambda images: sizes.append(len(images)) or encode(images))
    ImageFeatures(backbone, Drawn(SHARD + 3, (1, 40)), None).rows(np.arange(SHARD + 3))
    ImageFeatures(backbone, Drawn(2, (0, 1)), None).rows(np.arange(2))  # none to encode
    assert sizes == (SHARD // BATCH + 1) * [BATCH]


def test_a_feature_that_is_not_finite_is_nan_as_a_whole(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    def overflowing(images: torch.Tensor) -> torch.Tensor:
        features = torch.ones(len(images), backbone.embed_dim)
        features[1, 5] = float("inf")
        return features

    monkeypatch.setattr(backbone, "image_features", overflowing)
    rows = ImageFeatures(backbone, Drawn(4), None).rows(np.arange(4))
    assert np.isnan(rows).all(axis=1).tolist() == [False, True, False, False]
    assert np.isfinite(rows[0]).all()


def test_mirrored_rows_are_features_of_mirrored_images(backbone: Backbone, tmp_path: Path):
    images, indices = Drawn(6), np.array([0, 2, 4, 5])
    features = ImageFeatures(backbone, images, tmp_path)
    mirrored = features.mirrored_rows(indices, np.array([True, False, False, True]))
    plain = features.rows(indices)
    flipped = backbone.preprocess(images.image(5).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    np.testing.assert_allclose(mirrored[3], backbone.image_features(flipped[None])[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(mirrored[1:3], plain[1:3], atol=1e-6)
    assert np.abs(mirrored[0] - plain[0]).max() > 1e-3


class Prompted:
    """A backbone whose image tower reads trainable prompts."""

    visual_prompts = True
    mirrors = True

    def __init__(self, backbone: Backbone) -> None:
        self.embed_dim, self.device = backbone.embed_dim, backbone.device
        self.preprocess, self.image_features = backbone.preprocess, backbone.image_features


def test_nothing_is_kept_where_the_image_tower_learns(backbone: Backbone, tmp_path: Path):
    images: Any = Drawn(5)
    model: Any = Prompted(backbone)
    features = ImageFeatures(model, images, tmp_path)
    for _ in range(2):
        np.testing.assert_allclose(
            features.rows(np.array([1, 3])), ImageFeatures(backbone, Drawn(5), None).rows(np.array([1, 3])), atol=1e-6
        )
    assert images.reads == [1, 3, 1, 3]
    assert not list(tmp_path.iterdir())


# --- keys -------------------------------------------------------------------------------------------------------------


def write_images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def load(folder: Path) -> FolderSplit:
    return load_folder(folder, "", 0.1, 0.2, 0, "keep")[0]["train"]


def content_hash(folder: Path) -> str:
    return load(folder).content_hash


def change_a_pixel(folder: Path) -> None:
    image = Image.open(folder / "cat" / "2.png").convert("RGB")
    image.putpixel((3, 3), (1, 2, 3))
    image.save(folder / "cat" / "2.png")


def test_the_hash_of_a_folder_is_that_of_its_images(tmp_path: Path):
    folder = write_images(tmp_path / "some")
    first = content_hash(folder)
    assert content_hash(folder.rename(tmp_path / "renamed")) == first
    changes: list[Callable[[Path], object]] = [
        change_a_pixel,
        lambda copy: (copy / "cat" / "0.png").rename(copy / "cat" / "9.png"),  # another order
        lambda copy: (copy / "cat" / "2.png").unlink(),
        lambda copy: [path.write_bytes(b"") for path in copy.glob("dog/*.png")],
    ]
    hashes = {first}
    for number, change in enumerate(changes):
        copy = Path(shutil.copytree(tmp_path / "renamed", tmp_path / str(number)))
        change(copy)
        hashes.add(content_hash(copy))
    assert len(hashes) == 1 + len(changes)


def overwrite(path: Path) -> None:
    """In place, with as many bytes and the old time of change."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 0xFF
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: Image.new("RGB", (8, 8), (255, 0, 0)).save(path),
        overwrite,
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
    ],
    ids=["another image", "same size and time", "gone", "emptied"],
)
def test_a_file_that_changes_after_the_hash_poisons_nothing(
    backbone: Backbone, tmp_path: Path, change: Callable[[Path], object]
):
    folder, cache = write_images(tmp_path / "some"), tmp_path / "cache"
    intact = shutil.copytree(folder, tmp_path / "intact")
    split = load(folder)
    assert feature_cache_key(backbone, split) == feature_cache_key(backbone, load(intact))
    change(split.paths[1])
    ImageFeatures(backbone, split, cache).rows(np.arange(len(split)))
    assert not list(cache.glob("*/*.npy"))
    expected = ImageFeatures(backbone, load(intact), None).rows(np.arange(len(split)))
    for _ in range(2):
        assert np.array_equal(ImageFeatures(backbone, load(intact), cache).rows(np.arange(len(split))), expected)
    assert len(list(cache.glob("*/*.npy"))) == 1


def test_an_error_that_may_pass_gives_a_key_that_nothing_shares(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, cache = write_images(tmp_path / "some"), tmp_path / "cache"
    sound, opened = load(folder), Path.open

    def busy(path: Path, *arguments: Any) -> Any:
        if path == sound.paths[0]:
            raise OSError(24, "Too many open files")
        return opened(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", busy)
        splits = [load(folder), load(folder)]
        assert len({split.content_hash for split in (sound, *splits)}) == 3
    rows = ImageFeatures(backbone, splits[0], cache).rows(np.arange(len(sound)))
    assert np.isfinite(rows).all()
    assert not list(cache.glob("*/*.npy"))  # nobody could ever find it


def test_a_file_that_is_written_while_it_is_hashed_has_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    split, digest = load(write_images(tmp_path / "some")), hashlib.file_digest

    def meanwhile(file: Any, name: str) -> Any:
        with split.paths[0].open("ab") as other:
            other.write(b".")
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", meanwhile)
    assert split.content_hash != load(tmp_path / "some").content_hash
    assert not split.unchanged(1)


def test_lasting_errors_have_a_hash_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, hashes = write_images(tmp_path / "some"), []
    for number in (2, 13, 40):  # ENOENT, EACCES, ELOOP

        def refuse(path: Path, *arguments: Any, number: int = number) -> Any:
            raise OSError(number, "no")

        monkeypatch.setattr(Path, "open", refuse)
        split = load(folder)
        hashes += [split.content_hash, load(folder).content_hash]
        assert split.unreadable(0) == number
        assert split.unchanged(0)
    assert hashes[::2] == hashes[1::2]
    assert len(set(hashes)) == 3


def test_an_unreadable_file_has_a_hash(tmp_path: Path):
    folder = write_images(tmp_path / "some")
    first = content_hash(folder)
    for path in folder.glob("cat/*.png"):
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    broken = content_hash(folder)
    assert broken not in (first, "")
    assert content_hash(folder) == broken


def test_the_key_changes_with_all_that_changes_a_feature(
    make_clip_dir: Callable[..., Path], tiny_clip_dir: Path, backbone: Backbone
):
    other_weights = make_clip_dir()
    weights = other_weights / "open_clip_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["visual.proj"][0, 0] += 1e-3
    save_file(tensors, weights)
    name = f"local-dir:{tiny_clip_dir}"
    backbones = [
        backbone,
        load_backbone(name, "", "cpu", VisualTokenPruner(keep_ratio=0.5, layer=2), "fp32"),
        load_backbone(name, "", "cpu", VisualTokenPruner(keep_ratio=0.5, layer=1), "fp32"),
        load_backbone(name, "", "cpu", None, "bf16"),
        load_backbone(f"local-dir:{other_weights}", "", "cpu", None, "fp32"),
    ]
    keys = [feature_cache_key(model, Drawn(5)) for model in backbones]
    keys.append(feature_cache_key(backbone, Drawn(6)))
    assert len(set(keys)) == len(keys)
    assert feature_cache_key(backbone, Drawn(5)) == keys[0]


def test_the_key_changes_with_the_libraries(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    first = feature_cache_key(backbone, Drawn(5))
    for library in ("torch", "pillow", "fl-dualpriv"):
        with monkeypatch.context() as patched:
            patched.setattr(metadata, "version", lambda name, other=library: "99.0" if name == other else version(name))
            assert feature_cache_key(backbone, Drawn(5)) != first, library
    assert feature_cache_key(backbone, Drawn(5)) == first

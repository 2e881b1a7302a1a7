"""The CIFAR-10 task: no image is public and private, no private look is public, and the folder loader reads it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fl_dualpriv.data.folder import load_folder
from tools import cifar10_images, make_cifar10
from tools.cifar10_images import DOMAINS, N_PUBLIC, NAMES, PRIVATE, PUBLIC, Labelled


def _numbered(count: int) -> Labelled:
    """Images whose first pixel says their number; labels go round."""
    images = np.zeros((count, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0] = np.stack([np.arange(count) // 256**power % 256 for power in range(3)], axis=1)
    return Labelled(images, np.arange(count, dtype=np.int64) % 10)


def _number(images: np.ndarray) -> np.ndarray:
    return images[:, 0, 0].astype(np.int64) @ [1, 256, 65536]


def test_the_package_is_read_row_by_row(tmp_path: Path):
    train, test = _numbered(10), _numbered(2)
    for number in range(5):
        rows = train.images[2 * number : 2 * number + 2].reshape(2, -1, 3)
        Image.fromarray(rows).save(tmp_path / f"data_batch_{number + 1}.png")
    Image.fromarray(test.images.reshape(2, -1, 3)).save(tmp_path / "test_batch.png")
    (tmp_path / "train_lables.json").write_text(json.dumps(train.labels.tolist()))
    (tmp_path / "test_lables.json").write_text(json.dumps(test.labels.tolist()))
    limit = Image.MAX_IMAGE_PIXELS
    for found, made in zip(cifar10_images.read(tmp_path), (train, test), strict=True):
        assert np.array_equal(found.images, made.images)
        assert np.array_equal(found.labels, made.labels)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_private_images_are_none_that_a_model_may_see():
    per_class = {"train": 3, "val": 2, "test": 4}
    splits = cifar10_images.private_splits(_numbered(N_PUBLIC + 60), _numbered(50), per_class)
    numbers = {name: _number(split.images) for name, split in splits.items()}
    assert numbers["train"].min() >= N_PUBLIC
    assert numbers["val"].min() >= N_PUBLIC
    assert not set(numbers["train"]) & set(numbers["val"])
    for name, split in splits.items():
        assert np.array_equal(np.bincount(split.labels), [per_class[name]] * 10)
    with pytest.raises(AssertionError, match="too few"):
        cifar10_images.private_splits(_numbered(N_PUBLIC + 60), _numbered(50), {**per_class, "test": 6})


def test_no_public_image_has_a_private_look():
    assert not {frozenset(pair) for pair in PRIVATE} & {frozenset(own) for own in PUBLIC}
    # Nothing, 7 domains, and 21 pairs without the 3 private ones.
    assert len(PUBLIC) == len(set(PUBLIC)) == 1 + 7 + 21 - 3
    assert {name for pair in PRIVATE for name in pair} <= set(DOMAINS)


def test_every_domain_changes_an_image_and_is_repeatable():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    looks = {name: cifar10_images.show(image, (name,), np.random.default_rng(1)) for name in DOMAINS}
    for name, look in looks.items():
        assert look.dtype == np.uint8
        assert look.shape == image.shape
        assert not np.array_equal(look, image)
        assert np.array_equal(look, cifar10_images.show(image, (name,), np.random.default_rng(1)))
    assert np.array_equal(looks["inverted"], 255 - image)
    assert (looks["gray"].min(axis=2) == looks["gray"].max(axis=2)).all()
    assert looks["dark"].max() <= 0.35 * 255 + 1
    assert np.array_equal(cifar10_images.show(image, (), np.random.default_rng(1)), image)
    # The order of the domains in a pair does not count.
    pairs = [cifar10_images.show(image, pair, np.random.default_rng(2)) for pair in (PRIVATE[0], PRIVATE[0][::-1])]
    assert np.array_equal(*pairs)


def test_the_folder_loader_reads_what_is_written(tmp_path: Path):
    splits = {name: _numbered(20) for name in ("train", "val", "test")}
    make_cifar10.write(splits, tmp_path / "images")
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    found, template = load_folder(tmp_path / "images", "", 0.1, 0.1, 0, "raise")
    assert template == "a photo of a {}"
    for split in found.values():
        assert split.class_names == NAMES
        assert np.array_equal(np.bincount(split.labels), [2] * 10)
    make_cifar10.write(splits, tmp_path / "images")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == first


@pytest.mark.slow
def test_a_model_is_trained_written_and_read_back(tmp_path: Path):
    import torch

    from fl_dualpriv.models.open_clip import load_backbone
    from tools import make_cifar10_clip as make

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (256, 32, 32, 3), dtype=np.uint8), np.arange(256) % 10
    tokenizer, vocabulary = make.make_tokenizer()
    model = make.train_vision(images, labels, tokenizer.vocab_size, seed=0, epochs=1, lr=1e-3)
    bank = make.make_bank(model, images, labels, rng, each=64)
    assert bank[0].shape == (len(PUBLIC), 64, 768 * make.WIDTH // 24)
    make.train_text(model, tokenizer, bank, seed=0, steps=2, lr=1e-3)
    make.write(model, vocabulary, tmp_path)
    backbone = load_backbone(f"local-dir:{tmp_path}", "", "cpu")
    with torch.no_grad():
        x = make.to_tensor(images[:8])
        ours = torch.nn.functional.normalize(model.visual(x), dim=-1)
        assert torch.allclose(backbone.image_features(x), ours, atol=0.02)  # weights in half precision
        # The bank's features are those before the projection of the same tower.
        plain = model.visual.attnpool.c_proj(bank[0][0, :1])
        assert plain.shape == (1, make.EMBED_DIM)
    make.report(tmp_path, images[:4], labels[:4])

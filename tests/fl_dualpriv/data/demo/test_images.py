"""The embedded demo: enough images, in disjoint splits, always the same, small, and with its papers."""

import dataclasses
import json

import numpy as np
import pytest

from fl_dualpriv.assets import demo_folder
from fl_dualpriv.data.demo.images import demo_categories, demo_template, load_demo

MEGABYTE = 1_000_000


def test_split_sizes_and_classes() -> None:
    splits = load_demo()
    assert set(splits) == {"train", "val", "test"}
    assert len(splits["train"]) >= 4000
    for split in splits.values():
        assert split.labels.dtype == np.int64
        assert len(split) == len(split.labels) == len(split.sketches)
        assert set(split.labels) == set(range(len(split.class_names)))
    assert len(set(splits["train"].class_names)) >= 10


def test_splits_share_no_sketch() -> None:
    splits = load_demo()
    seen = {name: {sketch.tobytes() for sketch in split.sketches} for name, split in splits.items()}
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


def test_images_are_rendered_the_same_each_time() -> None:
    split = load_demo()["val"]
    image = split.image(7)
    assert image.mode == "RGB"
    assert image.size == (32, 32)
    assert image.tobytes() == split.image(7).tobytes()
    assert image.tobytes() != split.image(8).tobytes()


def test_every_domain_holds_every_tenth_image_and_is_drawn_apart_from_the_class() -> None:
    split = load_demo()["train"]
    shares = np.bincount(split.domains) / len(split)
    assert shares.min() > 0.1
    per_block = np.array([np.bincount(split.domains[split.labels // 10 == block], minlength=6) for block in range(10)])
    assert (per_block / per_block.sum(axis=1, keepdims=True)).min() > 0.08


def test_indexing_past_the_end_fails() -> None:
    split = load_demo()["test"]
    with pytest.raises(IndexError):
        split.image(len(split))


def test_categories_are_blocks_of_class_ids() -> None:
    names = [name for category in demo_categories().values() for name in category]
    assert tuple(names) == load_demo()["train"].class_names
    assert {len(category) for category in demo_categories().values()} == {10}
    assert demo_template().count("{}") == 1


def test_assets_are_small_and_say_where_they_come_from() -> None:
    files = {path.name: path for path in demo_folder().iterdir()}
    assert sum(len(path.read_bytes()) for path in files.values()) <= 10 * MEGABYTE
    assert not [name for name in files if name.endswith((".png", ".jpg"))]
    provenance = files["PROVENANCE.md"].read_text(encoding="utf-8")
    for needed in ("CC BY 4.0", "Quick, Draw!", "Google", "make_demo_assets"):
        assert needed in provenance
    assert "model_cfg" in json.loads(files["open_clip_config.json"].read_text(encoding="utf-8"))


def test_the_content_hash_follows_the_images() -> None:
    splits = load_demo()
    assert len({split.content_hash for split in splits.values()}) == 3
    val = splits["val"]
    assert dataclasses.replace(val).content_hash == val.content_hash
    sketches = val.sketches.copy()
    sketches[3, 10, 10] ^= 1
    assert dataclasses.replace(val, sketches=sketches).content_hash != val.content_hash
    assert dataclasses.replace(val, seeds=val.seeds + 1).content_hash != val.content_hash

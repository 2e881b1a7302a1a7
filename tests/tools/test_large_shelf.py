"""The larger shelf task: settings nest, held-out pictures are the embedded ones, and a sketch's copies are said."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fl_dualpriv.data.demo.shelf import DOMAINS, load_shelf
from tools.make_large_shelf import make, other_sketches, parse_setting, training_sketches


def rows(folder: Path, split: str = "train") -> list[dict[str, str]]:
    with (folder / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("large")
    make(out, [(4, 3), (4, 30)])
    return out


def test_a_smaller_setting_is_the_start_of_a_larger_one(made: Path) -> None:
    small, large = rows(made / "4x3"), rows(made / "4x30")
    assert (len(small), len(large)) == (12, 120)
    assert large[:12] == small
    assert [row["domain"] for row in large].count(DOMAINS[0]) == 30
    assert len({row["image"] for row in large}) == 120


def test_held_out_pictures_are_those_of_the_embedded_task(made: Path) -> None:
    split = load_shelf()["test"]
    listed = rows(made / "4x3", "test")
    assert [row["label"] for row in listed] == [split.class_names[label] for label in split.labels]
    with Image.open(made / "4x3" / listed[5]["image"]) as image:
        assert np.array_equal(np.asarray(image), np.asarray(split.image(5).convert("L")))


def test_training_pictures_differ_and_have_private_training_sketches_only(made: Path) -> None:
    pixels = [np.asarray(Image.open(made / "4x30" / row["image"])) for row in rows(made / "4x30")]
    assert len({image.tobytes() for image in pixels}) == len(pixels)
    splits = load_shelf()
    own = training_sketches(splits["train"])
    assert {len(sketches) for sketches in own.values()} == {40}
    held_out = {
        s.tobytes()
        for name in ("val", "test")
        for sketches in training_sketches(splits[name]).values()
        for s in sketches
    }
    assert not held_out & {sketch.tobytes() for sketches in own.values() for sketch in sketches}
    assert not held_out & {sketch.tobytes() for sketch in other_sketches(splits["train"])}


def test_the_folder_says_that_sketches_repeat(made: Path) -> None:
    about = json.loads((made / "about.json").read_text())
    assert about["sketches of each class"] == 40
    assert "no ε here is about a sketch" in about["warning"]


@pytest.mark.parametrize("text", ["60", "60x", "x30", "0x3", "a3x4", "60X30"])
def test_a_setting_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(Exception, match="is not CLIENTSxIMAGES"):
        parse_setting(text)

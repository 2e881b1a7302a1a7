"""What users are told about their data and names, word by word: the file or class, the limit, and what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli

ROOT = Path(__file__).parents[2]
Setting = list[str]


def photo(file: Path, value: int = 7, size: tuple[int, int] = (6, 6)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(file)
    return file


def folder(root: Path, *classes: str, split: str = "") -> Path:
    for name in classes:
        for i in range(8):
            photo(root / split / name / f"{i}.png", i)
    return root


def too_large(root: Path) -> tuple[Setting, str]:
    folder(root / "images", "cat", "dog")
    file = photo(root / "images" / "cat" / "wide.png", size=(5_000, 4))
    said = (
        "1 of 17 images cannot be used; repair or remove them\n"
        f"  image {file} has 5000 x 4 pixels: it is out of proportion (one side more than 100 times the other)"
    )
    return ["privacy.record.mechanism=none"], said


def too_long(root: Path) -> tuple[Setting, str]:
    folder(root / "images", "cat", "dog")
    names = {"cat": " ".join(["tabby"] * 80), "dog": "dog"}
    (root / "classes.json").write_text(json.dumps({"class-names": names}))
    said = (
        f"class names are too long: '{names['cat']}' (cat/) takes 80 tokens, and with prompt.n-ctx = 4 there is room "
        "for 71; give shorter names in data.classes"
    )
    return [f"data.classes={root / 'classes.json'}", "backbone.name=ViT-B-32"], said


def wrong_split(root: Path) -> tuple[Setting, str]:
    folder(root / "images", "cat", "dog", split="train")
    folder(root / "images", "cat", "dog", split="validation")
    return [], "validation/ is not a name of a split: rename it to val/"


def wordnet(root: Path) -> tuple[Setting, str]:
    folder(root / "images", "n01440764", "n01443537")
    said = (
        "class folders n01440764, n01443537 have names that are WordNet ids, which are no words: name each class in "
        'data.classes, for example {"class-names": {"n01440764": "goldfish"}}'
    )
    return [], said


def no_label(root: Path) -> tuple[Setting, str]:
    photo(root / "images" / "a.png")
    file = root / "list.csv"
    file.write_text("image,kind\nimages/a.png,cat\n")
    said = (
        f"{file} has the columns image, kind:\n"
        "  no column is called label or labels or class or class_name or category: name the one of the label in "
        "data.label-column"
    )
    return [f"data.path={file}"], said


def clients(root: Path) -> tuple[Setting, str]:
    rows = [f"{photo(root / 'images' / f'{i}.png', i)},{('cat', 'dog')[i % 2]},ward-{i % 3}" for i in range(24)]
    file = root / "list.csv"
    file.write_text("\n".join(["image,label,client", *rows]))
    said = "population = 2 with evaluation.new-clients = 0: the records name 3 clients; set population = 3"
    return [f"data.path={file}", "data.partition=by-client"], said


def no_clients(root: Path) -> tuple[Setting, str]:
    folder(root / "images", "cat", "dog")
    said = (
        'data.partition = "by-client": folders name no clients; give a .csv or .jsonl list with a column client, or a '
        "data set with one"
    )
    return ["data.partition=by-client"], said


def frames(root: Path) -> tuple[Setting, str]:
    folder(root / "images", "cat", "dog")
    file = root / "images" / "cat" / "x.tif"
    Image.fromarray(np.full((4, 4), np.inf, np.float32)).save(file)
    said = f"image {file} cannot be read: it has samples that are not finite numbers"
    return ["privacy.record.mechanism=none"], said


def partitioner(root: Path) -> tuple[Setting, str]:
    folder(root / "images", "cat", "dog")
    said = (
        "data.partitioner = 'Pathological(2)': must be a class of flwr_datasets.partitioner with literal keyword "
        "arguments, for example PathologicalPartitioner(num_classes_per_partition=2)"
    )
    return ["data.partition=flwr-datasets", "data.partitioner=Pathological(2)"], said


def missing(root: Path) -> tuple[Setting, str]:
    return [], f"data.path = '{root / 'images'}': {root / 'images'} does not exist; give an absolute path"


def few(root: Path) -> tuple[Setting, str]:
    rows = [f"{photo(root / 'images' / f'{i}.png', i)},{'cat' if i < 2 else 'dog'}" for i in range(12)]
    file = root / "list.csv"
    file.write_text("\n".join(["image,label", *rows]))
    said = (
        "label 'cat' has 2 records, too few to cut val and test from them and train on the rest; add records, lower "
        "the fractions or give these splits"
    )
    return [f"data.path={file}"], said


MESSAGES = [
    *(too_large, too_long, wrong_split, wordnet, no_label, clients, no_clients, frames, partitioner, missing, few)
]


@pytest.mark.parametrize("make", MESSAGES, ids=lambda make: make.__name__)
def test_a_message_says_what_and_what_to_do(make: Callable[[Path], tuple[Setting, str]], tmp_path: Path):
    settings, said = make(tmp_path)
    given = {"data.path": str(tmp_path / "images"), "population": "2", "prompt.init": "random", "backbone.name": "demo"}
    given |= dict(setting.split("=", 1) for setting in settings)
    config = str(ROOT / "simulations" / "configs" / "your-data.toml")
    words = [f"--set={key}={value}" for key, value in given.items()]
    result = CliRunner().invoke(cli.app, ["data", "check", config, *words])
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output

"""Lists and Hugging Face data sets of labelled images: roles of columns, splits, clients, and faults in one message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from fl_dualpriv.data.folder import FolderSplit
from fl_dualpriv.data.formats.pixels import BadImageError
from fl_dualpriv.data.images import DataSplits
from fl_dualpriv.data.layout import Columns, Reading
from fl_dualpriv.data.load import given_image_splits, holds_questions, load_data
from fl_dualpriv.data.usable import image_fault
from fl_dualpriv.errors import ConfigError

CLASSES, DOMAINS = ("bird", "cat", "dog"), ("night", "day")
Write = Callable[[Path, list[dict[str, Any]]], str]


def records(root: Path, count: int = 36) -> list[dict[str, Any]]:
    (root / "photos").mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(count):
        file = root / "photos" / f"{i:02d}.png"
        Image.new("RGB", (6, 4), (i, 0, 0)).save(file)
        found.append(
            {
                "path": f"photos/{file.name}",
                "label": CLASSES[i % 3],
                "domain": DOMAINS[i % 2],
                "client": f"ward-{i % 4}",
            }
        )
    return found


def as_csv(root: Path, rows: list[dict[str, Any]], name: str = "list.csv") -> str:
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    (root / name).write_text("\n".join(lines) + "\n")
    return str(root / name)


def as_lines(root: Path, rows: list[dict[str, Any]]) -> str:
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root / "list.jsonl")


def table_of(root: Path, rows: list[dict[str, Any]]) -> datasets.Dataset:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns["image"] = [str(root / path) for path in columns.pop("path")]
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def as_saved(root: Path, rows: list[dict[str, Any]]) -> str:
    table_of(root, rows).save_to_disk(str(root / "saved"))
    return f"datasets:{root / 'saved'}"


def as_parquet(root: Path, rows: list[dict[str, Any]]) -> str:
    table_of(root, rows).to_parquet(str(root / "train.parquet"))
    return str(root / "train.parquet")


FORMS = pytest.mark.parametrize("write", [as_csv, as_lines, as_saved, as_parquet])


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    load_data.cache_clear()


def load(path: str, classes: str = "", **reading: Any) -> DataSplits:
    load_data.cache_clear()
    return load_data("folder", path, classes, 0.1, 0.2, 0, Reading(**reading))


def fault(path: str, classes: str = "", **reading: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, classes, **reading)
    return str(caught.value)


def content(data: DataSplits) -> dict[str, list[tuple[int, int]]]:
    """Red value, which is the record's number, and class of each image, by split."""
    return {
        name: [(split.image(i).getpixel((0, 0))[0], int(split.labels[i])) for i in range(len(split))]  # type: ignore[index]
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
    }


@FORMS
def test_every_record_has_its_image_and_class(write: Write, tmp_path: Path):
    data = load(write(tmp_path, records(tmp_path)))
    found = content(data)
    assert data.class_names == CLASSES
    assert {name: len(split) for name, split in found.items()} == {"train": 27, "val": 3, "test": 6}
    everything = [pair for split in found.values() for pair in split]
    assert sorted(everything) == [(i, i % 3) for i in range(36)], "every record once, with its own label"
    assert sorted(label for _, label in found["val"]) == [0, 1, 2], "the cut is made class by class"


def test_all_forms_are_cut_alike(tmp_path: Path):
    rows = records(tmp_path)
    first, *others = (content(load(write(tmp_path, rows))) for write in (as_csv, as_lines, as_saved, as_parquet))
    assert all(other == first for other in others)


@FORMS
@pytest.mark.parametrize("group", ["domain", "client"])
def test_groups(write: Write, group: str, tmp_path: Path):
    data = load(write(tmp_path, records(tmp_path)), group=group)
    train = data.train
    ids, names = (train.domains, train.domain_names) if group == "domain" else (train.clients, train.client_names)
    others = train.clients if group == "domain" else train.domains
    assert names == (("day", "night") if group == "domain" else tuple(f"ward-{i}" for i in range(4)))
    assert others is None
    assert ids is not None
    for i in range(len(train)):
        number = train.image(i).getpixel((0, 0))[0]  # type: ignore[index]
        assert names[ids[i]] == (DOMAINS[number % 2] if group == "domain" else f"ward-{number % 4}")


def test_given_splits_are_not_cut(tmp_path: Path):
    rows = records(tmp_path)
    as_csv(tmp_path, rows[:24], "train.csv")
    as_csv(tmp_path, rows[24:], "test.csv")
    data = load(str(tmp_path))
    assert given_image_splits(str(tmp_path)) == {"train", "test"}
    assert [number for number, _ in content(data)["test"]] == list(range(24, 36))
    assert len(data.train) + len(data.val) == 24


def test_splits_of_a_data_set_and_names_of_its_feature(tmp_path: Path):
    table = table_of(tmp_path, records(tmp_path))
    names = datasets.ClassLabel(names=["dog", "bird", "cat", "yeti"])  # an order of its own, and a class without images
    table = table.cast_column("label", names)
    splits = {"train": table.select(range(24)), "validation": table.select(range(24, 36))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    data = load(f"datasets:{tmp_path / 'saved'}")
    assert data.class_names == ("dog", "bird", "cat", "yeti")
    assert content(data)["val"] == [(i, (1, 2, 0)[i % 3]) for i in range(24, 36)]
    assert given_image_splits(f"datasets:{tmp_path / 'saved'}") == {"train", "val"}


def test_a_folder_that_datasets_reads(tmp_path: Path):
    for i, row in enumerate(records(tmp_path)):
        place = tmp_path / "images" / "train" / row["label"]
        place.mkdir(parents=True, exist_ok=True)
        (tmp_path / row["path"]).rename(place / f"{i:02d}.png")
    data = load(f"datasets:{tmp_path / 'images'}")
    assert data.class_names == CLASSES
    assert sorted(pair for split in content(data).values() for pair in split) == [(i, i % 3) for i in range(36)]


@FORMS
def test_columns_of_other_names_are_named(write: Write, tmp_path: Path):
    rows = [{"photo": r["path"], "species": r["label"], "ward": r["client"]} for r in records(tmp_path)]
    if write in (as_saved, as_parquet):
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        columns["photo"] = [str(tmp_path / path) for path in columns["photo"]]
        datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "saved"))
        path = f"datasets:{tmp_path / 'saved'}"
    else:
        path = write(tmp_path, rows)
    message = fault(path, group="client")
    assert "has the columns photo, species, ward:" in message
    assert (
        "no column is called label or labels or class or class_name or category: name the one of the label" in message
    )
    assert "data.client-column" in message
    assert "data.image-column" in message
    assert "data.label-column = 'kind': there is no such column" in fault(path, columns=Columns(label="kind"))
    data = load(path, columns=Columns(image="photo", label="species", client="ward"), group="client")
    assert data.class_names == CLASSES
    assert data.train.client_names == tuple(f"ward-{i}" for i in range(4))


@FORMS
def test_a_record_without_label_stays_counted_under_dp_and_is_refused_without(write: Write, tmp_path: Path):
    rows = records(tmp_path)
    whole = content(load(path := write(tmp_path, rows)))
    rows[7] = rows[7] | {"label": ""}
    for old in (tmp_path / "saved", tmp_path / "cache"):
        if old.exists():
            old.rename(tmp_path / f"old-{old.name}")
    from fl_dualpriv.data import hub

    hub.load_tables.cache_clear()
    data = load(path := write(tmp_path, rows))
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 36
    assert data.class_names == CLASSES
    bad = [i for i in range(len(data.train)) if image_fault(data.train, i)[0]]
    assert len(bad) == 1, "only that record cannot be used"
    with pytest.raises(BadImageError):
        data.train.image(bad[0])
    assert len(whole["train"]) == 27
    message = fault(path, on_bad="raise")
    assert "1 records have no label: " in message
    assert "add them" in message


def test_an_image_that_lacks_is_named_in_one_message(tmp_path: Path):
    rows = records(tmp_path)
    (tmp_path / rows[3]["path"]).unlink()
    (tmp_path / rows[5]["path"]).write_bytes(b"no image")
    message = fault(as_csv(tmp_path, rows), on_bad="raise")
    assert "2 of 36 images cannot be used; repair or remove them" in message
    assert "03.png is missing" in message
    assert "05.png cannot be read" in message


@FORMS
def test_names_and_template_of_a_file(write: Write, tmp_path: Path):
    path, file = write(tmp_path, records(tmp_path)), tmp_path / "classes.json"
    file.write_text(
        json.dumps({"template": "a sketch of a {}", "class-names": dict.fromkeys(CLASSES, "x") | {"dog": "y"}})
    )
    assert "share the name 'x'" in fault(path, str(file))
    names = {"bird": "small bird", "cat": "tabby cat", "dog": "puppy", "yeti": "snow man"}
    file.write_text(json.dumps({"template": "a sketch of a {}", "class-names": names}))
    data = load(path, str(file))
    assert (data.class_names, data.template) == (tuple(names.values()), "a sketch of a {}")
    assert sorted({label for split in content(data).values() for _, label in split}) == [0, 1, 2], "no yeti was seen"
    file.write_text(json.dumps({"class-names": {"bird": "small bird"}}))
    assert "class-names do not match the class folders: missing cat, dog" in fault(path, str(file))


@FORMS
def test_a_node_declares_its_classes(write: Write, tmp_path: Path):
    path, file = write(tmp_path, records(tmp_path)), tmp_path / "classes.json"
    assert "the classes are not declared, and on a node they must not depend on its records" in fault(
        path, needs_declared=True
    )
    file.write_text(json.dumps({"class-names": {name: name for name in (*CLASSES, "yeti")}}))
    assert load(path, str(file), needs_declared=True).class_names == (*CLASSES, "yeti")
    rows = [row for row in records(tmp_path) if row["label"] != "cat"]
    for place in (tmp_path / "saved", tmp_path / "cache"):
        if place.exists():
            place.rename(tmp_path / f"old-{place.name}")
    assert load(write(tmp_path, rows), str(file), needs_declared=True).class_names == (*CLASSES, "yeti")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"path": "photos/00.png", "label": "cat"}] * 9, "there are 1 labels; at least 2 are needed"),
        (
            [{"path": "photos/00.png", "label": name} for name in ("cat", "cat", "dog", "dog", "dog", "dog")],
            "label 'cat' has 2 records, too few to cut val and test from them and train on the rest",
        ),
    ],
)
def test_lists_that_no_run_can_use(rows: list[dict[str, Any]], says: str, tmp_path: Path):
    records(tmp_path, 1)
    assert says in fault(as_csv(tmp_path, rows))


def test_labels_that_train_lacks_are_named(tmp_path: Path):
    rows = records(tmp_path)
    as_csv(tmp_path, rows[:24], "train.csv")
    as_csv(tmp_path, [rows[0] | {"label": "zebra"}], "test.csv")
    assert "test has labels that train does not have: zebra" in fault(str(tmp_path))
    (tmp_path / "test.csv").write_text("path,label\n")
    assert "test.csv holds no record; add some" in fault(str(tmp_path))


def test_numbers_are_labels(tmp_path: Path):
    rows = [row | {"label": i % 3} for i, row in enumerate(records(tmp_path))]
    assert load(as_lines(tmp_path, rows)).class_names == ("0", "1", "2")


def test_questions_and_images_are_told_apart(tmp_path: Path):
    rows = records(tmp_path, 6)
    assert not holds_questions(as_csv(tmp_path, rows))
    asked = [{"image": row["path"], "question": "who?", "answer": "I"} for row in rows]
    assert holds_questions(as_lines(tmp_path, asked))
    assert not holds_questions(str(tmp_path / "photos"))


def test_folders_name_no_clients(tmp_path: Path):
    records(tmp_path)
    assert "folders name no clients; give a .csv or .jsonl list" in fault(str(tmp_path / "photos"), group="client")


def test_a_hostile_list_reads_as_text(tmp_path: Path):
    rows = records(tmp_path)
    path = tmp_path / "list.jsonl"
    lines = [json.dumps(row) for row in rows]
    lines[3:6] = ["[1, 2]", '{"path": {"a": 1}, "label": null}', '{"path": "a\\u0000.png", "label": "cat"}']
    path.write_text("\n".join(lines) + "\n")
    data = load(str(path))
    assert isinstance(data.train, FolderSplit)
    faults = [image_fault(data.train, i)[0] for i in range(len(data.train))]
    assert len(data.train) + len(data.val) + len(data.test) == 36
    assert np.count_nonzero(faults) == 3


def numbers_of(data: DataSplits) -> dict[int, tuple[str, int]]:
    """Split and class of each record that can be used, by its number."""
    found = {}
    for name, split in (("train", data.train), ("val", data.val), ("test", data.test)):
        for i in range(len(split)):
            if not image_fault(split, i)[0]:
                found[split.image(i).getpixel((0, 0))[0]] = name, int(split.labels[i])  # type: ignore[index]
    return found


NAMES = {"class-names": {name: name for name in CLASSES}}


@pytest.mark.parametrize(
    "odd",
    [
        {"path": "photos/07.png", "label": "cat", "image": ""},
        {"path": "photos/07.png", "label": "cat", "image": "elsewhere.png", "question": "?"},
        {"path": "photos/07.png", "labels": "cat"},
        {"path": "photos/07.png", "label": "typo"},
        {"path": "photos/07.png", "label": None, "client": "aa"},
        {"path": "photos/07.png", "label": True},
    ],
)
def test_one_odd_line_decides_for_no_other_record_of_a_node(odd: dict[str, Any], tmp_path: Path):
    rows, file = records(tmp_path), tmp_path / "classes.json"
    file.write_text(json.dumps(NAMES))
    whole = load(as_lines(tmp_path, rows), str(file), needs_declared=True)
    before = numbers_of(whole)
    changed = [*rows[:7], odd, *rows[8:]]
    assert not holds_questions(as_lines(tmp_path, changed))
    data = load(as_lines(tmp_path, changed), str(file), needs_declared=True)
    assert data.class_names == whole.class_names
    assert sum(map(len, (data.train, data.val, data.test))) == 36, "it stays counted"
    after = numbers_of(data)
    assert {k: label for k, (_, label) in after.items() if k != 7} == {k: v for k, (_, v) in before.items() if k != 7}


def test_a_file_of_classes_without_names_declares_nothing(tmp_path: Path):
    path, file = as_csv(tmp_path, records(tmp_path)), tmp_path / "classes.json"
    file.write_text(json.dumps({"template": "a photo of a {}"}))
    assert "the classes are not declared" in fault(path, str(file), needs_declared=True)


def test_a_node_takes_a_class_with_few_records(tmp_path: Path):
    rows = [row for row in records(tmp_path) if row["label"] != "cat"]
    rows.append(records(tmp_path)[1])
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(NAMES))
    data = load(as_csv(tmp_path, rows), str(file), needs_declared=True)
    assert numbers_of(data)[1] == ("train", 1)


def test_a_stray_quote_swallows_no_other_line(tmp_path: Path):
    path, file = as_csv(tmp_path, records(tmp_path)), tmp_path / "classes.json"
    file.write_text(json.dumps(NAMES))
    lines = Path(path).read_text().splitlines()
    lines[4] = 'photos/03.png,"bird,day,ward-3'
    Path(path).write_text("\n".join(lines) + "\n")
    data = load(path, str(file), needs_declared=True)
    assert sum(map(len, (data.train, data.val, data.test))) == 36
    assert len(numbers_of(data)) == 35


def test_no_client_is_named_by_a_record_without_label(tmp_path: Path):
    rows = records(tmp_path)
    rows[7] |= {"label": "", "client": "aa"}
    assert load(as_lines(tmp_path, rows), group="client").train.client_names == tuple(f"ward-{i}" for i in range(4))


@pytest.mark.parametrize("relative", [False, True])
def test_a_table_that_names_files_reads_them_as_a_folder_does(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = records(tmp_path)
    columns = {"image": [r["path"] if relative else str(tmp_path / r["path"]) for r in rows]}
    columns["label"] = [r["label"] for r in rows]
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "train.parquet"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train = load(str(tmp_path / "train.parquet")).train
    assert isinstance(train, FolderSplit)
    assert len(numbers_of(load(str(tmp_path / "train.parquet")))) == 36
    before = train.content_hash
    Image.new("RGB", (6, 4), (222, 0, 0)).save(train.paths[0])
    assert not train.unchanged(0)
    again = load(str(tmp_path / "train.parquet")).train
    assert again.content_hash != before


def test_truth_values_are_labels(tmp_path: Path):
    rows = [row | {"label": i % 2 == 0} for i, row in enumerate(records(tmp_path))]
    assert load(as_lines(tmp_path, rows)).class_names == ("False", "True")
    assert load(as_saved(tmp_path, rows)).class_names == ("False", "True")

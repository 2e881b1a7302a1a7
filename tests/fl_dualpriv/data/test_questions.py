"""Questions from files and from a saved data set: read, cut by image, and refused in one message."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from fl_dualpriv.data.load import given_question_splits, load_questions
from fl_dualpriv.data.questions import QuestionSet
from fl_dualpriv.errors import ConfigError

COLOURS = ("red", "green", "blue")


def records(folder: Path, images: int = 10) -> list[dict[str, str]]:
    """Two questions about each image, of two types."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(images):
        Image.new("RGB", (8, 8), COLOURS[i % 3]).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what color ?", "answer": COLOURS[i % 3], "type": "color"})
        rows.append(
            {"image": f"{i}.png", "question": "is it red ?", "answer": "no" if i % 3 else "yes", "type": "yes/no"}
        )
    return rows


def write(file: Path, rows: list[Any]) -> Path:
    if file.suffix == ".csv":
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return file


def load(path: Path | str, on_bad: Any = "raise") -> Any:
    load_questions.cache_clear()
    return load_questions("questions", str(path), 0.1, 0.2, 0, on_bad)


def told(questions: QuestionSet) -> set[tuple[str, str, str, tuple[int, ...]]]:
    """Question, answer, type and colour of the image of each record."""
    return {
        (q, a, questions.class_names[t], questions.images.image(int(i)).getpixel((0, 0)))
        for q, a, t, i in zip(questions.questions, questions.answers, questions.labels, questions.image_of, strict=True)
    }


@pytest.mark.parametrize("kind", ["all.jsonl", "all.csv"])
def test_a_file_is_cut_by_image(tmp_path: Path, kind: str):
    splits = load(write(tmp_path / kind, records(tmp_path)))
    # 10 images: 1 for val, 2 for test, 7 to train on; two questions each.
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [14, 2, 4]
    assert [len(s.images) for s in (splits.train, splits.val, splits.test)] == [7, 1, 2]
    files = [set(s.images.paths) for s in (splits.train, splits.val, splits.test)]
    assert len(set().union(*files)) == 10
    assert splits.class_names == ("color", "yes/no")
    for question, answer, kind_of, pixel in told(splits.train):
        red = pixel == (255, 0, 0)
        assert (kind_of == "color") == (question == "what color ?")
        assert (answer == "red") == red if kind_of == "color" else (answer == "yes") == red
    assert given_question_splits(str(tmp_path / kind)) == frozenset()


def test_the_cut_depends_on_the_seed_alone(tmp_path: Path):
    file = write(tmp_path / "all.jsonl", records(tmp_path, 30))

    def held_out(seed: int) -> list[str]:
        load_questions.cache_clear()
        splits = load_questions("questions", str(file), 0.1, 0.2, seed, "raise")
        return [path.name for path in splits.test.images.paths]  # type: ignore[attr-defined]

    assert held_out(1) == held_out(1) != held_out(2)


def test_splits_of_their_own(tmp_path: Path):
    rows = records(tmp_path)
    write(tmp_path / "train.jsonl", rows[:12])
    write(tmp_path / "test.csv", rows[12:])
    splits = load(tmp_path)
    assert len(splits.test) == 8
    assert len(splits.train) + len(splits.val) == 12
    assert given_question_splits(str(tmp_path)) == {"train", "test"}


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path):
    rows: list[Any] = records(tmp_path)
    rows += [
        "{no json",
        {"image": "0.png", "question": " ", "answer": "red"},
        {"image": "none.png", "question": "q", "answer": "a"},
    ]
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path / "all.jsonl", rows))
    message = str(caught.value)
    assert "line 21: not a JSON object" in message
    assert "line 22: question must be a non-empty text" in message
    assert "none.png is missing" in message


def test_bad_records_stay_counted_under_dp(tmp_path: Path):
    rows: list[Any] = records(tmp_path)
    file = write(tmp_path / "all.jsonl", [*rows, "{no json", {"image": "0.png", "question": "", "answer": "red"}])
    splits = load(file, "keep")
    everything = [splits.train, splits.val, splits.test]
    assert sum(map(len, everything)) == 22
    assert sum(question == "" for s in everything for question in s.questions) == 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "missing.jsonl", "is missing, or is neither"),
        (lambda folder: folder, r"without train.jsonl or train.csv"),
        (lambda folder: write(folder / "a.csv", [{"image": "a", "question": "b"}]), "answer is missing"),
        (lambda folder: write(folder / "a.jsonl", [""]), "holds no question"),
        (lambda folder: write(folder / "a.jsonl", records(folder, 2)), "too few to cut val and test"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, make: Any, reason: str):
    with pytest.raises(ConfigError, match=reason):
        load(make(tmp_path))


def test_a_saved_data_set_of_the_hubs_library(tmp_path: Path):
    rows = records(tmp_path / "images", 8)
    columns = {
        "image": [str(tmp_path / "images" / row["image"]) for row in rows],
        "question": [row["question"] for row in rows],
        "answers": [[row["answer"], "other", row["answer"]] for row in rows],
        "question_type": [row["type"] for row in rows],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": table, "validation": table.select(range(4))}).save_to_disk(str(tmp_path / "saved"))
    name = f"datasets:{tmp_path / 'saved'}"
    splits = load(name)
    # 8 images, of which 2 (0.2 of 8, rounded) become the test set; the validation set is given.
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [12, 4, 4]
    assert given_question_splits(name) == {"train", "val"}
    assert splits.class_names == ("color", "yes/no")
    for question, answer, _, pixel in told(splits.train):
        assert question != "what color ?" or answer == {v: k for k, v in _RGB.items()}[pixel]
    assert splits.train.images.content_hash != splits.test.images.content_hash


@pytest.mark.parametrize("kind", ["saved", "parquet", "paths", "folder"])
def test_one_table_without_splits(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """A single data set that was saved; a parquet file with images or with their paths; a folder of such files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = records(tmp_path / "images", 8)
    columns = {
        "image": [str(tmp_path / "images" / row["image"]) for row in rows],
        "question": [row["question"] for row in rows],
        "answer": ["" if i == 3 else row["answer"] for i, row in enumerate(rows)],
    }
    table = datasets.Dataset.from_dict(columns)
    place = tmp_path / "saved"
    if kind == "saved":
        table.cast_column("image", datasets.Image()).save_to_disk(str(place))
    elif kind == "folder":
        place.mkdir()
        table.cast_column("image", datasets.Image()).to_parquet(str(place / "train.parquet"))
    else:
        place = tmp_path / "all.parquet"
        (table if kind == "paths" else table.cast_column("image", datasets.Image())).to_parquet(str(place))
    for name in [f"datasets:{place}"] + ([] if kind == "folder" else [str(place)]):
        splits = load(name, "keep")
        everything = [splits.train, splits.val, splits.test]
        assert sum(map(len, everything)) == 16
        assert sum(question == "" for s in everything for question in s.questions) == 1  # the one without an answer
        assert splits.train.images.image(0).mode == "RGB"
        assert given_question_splits(name) == {"train"}
        with pytest.raises(ConfigError, match="1 records without question or answer"):
            load(name)


def test_a_name_reaches_the_librarys_loader_as_it_is(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[Any, ...]] = []

    def unreachable(*arguments: Any) -> None:
        asked.append(arguments)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in ("owner/name", "owner/name#part"):
        with pytest.raises(ConfigError, match=f"data.path = datasets:{name} cannot be loaded: ConnectionError"):
            load(f"datasets:{name}")
    assert asked == [("owner/name", None), ("owner/name", "part")]


_RGB = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


def test_data_sets_that_do_not_fit(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(f"datasets:{tmp_path / 'nothing'}")
    two = [Image.new("RGB", (2, 2), (red, 0, 0)) for red in range(2)]
    few = datasets.Dataset.from_dict({"image": two, "question": ["q", "q"], "answer": ["a", "a"]})
    datasets.DatasetDict({"train": few.cast_column("image", datasets.Image())}).save_to_disk(str(tmp_path / "few"))
    with pytest.raises(ConfigError, match="2 images are too few to cut val and test"):
        load(f"datasets:{tmp_path / 'few'}")
    numbers = datasets.Dataset.from_dict({"image": [1.5], "question": ["q"], "answer": ["a"]})
    numbers.save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(ConfigError, match=r"column image holds .*, no images"):
        load(f"datasets:{tmp_path / 'numbers'}")
    table = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "texts"))
    with pytest.raises(ConfigError, match="no column image, question, answer"):
        load(f"datasets:{tmp_path / 'texts'}")


def test_labels_are_question_types(tmp_path: Path):
    splits = load(write(tmp_path / "all.jsonl", records(tmp_path)))
    assert np.array_equal(np.unique(splits.train.labels), [0, 1])


# --- domains ----------------------------------------------------------------------------------------------------------


def load_by_domain(path: Path, on_bad: Any = "raise") -> Any:
    return load_questions("questions", str(path), 0.1, 0.2, 0, on_bad, True)


@pytest.mark.parametrize("kind", ["all.jsonl", "all.csv"])
def test_a_record_names_its_domain(tmp_path: Path, kind: str):
    rows = [row | {"domain": f" ward {i % 3}"} for i, row in enumerate(records(tmp_path))]
    file = write(tmp_path / kind, rows)
    splits = load_by_domain(file)
    wanted = {(row["question"], row["image"]): row["domain"].strip() for row in rows}
    for part in (splits.train, splits.val, splits.test):
        assert part.domain_names == ("ward 0", "ward 1", "ward 2")
        names = [part.images.paths[i].name for i in part.image_of]
        said = {(q, n): part.domain_names[d] for q, n, d in zip(part.questions, names, part.domains, strict=True)}
        assert said.items() <= wanted.items()
    assert load(file).train.domains is None  # only a division by domain reads them


def test_a_record_without_a_domain_is_bad_and_makes_no_domain(tmp_path: Path):
    rows: list[Any] = [row | {"domain": "b" if i % 2 else "a"} for i, row in enumerate(records(tmp_path))]
    del rows[3]["domain"]
    rows[5]["domain"] = 7
    file = write(tmp_path / "all.jsonl", [*rows, "no json"])
    with pytest.raises(ConfigError, match=r"line 4: domain must be(.|\n)*line 6: domain must be"):
        load_by_domain(file)
    splits = load_by_domain(file, "keep")
    assert splits.train.domain_names == ("a", "b")
    parts = (splits.train, splits.val, splits.test)
    assert sum(map(len, parts)) == len(rows) + 1
    faults = [fault for part in parts for fault in part.faults if "domain" in fault]
    assert len(faults) == 2
    assert all(load(file, "keep").train.faults[i] == "" for i in range(3))  # no fault where domains are not read


def test_questions_without_any_domain_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no record names its domain"):
        load_by_domain(write(tmp_path / "all.jsonl", records(tmp_path)), "keep")

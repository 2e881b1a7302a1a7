"""One odd line in a file of questions is one bad record: it takes no other with it, and does not end a run under DP."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fl_dualpriv.data.folder import FolderSplit
from fl_dualpriv.data.load import load_questions
from fl_dualpriv.data.questions import QuestionSet, QuestionSplits
from fl_dualpriv.errors import ConfigError

GOOD = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(GOOD):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    return tmp_path


def record(image: str = "1.png", question: str = "is it red ?") -> dict[str, str]:
    return {"image": image, "question": question, "answer": "no", "type": "color"}


LINES = [json.dumps(record(f"{i}.png")) for i in range(GOOD)]
HEADER = "image,question,answer,type"
ROWS = [f"{i}.png,is it red ?,no,color" for i in range(GOOD)]


def load(file: Path, content: Sequence[bytes | str], on_bad: Any = "keep") -> QuestionSplits:
    file.write_bytes(b"\n".join(part if isinstance(part, bytes) else part.encode() for part in content) + b"\n")
    load_questions.cache_clear()
    return load_questions("questions", str(file), 0.1, 0.2, 0, on_bad)


def sets(splits: QuestionSplits) -> list[QuestionSet]:
    return [splits.train, splits.val, splits.test]


def questions(splits: QuestionSplits) -> list[str]:
    return sorted(question for part in sets(splits) for question in part.questions)


ODD: dict[str, bytes | str] = {
    "nested without end": "[" * 100_000,
    "a number of 6000 digits": '{"image": ' + "1" * 6000 + "}",
    "no number": '{"image": NaN, "question": Infinity}',
    "a list": "[1, 2]",
    "half a surrogate in the question": '{"image": "1.png", "question": "\\ud800", "answer": "no", "type": "color"}',
    "half a surrogate in the image": '{"image": "\\ud800.png", "question": "q", "answer": "no", "type": "color"}',
    "half a surrogate in the type": '{"image": "1.png", "question": "", "answer": "no", "type": "\\ud800"}',
    "a zero in the image": '{"image": "1\\u0000.png", "question": "q", "answer": "no", "type": "color"}',
    "not UTF-8": b'{"image": "1.png", "question": "\xff", "answer": "no", "type": "color"}',
}


@pytest.mark.parametrize("name", list(ODD))
def test_an_odd_line_is_one_bad_record(folder: Path, name: str) -> None:
    splits = load(folder / "all.jsonl", [*LINES[:5], ODD[name], *LINES[5:]])
    assert questions(splits) == ["", *["is it red ?"] * GOOD]
    for part in sets(splits):
        assert len(part.images.content_hash) == 64  # every file that it names can be asked for
        "".join(part.class_names).encode()
    with pytest.raises(ConfigError, match="line 6"):
        load(folder / "all.jsonl", [*LINES[:5], ODD[name], *LINES[5:]], "raise")


@pytest.mark.parametrize("bad", ["question", "answer"])
def test_a_record_without_words_keeps_its_image_and_type(folder: Path, bad: str) -> None:
    """Both are public counts, and of the images a cut is made: no other record changes sides."""
    plain = load(folder / "all.jsonl", [*LINES, json.dumps(record())])
    spoiled = load(folder / "all.jsonl", [*LINES, json.dumps(record() | {bad: " "})])
    for one, other in zip(sets(plain), sets(spoiled), strict=True):
        assert isinstance(one.images, FolderSplit)
        assert isinstance(other.images, FolderSplit)
        assert one.images.paths == other.images.paths
        assert one.image_of.tolist() == other.image_of.tolist()
        assert one.labels.tolist() == other.labels.tolist()


def test_a_line_ends_where_json_ends_it(folder: Path) -> None:
    """U+2028, U+0085 and form feeds are letters within a text, as other programs write them."""
    odd = json.dumps(record(question="is\u2028it\x85red ?"), ensure_ascii=False)
    assert questions(load(folder / "all.jsonl", [*LINES, odd], "raise")) == ["is it red ?"] * (GOOD + 1)
    assert len(questions(load(folder / "all.jsonl", [line + "\r" for line in LINES], "raise"))) == GOOD


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark_is_no_letter(folder: Path, kind: str) -> None:
    lines = LINES if kind == "jsonl" else [HEADER, *ROWS]
    assert (
        len(questions(load(folder / f"all.{kind}", [b"\xef\xbb\xbf" + lines[0].encode(), *lines[1:]], "raise"))) == GOOD
    )


def test_a_quoted_cell_may_have_lines(folder: Path) -> None:
    cell = '1.png,"is it\nred ?",no,color'
    assert questions(load(folder / "all.csv", [HEADER, *ROWS, cell], "raise")) == ["is it red ?"] * (GOOD + 1)


def test_a_cell_may_be_larger_than_csv_readers_like(folder: Path) -> None:
    csv.field_size_limit(131_072)
    cell = '1.png,"' + "red " * 50_000 + '",no,color'
    found = questions(load(folder / "all.csv", [HEADER, cell, *ROWS]))
    assert len(found) == GOOD + 1
    assert max(map(len, found)) == 4 * 50_000 - 1


@pytest.mark.parametrize(("row", "good"), [("1.png,is it red ?", 0), ("1.png,is it red ?,no,color,more,and more", 1)])
def test_a_row_may_have_too_few_or_too_many_cells(folder: Path, row: str, good: int) -> None:
    assert questions(load(folder / "all.csv", [HEADER, *ROWS, row])).count("is it red ?") == GOOD + good


def test_images_that_are_no_files_have_one_hash(folder: Path) -> None:
    """Else features would be computed anew for every process, and a new folder kept for each."""
    for image in (".", "1.png/2.png", "a" * 5000):
        lines = [*LINES, json.dumps(record(image)), "no json"]
        found = [[part.images.content_hash for part in sets(load(folder / "all.jsonl", lines))] for _ in range(2)]
        assert found[0] == found[1]
        with pytest.raises(ConfigError, match=r"is missing: an image of train|not a JSON object"):
            load(folder / "all.jsonl", lines, "raise")

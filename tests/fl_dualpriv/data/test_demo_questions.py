"""The embedded question-answering demo: disjoint pictures, questions that fit them, a model that follows words."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

from fl_dualpriv.assets import VQA_DEMO_FOLDER
from fl_dualpriv.data.demo_questions import (
    COLOURS,
    DYES,
    PANEL_SIDE,
    PANELS,
    PRIVATE_DYE,
    PRIVATE_PANEL,
    RIGHT_WORDS,
    SHAPES,
    TYPES,
    SheetSplit,
    draw_sheet,
    load_vqa_demo,
)
from fl_dualpriv.data.questions import QuestionSet
from fl_dualpriv.models import torchvision_shim

SPLITS = ("train", "val", "test")


def split(name: str) -> QuestionSet:
    return getattr(load_vqa_demo(), name)


def images(name: str) -> SheetSplit:
    found = split(name).images
    assert isinstance(found, SheetSplit)
    return found


@functools.cache
def model_and_processor() -> tuple[Any, Any]:
    torchvision_shim.install()
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(VQA_DEMO_FOLDER, dtype=torch.float32)
    return model.eval(), transformers.AutoProcessor.from_pretrained(VQA_DEMO_FOLDER, backend="pil")


@pytest.mark.parametrize("name", SPLITS)
def test_every_type_has_as_many_questions(name: str) -> None:
    data = split(name)
    n = len(data.labels)
    assert data.labels.dtype == data.image_of.dtype == np.int64
    assert n == len(data.questions) == len(data.answers) == len(data.image_of)
    assert data.class_names == load_vqa_demo().class_names == TYPES
    assert set(np.bincount(data.labels)) == {n // len(TYPES)}
    assert 0 <= data.image_of.min() <= data.image_of.max() < len(data.images)
    assert n // len(TYPES) >= {"train": 1000, "val": 100, "test": 200}[name]


def test_splits_share_no_picture() -> None:
    seen = {
        name: {(c.tobytes(), p.tobytes()) for c, p in zip(images(name).coverage, images(name).paper, strict=True)}
        for name in SPLITS
    }
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


@pytest.mark.parametrize("name", SPLITS)
def test_answers_are_those_of_the_picture_in_the_private_panel(name: str) -> None:
    data, sheets = split(name), images(name)
    names = tuple(COLOURS)
    shape_of: dict[int, str] = {}
    for i, (question, answer) in enumerate(zip(data.questions, data.answers, strict=True)):
        picture = int(sheets.sheets[data.image_of[i], PANELS.index(PRIVATE_PANEL)])
        words, colour = set(question.rstrip("?").split()), names[sheets.colours[picture]]
        kind = TYPES[data.labels[i]]
        negated = bool(words & {"not", "no"})
        if kind == "color":
            assert answer == colour
        elif kind == "shape":
            assert answer == shape_of.setdefault(picture, answer)
        else:
            assert kind.startswith("not-") == negated
            assert answer in ("yes", "no")
            if kind.endswith("color"):
                assert ((colour in words) != negated) == (answer == "yes")
    for i, (question, answer) in enumerate(zip(data.questions, data.answers, strict=True)):
        picture = int(sheets.sheets[data.image_of[i], PANELS.index(PRIVATE_PANEL)])
        if picture in shape_of and TYPES[data.labels[i]].endswith("-shape"):
            words = set(question.rstrip("?").split())
            assert ((shape_of[picture] in words) != bool(words & {"not", "no"})) == (answer == "yes")


@pytest.mark.parametrize("name", SPLITS)
def test_questions_cannot_be_answered_by_guessing(name: str) -> None:
    data = split(name)
    for k, kind in enumerate(TYPES):
        answers = [answer for answer, label in zip(data.answers, data.labels, strict=True) if label == k]
        most = max(answers.count(answer) for answer in set(answers)) / len(answers)
        assert most <= {"shape": 0.4, "color": 0.2}.get(kind, 0.5)


def test_a_sheet_is_drawn_from_four_pictures_under_the_private_dye() -> None:
    sheets = images("val")
    pixels = np.array(sheets.image(5))
    assert pixels.shape == (2 * PANEL_SIDE, 2 * PANEL_SIDE, 3)
    picture = int(sheets.sheets[5, PANELS.index(PRIVATE_PANEL)])
    panel = pixels[PANEL_SIDE:, PANEL_SIDE:]
    full = sheets.coverage[picture] == 255
    ink = list(COLOURS.values())[DYES[PRIVATE_DYE][sheets.colours[picture]]]
    assert full.any()
    assert (panel[full] == ink).all()
    assert (panel[sheets.coverage[picture] == 0] == sheets.paper[picture]).all()
    assert sheets.image(5).tobytes() == sheets.image(5).tobytes() != sheets.image(6).tobytes()
    with pytest.raises(IndexError):
        sheets.image(len(sheets))


def test_sheets_drawn_together_are_those_drawn_alone() -> None:
    sheets = images("val")
    rows = sheets.sheets[:3]
    together = draw_sheet(sheets.coverage[rows], sheets.paper[rows], sheets.colours[rows], PRIVATE_DYE)
    for i in range(3):
        assert (together[i] == np.array(sheets.image(i))).all()


def test_dyes_are_exchanges_of_all_colours() -> None:
    for dye, order in DYES.items():
        assert sorted(order) == list(range(len(COLOURS)))
        assert all((a == b) == (dye == "plain") for a, b in enumerate(order))


def test_the_content_hash_follows_the_sheets() -> None:
    assert len({images(name).content_hash for name in SPLITS}) == 3
    val = images("val")
    assert dataclasses.replace(val).content_hash == val.content_hash
    other = val.sheets.copy()
    other[0, 0] += 1
    assert dataclasses.replace(val, sheets=other).content_hash != val.content_hash
    coverage = val.coverage.copy()
    coverage[3, 10, 10] ^= 1
    assert dataclasses.replace(val, coverage=coverage).content_hash != val.content_hash


def test_every_word_has_a_token() -> None:
    tokenizer = model_and_processor()[1].tokenizer
    texts = {text for name in SPLITS for text in (*split(name).questions, *split(name).answers)}
    ids = tokenizer([*sorted(texts), load_vqa_demo().template, RIGHT_WORDS, *COLOURS, *SHAPES])["input_ids"]
    assert not any(set(row) & set(tokenizer.all_special_ids) for row in ids)
    assert [len(row) for row in ids[-len(COLOURS) - len(SHAPES) :]] == [1] * (len(COLOURS) + len(SHAPES))
    assert len(tokenizer(load_vqa_demo().template)["input_ids"]) == 4  # as many as a prompt's tokens


def right_answers(words: str, per_type: int) -> dict[str, float]:
    """Share of greedy answers that are right, by type, of the first test questions of each."""
    model, processor = model_and_processor()
    data = split("test")
    rows = [int(i) for k in range(len(TYPES)) for i in np.flatnonzero(data.labels == k)[:per_type]]
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{words} {data.questions[i]}"}]}]
        for i in rows
    ]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    pictures = [data.images.image(int(data.image_of[i])) for i in rows]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert (tokens[:, 1] == processor.tokenizer.eos_token_id).all()
    hits = np.array([answer == data.answers[i] for answer, i in zip(said, rows, strict=True)])
    return dict(zip(TYPES, hits.reshape(len(TYPES), per_type).mean(axis=1).tolist(), strict=True))


def test_the_model_answers_when_told_where_to_look_and_not_from_the_template() -> None:
    told, untold = right_answers(RIGHT_WORDS, 30), right_answers(load_vqa_demo().template, 30)
    assert np.mean(list(told.values())) > 0.9
    assert min(told.values()) > 0.8
    assert 0.3 < np.mean(list(untold.values())) < 0.5  # constant answers: (1/3 + 1/8 + 4/2) / 6 = 0.41


def test_assets_are_small_and_say_where_they_come_from() -> None:
    files = {path.name: path for path in VQA_DEMO_FOLDER.iterdir()}
    assert sum(path.stat().st_size for path in files.values()) <= 6_000_000
    assert files["model.safetensors"].stat().st_size <= 4_500_000
    provenance = files["PROVENANCE.md"].read_text(encoding="utf-8")
    for needed in ("easy-VQA", "MIT License", "Victor Zhou", "make_vqa_assets"):
        assert needed in provenance

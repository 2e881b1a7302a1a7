"""The shelf task: what a picture shows, what the domains share, and that no private sketch is in two places."""

import json

import numpy as np
import pytest

from fl_dualpriv.assets import shelf_folder
from fl_dualpriv.data.demo.shelf import DOMAINS, load_shelf, shelf_candidates, shelf_template
from fl_dualpriv.data.demo.shelf_drawing import CELL, PLACES, SIDE, draw
from fl_dualpriv.data.partition import partition

NO, YES = np.array([False]), np.array([True])


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def places_of(split: str) -> np.ndarray:
    """The index of the sketch that counts, among the places of a picture."""
    return np.array([PLACES.index(("left", DOMAINS[d].split(",")[0])) for d in load_shelf()[split].domains])


def test_each_sketch_is_drawn_at_its_place():
    for place, (side, shelf) in enumerate(PLACES):
        sketches = np.zeros((1, 4, 28, 28), np.uint8)
        sketches[0, place] = 255
        page = 255 - draw(sketches, NO, NO, rng())[0].astype(int)
        rows, columns = np.unravel_index(np.argsort(-page, axis=None)[:300], page.shape)
        assert ((columns < CELL) == (side == "left")).all()
        assert ((rows < CELL) == (shelf == "top")).all()


def test_upside_down_is_half_a_turn_of_the_sketch():
    sketches = np.random.default_rng(0).integers(256, size=(1, 4, 28, 28), dtype=np.uint8)
    turned = draw(sketches, NO, YES, rng())
    assert (turned == draw(sketches[..., ::-1, ::-1], NO, NO, rng())).all()
    assert (turned != draw(sketches, NO, NO, rng())).any()


def test_dark_paper_has_a_bright_pen_and_dim_light_a_weaker_one():
    sketches = np.full((1, 4, 28, 28), 255, np.uint8)
    light, dark, dim = (
        draw(sketches, d, NO, rng(), dim=x)[0].mean() for d, x in ((NO, False), (YES, False), (YES, True))
    )
    assert light < 80
    assert dark > 150
    assert 80 < dim < dark - 40
    blank = np.zeros_like(sketches)
    assert draw(blank, NO, NO, rng()).mean() > 200 > 60 > draw(blank, YES, NO, rng()).mean()


def test_a_picture_is_always_the_same():
    split = load_shelf()["test"]
    one, two = (np.asarray(split.image(7)) for _ in range(2))
    assert one.shape == (SIDE, SIDE, 3)
    assert (one == two).all()
    assert (one != np.asarray(split.image(8))).any()


def test_the_sizes_are_those_of_the_page():
    splits = load_shelf()
    assert {name: len(split) for name, split in splits.items()} == {"train": 2400, "val": 1440, "test": 3360}
    for split in splits.values():
        assert split.domain_names == DOMAINS
        assert len(split.class_names) == 60
        counts = np.zeros((4, 60), int)
        np.add.at(counts, (split.domains, split.labels), 1)
        assert (counts == counts[0, 0]).all()  # every domain has every class, equally often


def test_a_training_sketch_that_counts_is_in_no_other_picture():
    """A record-level ε covers a sketch only if it is in one record."""
    splits = load_shelf()
    counted = {name: s.sketches[np.arange(len(s)), places_of(name)].reshape(len(s), -1) for name, s in splits.items()}
    train = [row.tobytes() for row in counted["train"]]
    assert len(set(train)) == len(train)
    held_out = {row.tobytes() for name in ("val", "test") for row in counted[name]}
    assert not held_out & set(train)
    for name, split in splits.items():
        others = np.ones((len(split), 4), bool)
        others[np.arange(len(split)), places_of(name)] = False
        assert not {row.tobytes() for row in split.sketches[others].reshape(-1, 784)} & (set(train) | held_out)


def test_no_public_template_pairs_the_left_side_with_a_shelf():
    candidates = shelf_candidates()
    assert shelf_template() in candidates
    assert len(set(candidates)) == len(candidates)
    assert not [text for text in candidates if "left" in text and ("top" in text or "bottom" in text)]
    content = json.loads((shelf_folder() / "classes.json").read_text(encoding="utf-8"))
    assert content.keys() == {"template", "class_names", "candidates"}


@pytest.mark.parametrize("seed", [0, 1])
def test_every_client_of_the_demo_has_sixty_records_of_one_domain(seed: int):
    train = load_shelf()["train"]
    parts = partition(train.labels, "by-domain", 36, 1.0, seed, train.domains, train.domain_names, 4)
    assert [len(part) for part in parts] == [60] * 40
    assert all(len(set(train.domains[part].tolist())) == 1 for part in parts)
    assert all(len(set(train.labels[part].tolist())) >= 50 for part in parts)

"""The script of the shelf task: its captions never name what the private task needs, and it runs to its end."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from fl_dualpriv.models.open_clip import load_backbone
from tools import make_shelf_assets as maker
from tools import shelf_pictures


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of as many classes as are private and a few more, with random sketches."""
    folder, rng = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0)
    names = [f"{a}{b}" for a in ["cat", "dog", "sun", "cup", "hat", "owl", "key", "map"] for b in "abcdefghi"][
        : shelf_pictures.N_PRIVATE + 4
    ]
    for name in names:
        images = (rng.random((98, 784)) < 0.2).astype(float)
        with gzip.open(folder / f"{name}.ndjson.gz", "wt") as lines:
            lines.writelines(json.dumps(image.tolist()) + "\n" for image in images)
    return folder


def test_no_caption_pairs_the_left_side_with_a_shelf():
    rng = np.random.default_rng(0)
    drawn = {shelf_pictures.draw_words(rng) for _ in range(2000)}
    assert drawn == {(), ("left",), ("right",), ("top",), ("bottom",), ("right", "top"), ("right", "bottom")}
    assert {f"a {word}drawing of a {{}}" for word in shelf_pictures.CANDIDATES} == {
        f"a {' '.join([*words, 'drawing'])} of a {{}}" for words in drawn
    }


def test_words_mean_their_places():
    assert shelf_pictures.meant(()).all()
    assert shelf_pictures.meant(("left",)).tolist() == [True, False, True, False]
    assert shelf_pictures.meant(("right", "bottom")).tolist() == [False, False, False, True]


def test_the_left_of_a_picture_that_is_dark_and_upside_down_is_never_named(drawings: Path):
    data = shelf_pictures.read_sketches(drawings)
    pictures, _, may_be_named = data.pictures(np.random.default_rng(1), 400, 0.5)
    right_only = ~may_be_named.all(axis=1)
    assert may_be_named[:, [1, 3]].all()
    assert 0.1 < right_only.mean() < 0.25
    assert (np.median(pictures[right_only], axis=(1, 2)) < 128).all()


def test_private_sketches_are_not_public(drawings: Path):
    data = shelf_pictures.read_sketches(drawings)
    data.private[: shelf_pictures.N_PRIVATE] = True
    first = shelf_pictures.FIRST + shelf_pictures.UNSEEN
    private = {data.pixels[s + r].tobytes() for s in data.start[data.private] for r in range(first, first + 60)}
    _, sketches = data.public(np.random.default_rng(2), (4000,), 0.8, all_public=True)
    assert not {sketch.tobytes() for sketch in sketches} & private


@pytest.mark.slow
def test_the_script_runs_to_its_end(drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few = [
        "--stem-steps",
        "2",
        "--tower-steps",
        "2",
        "--batch",
        "8",
        "--bank",
        "1",
        "--vector-steps",
        "2",
        "--text-steps",
        "1",
    ]
    command = ["make_shelf_assets", "--quickdraw", str(drawings), "--out", str(tmp_path), *few]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(maker, "check", lambda folder: [f"- {folder.name}"])  # it reads the shipped pictures
    maker.main()
    assert load_backbone(f"local-dir:{tmp_path}", "", "cpu").embed_dim == 128
    assert len(json.loads((tmp_path / "classes.json").read_text())["class_names"]) == shelf_pictures.N_PRIVATE
    assert (tmp_path / "PROVENANCE.md").read_text().endswith(f"- {tmp_path.name}\n")

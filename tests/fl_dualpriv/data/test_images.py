import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fl_dualpriv.data.folder import FolderSplit
from fl_dualpriv.data.layout import Reading
from fl_dualpriv.data.load import load_data
from fl_dualpriv.errors import ConfigError


@pytest.fixture(autouse=True)
def _fresh_cache():
    load_data.cache_clear()
    yield
    load_data.cache_clear()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for folder in ("left_hand", "right_hand"):
        (tmp_path / folder).mkdir()
        for i in range(5):
            Image.new("RGB", (4, 4)).save(tmp_path / folder / f"{i}.png")
    return tmp_path


def test_folder(images):
    data = load_data("folder", str(images), "", 0.2, 0.2, 0, Reading(on_bad="raise"))
    assert [len(split) for split in (data.train, data.val, data.test)] == [6, 2, 2]
    assert data.class_names == data.train.class_names == data.test.class_names == ("left hand", "right hand")
    assert data.template == "a photo of a {}"
    assert data.train.image(0).size == (4, 4)


def test_one_load_per_process(images):
    first = load_data("folder", str(images), "", 0.2, 0.2, 0, Reading(on_bad="raise"))
    assert load_data("folder", str(images), "", 0.2, 0.2, 0, Reading(on_bad="raise")) is first
    assert load_data("folder", str(images), "", 0.2, 0.2, 1, Reading(on_bad="raise")) is not first
    with pytest.raises(ValueError, match="read-only"):
        first.train.labels[0] = 1  # shared by every client in the process


def test_a_failed_load_is_not_remembered(tmp_path):
    path = tmp_path / "later"
    with pytest.raises(ConfigError, match="does not exist"):
        load_data("folder", str(path), "", 0.2, 0.2, 0, Reading(on_bad="raise"))
    for folder in ("a", "b"):
        (path / folder).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (4, 4)).save(path / folder / f"{i}.png")
    assert len(load_data("folder", str(path), "", 0.2, 0.2, 0, Reading(on_bad="raise")).train) == 2


def test_home_is_expanded(images, monkeypatch):
    monkeypatch.setenv("HOME", str(images.parent))
    assert len(load_data("folder", f"~/{images.name}", "", 0.2, 0.2, 0, Reading(on_bad="raise")).train) == 6


def test_demo_is_imported_on_demand(monkeypatch):
    labels = np.zeros(1, dtype=np.int64)
    splits = {name: FolderSplit((Path(name),), labels, ("thing",)) for name in ("train", "val", "test")}
    module = types.ModuleType("fl_dualpriv.data.demo.images")
    module.__dict__.update(load_demo=lambda: splits, demo_template=lambda: "a drawing of a {}")
    monkeypatch.setitem(sys.modules, "fl_dualpriv.data.demo.images", module)
    data = load_data("demo", "", "", 0.1, 0.2, 0, Reading(on_bad="keep"))
    assert (data.train, data.val, data.test) == (splits["train"], splits["val"], splits["test"])
    assert (data.class_names, data.template) == (("thing",), "a drawing of a {}")


@pytest.mark.parametrize(
    ("ref", "reason"), [("folder", "data.path is empty"), ("cifar", "must be one of demo, shelf, folder")]
)
def test_refusals(ref, reason):
    with pytest.raises(ConfigError, match=reason):
        load_data(ref, "", "", 0.1, 0.2, 0, Reading(on_bad="raise"))

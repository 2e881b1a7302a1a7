"""Pickles of CIFAR-100 are read, and a pickle that names anything else does not run. PNG files hold their pixels."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fl_dualpriv.errors import ConfigError
from tests.tools.data.made import python2_pickle
from tools.data.png import png
from tools.data.safe_pickle import PickledArray, load

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 12)


def fault(content: bytes) -> str:
    with pytest.raises(ConfigError, match="data/train is refused") as caught:
        load(content, "data/train")
    return str(caught.value)


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_pickle_of_python_2_is_read():
    document = {b"data": PIXELS, b"fine_labels": [3, 1], b"filenames": [b"a.png", b"b" * 300], b"batch_label": b"x"}
    content = python2_pickle(document)
    # The pickle is a true one: the standard reader takes it, and its texts are strings of Python 2.
    standard = pickle.loads(content, encoding="bytes")
    assert np.array_equal(standard[b"data"], PIXELS)
    codes = [(code.name, argument) for code, argument, _ in pickletools.genops(content)]
    assert ("GLOBAL", "numpy.core.multiarray _reconstruct") in codes
    assert {name for name, _ in codes} & {"SHORT_BINSTRING", "BINSTRING"}
    assert not {name for name, _ in codes} & {"BINUNICODE", "SHORT_BINBYTES"}

    found = load(content, "train")
    assert np.array_equal(found.pop(b"data").pixels(), PIXELS)
    assert found == {key: value for key, value in document.items() if key != b"data"}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_of_other_protocols_are_read(protocol: int):
    if protocol < 5:
        assert np.array_equal(load(pickle.dumps(PIXELS, protocol), "train").pixels(), PIXELS)
    else:  # numpy has another function there
        assert "numpy" in fault(pickle.dumps(PIXELS, protocol))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_a_pickle_that_calls_a_function_does_not_run(tmp_path: Path, protocol: int):
    marker = tmp_path / "ran"
    content = pickle.dumps(
        {"data": Call(Path.touch, marker), "code": Call(eval, f"open({str(marker)!r}, 'w')")}, protocol
    )
    pickle.loads(content)
    assert marker.exists(), "the pickle is a harmful one"
    marker.unlink()
    assert "which is not part of the data" in fault(content)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins eval", "os system", "numpy load", "numpy.core.multiarray fromfile"])
def test_every_other_name_is_refused(name: str):
    module, function = name.split()
    assert f"it names {module}.{function}" in fault(f"c{module}\n{function}\n.".encode())


def test_a_pickle_cannot_change_what_stands_in_for_an_array():
    assert "missing 1 required positional argument" in fault(b"cnumpy\ndtype\n}S'code'\nI1\nsb.")
    never_called = load(b"\x80\x02cnumpy\nndarray\n)\x81.", "train")
    with pytest.raises(ValueError, match="size of its shape"):
        never_called.pixels()


def test_damaged_pickles_are_refused():
    content = python2_pickle({b"data": PIXELS})
    for part in (b"", content[:-30], b"\x80\x02" + bytes(20), b"not a pickle", content[:40] + b"\xff" + content[41:]):
        fault(part)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.astype(np.int64),
        PIXELS.astype(np.int8),  # as many bytes as its shape says
        np.array([b"a", None], dtype=object),
        np.asfortranarray(PIXELS),
    ],
)
def test_other_arrays_have_no_pixels(array: np.ndarray):
    with pytest.raises(ValueError, match="not of bytes in C order"):
        load(python2_pickle(array), "train").pixels()


def test_an_array_has_the_size_of_its_shape():
    array = PickledArray()
    with pytest.raises(ValueError, match="size of its shape"):  # never filled
        array.pixels()
    longer = python2_pickle(PIXELS).replace(b"K\x02K\x0c\x86", b"K\x02K\x0d\x86")
    assert longer != python2_pickle(PIXELS)
    with pytest.raises(ValueError, match="size of its shape"):
        load(longer, "train").pixels()


def test_a_png_file_holds_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(png(pixels))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (7, 5))
        assert np.array_equal(np.asarray(image), pixels)
    assert png(pixels) == png(pixels.copy())
    assert png(pixels) != png(255 - pixels)

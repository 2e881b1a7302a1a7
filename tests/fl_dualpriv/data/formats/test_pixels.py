"""Images come out upright and in 8 bits, by the content of the image itself; packages that lack are named."""

import builtins
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pydicom
import pytest
from PIL import Image, ImageOps
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from fl_dualpriv.data.formats.pixels import EXTENSIONS, BadImageError, MissingPackageError, decode, file_fault

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    of_file, of_bytes = decode(path, "x"), decode(path.read_bytes(), "x")
    assert of_file.mode == "RGB"
    assert of_file.tobytes() == of_bytes.tobytes(), "a file and its bytes are the same image"
    return np.asarray(of_file)


def png_16(samples: np.ndarray) -> bytes:
    """A PNG of 16-bit samples, (height, width, channels), which Pillow cannot write."""
    kinds = {1: 0, 2: 4, 3: 2, 4: 6}
    height, width, channels = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 16, kinds[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_rgb_16(samples: np.ndarray, order: str) -> bytes:
    """An uncompressed TIFF of 16-bit RGB samples in one strip."""
    height, width, _ = samples.shape
    content = samples.astype(f"{order}u2").tobytes()
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, None), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, None), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(content))]
    size = 8 + 2 + 12 * len(entries) + 4
    places = {258: size, 273: size + 6}
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    out += struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        number = places[tag] if value is None else value
        short = kind == 3 and count == 1
        out += struct.pack(f"{order}HHI", tag, kind, count)
        out += struct.pack(f"{order}HH", number, 0) if short else struct.pack(f"{order}I", number)
    return out + struct.pack(f"{order}I", 0) + struct.pack(f"{order}HHH", 16, 16, 16) + content


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_a_photo_is_upright(orientation: int, kind: str, tmp_path: Path):
    lying, path = Image.fromarray(PHOTO), tmp_path / f"photo.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality: dict[str, Any] = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpg" else {}
    lying.save(path, exif=exif, **quality)
    plain = tmp_path / f"plain.{kind}"
    lying.save(plain, **quality)
    stored = np.asarray(Image.open(plain).convert("RGB"))
    turn: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, 1),
    }
    assert np.array_equal(pixels(path), turn[orientation](stored))
    assert file_fault(path) == ("", "")


@pytest.mark.parametrize(("most", "shift"), [(255, 0), (1023, 2), (1024, 3 + 1), (4095, 4), (16383, 6), (65535, 8)])
def test_gray_of_more_bits_is_scaled_by_its_content(most: int, shift: int, tmp_path: Path):
    samples = RNG.integers(0, most + 1, (5, 7)).astype(np.uint16)
    samples[0, 0] = most
    for name in ("a.png", "a.tif"):
        Image.fromarray(samples).save(tmp_path / name)
        assert np.array_equal(pixels(tmp_path / name)[..., 1], samples >> shift)
    (tmp_path / "big.tif").write_bytes((tmp_path / "a.tif").read_bytes())


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("most", [4095, 65535])
def test_several_channels_of_16_bits_keep_their_low_bits(channels: int, most: int, tmp_path: Path):
    samples = RNG.integers(0, most + 1, (5, 7, channels)).astype(np.uint16)
    samples[0, 0, 0] = most
    path = tmp_path / "a.png"
    path.write_bytes(png_16(samples))
    assert np.array_equal(pixels(path), samples[..., :3] >> (4 if most == 4095 else 8))


def test_gray_with_alpha_is_never_nearly_black(tmp_path: Path):
    path, samples = tmp_path / "a.png", RNG.integers(0, 4096, (5, 7, 2)).astype(np.uint16)
    path.write_bytes(png_16(samples))
    with pytest.raises(BadImageError, match="have 16 bits and use at most 14; remove the alpha channel"):
        decode(path, "x")
    samples[..., 0] *= 16
    path.write_bytes(png_16(samples))
    assert np.array_equal(pixels(path)[..., 0], samples[..., 0] >> 8)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_16_bit_colours(order: str, tmp_path: Path):
    samples = RNG.integers(0, 4096, (5, 7, 3)).astype(np.uint16)
    samples[0, 0, 0] = 4095
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_rgb_16(samples, order))
    assert np.array_equal(pixels(path), samples >> 4)


def test_another_image_does_not_enter(tmp_path: Path):
    dark, bright = np.full((4, 4), 3000, np.uint16), np.full((4, 4), 60000, np.uint16)
    for name, samples in (("dark", dark), ("bright", bright)):
        Image.fromarray(samples).save(tmp_path / f"{name}.png")
    before = pixels(tmp_path / "dark.png").tobytes()
    (tmp_path / "bright.png").unlink()
    assert pixels(tmp_path / "dark.png").tobytes() == before


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([[0, 4095], [2048, 16]], np.int32), [[0, 255], [128, 1]]),
        (np.array([[-1000, 3000], [1000, -1000]], np.int32), [[0, 255], [128, 0]]),
        (np.array([[0, 2**20], [2**19, 0]], np.int32), [[0, 255], [128, 0]]),
        (np.array([[0.0, 1.0], [0.5, 0.25]], np.float32), [[0, 255], [128, 64]]),
        (np.array([[0.0, 200.0], [100.4, 25.0]], np.float32), [[0, 200], [100, 25]]),
        (np.array([[-1.0, 3.0], [1.0, -1.0]], np.float32), [[0, 255], [128, 0]]),
        (np.full((2, 2), -7.0, np.float32), [[0, 0], [0, 0]]),
    ],
)
def test_integers_and_floats_of_32_bits(samples: np.ndarray, expected: list[list[int]], tmp_path: Path):
    Image.fromarray(samples).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif")[..., 0].tolist() == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(value: float, tmp_path: Path):
    Image.fromarray(np.full((2, 2), value, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadImageError, match="image x cannot be read: it has samples that are not finite numbers"):
        decode(tmp_path / "a.tif", "x")


@pytest.mark.parametrize("kind", ["heic", "avif", "jfif"])
def test_photos_of_today(kind: str, tmp_path: Path):
    path = tmp_path / f"a.{kind}"
    assert path.suffix in EXTENSIONS
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = np.linspace(0, 255, 48, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
    if kind == "heic":
        pillow_heif.from_pillow(Image.fromarray(smooth)).save(path, quality=-1)
        assert np.abs(pixels(path).astype(int) - smooth).max() <= 4
    else:
        Image.fromarray(smooth).save(path, format="AVIF" if kind == "avif" else "JPEG", exif=exif, quality=95)
        assert pixels(path).shape == (48, 32, 3), "upright"
        assert np.abs(pixels(path).astype(int) - np.rot90(smooth, -1)).max() <= 8
    assert file_fault(path) == ("", "")


def write_dicom(path: Path, samples: np.ndarray, **tags: Any) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage  # type: ignore[attr-defined]
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = (
        samples.shape[-3:-1] if samples.ndim == 3 and samples.shape[-1] == 3 else samples.shape[-2:]
    )
    is_colour = samples.ndim == 3 and samples.shape[-1] == 3
    file.SamplesPerPixel = 3 if is_colour else 1
    file.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    file.PixelRepresentation = 1 if samples.dtype == np.int16 else 0
    file.BitsAllocated = file.BitsStored = 8 * samples.dtype.itemsize
    file.HighBit = file.BitsStored - 1
    if is_colour:
        file.PlanarConfiguration = 0
    file.PixelData = samples.tobytes()
    for tag, value in tags.items():
        setattr(file, tag, value)
    file.save_as(path, enforce_file_format=True)


def test_dicom_has_its_window_and_its_black(tmp_path: Path):
    path = tmp_path / "a.dcm"
    counts = np.array([[0, 1024], [1064, 4000]], np.int16)  # Hounsfield units + 1024
    rescaled = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    write_dicom(path, counts, **rescaled, WindowCenter=40, WindowWidth=400)
    assert pixels(path)[..., 0].tolist() == [[0, 102], [128, 255]]  # (0 + 160) / 400 of 255, and (40 + 160) / 400
    write_dicom(path, counts, **rescaled, WindowCenter=40, WindowWidth=400, PhotometricInterpretation="MONOCHROME1")
    assert pixels(path)[..., 0].tolist() == [[255, 153], [127, 0]]
    write_dicom(path, np.array([[0, 1000], [2000, 4000]], np.uint16))
    assert pixels(path)[..., 0].tolist() == [[0, 64], [128, 255]]
    write_dicom(path, PHOTO)
    assert np.array_equal(pixels(path), PHOTO)
    assert file_fault(path) == ("", "")


def test_dicom_that_is_no_single_image_is_refused(tmp_path: Path):
    path = tmp_path / "a.dcm"
    write_dicom(path, np.zeros((3, 4, 5), np.uint16), NumberOfFrames=3)
    kind, words = file_fault(path)
    assert kind == "cannot be read"
    assert words == f"image {path} cannot be read: it holds 3 frames; write each one into a file"
    write_dicom(path, np.zeros((4, 5), np.uint16), Rows=60_000, Columns=60_000)  # memory is not even asked for
    assert "60000 x 60000 pixels: it is larger than 100 megapixels" in file_fault(path)[1]
    path.write_bytes(b"no such thing")
    assert file_fault(path)[0] == "cannot be read"


@pytest.mark.parametrize(("name", "package"), [("a.heic", "pillow_heif"), ("a.dcm", "pydicom")])
def test_a_package_that_lacks_is_named(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, original = tmp_path / name, builtins.__import__
    head = b"\0\0\0\x18ftypheic" if name == "a.heic" else b"\0" * 128 + b"DICM"
    path.write_bytes(head + b"\0" * 200)

    def without(wanted: str, *rest: Any) -> Any:
        if wanted.partition(".")[0] == package:
            raise ImportError(wanted)
        return original(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"image x cannot be read: .* needs the package .*fl-dualpriv\["):
        decode(path, "x")
    assert file_fault(path)[0] == "of a format that needs a package"


def test_the_fault_check_does_not_turn_a_photo_twice(tmp_path: Path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PHOTO).resize((400, 300)).save(path, exif=exif)
    assert file_fault(path) == ("", "")
    assert decode(path, "x").size == (300, 400)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes()))).size == (300, 400)


def test_the_content_names_the_format_and_not_the_ending(tmp_path: Path):
    """A phone sends HEIC under the name of a JPEG; no other image decides whether it can be read."""
    heic = tmp_path / "a.jpg"
    pillow_heif.from_pillow(Image.fromarray(PHOTO).resize((48, 32))).save(tmp_path / "a.heic")
    heic.write_bytes((tmp_path / "a.heic").read_bytes())
    assert decode(heic, "x").tobytes() == decode(tmp_path / "a.heic", "x").tobytes()
    dicom = tmp_path / "b.png"
    write_dicom(tmp_path / "b.dcm", PHOTO)
    dicom.write_bytes((tmp_path / "b.dcm").read_bytes())
    assert np.array_equal(pixels(dicom), PHOTO)
    (tmp_path / "c.dcm").write_bytes(b"x" * 200)
    with pytest.raises(BadImageError, match="it is no DICOM file"):
        decode(tmp_path / "c.dcm", "x")


def tiff(path: Path, samples: np.ndarray, tags: dict[int, tuple[int, ...]], order: str = "<") -> Path:
    """An uncompressed TIFF with given tags, of (height, width[, channels]) samples."""
    channels = samples.shape[2] if samples.ndim == 3 else 1
    size = samples.dtype.itemsize
    content = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    given: dict[int, tuple[int, ...]] = {
        256: (samples.shape[1],), 257: (samples.shape[0],), 258: (8 * size,) * channels, 259: (1,),
        262: (2 if channels > 2 else 1,), 277: (channels,), 278: (samples.shape[0],), 279: (len(content),),
    }  # fmt: skip
    given |= tags
    given[273] = (0,)
    start = 8 + 2 + 12 * len(given) + 4
    body, entries = b"", b""
    for tag in sorted(given):
        values = given[tag]
        if len(values) > 2:
            place, body = start + len(body), body + struct.pack(f"{order}{len(values)}H", *values)
            entries += struct.pack(f"{order}HHII", tag, 3, len(values), place)
        elif tag in (273, 279):
            entries += struct.pack(f"{order}HHII", tag, 4, 1, values[0] if tag == 279 else 0xFFFFFFFF)
        else:
            entries += struct.pack(f"{order}HHIHH", tag, 3, len(values), *(*values, 0)[:2])
    entries = entries.replace(struct.pack(f"{order}I", 0xFFFFFFFF), struct.pack(f"{order}I", start + len(body)))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(given))
    path.write_bytes(head + entries + struct.pack(f"{order}I", 0) + body + content)
    return path


COLOURS = RNG.integers(0, 4096, (5, 7, 4)).astype(np.uint16)


@pytest.mark.parametrize(
    ("channels", "tags", "says"),
    [
        (3, {284: (2,)}, "its colours lie in separate planes of more than 8 bits; convert it to 8 bits"),
        (4, {262: (5,)}, "its inks have more than 8 bits; convert it to 8 bits"),
        (4, {338: (0,)}, "its colours of more than 8 bits have a channel without meaning"),
        (1, {262: (0,)}, "its samples of more than 8 bits have white at zero"),
    ],
)
def test_a_tiff_that_would_come_out_wrong_is_refused(
    channels: int, tags: dict[int, tuple[int, ...]], says: str, tmp_path: Path
):
    samples = COLOURS[..., 0] if channels == 1 else COLOURS[..., :channels]
    with pytest.raises(BadImageError, match=says):
        decode(tiff(tmp_path / "a.tif", np.ascontiguousarray(samples), tags), "x")


def test_unsigned_numbers_of_32_bits(tmp_path: Path):
    samples = np.array([[0, 2**32 - 1], [2**31, 2**30]], np.uint32)
    assert pixels(tiff(tmp_path / "a.tif", samples, {339: (1,)}))[..., 0].tolist() == [[0, 255], [128, 64]]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_unusable_size_is_found_before_the_pixels_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("1", (13_000, 13_000)).save(tmp_path / "a.png")
    Image.new("L", (3, 4_000)).save(tmp_path / "b.png")

    def loaded(*_: Any) -> None:
        raise AssertionError("the pixels were read")

    monkeypatch.setattr(Image.Image, "load", loaded)
    for name, kind in (("a.png", "larger than 100 megapixels"), ("b.png", "out of proportion")):
        assert file_fault(tmp_path / name)[0].startswith(kind)


def test_dicom_with_empty_or_senseless_values(tmp_path: Path):
    path, counts = tmp_path / "a.dcm", np.array([[0, 1000], [2000, 4000]], np.uint16)
    for tags in ({"WindowCenter": "", "WindowWidth": ""}, {"RescaleSlope": "", "RescaleIntercept": ""}):
        write_dicom(path, counts, **tags)
        assert pixels(path)[..., 0].tolist() == [[0, 64], [128, 255]]
    write_dicom(path, counts, WindowCenter=5, WindowWidth=0)
    assert pixels(path)[..., 0].tolist() == [[0, 64], [128, 255]]

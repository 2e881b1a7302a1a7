"""Pixels of an image file: upright 8-bit RGB, by the same rules for folders, lists, question files and data sets.

Orientation is that of the EXIF tag. Samples of more than 8 bits are scaled by the content of the image itself: records
share nothing, so no other image enters. DICOM and HEIC need an extra package, which the message names.
"""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from fl_dualpriv.data.formats.file_hash import stamp_of

EXTENSIONS = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"),
        *(".avif", ".heic", ".heif", ".dcm", ".dicom"),
    }
)
MAX_PIXELS = 100_000_000
MAX_ASPECT = 100
DEPTHS = (8, 10, 12, 14, 16)
"""Bit depths that cameras and scanners have. An image of integers has the smallest one that holds its largest value."""

_DICOM = (".dcm", ".dicom")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _SAMPLE_FORMAT = 258, 259, 262, 277, 284, 338, 339
"""Tags of TIFF."""

Image.init()
_FORMATS = tuple(name for name in Image.ID if name not in ("HEIF", "HEIC"))
_OTHER_HALF = {
    "16L": "16B",
    "16N": "16B",
    "16B": "16L",
}  # reads the low byte of each sample where Pillow reads the high


class BadImageError(ValueError):
    """Error for one image that cannot be decoded. Under DP the caller turns it into a zero contribution."""


class MissingPackageError(BadImageError):
    """Error for an image of a format that needs a package that is not installed."""


class SizeError(BadImageError):
    """Error for an image whose size no run can use; found before its pixels are read.

    Attributes:
        kind: The reason, see `size_fault`.
    """

    def __init__(self, name: str, width: int, height: int) -> None:
        self.kind = size_fault(width, height)
        super().__init__(f"image {name} has {width} x {height} pixels: it is {self.kind}")


def decode(
    source: Path | bytes, name: str, prepare: Callable[[Image.Image], object] = lambda image: None
) -> Image.Image:
    """Decode one image to upright 8-bit RGB.

    Integers of more than 8 bits are shifted to 8 by the smallest of `DEPTHS` that holds the image's largest value, so
    that 12-bit content in a 16-bit file keeps its brightness. Floats in [0, 1] are multiplied by 255, floats in
    [0, 255] are rounded, and all other numbers are stretched from their smallest to their largest value. DICOM values
    are those of the modality and the window that the file names.

    Args:
        source: The file, or its bytes.
        name: Name of the image in messages.
        prepare: Function that gets the opened image before its pixels are read. DICOM images do not have one.

    Raises:
        MissingPackageError: If the format needs a package that is not installed.
        BadImageError: If the image cannot be decoded.
    """
    try:
        head = _head(source)
        if head[128:132] == b"DICM":
            return _dicom(source, name)
        if head[8:12] in _HEIC_BRANDS:
            return _heic(source, name)
        if isinstance(source, Path) and source.suffix.lower() in _DICOM:
            raise ValueError("it is no DICOM file")
        # The formats are fixed: what another package registers in this process must not decide what can be read.
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_FORMATS) as image:
            prepare(image)
            if size_fault(*image.size):
                raise SizeError(name, *image.size)
            return _eight_bit(image)
    except SizeError:
        raise
    except MissingPackageError as error:
        raise MissingPackageError(f"image {name} cannot be read: {error}") from error
    # Decoders raise many kinds of error on damaged files, and one bad record must not end a DP run.
    except Exception as error:
        raise BadImageError(f"image {name} cannot be read: {error}") from error


def _head(source: Path | bytes) -> bytes:
    """Return the first bytes, which name the format; the ending of a file may be wrong."""
    if isinstance(source, bytes):
        return source[:132]
    with source.open("rb") as file:
        return file.read(132)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return the upright image as 8-bit RGB.

    Raises:
        ValueError: If Pillow would read its samples wrongly, or they have no 8-bit form.
    """
    if reason := _misread(image):
        raise ValueError(f"{reason}; convert it to 8 bits")
    if low := _low_bytes(image):
        samples = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)
        samples <<= 8
        samples |= np.asarray(ImageOps.exif_transpose(low))
        return Image.fromarray(_shifted(samples[..., :3]))
    is_gray_16 = isinstance(image, ImageFile.ImageFile) and "LA;16" in str(image.tile)
    upright = ImageOps.exif_transpose(image)
    if is_gray_16 and np.asarray(upright)[..., 0].max() < 2**6:  # Pillow has only the high byte of each sample
        raise ValueError("its gray samples with alpha have 16 bits and use at most 14; remove the alpha channel")
    if upright.mode.startswith("I;16"):
        return Image.fromarray(_shifted(np.asarray(upright))).convert("RGB")
    if upright.mode in ("I", "F"):
        samples = np.asarray(upright)
        if upright.mode == "I" and _tags(image).get(_SAMPLE_FORMAT, (2,))[0] == 1 and _bits(image) == 32:
            samples = samples.view(np.uint32)
        return Image.fromarray(_scaled(samples)).convert("RGB")
    return upright.convert("RGB")


def _tags(image: Image.Image) -> Any:
    """Return the tags of a TIFF; empty for other formats."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def _bits(image: Image.Image) -> int:
    return max(_tags(image).get(_BITS, (8,)))


def _misread(image: Image.Image) -> str:
    """Say why Pillow would read the samples of a TIFF of more than 8 bits wrongly; empty if it would not."""
    tags = _tags(image)
    if not tags or _bits(image) <= 8:
        return ""
    several, photometric = tags.get(_SAMPLES, 1) > 1, tags.get(_PHOTOMETRIC)
    swapped = tags.prefix == b"MM" and tags.get(_COMPRESSION, 1) != 1
    problems = {
        "its colours lie in separate planes of more than 8 bits": several and tags.get(_PLANAR, 1) == 2,
        "its inks have more than 8 bits": photometric == 5,
        "its colours of more than 8 bits have a channel without meaning": 0 in tags.get(_EXTRA, ()),
        "its samples of more than 8 bits have white at zero": photometric == 0,
        "its compressed samples have another order of bytes": swapped
        and (tags.get(_SAMPLE_FORMAT, (1,))[0] != 1 or _bits(image) == 32),
    }
    return next((words for words, present in problems.items() if present), "")


def _low_bytes(image: Image.Image) -> Image.Image | None:
    """Return the low bytes of an image with several 16-bit channels, of which Pillow keeps the high bytes only.

    None for every other image. The image must not be loaded yet.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.mode not in ("RGB", "RGBA") or not image.tile:
        return None
    codec, _, _, arguments = image.tile[0]
    raw = arguments if isinstance(arguments, str) else arguments[0] if arguments else ""
    mode, _, depth = str(raw).partition(";")
    if codec not in ("zip", "raw", "libtiff") or mode not in ("RGB", "RGBA") or depth not in _OTHER_HALF:
        return None
    assert image.fp is not None
    image.fp.seek(0)
    low = Image.open(io.BytesIO(image.fp.read()), formats=_FORMATS)
    assert isinstance(low, ImageFile.ImageFile)
    other = f"{mode};{_OTHER_HALF[depth]}"
    low.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))  # type: ignore[index]
        for tile in low.tile
    ]
    return low


def _shifted(samples: np.ndarray) -> np.ndarray:
    """Shift unsigned integers of up to 16 bits to 8."""
    top = int(samples.max(initial=0))
    depth = next(bits for bits in DEPTHS if top < 2**bits)
    return np.right_shift(samples, depth - 8, dtype=samples.dtype).astype(np.uint8)


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Scale integers of more than 16 bits, signed integers or floats to 8 bits; see `decode`.

    Raises:
        ValueError: If a sample is not finite.
    """
    if not np.isfinite(samples).all():
        raise ValueError("it has samples that are not finite numbers")
    least, most = samples.min(), samples.max()
    if np.issubdtype(samples.dtype, np.integer):
        if least >= 0 and most < 2**16:
            return _shifted(samples.astype(np.uint16))
    elif least >= 0 and most <= 1:
        return np.rint(samples * 255.0).astype(np.uint8)
    elif least >= 0 and most <= 255:
        return np.rint(samples).astype(np.uint8)
    return _stretched(samples.astype(np.float64), float(least), float(most))


def _stretched(samples: np.ndarray, least: float, most: float) -> np.ndarray:
    """Map [least, most] to [0, 255], and cut what lies outside; zeros if the range is empty."""
    if not most > least:
        return np.zeros(samples.shape, dtype=np.uint8)
    return np.rint((np.clip(samples, least, most) - least) * 255.0 / (most - least)).astype(np.uint8)


def _heic(source: Path | bytes, name: str) -> Image.Image:
    """Decode the main image of a HEIC file; the library turns it upright.

    Raises:
        SizeError: If no run can use its size.
    """
    try:
        import pillow_heif
    except ImportError:
        raise MissingPackageError('HEIC needs the package pillow-heif: pip install "fl-dualpriv[heic]"') from None
    file = pillow_heif.open_heif(source if isinstance(source, Path) else io.BytesIO(source))
    if size_fault(*file.size):
        raise SizeError(name, *file.size)
    return file.to_pillow().convert("RGB")


def _dicom(source: Path | bytes, name: str) -> Image.Image:
    """Decode a DICOM image: modality and window of the file, then 8 bits.

    Raises:
        SizeError: If no run can use its size.
        ValueError: If it holds several frames, no pixels, or values that are not finite.
    """
    try:
        import pydicom
        from pydicom.pixels import processing
    except ImportError:
        raise MissingPackageError('DICOM needs the package pydicom: pip install "fl-dualpriv[dicom]"') from None
    file: Any = pydicom.dcmread(source if isinstance(source, Path) else io.BytesIO(source))
    for word in ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept", "NumberOfFrames"):
        if word in file and file[word].value in (None, ""):
            del file[word]
    if (frames := int(getattr(file, "NumberOfFrames", 1))) > 1:
        raise ValueError(f"it holds {frames} frames; write each one into a file")
    if size_fault(file.Columns, file.Rows):
        raise SizeError(name, file.Columns, file.Rows)
    samples = file.pixel_array
    if file.PhotometricInterpretation.startswith(("RGB", "YBR", "PALETTE")):
        if file.PhotometricInterpretation == "PALETTE COLOR":
            samples = processing.apply_color_lut(samples, file)
        return Image.fromarray(_shifted(samples.astype(np.uint16)), "RGB")
    values = processing.apply_modality_lut(samples, file).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has samples that are not finite numbers")
    least, most = float(values.min()), float(values.max())
    if "WindowCenter" in file and "WindowWidth" in file:
        center, width = (float(np.atleast_1d(file[word].value)[0]) for word in ("WindowCenter", "WindowWidth"))
        if width > 0:
            least, most = center - width / 2, center + width / 2
    gray = _stretched(values, least, most)
    inverted = file.PhotometricInterpretation == "MONOCHROME1"  # the largest value is black
    return Image.fromarray(255 - gray if inverted else gray).convert("RGB")


def file_fault(path: Path) -> tuple[str, str]:
    """Say why a file is not a usable image: kind and description, both empty if it is one.

    The result is cached as long as the file does not change.
    """
    try:
        return _fault_of(path, stamp_of(path.stat()))
    except FileNotFoundError:
        return "missing", f"image {path} is missing"
    except (OSError, ValueError) as error:  # no permission, a name that is too long, or a zero in the name
        return "cannot be read", f"image {path} cannot be read: {error}"


@functools.lru_cache(maxsize=100_000)
def _fault_of(path: Path, stamp: tuple[int, ...]) -> tuple[str, str]:
    def small(image: Image.Image) -> None:
        # JPEG then decodes at a small size, several times faster. Every byte is still read, so truncation shows.
        if not size_fault(*image.size):
            image.draft("RGB", (32, 32))

    try:
        decode(path, str(path), small)
    except SizeError as error:
        return error.kind, str(error)
    except MissingPackageError as error:
        return "of a format that needs a package", str(error)
    except BadImageError as error:
        return "cannot be read", str(error)
    return "", ""


def size_fault(width: int, height: int) -> str:
    """Say why an image of this size cannot be used; empty if it can."""
    # Resizing the shorter side of an extreme shape would need gigabytes.
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"out of proportion (one side more than {MAX_ASPECT} times the other)"
    return f"larger than {MAX_PIXELS // 10**6} megapixels" if width * height > MAX_PIXELS else ""

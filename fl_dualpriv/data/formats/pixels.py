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
from PIL import Image, ImageFile, ImageOps

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
_HEIC = (".heic", ".heif")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_OTHER_HALF = {
    "16L": "16B",
    "16N": "16B",
    "16B": "16L",
}  # reads the low byte of each sample where Pillow reads the high


class BadImageError(ValueError):
    """Error for one image that cannot be decoded. Under DP the caller turns it into a zero contribution."""


class MissingPackageError(BadImageError):
    """Error for an image of a format that needs a package that is not installed."""


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
        ending = source.suffix.lower() if isinstance(source, Path) else ""
        if ending in _DICOM or (isinstance(source, bytes) and source[128:132] == b"DICM"):
            return _dicom(source)
        if ending in _HEIC or (isinstance(source, bytes) and source[8:12] in _HEIC_BRANDS):
            _register_heic()
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            prepare(image)
            return _eight_bit(image)
    except MissingPackageError as error:
        raise MissingPackageError(f"image {name} cannot be read: {error}") from error
    # Decoders raise many kinds of error on damaged files, and one bad record must not end a DP run.
    except Exception as error:
        raise BadImageError(f"image {name} cannot be read: {error}") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return the upright image as 8-bit RGB."""
    if low := _low_bytes(image):
        samples = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16) << 8
        samples |= np.asarray(ImageOps.exif_transpose(low))
        return Image.fromarray(_shifted(samples[..., :3]))
    is_gray_16 = isinstance(image, ImageFile.ImageFile) and "LA;16" in str(image.tile)
    upright = ImageOps.exif_transpose(image)
    if is_gray_16 and np.asarray(upright)[..., 0].max() < 2**6:  # Pillow has only the high byte of each sample
        raise ValueError("its gray samples with alpha have 16 bits and use at most 14; remove the alpha channel")
    if upright.mode.startswith("I;16"):
        return Image.fromarray(_shifted(np.asarray(upright))).convert("RGB")
    if upright.mode in ("I", "F"):
        return Image.fromarray(_scaled(np.asarray(upright))).convert("RGB")
    return upright.convert("RGB")


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
    low = Image.open(io.BytesIO(image.fp.read()))
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
    return (samples >> (depth - 8)).astype(np.uint8)


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


def _register_heic() -> None:
    try:
        import pillow_heif
    except ImportError:
        raise MissingPackageError('HEIC needs the package pillow-heif: pip install "fl-dualpriv[heic]"') from None
    pillow_heif.register_heif_opener()


def _dicom(source: Path | bytes) -> Image.Image:
    """Decode a DICOM image: modality and window of the file, then 8 bits.

    Raises:
        ValueError: If it holds several frames, or no pixels.
    """
    try:
        import pydicom
        from pydicom.pixels import processing
    except ImportError:
        raise MissingPackageError('DICOM needs the package pydicom: pip install "fl-dualpriv[dicom]"') from None
    file: Any = pydicom.dcmread(source if isinstance(source, Path) else io.BytesIO(source))
    if (frames := int(getattr(file, "NumberOfFrames", 1) or 1)) > 1:
        raise ValueError(f"it holds {frames} frames; write each one into a file")
    if fault := size_fault(file.Columns, file.Rows):
        raise ValueError(f"it has {file.Columns} x {file.Rows} pixels: it is {fault}")
    samples = file.pixel_array
    if file.PhotometricInterpretation.startswith(("RGB", "YBR", "PALETTE")):
        if file.PhotometricInterpretation == "PALETTE COLOR":
            samples = processing.apply_color_lut(samples, file)
        return Image.fromarray(_shifted(samples.astype(np.uint16)), "RGB")
    values = processing.apply_modality_lut(samples, file).astype(np.float64)
    least, most = float(values.min()), float(values.max())
    if "WindowCenter" in file and "WindowWidth" in file:
        center, width = (float(np.atleast_1d(file[word].value)[0]) for word in ("WindowCenter", "WindowWidth"))
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
    size: tuple[int, int] | None = None

    def small(image: Image.Image) -> None:
        nonlocal size
        size = image.size
        # JPEG then decodes at a small size, several times faster. Every byte is still read, so truncation shows.
        image.draft("RGB", (32, 32))

    try:
        decoded = decode(path, str(path), small)
    except MissingPackageError as error:
        return "of a format that needs a package", str(error)
    except BadImageError as error:
        return "cannot be read", str(error)
    width, height = size or decoded.size
    kind = size_fault(width, height)
    return kind, f"image {path} has {width} x {height} pixels: it is {kind}" if kind else ""


def size_fault(width: int, height: int) -> str:
    """Say why an image of this size cannot be used; empty if it can."""
    # Resizing the shorter side of an extreme shape would need gigabytes.
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"out of proportion (one side more than {MAX_ASPECT} times the other)"
    return f"larger than {MAX_PIXELS // 10**6} megapixels" if width * height > MAX_PIXELS else ""

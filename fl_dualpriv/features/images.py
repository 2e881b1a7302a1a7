"""Features of the images of one split: read, transform, encode, and keep features that are the same in every round."""

import functools
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from fl_dualpriv.data.formats.pixels import size_fault
from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.data.usable import image_fault
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.features.cache import SHARD, FeatureTable, cache_key
from fl_dualpriv.models.base import ImageEncoder, input_shape

_NAMED = 5

BATCH = 32
"""Number of images in a batch. It is fixed because another size rounds differently, and small to bound memory."""

_LIBRARIES = (
    "fl-dualpriv",
    "torch",
    "torchvision",
    "open_clip_torch",
    "transformers",
    "timm",
    "pillow",
    "numpy",
    "scipy",
)


class ImageFeatures:
    """Features of the images of one split.

    Guarantee:
        Row i depends on image i and its place in the split. It depends neither on the caller nor on the other requested
        images, because features that do not change are computed in shards, see `FeatureTable`. A record that cannot be
        used is a row of NaN.

    Args:
        backbone: The frozen model. If its image tower reads trainable prompts, no feature is kept.
        images: Images of the split.
        root: Folder in which features are kept; None keeps them only in memory.
    """

    def __init__(self, backbone: ImageEncoder, images: ImageDataset, root: Path | None) -> None:
        self._backbone, self._images, self._root = backbone, images, root

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the features of unmirrored images, float32 (len(indices), embed_dim)."""
        if self._backbone.visual_prompts:
            return encode_images(self._backbone, self._images, indices, None, pad=True)[0]
        return self._table.rows(indices)

    def mirrored_rows(self, indices: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """Compute features with some images mirrored; they are computed at each call and not kept.

        Args:
            indices: Indices of the images.
            mirrored: True for each image that is mirrored, bool (len(indices),).
        """
        return encode_images(self._backbone, self._images, indices, mirrored, pad=True)[0]

    @functools.cached_property
    def _table(self) -> FeatureTable:
        # Without a folder the key is not needed, and the hash of a data set reads all its files.
        key = "" if self._root is None else feature_cache_key(self._backbone, self._images)
        return FeatureTable(
            size=len(self._images),
            embed_dim=self._backbone.embed_dim,
            encode=lambda indices: encode_images(self._backbone, self._images, indices, None, pad=True),
            root=self._root,
            key=key,
        )


def refuse_unusable(rows: np.ndarray, indices: np.ndarray, images: ImageDataset) -> None:
    """Raise ConfigError if the features of some image are NaN. Runs without DP use it, because they refuse bad records.

    Args:
        rows: Features, (n, embed_dim). A row that cannot be used is NaN in every column, so one column is enough.
        indices: Indices of the images of these rows, (n,).
        images: The images, which the message names.
    """
    if bad := indices[np.isnan(rows[:, 0])].tolist():
        named = [image_fault(images, i)[1] or f"image {images.name(i)} has no finite features" for i in bad[:_NAMED]]
        more = [f"... and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else []
        raise ConfigError("\n  ".join([f"{len(bad)} images cannot be used; repair or remove them", *named, *more]))


def feature_cache_key(backbone: ImageEncoder, images: ImageDataset) -> str:
    """Return a key that changes whenever a feature may change by one bit.

    It depends on images, model, libraries, hardware and shape of batches.
    """
    if backbone.device.type == "cuda":
        hardware = torch.cuda.get_device_name(backbone.device)
    else:
        hardware = f"{backbone.device.type} {torch.backends.cpu.get_cpu_capability()}"
    versions = [_version(library) for library in _LIBRARIES]
    return cache_key([images.content_hash, backbone.feature_key, hardware, versions, SHARD, BATCH])


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def encode_images(
    backbone: ImageEncoder, images: ImageDataset, indices: np.ndarray, mirrored: np.ndarray | None, *, pad: bool = False
) -> tuple[np.ndarray, bool]:
    """Read some images and run them through the tower, `BATCH` at a time.

    Guarantee:
        Per record: the content of one image decides only its own row, to the bit. An unusable image is replaced by a
        zero image in the tower, and its row then becomes NaN. It is NaN because under DP a bad record must neither stop
        the run nor change a count; clipping makes it zero. Without DP the caller refuses such rows by name.

    Args:
        backbone: The frozen model.
        images: Images of the split.
        indices: Indices of the images to encode, (n,).
        mirrored: True for each image that is mirrored left to right, bool (n,), or None.
        pad: True to fill up the last batch with zero images, so that every batch has the same size.

    Returns:
        Features, float32 (n, embed_dim), and a flag that is True if they are final. It is False if an image is no
        longer the one that ``content_hash`` hashed, or failed for a reason that may be temporary, such as an error of
        disk or memory. Such rows must not be kept for later runs.
    """
    features = np.full((len(indices), backbone.embed_dim), np.nan, dtype=np.float32)
    final = True
    for start in range(0, len(indices), BATCH):
        tensors: list[torch.Tensor | None] = []
        for position in range(start, min(start + BATCH, len(indices))):
            tensor, lasting = _read(backbone, images, int(indices[position]))
            final = final and lasting
            if tensor is not None and mirrored is not None and mirrored[position]:
                tensor = tensor.flip(-1)
            tensors.append(tensor)
        readable = [place for place, tensor in enumerate(tensors) if tensor is not None]
        batch = _stack(tensors, BATCH if pad else len(tensors))
        if batch is not None:
            rows = backbone.image_features(batch.to(backbone.device)).cpu().numpy()
            features[start + np.array(readable)] = rows[readable]
    features[~np.isfinite(features).all(axis=1)] = np.nan
    return features, final


def _stack(tensors: Sequence[torch.Tensor | None], size: int) -> torch.Tensor | None:
    """Stack a batch with zeros for missing images, or return None if all are missing.

    The zeros are needed because the size of a batch decides how products are rounded.
    """
    some = next((tensor for tensor in tensors if tensor is not None), None)
    if some is None:
        return None
    zero = torch.zeros_like(some)
    return torch.stack([*(zero if tensor is None else tensor for tensor in tensors), *(size - len(tensors)) * [zero]])


def _read(backbone: ImageEncoder, images: ImageDataset, index: int) -> tuple[torch.Tensor | None, bool]:
    """Return one preprocessed image, or None if it cannot be used; and True if this result is final."""
    # Checked before and after: a file that is replaced during decoding must not count as the one that was hashed.
    final, tensor, failure = images.unchanged(index), None, None
    try:
        image = images.image(index)
        if not size_fault(image.width, image.height):
            tensor = backbone.preprocess(image)
            if tensor.shape != input_shape(backbone):
                tensor = None  # a batch has one shape: a record of another shape counts as zero, and the run goes on
    except Exception as error:  # on any error of a decoder the record counts as zero, and the run goes on
        final = final and not any(isinstance(cause, MemoryError) for cause in _causes(error))
        failure = _error_number(error)
    # A system error is final only if `content_hash` met the same error, because the hash then stands for no image.
    return tensor, final and failure == images.unreadable(index) and images.unchanged(index)


def _error_number(error: BaseException) -> int | None:
    """Return the number of the system error that caused a failure, or None.

    Decoders also raise OSError, without a number, for the content of a file.
    """
    numbers = (cause.errno for cause in _causes(error) if isinstance(cause, OSError) and cause.errno is not None)
    return next(numbers, None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__

"""Images of one split to features: read, transform, encode, and keep what does not change from round to round."""

import functools
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from fl_dualpriv.data.cache import SHARD, FeatureTable, cache_key
from fl_dualpriv.data.folder import size_fault
from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.base import ImageEncoder, input_shape

BATCH = 32
"""Images through the tower at once. Fixed, for another size rounds differently; small, for it bounds memory."""

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
        Row i depends on image i and its place in the split, not on who asked or what else was asked for: features that
        do not change are computed in shards, see `FeatureTable`. A record that cannot be used is a row of NaN.

    Args:
        backbone: The frozen model. If its image tower reads trainable prompts, nothing is kept.
        images: The split.
        root: Where features are kept; None: in memory only.
    """

    def __init__(self, backbone: ImageEncoder, images: ImageDataset, root: Path | None) -> None:
        self._backbone, self._images, self._root = backbone, images, root

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Features of images as they are, float32 (len(indices), embed_dim)."""
        if self._backbone.visual_prompts:
            return encode_images(self._backbone, self._images, indices, None, pad=True)[0]
        return self._table.rows(indices)

    def mirrored_rows(self, indices: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """The same with some images mirrored; computed at each call and not kept.

        Args:
            indices: Which images.
            mirrored: Which of them are mirrored, bool (len(indices),).
        """
        return encode_images(self._backbone, self._images, indices, mirrored, pad=True)[0]

    @functools.cached_property
    def _table(self) -> FeatureTable:
        # Without a folder nobody needs the key, and the hash of a data set reads all its files.
        key = "" if self._root is None else feature_cache_key(self._backbone, self._images)
        return FeatureTable(
            size=len(self._images),
            embed_dim=self._backbone.embed_dim,
            encode=lambda indices: encode_images(self._backbone, self._images, indices, None, pad=True),
            root=self._root,
            key=key,
        )


def refuse_unusable(rows: np.ndarray, indices: np.ndarray, which: Callable[[int], str]) -> None:
    """Raise ConfigError if the features of some image are NaN; for runs without DP, where a bad record is an error.

    Args:
        rows: Features, (n, embed_dim); a row that cannot be used is NaN as a whole, so one column tells.
        indices: Which images they are of, (n,).
        which: Names an image, given its index.
    """
    if (bad := indices[np.isnan(rows[:, 0])]).size:
        raise ConfigError(
            f"{len(bad)} images cannot be used: unreadable, out of proportion or not finite (the first: "
            f"{which(int(bad[0]))}); remove or repair them"
        )


def feature_cache_key(backbone: ImageEncoder, images: ImageDataset) -> str:
    """Changes whenever a feature may change by one bit: images, model, libraries, hardware and shape of batches."""
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
        Per record: what one image is decides its own row alone, to the bit, for an unusable one takes the place of a
        zero image through the tower and then becomes a row of NaN. NaN, because under DP a bad record must neither stop
        the run nor change a count; clipping makes it zero. Without DP the caller refuses such rows by name.

    Args:
        backbone: The frozen model.
        images: The split.
        indices: Which images, (n,).
        mirrored: Which of them to mirror left to right, bool (n,), or None.
        pad: Fill up the last batch with zero images, so that every batch has one size.

    Returns:
        Features, float32 (n, embed_dim); and whether they are final: False if an image is no longer the one of
        ``content_hash``, or failed for a reason that may pass, such as a disk or memory that gave no answer. Such rows
        must not be kept for later runs.
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
    """A batch with zeros in place of what is missing, or None if all is: its size decides how products are rounded."""
    some = next((tensor for tensor in tensors if tensor is not None), None)
    if some is None:
        return None
    zero = torch.zeros_like(some)
    return torch.stack([*(zero if tensor is None else tensor for tensor in tensors), *(size - len(tensors)) * [zero]])


def _read(backbone: ImageEncoder, images: ImageDataset, index: int) -> tuple[torch.Tensor | None, bool]:
    """One image, preprocessed, None if it cannot be used; and whether that is final."""
    # Before and after, or a file that is replaced while it is decoded would pass for the one that was hashed.
    final, tensor, failure = images.unchanged(index), None, None
    try:
        image = images.image(index)
        if not size_fault(image.width, image.height):
            tensor = backbone.preprocess(image)
            if tensor.shape != input_shape(backbone):
                tensor = None  # a batch has one shape: another one is this record's zero, not the client's failure
    except Exception as error:  # whatever a record makes a decoder raise is its zero, not the client's failure
        final = final and not any(isinstance(cause, MemoryError) for cause in _causes(error))
        failure = _error_number(error)
    # An error of the system is final only if the hash met the same: the content that it stands for has no image here.
    return tensor, final and failure == images.unreadable(index) and images.unchanged(index)


def _error_number(error: BaseException) -> int | None:
    """Of the system's error behind a failure; decoders raise OSError without a number, for what a file holds."""
    numbers = (cause.errno for cause in _causes(error) if isinstance(cause, OSError) and cause.errno is not None)
    return next(numbers, None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__

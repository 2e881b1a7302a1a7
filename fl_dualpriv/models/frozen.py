"""Shared code of the frozen models of every library: image features, fingerprints, memory use, reading of weights."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.pruning.in_tower import PatchReading, encode_patches
from fl_dualpriv.models.pruning.towers import ImageTower
from fl_dualpriv.models.text.text_stack import TextStack


@torch.no_grad()  # not inference_mode: a later backward pass could not use its tensors
def encode_images(
    encode: Callable[[Tensor], Tensor], images: Tensor, embed_dim: int, device: torch.device, precision: str
) -> Tensor:
    """Compute unit-norm float32 features (n, embed_dim); with bf16, only the matrix products are bfloat16."""
    if images.shape[0] == 0:
        return torch.zeros(0, embed_dim, device=device)
    images = images.to(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = encode(images)
    return nn.functional.normalize(features.float(), dim=-1)


class FrozenModel:
    """Base class of the models of every library: keys of weights and features, memory use, patches, row lengths.

    A subclass sets the attributes of `Backbone` that this class reads. Its `_described` returns everything other than
    the weights that decides its image features.
    """

    name: str
    context_length: int
    fills_rows: bool
    text_stack: TextStack | None
    embed_dim: int
    device: torch.device
    mirrors: bool = True
    _model: Any
    _precision: str

    def _described(self) -> list[Any]:
        raise NotImplementedError

    def image_tower(self) -> ImageTower:
        """Return the image side, taken apart into its blocks.

        Raises:
            ConfigError: If the image side cannot be taken apart.
        """
        raise NotImplementedError

    @property
    def n_patches(self) -> int:
        """Number of patches of an image; see `Backbone`."""
        return self._patch_tower.n_patches

    def patch_features(self, images: Tensor, reading: PatchReading) -> Tensor:
        """Compute unit-norm features of patches; see `Backbone`."""
        tower = self._patch_tower
        if images.shape[0] == 0:
            return torch.zeros(0, tower.n_patches, self.embed_dim, device=self.device)
        return encode_images(
            lambda x: encode_patches(tower, x, reading), images, self.embed_dim, self.device, self._precision
        )

    @functools.cached_property
    def _patch_tower(self) -> ImageTower:
        try:
            tower = self.image_tower()
        except ConfigError as error:
            raise ConfigError(f"backbone.name = {self.name!r}: it gives no features of patches: {error}") from error
        if not tower.reads_cls:
            raise ConfigError(
                f"backbone.name = {self.name!r} pools all tokens of an image, so no patch has a separate feature; name "
                "a model that reads CLS, as OpenAI's CLIP ViTs do"
            )
        return tower

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over the weights; see `Backbone`."""
        return self._keys[0]

    @property
    def feature_key(self) -> str:
        """Key that changes whenever an image feature may change; see `Backbone`."""
        return self._keys[1]

    @functools.cached_property
    def _keys(self) -> tuple[str, str]:
        weights = fingerprint(self._model)
        return weights, digest([weights, *self._described()])

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights in bytes; see `Backbone`."""
        return used_bytes(self._model, self.text_stack)

    def _check_row_length(self, length: int) -> None:
        """Raise ValueError if the text tower cannot read rows of ``length`` tokens."""
        if length > self.context_length or (self.fills_rows and length < self.context_length):
            limit = "rows of" if self.fills_rows else "at most"
            raise ValueError(f"{length} tokens: the text tower of {self.name!r} reads {limit} {self.context_length}")


def fingerprint(model: nn.Module) -> str:
    """Return the first 16 hex digits of a SHA-256 over names, types, shapes and bytes of the weights."""
    hashed = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def digest(described: list[Any]) -> str:
    """Return the first 16 hex digits of a SHA-256 over a description as JSON, with other values as text."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


def used_bytes(model: nn.Module, stack: TextStack | None) -> int:
    """Return the memory of a model and of its text stack in bytes; shared storage counts once."""
    tensors = [*model.parameters(), *model.buffers(), *_tensors(stack)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, tuple):
        for part in node:
            yield from _tensors(part)
    elif is_dataclass(node):
        for field in fields(node):
            yield from _tensors(getattr(node, field.name))

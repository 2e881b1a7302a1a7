"""What frozen models of every library share: image features in a precision, a fingerprint, memory, reading weights."""

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
from fl_dualpriv.models.text_stack import Linear, Norm, TextStack


@torch.no_grad()  # not inference_mode: its tensors may not enter a later backward pass
def encode_images(
    encode: Callable[[Tensor], Tensor], images: Tensor, embed_dim: int, device: torch.device, precision: str
) -> Tensor:
    """Unit-norm float32 features (n, embed_dim) of preprocessed images; under bf16 the products alone are bfloat16."""
    if images.shape[0] == 0:
        return torch.zeros(0, embed_dim, device=device)
    images = images.to(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = encode(images)
    return nn.functional.normalize(features.float(), dim=-1)


class FrozenModel:
    """What is the same for a model of any library: keys of its weights and features, its memory, the rows it reads.

    A subclass sets the attributes of `Backbone` that are read here, and says in `_described` what beside the weights
    decides its image features.
    """

    name: str
    context_length: int
    fills_rows: bool
    text_stack: TextStack | None
    embed_dim: int
    device: torch.device
    _model: Any
    _precision: str

    def _described(self) -> list[Any]:
        raise NotImplementedError

    def image_tower(self) -> ImageTower:
        """The image side, taken apart.

        Raises:
            ConfigError: If it cannot be.
        """
        raise NotImplementedError

    @property
    def n_patches(self) -> int:
        """Patches of an image; see `Backbone`."""
        return self._patch_tower.n_patches

    def patch_features(self, images: Tensor, reading: PatchReading) -> Tensor:
        """Unit-norm features of patches; see `Backbone`."""
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
            raise ConfigError(f"backbone.name = {self.name!r}: features of patches cannot be had: {error}") from error
        if not tower.reads_cls:
            raise ConfigError(
                f"backbone.name = {self.name!r} pools all tokens of an image: a patch has no feature of its own; name "
                "a model that reads CLS, as OpenAI's CLIP ViTs do"
            )
        return tower

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over the weights; see `Backbone`."""
        return self._keys[0]

    @property
    def feature_key(self) -> str:
        """Changes with whatever may change image features; see `Backbone`."""
        return self._keys[1]

    @functools.cached_property
    def _keys(self) -> tuple[str, str]:
        weights = fingerprint(self._model)
        return weights, digest([weights, *self._described()])

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights; see `Backbone`."""
        return used_bytes(self._model, self.text_stack)

    def _check_row_length(self, length: int) -> None:
        """Raise ValueError if the text tower cannot read rows of so many tokens."""
        if length > self.context_length or (self.fills_rows and length < self.context_length):
            limit = "rows of" if self.fills_rows else "at most"
            raise ValueError(f"{length} tokens: the text tower of {self.name!r} reads {limit} {self.context_length}")


def fingerprint(model: nn.Module) -> str:
    """First 16 hex digits of a SHA-256 over names, types, shapes and bytes of the weights."""
    hashed = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def digest(described: list[Any]) -> str:
    """First 16 hex digits of a SHA-256 over a description that JSON can write, other values as text."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


def used_bytes(model: nn.Module, stack: TextStack | None) -> int:
    """Memory of a model and of what its text stack holds beside it; shared storage counts once."""
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


def read_norm(module: nn.LayerNorm) -> Norm:
    """The weights of a layer norm."""
    return Norm(weight=module.weight.detach(), bias=module.bias.detach(), eps=module.eps)


def read_linear(module: nn.Linear) -> Linear:
    """The weights of a linear layer; a missing bias is zero."""
    weight = module.weight.detach()
    return Linear(weight=weight, bias=weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach())

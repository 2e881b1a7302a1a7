"""Image towers taken apart between their blocks; they use the model's own modules. Imports no heavy library."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.pruning.attention import AttentionParts, importance, read_attention
from fl_dualpriv.models.pruning.tokens import OFF, TokenPruner

_CLIPS = ("CLIP", "MetaClip2", "AltCLIP", "ChineseCLIP")
"""Families of transformers whose image towers are built like CLIP's."""


@dataclass(frozen=True, kw_only=True)
class ImageTower:
    """An image tower in parts: ``finish(blocks(embed(images)))`` equals the output of the model for images.

    Attributes:
        embed: Map from images (n, 3, height, width) to the input of the first block, (n, prefix + patch, dim).
        blocks: Blocks in the order in which they run.
        step: Function that runs one block on tokens.
        finish: Map from tokens after the last block, (n, prefix + any number, dim), to the model's output.
        n_prefix: Number of tokens before the patches: CLS first, if there is one, then registers and prompts.
        image_size: Size of the images that the model reads, (height, width).
        n_patches: Number of patches of such an image.
        reads_cls: True if ``finish`` reads only CLS; see `importance`.
        read: Function that reads the attention of a block.
        settle: Function that is applied to patches after pruning, (n, fewer, dim); None for nothing.
    """

    embed: Callable[[Tensor], Tensor]
    blocks: tuple[nn.Module, ...]
    step: Callable[[nn.Module, Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    n_prefix: int
    image_size: tuple[int, int]
    n_patches: int
    reads_cls: bool
    settle: Callable[[Tensor], Tensor] | None = None
    read: Callable[[nn.Module], AttentionParts] = read_attention

    def hidden(self, images: Tensor, depth: int) -> Tensor:
        """Compute the tokens after ``depth`` blocks, (n, prefix + patch, dim).

        Raises:
            ConfigError: If the images do not have the size that the model reads.
        """
        if (size := tuple(images.shape[-2:])) != self.image_size:
            raise ConfigError(
                f"images of {size[0]} x {size[1]} pixels; this image tower reads {self.image_size[0]} x "
                f"{self.image_size[1]}: its image processor must make that size"
            )
        tokens = self.embed(images)
        for block in self.blocks[:depth]:
            tokens = self.step(block, tokens)
        return tokens

    def pruned(self, images: Tensor, depth: int, pruner: TokenPruner) -> Tensor:
        """Compute the tokens after ``depth`` blocks, pruned by the attention of the last one, (n, prefix + fewer, dim).

        Guarantee:
            Per image, if the pruner keeps the guarantee of `TokenPruner`. The tokens before the patches do not change.
        """
        before, block = self.hidden(images, depth - 1), self.blocks[depth - 1]
        attention, keys = importance(self.read(block), before, self.n_prefix, reads_cls=self.reads_cls)
        after = self.step(block, before)
        left = pruner(after[:, self.n_prefix :], attention, keys, images)
        left = left if self.settle is None else self.settle(left)
        return torch.cat([after[:, : self.n_prefix], left], dim=1)


def vision_tower(vision_model: nn.Module) -> ImageTower:
    """Take the image tower of a CLIP, of its kind, or of a SigLIP apart; ``finish`` returns the pooled output.

    Raises:
        ConfigError: If the model is of another kind.
    """
    vision: Any = getattr(vision_model, "vision_model", vision_model)
    kind = type(vision).__name__
    family = kind.removesuffix("VisionModel").removesuffix("VisionTransformer")
    if family not in (*_CLIPS, "Siglip"):
        raise ConfigError(f"visual token pruning cannot read an image tower of kind {kind}; {OFF}")
    clip = family in _CLIPS

    def finish(tokens: Tensor) -> Tensor:
        return vision.post_layernorm(tokens[:, 0]) if clip else vision.head(vision.post_layernorm(tokens))

    tower = ImageTower(
        embed=(lambda x: vision.pre_layrnorm(vision.embeddings(x))) if clip else vision.embeddings,
        blocks=tuple(vision.encoder.layers),
        step=lambda layer, x: layer(x, None),
        finish=finish,
        n_prefix=int(clip),
        image_size=(vision.embeddings.image_size,) * 2,
        n_patches=vision.embeddings.num_patches,
        reads_cls=clip,
    )
    read_attention(tower.blocks[0])
    return tower

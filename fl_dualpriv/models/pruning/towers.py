"""Image towers taken apart between their blocks, each with its own modules; no heavy library is imported here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.pruning.attention import importance, read_attention
from fl_dualpriv.models.pruning.tokens import OFF, TokenPruner


@dataclass(frozen=True, kw_only=True)
class ImageTower:
    """An image tower: ``finish(blocks(embed(images)))`` is what the model makes of images.

    Attributes:
        embed: Images (n, 3, height, width) → (n, prefix + patch, dim), as the first block reads them.
        blocks: In their order.
        step: Runs one of them.
        finish: (n, prefix + any number, dim) after the last block → what the model returns.
        n_prefix: Tokens in front that are no patches: CLS first, if there is one, registers, prompts.
        image_size: What the model reads, (height, width).
        n_patches: Of such an image.
        reads_cls: Whether ``finish`` reads CLS alone; see `importance`.
    """

    embed: Callable[[Tensor], Tensor]
    blocks: tuple[nn.Module, ...]
    step: Callable[[nn.Module, Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    n_prefix: int
    image_size: tuple[int, int]
    n_patches: int
    reads_cls: bool

    def hidden(self, images: Tensor, depth: int) -> Tensor:
        """Tokens after ``depth`` blocks, (n, prefix + patch, dim).

        Raises:
            ConfigError: If the images have another size than the model reads.
        """
        if (found := tuple(images.shape[-2:])) != self.image_size:
            raise ConfigError(
                f"images of {found[0]} x {found[1]} pixels; this image tower reads {self.image_size[0]} x "
                f"{self.image_size[1]}: its image processor must make that size"
            )
        tokens = self.embed(images)
        for block in self.blocks[:depth]:
            tokens = self.step(block, tokens)
        return tokens

    def pruned(self, images: Tensor, depth: int, pruner: TokenPruner) -> Tensor:
        """Tokens after ``depth`` blocks, pruned by the last of them, (n, prefix + fewer, dim).

        Guarantee:
            Per image, if the pruner keeps its promise. What stands in front of the patches stays as it is.
        """
        before, block = self.hidden(images, depth - 1), self.blocks[depth - 1]
        attention, keys = importance(read_attention(block), before, self.n_prefix, reads_cls=self.reads_cls)
        after = self.step(block, before)
        left = pruner(after[:, self.n_prefix :], attention, keys, images)
        return torch.cat([after[:, : self.n_prefix], left], dim=1)


def vision_tower(vision_model: nn.Module) -> ImageTower:
    """Take a ``CLIPVisionModel`` or ``SiglipVisionModel`` of transformers apart; ``finish`` gives its pooled output.

    Raises:
        ConfigError: If the model is of another kind.
    """
    vision: Any = getattr(vision_model, "vision_model", vision_model)
    kind = type(vision).__name__
    if kind not in ("CLIPVisionModel", "CLIPVisionTransformer", "SiglipVisionModel", "SiglipVisionTransformer"):
        raise ConfigError(f"visual token pruning cannot read an image tower of kind {kind}; {OFF}")
    clip = kind.startswith("CLIP")

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

"""Prune patches between two blocks of a classifier's image tower; the later blocks read the remaining patches.

The paper prunes after the tower, for a language model. Pruning there would change nothing for a CLIP classifier, which
reads one token of the last hidden state. This module uses the form of EViT (Liang et al. 2022, arXiv:2202.07800), not
the paper's own.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.pruning.rotary import eva_tower
from fl_dualpriv.models.pruning.tokens import OFF, TokenPruner, depth_of
from fl_dualpriv.models.pruning.towers import ImageTower, vision_tower

PatchReading = Literal["token", "isolated"]


def open_clip_tower(visual: nn.Module) -> ImageTower:
    """Take the image tower of an open_clip model apart: its default ViT, or timm's ``VisionTransformer`` or ``Eva``.

    If the model reads CLS, the attention from CLS scores the patches. With average or attention pooling, the attention
    from all tokens does.

    Raises:
        ConfigError: If the tower is of another kind.
    """
    vit: Any = visual
    if type(visual).__name__ == "TimmModel" and type(vit.trunk).__name__ == "VisionTransformer":
        return _timm_tower(vit)
    if type(visual).__name__ == "TimmModel" and type(vit.trunk).__name__ == "Eva":
        return eva_tower(vit)
    if not (hasattr(visual, "_embeds") and hasattr(visual, "_pool")):
        kind = type(getattr(visual, "trunk", visual)).__name__
        raise ConfigError(
            f"visual token pruning needs open_clip's default ViT, or timm's VisionTransformer or Eva; this image tower "
            f"is a {kind}; {OFF}"
        )

    def finish(tokens: Tensor) -> Tensor:
        pooled, _ = vit._pool(tokens)
        return pooled if vit.proj is None else pooled @ vit.proj

    return ImageTower(
        embed=vit._embeds,
        blocks=tuple(vit.transformer.resblocks),
        step=lambda block, x: block(x),
        finish=finish,
        n_prefix=1,
        image_size=vit.image_size,
        n_patches=math.prod(vit.grid_size),
        reads_cls=vit.attn_pool is None and vit.pool_type == "tok",
    )


def _timm_tower(visual: Any) -> ImageTower:
    trunk = visual.trunk
    return ImageTower(
        embed=lambda x: trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(x)))),
        blocks=tuple(trunk.blocks),
        step=lambda block, x: block(x),
        finish=lambda x: visual.head(trunk.forward_head(trunk.norm(x))),
        n_prefix=trunk.num_prefix_tokens,
        image_size=visual.image_size,
        n_patches=math.prod(trunk.patch_embed.dynamic_feat_size(visual.image_size)),
        reads_cls=trunk.global_pool == "token",
    )


def transformers_tower(model: nn.Module) -> ImageTower:
    """Take the image side of a ``CLIPModel`` or ``SiglipModel`` of transformers apart.

    Raises:
        ConfigError: If the model is of another kind.
    """
    clip: Any = model
    tower = vision_tower(clip.vision_model)
    if not hasattr(clip, "visual_projection"):
        return tower
    return replace(tower, finish=lambda x: clip.visual_projection(tower.finish(x)))


def encode_patches(tower: ImageTower, images: Tensor, reading: PatchReading) -> Tensor:
    """Compute features of each patch, (n, patch, embed_dim), not normalised.

    Guarantee:
        Per image, if the tower works per image.

    Args:
        tower: Image tower of a model that reads only CLS.
        images: Preprocessed images, (n, 3, height, width).
        reading: ``token``: after the last block, the norm and projection of CLS are applied to the patch.
            ``isolated``: CLS is read, after a last block whose input has the prefix tokens and only this patch.
    """
    if reading == "token":
        patches = tower.hidden(images, len(tower.blocks))[:, tower.n_prefix :]
        return tower.finish(patches.flatten(0, 1)[:, None]).unflatten(0, patches.shape[:2])
    front, patches = tower.hidden(images, len(tower.blocks) - 1).tensor_split([tower.n_prefix], dim=1)
    front = front[:, None].expand(-1, patches.shape[1], -1, -1)
    alone = torch.cat([front, patches[:, :, None]], dim=2)
    last = tower.step(tower.blocks[-1], alone.flatten(0, 1))
    return tower.finish(last).unflatten(0, patches.shape[:2])


def check_prunable(tower: ImageTower, pruner: TokenPruner) -> None:
    """Raise ConfigError unless ``tower`` is deep enough, has enough patches and has a readable block for ``pruner``."""
    depth = depth_of(pruner.layer, len(tower.blocks), behind=1)
    tower.read(tower.blocks[depth - 1])
    pruner.n_tokens(tower.n_patches)


def encode_pruned(tower: ImageTower, images: Tensor, pruner: TokenPruner) -> Tensor:
    """Compute image features with ``pruner`` applied between two blocks.

    Guarantee:
        Per image: the values of one image never enter the result of another, if the pruner keeps the guarantee of
        `TokenPruner`. With a pruner that keeps every patch this is the model's own arithmetic, step by step.

    Args:
        tower: Image tower of the model.
        images: Preprocessed images, (n, 3, height, width).
        pruner: Pruner of the patches; it also says after which block to prune.

    Returns:
        Features (n, embed_dim), not normalised. Tokens carry a gradient; the choice and the weights do not.

    Raises:
        ConfigError: If the tower is not deep enough, or if its attention cannot be read.
    """
    depth = depth_of(pruner.layer, len(tower.blocks), behind=1)
    if pruner.keeps_all(tower.n_patches):
        return tower.finish(tower.hidden(images, len(tower.blocks)))
    tokens = tower.pruned(images, depth, pruner)
    for block in tower.blocks[depth:]:
        tokens = tower.step(block, tokens)
    return tower.finish(tokens)

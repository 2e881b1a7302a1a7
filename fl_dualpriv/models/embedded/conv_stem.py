"""The image tower of the embedded shelf task, by the name under which open_clip asks timm for it.

A convolutional stem turns an image of 48 x 48 pixels into 6 x 6 patch tokens, and three transformer blocks follow. The
stem learns from few images; the blocks have the patch tokens that visual token pruning needs. timm imports torchvision,
so `models.torchvision_shim` must be installed before this module is imported; `models.open_clip` does that.

Reference:
    Xiao et al. 2021, arXiv:2106.14881 (a convolutional stem in front of transformer blocks).
"""

import functools
from typing import Any

from timm.layers.hybrid_embed import HybridEmbed
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SIDE = 48
"""Height and width of the images that the tower reads, in pixels."""
GRID = 6
"""Patch tokens along each side of an image."""
WIDTH = 128
"""Size of a token."""
_CHANNELS = (32, 64, WIDTH, WIDTH, WIDTH, WIDTH)
_STRIDES = (2, 1, 2, 2, 1, 1)


class ConvStem(nn.Sequential):
    """Six 3 x 3 convolutions, each with a batch norm and a GELU: images (n, 3, 48, 48) → (n, 128, 6, 6)."""

    num_features = WIDTH

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        before = 3
        for channels, stride in zip(_CHANNELS, _STRIDES, strict=True):
            layers += [
                nn.Conv2d(before, channels, kernel_size=3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.GELU(),
            ]
            before = channels
        super().__init__(*layers)


class StemEmbed(HybridEmbed):
    """timm's patch embedding by a `ConvStem` and nothing behind it: images → tokens (n, 36, 128)."""

    def __init__(self, **options: Any) -> None:
        del options  # the sizes of timm's own embedding; those of this one are fixed
        super().__init__(
            ConvStem(), img_size=SIDE, patch_size=1, feature_size=(GRID, GRID), embed_dim=WIDTH, proj=False
        )

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the patch tokens along each side; timm would guess the stem's reduction of the size."""
        del img_size
        return GRID, GRID


@functools.cache
def register() -> None:
    """Make the tower known to timm under the name ``vit_conv_stem_48``; it may be called any number of times."""
    register_model(vit_conv_stem_48)


def vit_conv_stem_48(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Return the tower with random weights; ``options`` are timm's, which describe published weights.

    Raises:
        ValueError: If published weights are asked for, because there are none.
    """
    del options
    if pretrained:
        raise ValueError("vit_conv_stem_48 has no published weights; load those of the embedded shelf task")
    model = VisionTransformer(
        img_size=SIDE,
        patch_size=1,
        embed_dim=WIDTH,
        depth=3,
        num_heads=4,
        mlp_ratio=3,
        num_classes=0,
        embed_layer=StemEmbed,
    )
    object.__setattr__(model, "default_cfg", {"input_size": (3, SIDE, SIDE)})  # open_clip reads it; no module
    return model

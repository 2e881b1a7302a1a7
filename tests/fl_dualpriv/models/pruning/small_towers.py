"""Small image towers with random weights, of every kind that can be pruned, beside the model's own forward pass."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_dualpriv.models import open_clip as site
from fl_dualpriv.models.pruning.in_tower import open_clip_tower, transformers_tower
from fl_dualpriv.models.pruning.towers import ImageTower
from fl_dualpriv.models.transformers import transformers

open_clip: Any = site.open_clip
SIZE = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}  # 16 patches
VISION = SIZE | {"hidden_size": 32, "intermediate_size": 64}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9,
        "bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 1}  # fmt: skip


@dataclass(frozen=True)
class SmallTower:
    """A model's image side.

    Attributes:
        module: The whole model, or its image side.
        tower: What the library makes of it.
        encode: The model's own forward pass.
    """

    module: Any
    tower: ImageTower
    encode: Callable[[Tensor], Tensor]


def images(n: int = 3, side: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def _fill(module: nn.Module) -> nn.Module:
    """Weights of ordinary size: libraries start some at zero, at one or at 1e-5, which would hide a wrong use."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            start = 1.0 if parameter.ndim < 2 else 0.0
            scale = 0.2 if parameter.ndim < 2 else max(0.1, parameter.shape[-1] ** -0.5)
            parameter.copy_(start + scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def _open_clip(**settings: Any) -> SmallTower:
    given = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2, "output_dim": 24}
    visual = _fill(open_clip.transformer.VisionTransformer(**(given | settings)))
    return SmallTower(visual, open_clip_tower(visual), visual)


def _timm(name: str, pool: str, image_size: int = 64) -> SmallTower:
    visual = _fill(open_clip.timm_model.TimmModel(name, embed_dim=24, image_size=image_size, pool=pool))
    return SmallTower(visual, open_clip_tower(visual), visual)


def _eva(pool: str, **settings: Any) -> SmallTower:
    """timm's Eva as EVA-02 (rotations, SwiGLU), EVA-01 (absolute positions) and PE (other rotations) use it."""
    from timm.models.eva import Eva

    given: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    trunk = Eva(**(given | {"num_classes": 24, "global_pool": pool} | settings))
    visual = open_clip.timm_model.TimmModel("test_vit", embed_dim=24, image_size=32, pool="token")
    visual.trunk, visual.head, visual.image_size = trunk, nn.Identity(), (32, 32)
    _fill(visual)
    return SmallTower(visual, open_clip_tower(visual), visual)


def _transformers(kind: str) -> SmallTower:
    config = getattr(transformers, f"{kind}Config")(text_config=TEXT, vision_config=VISION)
    model: Any = _fill(getattr(transformers, f"{kind}Model")(config))
    encode = lambda x: model.get_image_features(pixel_values=x).pooler_output  # noqa: E731
    return SmallTower(model, transformers_tower(model), encode)


def vision_model(kind: str, attention: str = "sdpa") -> Any:
    """A ``CLIPVisionModel`` or ``SiglipVisionModel``, the same weights for each attention implementation."""
    config = getattr(transformers, f"{kind}VisionConfig")(**VISION, attn_implementation=attention)
    return _fill(getattr(transformers, f"{kind}VisionModel")(config))


MAKE: dict[str, Callable[[], SmallTower]] = {
    "open_clip": _open_clip,
    "open_clip, average": functools.partial(_open_clip, pool_type="avg"),
    "open_clip, attention pool": functools.partial(_open_clip, attentional_pool=True, attn_pooler_heads=2),
    "timm, CLS": functools.partial(_timm, "test_vit", "token"),
    "timm, register and average": functools.partial(_timm, "test_vit2", "avg"),
    "timm, register and attention pool": functools.partial(_timm, "test_vit3", "map", 160),  # it reads no other size
    "EVA-02": functools.partial(_eva, "token", use_rot_pos_emb=True, swiglu_mlp=True, qkv_fused=False),
    "EVA-02, fused": functools.partial(
        _eva, "avg", use_rot_pos_emb=True, scale_attn_inner=True, norm_layer=nn.LayerNorm
    ),
    "EVA-01": functools.partial(_eva, "token", use_post_norm=True),
    "PE": functools.partial(
        _eva,
        "map",
        use_rot_pos_emb=True,
        attn_type="rope",
        class_token=True,
        rope_grid_indexing="xy",
        use_fc_norm=False,
    ),
    "transformers CLIP": functools.partial(_transformers, "CLIP"),
    "transformers SigLIP": functools.partial(_transformers, "Siglip"),
}
KINDS = sorted(MAKE)


@functools.cache
def small(kind: str) -> SmallTower:
    """The tower of a kind; made once."""
    return MAKE[kind]()


def images_for(kind: str, n: int = 3, seed: int = 1) -> Tensor:
    return images(n, small(kind).tower.image_size[0], seed)

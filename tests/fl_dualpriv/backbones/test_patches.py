"""Features of patches: what the model reads from CLS, read from each patch; and models that have none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv.backbones.backbone import load_backbone
from fl_dualpriv.backbones.patches import PatchEncoder
from fl_dualpriv.data.feature_cache import SHARD
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.image_features import ImageFeatures
from tests.fl_dualpriv.test_image_features import Drawn


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_each_patch_is_read_as_cls_is(tiny_clip_dir: Path):
    backbone: Any = load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu")
    visual, kept = backbone._model.visual, []
    hook = visual.transformer.register_forward_hook(lambda module, args, out: kept.append(out))
    whole = backbone.image_features(images(3))
    hook.remove()
    tokens = torch.nn.functional.normalize(visual.ln_post(kept[0]) @ visual.proj, dim=-1)
    torch.testing.assert_close(tokens[:, 0], whole)  # so it is the way to read a token
    found = backbone.patch_features(images(3))
    assert found.shape == (3, backbone.n_patches, backbone.embed_dim) == (3, 16, 32)
    torch.testing.assert_close(found, tokens[:, 1:])
    assert backbone.patch_features(images(0)).shape == (0, 16, 32)


def test_images_do_not_mix(tiny_clip_dir: Path):
    backbone = load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu")
    batch, spoilt = images(3), images(3)
    spoilt[1] = torch.nan
    found = backbone.patch_features(spoilt)
    assert torch.equal(found[[0, 2]], backbone.patch_features(batch)[[0, 2]])
    assert torch.isnan(found[1]).all()


def test_a_model_that_pools_its_tokens_is_refused(make_clip_dir: Callable[..., Path]):
    folder = make_clip_dir({"vision_cfg": {"pool_type": "avg"}})
    backbone = load_backbone(f"local-dir:{folder}", "", "cpu")
    with pytest.raises(ConfigError, match="reads CLS"):
        PatchEncoder(backbone)


def test_patches_are_kept_as_images_are(tiny_clip_dir: Path, tmp_path: Path):
    backbone = load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu")
    encoder = PatchEncoder(backbone)
    drawn = Drawn(20, (3,))  # number 3 cannot be read
    rows = ImageFeatures(encoder, drawn, tmp_path).rows(np.arange(20))
    again = ImageFeatures(encoder, drawn, tmp_path).rows(np.arange(20))
    assert np.array_equal(rows, again, equal_nan=True)
    assert rows.shape == (20, 16 * 32)
    assert np.flatnonzero(np.isnan(rows).all(axis=1)).tolist() == [3]
    assert encoder.feature_key != backbone.feature_key  # or they would be taken for features of images
    assert len(list(tmp_path.glob("*/shard-*.npy"))) == -(-20 // SHARD)

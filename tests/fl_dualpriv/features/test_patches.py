"""Features of patches: what the model reads from CLS, read from each patch; and models that have none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.features.cache import SHARD
from fl_dualpriv.features.images import ImageFeatures
from fl_dualpriv.features.patches import PatchEncoder
from fl_dualpriv.models.load import load_backbone
from fl_dualpriv.models.pruning.in_tower import PatchReading
from tests.fl_dualpriv.features.test_images import Drawn


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
    found = backbone.patch_features(images(3), "token")
    assert found.shape == (3, backbone.n_patches, backbone.embed_dim) == (3, 16, 32)
    torch.testing.assert_close(found, tokens[:, 1:])
    assert backbone.patch_features(images(0), "token").shape == (0, 16, 32)


def test_a_patch_alone_is_what_cls_sees_of_it_in_the_last_block(tiny_clip_dir: Path):
    backbone: Any = load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu")
    visual, kept = backbone._model.visual, []
    hook = visual.transformer.resblocks[-1].register_forward_hook(lambda module, args, out: kept.append(args[0]))
    backbone.image_features(images(3))
    hook.remove()
    found, tokens = backbone.patch_features(images(3), "isolated"), kept[0]
    assert found.shape == (3, 16, 32)
    for patch in (0, 7, 15):
        with torch.no_grad():
            cls = visual.transformer.resblocks[-1](tokens[:, [0, 1 + patch]])[:, 0]
            expected = torch.nn.functional.normalize(visual.ln_post(cls) @ visual.proj, dim=-1)
        torch.testing.assert_close(found[:, patch], expected)
    assert backbone.patch_features(images(0), "isolated").shape == (0, 16, 32)


@pytest.mark.parametrize("reading", ["token", "isolated"])
def test_a_model_of_transformers_is_read_alike(hf_clip_dir: Path, reading: PatchReading):
    backbone: Any = load_backbone(f"hf:{hf_clip_dir}", "", "cpu")
    model, side = backbone._model, backbone.image_tower().image_size[0]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    vision = model.vision_model
    with torch.no_grad():
        states = vision(pixel_values=pixels, output_hidden_states=True).hidden_states
        tokens = states[-1][:, 1:]
        if reading == "isolated":
            last, count = vision.encoder.layers[-1], tokens.shape[1]
            pairs = [states[-2][:, [0, 1 + patch]] for patch in range(count)]
            tokens = torch.stack([last(pair, attention_mask=None)[:, 0] for pair in pairs], dim=1)
        expected = model.visual_projection(vision.post_layernorm(tokens))
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(backbone.patch_features(pixels, reading), expected)


@pytest.mark.parametrize("reading", ["token", "isolated"])
def test_images_do_not_mix(tiny_clip_dir: Path, reading: PatchReading):
    backbone = load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu")
    batch, spoilt = images(3), images(3)
    spoilt[1] = torch.nan
    found = backbone.patch_features(spoilt, reading)
    assert torch.equal(found[[0, 2]], backbone.patch_features(batch, reading)[[0, 2]])
    assert torch.isnan(found[1]).all()


def test_a_model_that_pools_its_tokens_is_refused(make_clip_dir: Callable[..., Path]):
    folder = make_clip_dir({"vision_cfg": {"pool_type": "avg"}})
    backbone = load_backbone(f"local-dir:{folder}", "", "cpu")
    with pytest.raises(ConfigError, match="reads CLS"):
        PatchEncoder(backbone, "token")


def test_patches_are_kept_as_images_are(tiny_clip_dir: Path, tmp_path: Path):
    backbone = load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu")
    encoder = PatchEncoder(backbone, "token")
    drawn = Drawn(20, (3,))  # number 3 cannot be read
    rows = ImageFeatures(encoder, drawn, tmp_path).rows(np.arange(20))
    again = ImageFeatures(encoder, drawn, tmp_path).rows(np.arange(20))
    assert np.array_equal(rows, again, equal_nan=True)
    assert rows.shape == (20, 16 * 32)
    assert np.flatnonzero(np.isnan(rows).all(axis=1)).tolist() == [3]
    # Or they would be taken for features of images, or for those of another reading.
    assert len({encoder.feature_key, PatchEncoder(backbone, "isolated").feature_key, backbone.feature_key}) == 3
    assert len(list(tmp_path.glob("*/shard-*.npy"))) == -(-20 // SHARD)

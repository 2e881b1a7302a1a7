"""An image's features depend on that image alone: what record-level privacy asks of anything before the gradient."""

import pytest
import torch

from fl_dualpriv.backbones.open_clip import OpenClipBackbone, load_backbone

# With another batch size or place in the batch, matrix products may sum in another order: float32 rounding of unit-norm
# features. A leak of one image into another would be of the order of the features, about 0.2 per entry here.
ROUNDING = 1e-6


@pytest.fixture(params=[1.0, 0.5, 0.1], ids=["plain", "half", "tenth"])
def backbone(request: pytest.FixtureRequest, tiny_clip_dir) -> OpenClipBackbone:
    return load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", request.param, 1)


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e6], ids=["others", "black", "huge"])
def test_values_of_the_batch_mates_never_matter(backbone: OpenClipBackbone, scale: float):
    batch = images(5)
    changed = batch.clone()
    changed[[0, 1, 3, 4]] = scale * images(4, seed=7)
    # Same shape, so the same order of summation: bitwise.
    assert torch.equal(backbone.image_features(batch)[2], backbone.image_features(changed)[2])
    if scale:
        assert not torch.equal(backbone.image_features(batch)[1], backbone.image_features(changed)[1])


def test_batch_equals_one_by_one(backbone: OpenClipBackbone):
    batch = images(7)
    alone = torch.cat([backbone.image_features(image[None]) for image in batch])
    torch.testing.assert_close(backbone.image_features(batch), alone, rtol=0, atol=ROUNDING)


def test_permuting_the_batch_permutes_the_features(backbone: OpenClipBackbone):
    batch, order = images(6), torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = backbone.image_features(batch[order])
    torch.testing.assert_close(permuted, backbone.image_features(batch)[order], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("whole", [True, False], ids=["whole image", "one pixel"])
def test_a_non_finite_image_ruins_only_its_own_row(backbone: OpenClipBackbone, bad: float, whole: bool):
    batch = images(4)
    spoiled = batch.clone()
    if whole:
        spoiled[1] = bad
    else:
        spoiled[1, 2, 17, 5] = bad
    good = [0, 2, 3]
    features = backbone.image_features(spoiled)
    assert features[1].isnan().all()
    assert torch.equal(features[good], backbone.image_features(batch)[good])

"""The image tower of the shelf task: open_clip builds it by its name, and token pruning knows its parts."""

import pytest
import torch

from fl_dualpriv.models.open_clip import conv_stem, load_backbone
from fl_dualpriv.models.pruning.in_tower import encode_pruned, open_clip_tower
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def test_the_embedded_model_loads_and_gives_unit_features(images: torch.Tensor):
    features = load_backbone("shelf", "", "cpu").image_features(images)
    assert features.shape == (3, 128)
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5)


def test_the_tower_in_parts_equals_the_model(images: torch.Tensor):
    model = load_backbone("shelf", "", "cpu")._model
    tower = open_clip_tower(model.visual)
    assert (tower.n_patches, tower.n_prefix, len(tower.blocks)) == (36, 1, 3)
    with torch.no_grad():
        assert torch.equal(tower.finish(tower.hidden(images, 3)), model.encode_image(images))


def test_pruning_shortens_each_image_by_itself(images: torch.Tensor):
    tower = open_clip_tower(load_backbone("shelf", "", "cpu")._model.visual)
    pruner = VisualTokenPruner(layer=1, keep_ratio=0.75, contextual=1)
    with torch.no_grad():
        assert tower.pruned(images, 1, pruner).shape == (3, 1 + 27 + 1, 128)
        together = encode_pruned(tower, images, pruner)
        alone = torch.cat([encode_pruned(tower, image[None], pruner) for image in images])
    # Sums of a few hundred products in another order: about 1e-6 relative to entries of order 10.
    assert torch.allclose(together, alone, atol=1e-3)


def test_there_are_no_published_weights():
    with pytest.raises(ValueError, match="has no published weights"):
        conv_stem.vit_conv_stem_48(pretrained=True)

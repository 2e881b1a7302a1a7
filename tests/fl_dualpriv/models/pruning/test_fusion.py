"""Clusters and their merges against a loop over images, centres and tokens; fusion noise."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv.models.pruning.fusion import attention_weights, cluster_weights, fusion_noise, mix
from tests.fl_dualpriv.models.pruning.small_towers import images


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(keys: Tensor, tokens: Tensor, k: int, merge: str) -> Tensor:
    """The published steps for one image (rest, …), one token after the other."""
    rest = len(tokens)
    centres = list(range(0, rest, rest // k))[:k]
    clusters: dict[int, list[int]] = {c: [] for c in centres}
    for token in (t for t in range(rest) if t not in centres):
        cosine = [float(keys[token] @ keys[c] / (keys[token].norm() * keys[c].norm())) for c in centres]
        clusters[centres[cosine.index(max(cosine))]].append(token)
    fused = []
    for centre, members in clusters.items():
        if merge == "sum":
            mean = torch.stack([tokens[m] for m in members]).mean(dim=0) if members else 0.0
            fused.append(tokens[centre] + mean)
        else:
            fused.append(torch.stack([tokens[m] for m in (centre, *members)]).mean(dim=0))
    return torch.stack(fused)


@pytest.mark.parametrize("merge", ["average", "sum"])
@pytest.mark.parametrize(("rest", "k"), [(11, 1), (11, 2), (11, 3), (12, 4), (11, 6), (11, 10), (11, 11)])
def test_clusters_as_published(rest: int, k: int, merge: Any):
    keys, tokens = drawn(5, rest, 6), drawn(5, rest, 8, seed=1)
    fused = mix(cluster_weights(keys, k, merge), tokens)
    expected = torch.stack([by_hand(keys[i], tokens[i], k, merge) for i in range(5)])
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)


def test_the_published_sum_doubles_what_is_alike():
    tokens = drawn(2, 1, 8).expand(-1, 6, -1)
    keys = drawn(2, 6, 4, seed=1)
    torch.testing.assert_close(mix(cluster_weights(keys, 1, "sum"), tokens), 2 * tokens[:, :1])
    torch.testing.assert_close(mix(cluster_weights(keys, 1, "average"), tokens), tokens[:, :1])


def test_a_centre_stays_with_itself_though_an_earlier_one_has_its_key():
    # Tokens 0 and 2 are the centres and have one key; each must keep its own cluster.
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    weights = cluster_weights(keys, 2, "average")
    assert weights[0, 0].tolist() == [pytest.approx(1 / 3), pytest.approx(1 / 3), 0, pytest.approx(1 / 3)]
    assert weights[0, 1].tolist() == [0, 0, 1, 0]


def test_keys_of_length_zero_are_no_error():
    assert cluster_weights(torch.zeros(1, 5, 3), 2, "sum").isfinite().all()


def test_attention_weights_are_shares():
    weights = attention_weights(torch.tensor([[0.1, 0.3], [0.0, 0.0]]))
    torch.testing.assert_close(weights, torch.tensor([[[0.25, 0.75]], [[0.5, 0.5]]]))


def test_fusion_noise_has_its_scale():
    # 4 x 50 000 draws: the standard error of the deviation is 0.16 %, of the mean 0.0022 x 0.3.
    noise = fusion_noise(images(4), (10, 5000), 0.3, 0).numpy()
    assert abs(noise.std() / 0.3 - 1) < 0.01
    assert abs(noise.mean()) < 0.3 * 0.015
    assert np.abs(np.corrcoef(noise.reshape(4, -1)) - np.eye(4)).max() < 0.03  # images have their own


def test_fusion_noise_is_the_images_own_and_repeats():
    pixels = images(4)
    noise = fusion_noise(pixels, (2, 8), 1.0, 0)
    assert torch.equal(noise, fusion_noise(pixels, (2, 8), 1.0, 0))
    assert torch.equal(noise[[2]], fusion_noise(pixels[[2]], (2, 8), 1.0, 0))  # whoever stands beside it
    assert not torch.equal(noise, fusion_noise(pixels, (2, 8), 1.0, 1))
    changed = pixels.clone()
    changed[2, 0, 0, 0] += 1e-3
    other = fusion_noise(changed, (2, 8), 1.0, 0)
    assert [bool((other[i] != noise[i]).all()) for i in range(4)] == [False, False, True, False]


def test_fusion_noise_of_a_non_finite_image_and_of_none():
    assert fusion_noise(torch.full((1, 3, 4, 4), float("nan")), (2, 8), 1.0, 0).isfinite().all()
    assert fusion_noise(images(0), (2, 8), 1.0, 0).shape == (0, 2, 8)


def test_fusion_noise_claims_no_epsilon():
    assert "NO ε" in (fusion_noise.__doc__ or "")

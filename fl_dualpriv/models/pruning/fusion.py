"""Fuse the tokens that are not kept: clusters around centres (as published), or one attention-weighted token (EViT).

Every form multiplies a matrix of mixing weights, (fused, rest) for each image, by the tokens that are not kept.
"""

import hashlib
from typing import Literal

import torch
from torch import Tensor, nn

from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey, gaussian_noise


def cluster_weights(keys: Tensor, n_fused: int, merge: Literal["average", "sum"]) -> Tensor:
    """Compute mixing weights of clusters around every ``floor(rest / n_fused)``-th token.

    Every other token joins the centre whose key has the largest cosine similarity with its own key. ``sum``, as
    published, is the centre plus the mean of its members: about twice as long as a token if they are alike. ``average``
    is the mean of the cluster, centre included.

    Guarantee:
        Per image: row i of the result depends only on row i of ``keys``.

    Args:
        keys: Keys of the attention averaged over heads, (n, rest, head_dim).
        n_fused: Number of centres k, 1 to ``rest``.
        merge: ``sum`` or ``average``, see above.

    Returns:
        Mixing weights (n, k, rest), float32.

    Reference:
        Dual-Priv (arXiv:2506.07077), Mechanism 1: c_i = v_center,i + 1/|C_i| Σ v_j; centres and keys as in VisionZip
        (arXiv:2412.04467), whose steps it follows.
    """
    centres = torch.arange(n_fused, device=keys.device) * (keys.shape[1] // n_fused)
    unit = nn.functional.normalize(keys.float(), dim=-1)
    nearest = (unit @ unit[:, centres].mT).argmax(dim=-1)
    nearest[:, centres] = torch.arange(n_fused, device=keys.device)  # even if another centre has an equal key
    cluster = nn.functional.one_hot(nearest, n_fused).mT.float()
    if merge == "average":
        return cluster / cluster.sum(dim=-1, keepdim=True)
    centre = nn.functional.one_hot(centres, keys.shape[1]).float()
    members = cluster - centre
    return centre + members / members.sum(dim=-1, keepdim=True).clamp(min=1)


def attention_weights(attention: Tensor) -> Tensor:
    """Compute mixing weights of one fused token: each token's share of the attention to the rest.

    Args:
        attention: Attention to each token of the rest, (n, rest), not negative.

    Returns:
        Mixing weights (n, 1, rest); each row sums to 1.

    Reference:
        EViT, Liang et al. 2022, arXiv:2202.07800.
    """
    total = attention.sum(dim=1, keepdim=True)
    # Attention can underflow to zero for every token of the rest. The limit is then a plain mean.
    equal = torch.full_like(attention, 1 / max(1, attention.shape[1]))
    return torch.where(total == 0, equal, attention / total).unsqueeze(1)


def mix(weights: Tensor, tokens: Tensor) -> Tensor:
    """Mix tokens: weights (n, fused, rest) and tokens (n, rest, dim) → (n, fused, dim), summed at least in float32."""
    fused = [(row.unsqueeze(-1) * tokens).sum(dim=1) for row in weights.unbind(dim=1)]
    return torch.stack(fused, dim=1).to(tokens.dtype)


def fusion_noise(images: Tensor, shape: tuple[int, int], std: float, seed: int) -> Tensor:
    """Draw the paper's "heuristic" noise on fused tokens. It has NO ε: no code accounts for it, and none may.

    Each image has a separate stream, keyed by the seed and a hash of the image's pixels. Noise from the operating
    system would make cached features depend on the process that computed them first, and would not protect more. The
    pixels are hashed and not the tokens, because tokens round differently in batches of another size.

    Guarantee:
        No privacy guarantee. Row i depends only on image i, ``std`` and ``seed``. The map from a record to its features
        therefore stays a map of single records, and every DP mechanism that follows keeps its ε.

    Args:
        images: Preprocessed images, (n, 3, height, width).
        shape: Shape of an image's noise, (fused, dim).
        std: Standard deviation in the units of the tokens.
        seed: Seed of the run.

    Returns:
        Noise (n, fused, dim), float64 on the CPU.
    """
    pixels = images.detach().float().cpu().contiguous().numpy()
    purposes = [f"fusion-noise/{hashlib.sha256(image.tobytes()).hexdigest()}" for image in pixels]
    rows = [gaussian_noise(KeyedRandom(StreamKey(seed=seed, purpose=p)), shape, std) for p in purposes]
    return torch.stack(rows) if rows else torch.zeros(0, *shape, dtype=torch.float64)

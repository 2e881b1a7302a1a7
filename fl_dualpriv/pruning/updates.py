"""Update pruning (Dual-Priv, arXiv:2506.07077, Mechanism 2): drop the blocks with the weakest *noised* gradient."""

import math

import torch
from torch import Tensor


def prune_update(noised_gradient: Tensor, keep_ratio: float) -> Tensor:
    """Zero all context tokens but the ``ceil(keep_ratio * n_ctx)`` with the largest gradient norm.

    Guarantee:
        A function of the noised gradient alone, hence post-processing: ε with pruning is ε without. Calling it on a
        gradient that is not yet noised would void the guarantee of the release.

    Args:
        noised_gradient: (…, n_ctx, ctx_dim), after clipping and noise. Block = one context token = one row; leading
            dimensions are clients, each pruned on its own.
        keep_ratio: In (0, 1]; 1 keeps everything.

    Raises:
        ValueError: If ``keep_ratio`` is outside (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio = {keep_ratio}; it must be in (0, 1]")
    if keep_ratio == 1:
        return noised_gradient
    kept = math.ceil(keep_ratio * noised_gradient.shape[-2])
    scores = torch.linalg.vector_norm(noised_gradient, dim=-1)
    mask = torch.zeros_like(scores).scatter_(-1, torch.topk(scores, kept).indices, 1.0)
    return noised_gradient * mask[..., None]

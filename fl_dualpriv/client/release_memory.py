"""Release memory of a client: named tensors from its own noised releases, and averages of known bias and noise.

All of it is computed from noised releases, so that remembering it costs no ε.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ReleaseMemory = Mapping[str, Tensor]
"""Name → tensor of one client, or of all clients of a cohort with a leading dimension."""

ReleaseMemoryShapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name → shape and type of one client's tensor."""


def empty_release_memory(shapes: ReleaseMemoryShapes) -> dict[str, Tensor]:
    """Return zeros of these shapes, the memory before the first release."""
    return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}


def stack_release_memories(release_memories: Sequence[ReleaseMemory]) -> dict[str, Tensor]:
    """Stack the release memories of some clients, which have the same names, along a leading client dimension."""
    return {
        name: torch.stack([release_memory[name] for release_memory in release_memories]) for name in release_memories[0]
    }


def unbiased(average: Tensor, decay: float, count: Tensor) -> Tensor:
    """Remove the bias of an exponential average towards its start at zero: divide by 1 − β^count.

    Args:
        average: Average (1 − β) Σ_i β^(count − i) x_i. It is zero where the count is zero, and so is the result.
        decay: Decay β in [0, 1).
        count: Number of averaged values; its shape broadcasts with ``average``.
    """
    seen = 1 - decay ** count.to(average.dtype)
    return average / torch.where(seen > 0, seen, 1.0)


def noise_left(decay: float, count: Tensor) -> Tensor:
    """Compute the share of the variance of independent noise that `unbiased` averages of ``count`` values still have.

    (1 − β)² Σ_{i<n} β^(2i) / (1 − β^n)² = (1 − β)(1 + β^n) / ((1 + β)(1 − β^n)): it is 1 for one value, and tends to
    (1 − β)/(1 + β) for many.

    Args:
        decay: Decay β in [0, 1).
        count: Number of values n >= 0.

    Returns:
        The share, float64; infinite where the count is 0.
    """
    power = decay ** count.to(torch.float64)
    return (1 - decay) * (1 + power) / ((1 + decay) * (1 - power))

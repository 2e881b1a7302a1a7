"""What a client remembers of its own noised releases: named tensors, and moving averages of known bias and noise.

Everything here is computed from what was released with noise, so remembering it costs no ε.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ReleaseMemory = Mapping[str, Tensor]
"""Name → tensor of one client, or of all clients of a cohort with a leading dimension."""

ReleaseMemoryShapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name → shape and type of one client's tensor."""


def empty_release_memory(shapes: ReleaseMemoryShapes) -> dict[str, Tensor]:
    """Zeros: nothing was released yet."""
    return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}


def stack_release_memories(release_memories: Sequence[ReleaseMemory]) -> dict[str, Tensor]:
    """Histories of some clients, all of the same names, with a leading dimension client."""
    return {
        name: torch.stack([release_memory[name] for release_memory in release_memories]) for name in release_memories[0]
    }


def unbiased(average: Tensor, decay: float, count: Tensor) -> Tensor:
    """Take the pull towards its start at zero out of an exponential average: divide by 1 − β^count.

    Args:
        average: (1 − β) Σ_i β^(count − i) x_i; zero where the count is zero, and stays so.
        decay: β in [0, 1).
        count: How many values it has seen; of a shape that broadcasts with it.
    """
    seen = 1 - decay ** count.to(average.dtype)
    return average / torch.where(seen > 0, seen, 1.0)


def noise_left(decay: float, count: Tensor) -> Tensor:
    """Share of the variance of independent noise that `unbiased` averages of ``count`` values still have.

    (1 − β)² Σ_{i<n} β^(2i) / (1 − β^n)² = (1 − β)(1 + β^n) / ((1 + β)(1 − β^n)): 1 for one value, and towards
    (1 − β)/(1 + β) for many.

    Args:
        decay: β in [0, 1).
        count: n >= 0; where it is 0 the result is infinite. Float64 is returned.
    """
    power = decay ** count.to(torch.float64)
    return (1 - decay) * (1 + power) / ((1 + decay) * (1 - power))

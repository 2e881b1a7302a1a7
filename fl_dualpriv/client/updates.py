"""Turn the noised gradients of some clients into directions: update pruning, then the optimizer, client by client."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.client.blocks import ComponentBlocks
from fl_dualpriv.client.optimizers import Optimizer
from fl_dualpriv.client.pruning import UpdatePruning
from fl_dualpriv.client.release_memory import ReleaseMemory, empty_release_memory, stack_release_memories
from fl_dualpriv.privacy.noise import RandomSource

Stream = Callable[[str, int], RandomSource]
"""(purpose, step) → a client's own random source."""


class UpdateRule:
    """Update rule for one round of clients that step together.

    Call `masks` and then `direction` for each step, and `release_memories` at the end.

    Guarantee:
        The output is a function of noised gradients, earlier and present ones, of public numbers and of coins. The
        masks of a step are known before its data are read. No client's numbers depend on another's.

    Args:
        pruning: Rule that selects the blocks that are followed.
        optimizer: Optimizer that turns noised gradients into directions.
        release_memories: Release memory of each client; empty before its first step.
        streams: Random sources of each client. If the rule needs coins, one source of purpose ``update-mask`` is used
            per step.
        noise_std: Std of the noise on each coordinate of a client's mean gradient, public, (client,); zeros without
            noise.
        like: Tensor with the shape of a gradient, (rows, cols), on its device.
    """

    def __init__(
        self,
        *,
        pruning: UpdatePruning,
        optimizer: Optimizer,
        release_memories: Sequence[ReleaseMemory],
        streams: Sequence[Stream],
        noise_std: Tensor,
        like: Tensor,
    ) -> None:
        self._pruning, self._optimizer, self._streams, self._noise_std = pruning, optimizer, streams, noise_std
        self._device, (rows, cols) = like.device, like.shape
        self._blocks = pruning.cut(rows, cols)
        shapes = {**pruning.release_memory_shapes(rows, cols), **optimizer.release_memory_shapes(rows, cols)}
        start = {name: tensor.to(self._device) for name, tensor in empty_release_memory(shapes).items()}
        self._release_memory: ReleaseMemory = stack_release_memories(
            [{**start, **release_memory} for release_memory in release_memories]
        )
        self._step, self._opened, self._closed = 0, None, None

    @property
    def cuts_components(self) -> bool:
        """True if `direction` needs the subspace bases of the step."""
        return self._blocks is None and self._pruning.is_on

    @property
    def closed(self) -> Tensor | None:
        """Coordinates that must not move in this step, (client, rows, cols); None if all may move."""
        return self._closed

    def masks(self, step: int) -> Tensor | None:
        """Return the mask of each example's gradient before the clip, (client, rows, cols); None for no mask."""
        self._step, self._opened = step, None
        if not self._pruning.masks_before_clip:
            return None
        assert self._blocks is not None  # components are refused before the clip
        self._opened = self._pruning.opened(self._release_memory, self._noise_std, self._draw, self._blocks)
        return self._blocks.spread(self._opened)

    def direction(self, release: Tensor, subspace_bases: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Prune a noised mean gradient (client, rows, cols), then apply the optimizer.

        Args:
            release: Noised mean gradient of this step, from gradients multiplied by `masks`.
            subspace_bases: Bases u and v of the step if blocks are components, else None.
        """
        if self._opened is not None and self._blocks is not None:
            self._release_memory = self._pruning.remember(self._release_memory, release, self._opened, self._blocks)
        gradient, weights = release, None
        blocks = self._blocks if subspace_bases is None else ComponentBlocks(*subspace_bases)
        if blocks is not None:
            gradient, weights = self._pruning.prune(release, self._opened, self._noise_std, self._draw, blocks)
        noise_std = self._noise_std[:, None, None] * (1.0 if weights is None else weights)
        self._closed = weights == 0 if weights is not None and self._pruning.frozen else None
        direction, self._release_memory = self._optimizer.direction(
            gradient, self._release_memory, noise_std, closed=self._closed
        )
        return direction

    def release_memories(self) -> list[ReleaseMemory]:
        """Return the current release memory of each client."""
        return [{name: tensor[i] for name, tensor in self._release_memory.items()} for i in range(len(self._streams))]

    def _draw(self, count: int) -> Tensor:
        coins = np.stack([stream("update-mask", self._step).uniforms(count) for stream in self._streams])
        return torch.from_numpy(coins).to(self._device)

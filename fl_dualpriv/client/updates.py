"""From the noised gradients of some clients to directions: update pruning, then the optimizer, client by client."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.client.blocks import ComponentBlocks
from fl_dualpriv.client.optimizers import Optimizer
from fl_dualpriv.client.pruning import UpdatePruning
from fl_dualpriv.client.release_memory import History, empty_history, stack_histories
from fl_dualpriv.privacy.noise import RandomSource

Stream = Callable[[str, int], RandomSource]
"""(purpose, step) → a client's own source."""


class Directions:
    """One round of clients that step together. For each step call `masks`, then `direction`; `histories` at the end.

    Guarantee:
        What comes out is a function of noised gradients, earlier and present ones, of public numbers and of coins; the
        masks of a step are known before its data are read. No client's numbers depend on another's.

    Args:
        pruning: Which blocks are followed.
        optimizer: What becomes of the gradients.
        histories: What each client remembers; empty before its first step.
        streams: Each client's sources; of purpose ``update-mask`` one per step is used, if the rule needs coins.
        noise_std: Std of the noise on each coordinate of a client's mean gradient, public, (client,); zeros without.
        like: A tensor of a gradient's shape, (rows, cols), on its device.
    """

    def __init__(
        self,
        *,
        pruning: UpdatePruning,
        optimizer: Optimizer,
        histories: Sequence[History],
        streams: Sequence[Stream],
        noise_std: Tensor,
        like: Tensor,
    ) -> None:
        self._pruning, self._optimizer, self._streams, self._noise_std = pruning, optimizer, streams, noise_std
        self._device, (rows, cols) = like.device, like.shape
        self._blocks = pruning.cut(rows, cols)
        shapes = {**pruning.history_shapes(rows, cols), **optimizer.history_shapes(rows, cols)}
        start = {name: tensor.to(self._device) for name, tensor in empty_history(shapes).items()}
        self._history: History = stack_histories([{**start, **history} for history in histories])
        self._step, self._opened, self._closed = 0, None, None

    @property
    def cuts_components(self) -> bool:
        """Whether `direction` needs the carriers of the step."""
        return self._blocks is None and self._pruning.is_on

    @property
    def closed(self) -> Tensor | None:
        """Coordinates that must not move in this step, (client, rows, cols); None: all may."""
        return self._closed

    def masks(self, step: int) -> Tensor | None:
        """What each example's gradient is multiplied with before the clip, (client, rows, cols); None: nothing."""
        self._step, self._opened = step, None
        if not self._pruning.masks_before_clip:
            return None
        assert self._blocks is not None  # components are refused before the clip
        self._opened = self._pruning.opened(self._history, self._noise_std, self._draw, self._blocks)
        return self._blocks.spread(self._opened)

    def direction(self, release: Tensor, carriers: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Prune a noised mean gradient (client, rows, cols), then let the optimizer have it.

        Args:
            release: Of this step, from gradients multiplied by `masks`.
            carriers: u and v of the step, where blocks are components.
        """
        if self._opened is not None and self._blocks is not None:
            self._history = self._pruning.remember(self._history, release, self._opened, self._blocks)
        gradient, weights = release, None
        blocks = self._blocks if carriers is None else ComponentBlocks(*carriers)
        if blocks is not None:
            gradient, weights = self._pruning.prune(release, self._opened, self._noise_std, self._draw, blocks)
        noise_std = self._noise_std[:, None, None] * (1.0 if weights is None else weights)
        self._closed = weights == 0 if weights is not None and self._pruning.frozen else None
        direction, self._history = self._optimizer.direction(gradient, self._history, noise_std, closed=self._closed)
        return direction

    def histories(self) -> list[History]:
        """What each client now remembers."""
        return [{name: tensor[i] for name, tensor in self._history.items()} for i in range(len(self._streams))]

    def _draw(self, count: int) -> Tensor:
        coins = np.stack([stream("update-mask", self._step).uniforms(count) for stream in self._streams])
        return torch.from_numpy(coins).to(self._device)

"""Update directions from released gradients: momentum and Adam as post-processing, aware of pruned blocks.

A client's gradient is noised before it comes here, and the optimizer remembers only noised gradients, so it costs no ε.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fl_dualpriv.client.release_memory import ReleaseMemory, ReleaseMemoryShapes, noise_left, unbiased

Name = Literal["sgd", "momentum", "adam", "adam-corrected"]

_FIRST, _SECOND, _NOISE, _COUNT = "optimizer.first", "optimizer.second", "optimizer.noise", "optimizer.count"
_SECOND_DECAY = 0.999
_TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Map from a noised gradient to a direction, which the caller scales with its learning rates.

    Guarantee:
        The direction is a function of only noised releases and public numbers, hence post-processing.

    Attributes:
        name: ``sgd``: the gradient itself, bit by bit. ``momentum``: heavy ball, m ← μ m + g, direction m. ``adam``:
            Kingma and Ba's Adam, both averages unbiased, second decay 0.999. ``adam-corrected``: Adam whose second
            moment is corrected by the noise's share Φ, which is known: m̂ / √max(v̂ − Φ, γ). Without the correction the
            noise dominates v̂, so that Adam divides all coordinates by about the scale of the noise and is SGD with
            another step size.
        momentum: μ, or Adam's first decay; in [0, 1). ``sgd`` does not read it.

    Raises:
        ValueError: If ``momentum`` is out of range.

    Reference:
        Tang, Shpilevskiy and Lécuyer 2024 (DP-AdamBC), arXiv:2312.14334. Their γ is a hyper-parameter; here it is one
        standard deviation of the noise in v̂ itself, below which v̂ − Φ cannot be distinguished from zero.
    """

    name: Name
    momentum: float

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum = {self.momentum}; it must be in [0, 1)")

    def release_memory_shapes(self, rows: int, cols: int) -> ReleaseMemoryShapes:
        """Return the shapes of the tensors that a client remembers for the optimizer."""
        names = {
            "sgd": (),
            "momentum": (_FIRST,),
            "adam": (_FIRST, _SECOND),
            "adam-corrected": (_FIRST, _SECOND, _NOISE),
        }[self.name]
        shape = (rows, cols)
        counted = {_COUNT: (shape, torch.int64)} if self.name.startswith("adam") else {}
        return dict.fromkeys(names, (shape, torch.float32)) | counted

    def direction(
        self, gradient: Tensor, release_memory: ReleaseMemory, noise_std: Tensor, *, closed: Tensor | None = None
    ) -> tuple[Tensor, ReleaseMemory]:
        """Take one step.

        Args:
            gradient: Noised and pruned gradient, (client, rows, cols).
            release_memory: Stacked release memory, see `release_memory_shapes`. Other names are passed through.
            noise_std: Std of the noise in each coordinate of ``gradient``, (client, rows, cols); read by
                ``adam-corrected``.
            closed: Coordinates that must not move. Their direction is zero and their release memory does not change, so
                that they later continue from it. With None, all coordinates may move: a pruned block has a zero
                gradient, which the averages take as a value, and momentum still moves it.

        Returns:
            The direction, which the caller subtracts, and the new release memory.
        """
        if self.name == "sgd":
            return gradient, release_memory
        moved = self._advance(gradient, release_memory, noise_std)
        direction = self._read(moved)
        if closed is not None:
            direction = torch.where(closed, 0.0, direction)
            moved = {name: torch.where(closed, release_memory[name], value) for name, value in moved.items()}
        return direction, {**release_memory, **moved}

    def _advance(self, gradient: Tensor, release_memory: ReleaseMemory, noise_std: Tensor) -> dict[str, Tensor]:
        if self.name == "momentum":
            return {_FIRST: self.momentum * release_memory[_FIRST] + gradient}
        moved = {
            _FIRST: torch.lerp(gradient, release_memory[_FIRST], self.momentum),
            _SECOND: torch.lerp(gradient.square(), release_memory[_SECOND], _SECOND_DECAY),
            _COUNT: release_memory[_COUNT] + 1,
        }
        if self.name == "adam-corrected":
            variance = noise_std.to(gradient.dtype).square()
            moved[_NOISE] = torch.lerp(variance, release_memory[_NOISE], _SECOND_DECAY)
        return moved

    def _read(self, moved: ReleaseMemory) -> Tensor:
        if self.name == "momentum":
            return moved[_FIRST]
        count = moved[_COUNT]
        first = unbiased(moved[_FIRST], self.momentum, count)
        second = unbiased(moved[_SECOND], _SECOND_DECAY, count)
        if self.name == "adam":
            return first / (second.sqrt() + _TINY)
        noise = unbiased(moved[_NOISE], _SECOND_DECAY, count)
        # The square of a normal variable has variance 2 s⁴; averaging leaves the share `noise_left` of it.
        least = noise * (2 * noise_left(_SECOND_DECAY, count)).sqrt().to(noise.dtype)
        return first / torch.maximum(second - noise, least).clamp_min(_TINY**2).sqrt()


SGD = Optimizer(name="sgd", momentum=0.0)

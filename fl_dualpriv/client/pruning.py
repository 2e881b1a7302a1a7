"""Update pruning: select the blocks of a released gradient that a client follows, and leave out the others.

Dual-Priv (arXiv:2506.07077, Mechanism 2) keeps the blocks of largest *noised* gradient. This module also has its
control (a random mask) and two stronger forms. The first is a mask from past releases, applied before the clip so that
no part of the clip norm is spent on frozen blocks. The second is shrinkage instead of a cut. No rule ever sees a clean
gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fl_dualpriv.client.blocks import Block, Blocks, CoordinateBlocks
from fl_dualpriv.client.release_memory import ReleaseMemory, ReleaseMemoryShapes, noise_left, unbiased

Rule = Literal["noised", "random", "past", "random-past", "shrink"]
Draw = Callable[[int], Tensor]
"""Count → that many uniforms from each client's own stream, (client, count) float64; called at most once per step."""

_BEFORE_CLIP = ("past", "random-past")
_AVERAGE, _SEEN = "past.average", "past.seen"


class Pruned(NamedTuple):
    """A pruned gradient.

    Attributes:
        gradient: Gradient after pruning, (client, rows, cols).
        weights: Factor of each coordinate, (client, rows, cols). None if all factors are one or the blocks are
            components.
    """

    gradient: Tensor
    weights: Tensor | None


@dataclass(frozen=True, kw_only=True)
class UpdatePruning:
    """One rule of update pruning.

    Guarantee:
        The choice of blocks is a function of noised releases and of coins that are independent of all data. The rules
        ``noised``, ``random`` and ``shrink`` are post-processing of the release they prune. ``past`` and
        ``random-past`` multiply each example's gradient by a mask m that is known before the step. This is a
        per-example map, so the sum of clip(m ⊙ g_i) has sensitivity C as before, and the step is one more adaptively
        chosen Gaussian mechanism with the same multiplier. The noise is still added to every coordinate, and the
        release is masked after. On a closed block the clean sum is exactly zero, so the discarded part is only
        independent noise, and the rest has the law of noise drawn only on the open blocks. ε is the same with every
        rule and without.

    Attributes:
        rule: ``noised``: keep the blocks of largest root mean square in the noised gradient (as published). ``random``:
            keep as many blocks, drawn at random, after the noise. ``past``: before the clip, open the blocks of largest
            debiased energy in past releases. ``random-past``: before the clip, open blocks drawn at random.
            ``shrink``: scale every block down by its share of noise (James-Stein).
        keep_ratio: Share of kept blocks, in (0, 1]: of n blocks, ceil(keep_ratio · n) are kept. 1 switches every rule
            off, including ``shrink``, which reads nothing else from it.
        block: Unit that is kept or dropped as a whole; ``component`` is possible only after the noise.
        frozen: If True, a dropped block does not move, even if an optimizer remembers gradients of it. Else its
            gradient is zero.
        warm_up: For ``past``: number of releases of all blocks before the first cut.
        exploration: For ``past``: share of the blocks that would be closed, rounded up, that is opened at random in
            each step. Without exploration a closed block is never seen again.
        floor: For ``shrink``: least weight of a block.
        decay: For ``past``: decay β of the average over releases.
        segments: Widths of ``matrix`` blocks, see `CoordinateBlocks`.

    Raises:
        ValueError: If a number is out of its range, or a mask before the clip is asked for components.
    """

    rule: Rule
    keep_ratio: float
    block: Block
    frozen: bool
    warm_up: int
    exploration: float
    floor: float = 0.2
    decay: float = 0.9
    segments: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio = {self.keep_ratio}; it must be in (0, 1]")
        for name, value in (("exploration", self.exploration), ("floor", self.floor)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value}; it must be in [0, 1]")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay = {self.decay}; it must be in [0, 1)")
        if self.warm_up < 0:
            raise ValueError(f"warm_up = {self.warm_up}; it must be >= 0")
        if self.block == "component" and self.masks_before_clip:
            raise ValueError(
                f"rule = {self.rule} needs fixed blocks, but components turn with every step; choose another block, "
                "for example token"
            )

    @property
    def is_on(self) -> bool:
        """True if any block may be pruned."""
        return self.keep_ratio < 1

    @property
    def masks_before_clip(self) -> bool:
        """True if each example's gradient is masked before the clip."""
        return self.is_on and self.rule in _BEFORE_CLIP

    def cut(self, rows: int, cols: int) -> CoordinateBlocks | None:
        """Return the blocks of a gradient of this shape; None for components, which need the step's subspace bases."""
        if self.block == "component":
            return None
        return CoordinateBlocks(kind=self.block, rows=rows, cols=cols, segments=self.segments)

    def release_memory_shapes(self, rows: int, cols: int) -> ReleaseMemoryShapes:
        """Return the shapes of a client's memory for this rule: average of its releases, and their count per block."""
        blocks = self.cut(rows, cols)
        if not self.is_on or self.rule != "past" or blocks is None:
            return {}
        return {_AVERAGE: ((rows, cols), torch.float32), _SEEN: ((blocks.count,), torch.int64)}

    def opened(self, release_memory: ReleaseMemory, noise_std: Tensor, draw: Draw, blocks: CoordinateBlocks) -> Tensor:
        """Choose the open blocks of the coming step, for rules before the clip.

        Guarantee:
            The choice is a function of only past noised releases and coins: the data of the step are not read yet.

        Args:
            release_memory: Stacked release memory, see `release_memory_shapes`.
            noise_std: See `scores`.
            draw: Source of coins.
            blocks: Blocks from `cut`.

        Returns:
            1 for an open block, 0 for a closed one, (client, block) float32.
        """
        keep_count = self._kept(blocks.count)
        if self.rule == "random-past":
            return _first(draw(blocks.count), keep_count)
        best = _first(-self.scores(release_memory, noise_std, blocks), keep_count)
        explored = math.ceil(round(self.exploration * (blocks.count - keep_count), 9))
        if explored:
            best = best + _first(torch.where(best > 0, math.inf, draw(blocks.count).to(best.device)), explored)
        warming = release_memory[_SEEN].amin(dim=1, keepdim=True) < self.warm_up
        return torch.where(warming, 1.0, best)

    def scores(self, release_memory: ReleaseMemory, noise_std: Tensor, blocks: CoordinateBlocks) -> Tensor:
        """Compute the energy per dimension of each block in the average of past releases, less the energy of noise.

        E_b = ‖average_b‖²/p_b − s² · `noise_left`, from the releases in which the block was open. If masks do not
        depend on the noise, its expectation is the energy of the averaged true gradient, which is zero for pure noise.
        A block that is closed *because* its average came out small keeps this average, and its score stays low. Only
        exploration heals that, not the correction. A block that was never seen comes first.

        Args:
            release_memory: Stacked release memory, see `release_memory_shapes`.
            noise_std: Std of the noise on each coordinate of a mean gradient, public, (client,): s = z·C/(q·n_i).
            blocks: Blocks from `cut`.

        Returns:
            Scores, (client, block), float64.
        """
        seen = release_memory[_SEEN]
        average = unbiased(release_memory[_AVERAGE], self.decay, blocks.spread(seen))
        energies = blocks.energies(average) / blocks.sizes.to(seen.device)
        noise = noise_std.to(torch.float64)[:, None].square() * noise_left(self.decay, seen)
        return torch.where(seen > 0, energies - noise, math.inf)

    def remember(
        self, release_memory: ReleaseMemory, release: Tensor, opened: Tensor, blocks: CoordinateBlocks
    ) -> ReleaseMemory:
        """Add a noised mean gradient (client, rows, cols) to the averages of the blocks that were open in it."""
        if self.rule != "past":
            return release_memory
        average = release_memory[_AVERAGE]
        moved = torch.lerp(release, average, self.decay)
        return {
            **release_memory,
            _AVERAGE: torch.where(blocks.spread(opened) > 0, moved, average),
            _SEEN: release_memory[_SEEN] + opened.to(torch.int64),
        }

    def prune(self, release: Tensor, opened: Tensor | None, noise_std: Tensor, draw: Draw, blocks: Blocks) -> Pruned:
        """Drop or shrink blocks of a noised mean gradient.

        Guarantee:
            Post-processing: it reads no data but the release. Calling it on a gradient that is not yet noised would
            void the guarantee of the release.

        Args:
            release: Mean gradients after clipping and noise, (client, rows, cols); each client is pruned separately.
            opened: Result of `opened` before the step, for rules before the clip; else None.
            noise_std: See `scores`; zeros without noise.
            draw: Source of coins.
            blocks: Blocks from `cut`, or the step's `ComponentBlocks`.
        """
        if not self.is_on:
            return Pruned(release, None)
        weights = self._weights(release, opened, noise_std, draw, blocks)
        spread = blocks.spread(weights) if isinstance(blocks, CoordinateBlocks) else None
        return Pruned(blocks.weighted(release, weights), spread)

    def _weights(self, release: Tensor, opened: Tensor | None, noise_std: Tensor, draw: Draw, blocks: Blocks) -> Tensor:
        """Compute the weight of each block, (client, block), float32."""
        if opened is not None:
            return opened
        sizes = blocks.sizes.to(release.device)
        if self.rule == "random":
            return _first(draw(len(sizes)), self._kept(len(sizes))).to(release.device)
        energies = blocks.energies(release)
        if self.rule == "noised":
            return _first(-energies / sizes, self._kept(len(sizes)))
        # James and Stein's (p − 2) s²/‖g‖² estimates the share of noise in a block; for p <= 2 shrinkage has no gain.
        noise = (sizes - 2).clamp_min(0) * noise_std.to(torch.float64)[:, None].square()
        weights = torch.where(noise > 0, 1 - noise / energies, 1.0)
        return weights.clamp_min(self.floor).to(release.dtype)

    def _kept(self, count: int) -> int:
        # 0.07 * 100 is 7.000000000000001 in floating point and must stay 7.
        return max(1, math.ceil(round(self.keep_ratio * count, 9)))


KEEP_ALL = UpdatePruning(rule="noised", keep_ratio=1.0, block="token", frozen=False, warm_up=0, exploration=0.0)


def _first(values: Tensor, count: int) -> Tensor:
    """Return 1 at each row's ``count`` smallest values, else 0, (client, block) float32; earlier blocks win ties."""
    places = values.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros(values.shape, device=values.device).scatter_(1, places, 1.0)

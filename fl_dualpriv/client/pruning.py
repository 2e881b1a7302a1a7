"""Update pruning: which blocks of a released gradient a client follows, and which it leaves out.

Dual-Priv (arXiv:2506.07077, Mechanism 2) keeps the blocks of largest *noised* gradient. Here it stands beside its
control (a random mask) and stronger forms: a mask from past releases, which is applied before the clip so that signal
is not clipped away on frozen blocks; and shrinkage instead of a cut. No rule ever sees a clean gradient.
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
"""How many → that many uniforms of each client's own stream, (client, count) float64; once a step at most."""

_BEFORE_CLIP = ("past", "random-past")
_AVERAGE, _SEEN = "past.average", "past.seen"


class Pruned(NamedTuple):
    """What is left of a gradient.

    Attributes:
        gradient: (client, rows, cols).
        weights: What each coordinate was multiplied with, (client, rows, cols); None: all ones, or components.
    """

    gradient: Tensor
    weights: Tensor | None


@dataclass(frozen=True, kw_only=True)
class UpdatePruning:
    """One rule of update pruning.

    Guarantee:
        Which blocks are kept is a function of noised releases and of coins that are independent of all data; the rules
        ``noised``, ``random`` and ``shrink`` are post-processing of the release they prune. ``past`` and
        ``random-past`` multiply each example's gradient by a mask m that is known before the step: a per-example map,
        so the sum of clip(m ⊙ g_i) has sensitivity C as before, and the step is one more adaptively chosen Gaussian
        mechanism with the same multiplier. The noise still goes on every coordinate and the release is masked after:
        on a closed block the clean sum is exactly zero, so what is thrown away is independent noise alone, and what is
        left has the law of noise drawn on the open blocks only. ε is the same with every rule and without.

    Attributes:
        rule: ``noised``: the blocks of largest root mean square in the noised gradient (as published). ``random``: as
            many, by chance, after the noise. ``past``: before the clip, the blocks of largest debiased energy in past
            releases. ``random-past``: before the clip, by chance. ``shrink``: every block is scaled down by how much of
            it is noise (James-Stein).
        keep_ratio: Of n blocks, ceil(keep_ratio · n) are kept; in (0, 1]. 1 switches every rule off, ``shrink`` too,
            which reads no more of it than that.
        block: What is kept or dropped as a whole; ``component`` after the noise alone.
        frozen: A dropped block does not move, whatever an optimizer remembers of it. Else its gradient is zero.
        warm_up: ``past``: releases of all blocks before the first cut.
        exploration: ``past``: this share of the blocks that would be closed, rounded up, is opened by chance each step;
            without it a closed block is never seen again.
        floor: ``shrink``: least weight of a block.
        decay: ``past``: of the average over releases, β.
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
            raise ValueError(f"rule = {self.rule}: components turn with every step and have no past; choose a token")

    @property
    def is_on(self) -> bool:
        """Whether anything is pruned."""
        return self.keep_ratio < 1

    @property
    def masks_before_clip(self) -> bool:
        """Whether gradients are masked example by example."""
        return self.is_on and self.rule in _BEFORE_CLIP

    def cut(self, rows: int, cols: int) -> CoordinateBlocks | None:
        """The blocks of a gradient of this shape; None for components, which need the step's subspace bases."""
        if self.block == "component":
            return None
        return CoordinateBlocks(kind=self.block, rows=rows, cols=cols, segments=self.segments)

    def release_memory_shapes(self, rows: int, cols: int) -> ReleaseMemoryShapes:
        """What a client remembers for this rule: the average of its releases, and how many each block has seen."""
        blocks = self.cut(rows, cols)
        if not self.is_on or self.rule != "past" or blocks is None:
            return {}
        return {_AVERAGE: ((rows, cols), torch.float32), _SEEN: ((blocks.count,), torch.int64)}

    def opened(self, release_memory: ReleaseMemory, noise_std: Tensor, draw: Draw, blocks: CoordinateBlocks) -> Tensor:
        """Choose the blocks that gradients of the coming step may have, for rules before the clip.

        Guarantee:
            A function of past noised releases and coins alone: the step's own data are not read yet.

        Args:
            release_memory: Stacked, as `release_memory_shapes`.
            noise_std: See `scores`.
            draw: Coins.
            blocks: From `cut`.

        Returns:
            1 for an open block, 0 for a closed one, (client, block) float32.
        """
        kept = self._kept(blocks.count)
        if self.rule == "random-past":
            return _first(draw(blocks.count), kept)
        best = _first(-self.scores(release_memory, noise_std, blocks), kept)
        explored = math.ceil(round(self.exploration * (blocks.count - kept), 9))
        if explored:
            best = best + _first(torch.where(best > 0, math.inf, draw(blocks.count).to(best.device)), explored)
        warming = release_memory[_SEEN].amin(dim=1, keepdim=True) < self.warm_up
        return torch.where(warming, 1.0, best)

    def scores(self, release_memory: ReleaseMemory, noise_std: Tensor, blocks: CoordinateBlocks) -> Tensor:
        """Energy of each block in the average of past releases, less what noise alone would leave, per dimension.

        E_b = ‖average_b‖²/p_b − s² · `noise_left`, from the releases in which the block was open. Where masks do not
        depend on the noise its expectation is the energy of the averaged true gradient: zero for pure noise. A block
        that is closed *because* its average came out small stops there, and its score stays low: exploration, not the
        correction, heals that. A block that was never seen comes first.

        Args:
            release_memory: Stacked, as `release_memory_shapes`.
            noise_std: Std of the noise on each coordinate of a mean gradient, public, (client,): s = z·C/(q·n_i).
            blocks: From `cut`.

        Returns:
            (client, block), float64.
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
            Post-processing: no data but the release can reach it. Calling it on a gradient that is not yet noised
            would void the guarantee of the release.

        Args:
            release: (client, rows, cols), after clipping and noise; each client is pruned on its own.
            opened: What `opened` said before the step, for rules before the clip.
            noise_std: See `scores`; zeros without noise.
            draw: Coins.
            blocks: From `cut`, or the step's `ComponentBlocks`.
        """
        if not self.is_on:
            return Pruned(release, None)
        weights = self._weights(release, opened, noise_std, draw, blocks)
        spread = blocks.spread(weights) if isinstance(blocks, CoordinateBlocks) else None
        return Pruned(blocks.weighted(release, weights), spread)

    def _weights(self, release: Tensor, opened: Tensor | None, noise_std: Tensor, draw: Draw, blocks: Blocks) -> Tensor:
        """(client, block), float32."""
        if opened is not None:
            return opened
        sizes = blocks.sizes.to(release.device)
        if self.rule == "random":
            return _first(draw(len(sizes)), self._kept(len(sizes))).to(release.device)
        energies = blocks.energies(release)
        if self.rule == "noised":
            return _first(-energies / sizes, self._kept(len(sizes)))
        # James and Stein's (p − 2) s²/‖g‖² estimates the share of noise in a block; with p <= 2 there is no such gain.
        noise = (sizes - 2).clamp_min(0) * noise_std.to(torch.float64)[:, None].square()
        weights = torch.where(noise > 0, 1 - noise / energies, 1.0)
        return weights.clamp_min(self.floor).to(release.dtype)

    def _kept(self, count: int) -> int:
        # 0.07 * 100 is 7.000000000000001 in floating point and must stay 7.
        return max(1, math.ceil(round(self.keep_ratio * count, 9)))


KEEP_ALL = UpdatePruning(rule="noised", keep_ratio=1.0, block="token", frozen=False, warm_up=0, exploration=0.0)


def _first(values: Tensor, count: int) -> Tensor:
    """1 at each row's ``count`` smallest values, else 0; of equal ones the earlier counts. (client, block), float32."""
    places = values.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros(values.shape, device=values.device).scatter_(1, places, 1.0)

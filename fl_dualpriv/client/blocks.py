"""Ways to cut a prompt's gradient into blocks that are kept, dropped or shrunk as a whole.

Gradients are stacked over clients, (client, rows, cols), and no function of this module mixes clients. In a prompt a
row is a context token. In a packed LoRA update a matrix is a range of neighbouring columns.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Block = Literal["token", "component", "coordinate", "matrix"]


class Blocks(Protocol):
    """A cut of gradients into orthogonal parts, which add up to the gradient."""

    @property
    def sizes(self) -> Tensor:
        """Dimensions of each block, p_b, (block,) float64; they add up to rows · cols."""
        ...

    def energies(self, gradient: Tensor) -> Tensor:
        """Compute the squared norm of each block, (client, block) float64; they add up to that of the gradient."""
        ...

    def weighted(self, gradient: Tensor, weights: Tensor) -> Tensor:
        """Multiply each block by its weight, (client, block), and add the blocks up; keeps the shape and the type."""
        ...


@dataclass(frozen=True, kw_only=True)
class CoordinateBlocks:
    """Blocks that are sets of coordinates, so that a mask can express them before and after the clip.

    Attributes:
        kind: ``token``: a row. ``coordinate``: one entry. ``matrix``: a segment of columns, over all rows.
        rows: Number of rows of a gradient.
        cols: Number of columns of a gradient.
        segments: Widths of the matrices, in order; they add up to ``cols``. Empty for one matrix. Only ``matrix`` reads
            them.

    Raises:
        ValueError: If the widths are not positive or do not add up to ``cols``.
    """

    kind: Literal["token", "coordinate", "matrix"]
    rows: int
    cols: int
    segments: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == "matrix" and (sum(self._widths) != self.cols or min(self._widths) < 1):
            raise ValueError(f"segments = {self.segments}; the widths must be >= 1 and add up to {self.cols}")

    @property
    def _widths(self) -> tuple[int, ...]:
        return self.segments or (self.cols,)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return {"token": self.rows, "coordinate": self.rows * self.cols, "matrix": len(self._widths)}[self.kind]

    @property
    def sizes(self) -> Tensor:
        """See `Blocks`."""
        if self.kind == "matrix":
            return self.rows * torch.tensor(self._widths, dtype=torch.float64)
        return torch.full((self.count,), self.rows * self.cols / self.count, dtype=torch.float64)

    def energies(self, gradient: Tensor) -> Tensor:
        """See `Blocks`."""
        squares = gradient.to(torch.float64).square()
        if self.kind == "token":
            return squares.sum(dim=-1)
        if self.kind == "coordinate":
            return squares.flatten(1)
        return torch.stack([part.sum(dim=(-2, -1)) for part in squares.split(self._widths, dim=-1)], dim=-1)

    def spread(self, weights: Tensor) -> Tensor:
        """Expand weights of blocks to weights of coordinates, (client, block) → (client, rows, cols)."""
        if self.kind == "token":
            return weights[:, :, None].expand(-1, -1, self.cols)
        if self.kind == "coordinate":
            return weights.unflatten(1, (self.rows, self.cols))
        widths = torch.tensor(self._widths, device=weights.device)
        return weights.repeat_interleave(widths, dim=1)[:, None].expand(-1, self.rows, -1)

    def weighted(self, gradient: Tensor, weights: Tensor) -> Tensor:
        """See `Blocks`; a weight of 1 leaves its block unchanged, bit by bit."""
        return gradient * self.spread(weights).to(gradient.dtype)


@dataclass(frozen=True)
class ComponentBlocks:
    """Parts of a gradient along the rank components of p_L = u·v, and the rest outside all components.

    With orthonormal bases u_j (columns) and v_j (rows), component j is G v_jᵀ v_j + u_j u_jᵀ G (I − vᵀv): the part that
    moves v_j's row, and the part that moves u_j's column outside the span of v. The components are orthogonal, because
    v_j v_lᵀ, u_jᵀ u_l and v_j (I − vᵀv) are zero for j ≠ l, and they add up to the tangent projection
    G vᵀv + u uᵀG (I − vᵀv). The rest, (I − u uᵀ) G (I − vᵀv), is the last block; only the global prompt moves along it.
    The overlap u_i v_j belongs to v_j, so that each direction of the tangent space belongs to one component.

    The bases turn from step to step. A component therefore has no fixed coordinates and no release memory.

    Attributes:
        u: Column basis, (client, rows, k).
        v: Row basis, (client, k, cols).
    """

    u: Tensor
    v: Tensor

    @property
    def sizes(self) -> Tensor:
        """See `Blocks`; a component has rows + cols − k dimensions. The rest is left out if it has no dimensions."""
        (rows, rank), cols = self.u.shape[1:], self.v.shape[2]
        rest = (rows - rank) * (cols - rank)
        return torch.tensor([rows + cols - rank] * rank + [rest] * (rest > 0), dtype=torch.float64)

    def _parts(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return G vᵀ (client, rows, k), uᵀG (I − vᵀv) (client, k, cols) and the rest."""
        on_v = gradient @ self.v.mT
        outside = gradient - on_v @ self.v
        on_u = self.u.mT @ outside
        return on_v, on_u, outside - self.u @ on_u

    def energies(self, gradient: Tensor) -> Tensor:
        """See `Blocks`."""
        on_v, on_u, rest = (part.to(torch.float64).square() for part in self._parts(gradient))
        energies = torch.cat([on_v.sum(dim=1) + on_u.sum(dim=2), rest.sum(dim=(1, 2))[:, None]], dim=1)
        return energies[:, : len(self.sizes)]

    def weighted(self, gradient: Tensor, weights: Tensor) -> Tensor:
        """See `Blocks`."""
        on_v, on_u, rest = self._parts(gradient)
        weights = weights.to(gradient.dtype)
        w = weights[:, : self.v.shape[1]]
        tangent = on_v * w[:, None] @ self.v + self.u @ (w[:, :, None] * on_u)
        return tangent if weights.shape[1] == w.shape[1] else tangent + weights[:, -1, None, None] * rest

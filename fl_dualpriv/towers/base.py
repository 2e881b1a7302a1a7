"""Protocols of prompt towers: class features of many prompts at once, and batched vector-Jacobian products."""

from typing import Protocol, Self

from torch import Tensor


class ClassFeatures(Protocol):
    """One forward pass of K prompts, kept for backward passes.

    Guarantee:
        Row (k, b) of `vjp` and `vjp_some` is a function of only prompt k and cotangent (k, b), and linear in the
        cotangent. Nothing mixes rows or prompts.
    """

    @property
    def values(self) -> Tensor:
        """Unit-norm class features, (prompt, n_cls, embed_dim), detached."""
        ...

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Shape of one prompt, (n_ctx, ctx_dim)."""
        ...

    @property
    def bytes_per_row(self) -> int:
        """Approximate memory of one row of `vjp`, in bytes."""
        ...

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents (prompt, row, n_cls, embed_dim) back to the prompts: (prompt, row, n_ctx, ctx_dim)."""
        ...

    def vjp_apart(self, cotangents: Tensor) -> Tensor:
        """As `vjp`, but with separate products for each row: slower, and no row's rounding can depend on its place."""
        ...

    def vjp_some(self, cotangents: Tensor, classes: Tensor) -> Tensor:
        """Pull back cotangents of some classes per row; the cotangents of all other classes count as zero.

        Args:
            cotangents: Cotangents in the order of ``classes``, (prompt, row, m, embed_dim).
            classes: Class ids, (prompt, row, m), distinct within a row.
        """
        ...

    def narrow(self, start: int, stop: int) -> Self:
        """Return a view of the pass with only the prompts from ``start`` up to and excluding ``stop``."""
        ...


class PromptTower(Protocol):
    """A callable that maps prompts to class features."""

    @property
    def bytes_per_prompt(self) -> int:
        """Approximate memory that a forward pass of one prompt keeps, in bytes."""
        ...

    def __call__(self, prompts: Tensor) -> ClassFeatures:
        """Run (prompt, n_ctx, ctx_dim) through the tower."""
        ...

    def values(self, prompts: Tensor) -> Tensor:
        """Compute ``self(prompts).values`` and keep nothing for a backward pass."""
        ...

"""What every prompt learner gives: class features of many prompts at once, and batched vector-Jacobian products."""

from typing import Protocol, Self

from torch import Tensor


class ClassFeatures(Protocol):
    """One forward pass of K prompts, kept for backward passes.

    Guarantee:
        Row (k, b) of `vjp` and `vjp_some` is a function of prompt k and of cotangent (k, b) alone: a linear map of the
        cotangent. Nothing mixes rows or prompts.
    """

    @property
    def values(self) -> Tensor:
        """Unit-norm class features, (prompt, n_cls, embed_dim), detached."""
        ...

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Of one prompt, (n_ctx, ctx_dim)."""
        ...

    @property
    def bytes_per_row(self) -> int:
        """Memory that one row of `vjp` takes, roughly."""
        ...

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents (prompt, row, n_cls, embed_dim) back to the prompts: (prompt, row, n_ctx, ctx_dim)."""
        ...

    def vjp_apart(self, cotangents: Tensor) -> Tensor:
        """As `vjp`, with each row in products of its own: slower, and no row's rounding can depend on its place."""
        ...

    def vjp_some(self, cotangents: Tensor, classes: Tensor) -> Tensor:
        """Pull back cotangents of some classes per row, (prompt, row, m, embed_dim); the others' are zero.

        Args:
            cotangents: In the order of ``classes``.
            classes: Class ids, (prompt, row, m), distinct within a row.
        """
        ...

    def narrow(self, start: int, stop: int) -> Self:
        """The same pass for the prompts from ``start`` to before ``stop``; a view."""
        ...


class PromptTower(Protocol):
    """Maps prompts to class features."""

    @property
    def bytes_per_prompt(self) -> int:
        """Memory that a forward pass of one prompt keeps, roughly."""
        ...

    def __call__(self, prompts: Tensor) -> ClassFeatures:
        """Run (prompt, n_ctx, ctx_dim) through the tower."""
        ...

    def values(self, prompts: Tensor) -> Tensor:
        """``self(prompts).values`` with nothing kept for a backward pass."""
        ...

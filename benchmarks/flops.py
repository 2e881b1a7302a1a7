"""Number of useful floating point operations of a shared-prefix step, without masked products and constants.

One multiply-add counts as two operations. Norms, softmax and activations are left out, so a share of the peak rate is a
lower bound.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """A text tower and its classes.

    Attributes:
        layers: Number of blocks.
        width: ctx_dim; the MLP is four times as wide.
        embed_dim: Dimension of the features.
        n_ctx: Number of context tokens; SOS is a constant.
        n_cls: Number of classes.
        n_suffix: Tokens of every class behind the context: the name, the words after it, and the end of text.
    """

    layers: int
    width: int
    embed_dim: int
    n_ctx: int
    n_cls: int
    n_suffix: int

    @property
    def _tokens(self) -> int:
        return self.n_ctx + self.n_cls * self.n_suffix

    def _pairs(self, *, last: bool) -> int:
        """Return the number of query-key pairs that the causal mask leaves."""
        prefix = 1 + self.n_ctx
        if last:  # only end-of-text tokens
            return self.n_cls * (prefix + self.n_suffix)
        context = sum(i + 2 for i in range(self.n_ctx))  # SOS, the token and earlier ones
        return context + self.n_cls * sum(prefix + j + 1 for j in range(self.n_suffix))

    def _block(self, depth: int, *, backward: bool) -> int:
        d, first, last = self.width, depth == 0, depth == self.layers - 1
        rows = self.n_cls if last else self._tokens  # rows through the MLP
        inputs = self.n_ctx if first else self._tokens  # the first block's suffix products are constants
        qkv = (4 * inputs + 2 * rows if last else 6 * inputs) * d * d
        pairs = self._pairs(last=last)
        return qkv + 18 * rows * d * d + (8 if backward else 4) * pairs * d

    @property
    def forward(self) -> int:
        """Operations of the forward pass of one prompt for all classes."""
        blocks = sum(self._block(depth, backward=False) for depth in range(self.layers))
        return blocks + 2 * self.n_cls * self.width * self.embed_dim

    @property
    def backward(self) -> int:
        """Operations of the backward pass of one cotangent of one prompt to the context.

        The tower is frozen, so weights have no gradient.
        """
        blocks = sum(self._block(depth, backward=True) for depth in range(self.layers))
        return blocks + 2 * self.n_cls * self.width * self.embed_dim

    def floor_over_nonprivate(self, batch: int) -> float:
        """Return (F + B b) / (F + b), the relative cost of one backward pass per example at equal speed."""
        return (self.forward + batch * self.backward) / (self.forward + self.backward)

    def padded_step(self, length: int) -> int:
        """Return the operations of the usual step, forward and backward.

        The usual step runs every class's whole row through every block and shares nothing.
        """
        d, tokens = self.width, self.n_cls * length
        pairs = self.n_cls * length * (length + 1) // 2
        return self.layers * (48 * tokens * d * d + 12 * pairs * d) + 4 * self.n_cls * d * self.embed_dim

"""Exact per-example gradients of the classification loss with respect to prompts, for many prompts at once.

Class features W(P) do not depend on the example, so one forward pass serves every example of a client: with logits
s·x_i·W(P)ᵀ, example i's gradient is the vector-Jacobian product of W at P with cotangent s·(softmax_i − y_i) x_iᵀ.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fl_dualpriv.prompts.tower import ClassFeatures

# Rows go backward in blocks of one size, the last one padded: the size of a matrix product can change the order of its
# sums, and so a client's numbers do not depend on who steps beside it. 8 rows fill a CPU core, a GPU wants more.
_CPU_ROWS, _CUDA_ROWS = 8, 64
# Activations that stay in the caches run fastest on a CPU: measured best between 16 and 64 MiB.
_CPU_CACHE_BYTES = 48 * 2**20


def rows_at_once(device: torch.device) -> int:
    """Rows of one prompt in a block."""
    return _CUDA_ROWS if device.type == "cuda" else _CPU_ROWS


@dataclass(frozen=True, kw_only=True)
class Batches:
    """One batch per prompt, side by side, padded.

    Attributes:
        x: Image features (prompt, row, embed_dim), unit norm; rows beyond a prompt's count are padding, up to a
            multiple of `rows_at_once`.
        y: Class ids (prompt, row).
        counts: True rows of each prompt, in falling order, so that prompts with rows left are always the first ones.
    """

    x: Tensor
    y: Tensor
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        assert list(self.counts) == sorted(self.counts, reverse=True)
        assert self.x.shape[1] % rows_at_once(self.x.device) == 0

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Self:
        """One batch alone: image features (row, embed_dim) and class ids (row,)."""
        padding = -len(y) % rows_at_once(x.device)
        padded = torch.nn.functional.pad(x, (0, 0, 0, padding)), torch.nn.functional.pad(y, (0, padding))
        return cls(x=padded[0][None], y=padded[1][None], counts=(len(y),))

    def is_row(self) -> Tensor:
        """Where there is a record: (prompt, row)."""
        counts = torch.tensor(self.counts, device=self.x.device)
        return torch.arange(self.x.shape[1], device=self.x.device) < counts[:, None]

    @functools.cached_property
    def finite(self) -> Tensor:
        """Records whose features are finite, (prompt, row)."""
        return torch.isfinite(self.x.sum(dim=-1))  # of unit norm: a sum overflows only where an entry does

    @functools.cached_property
    def readable(self) -> Tensor:
        """Image features with zeros for those that are not finite."""
        return self.x if bool(self.finite.all()) else torch.where(self.finite[..., None], self.x, 0.0)

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Each block of rows, and how many prompts have a row in it."""
        step = rows_at_once(self.x.device)
        for start in range(0, max(self.counts, default=0), step):
            yield slice(start, start + step), sum(count > start for count in self.counts)


def residuals(classes: Tensor, x: Tensor, y: Tensor, logit_scale: float) -> Tensor:
    """Softmax minus one-hot of each example: (prompt, row, n_cls) from class features (prompt, n_cls, embed_dim)."""
    residual = torch.softmax((x @ classes.transpose(-1, -2)).mul_(logit_scale), dim=-1)
    return residual.scatter_add_(-1, y[..., None], torch.full_like(residual[..., :1], -1.0))


def largest(residual: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
    """Each example's m residuals of largest absolute value, made to sum to zero as all of them do, and their classes.

    The true class is always among them, since its residual is minus the sum of the others. It is kept as it is, and
    the other kept ones are scaled up to balance it: left as they are, they would pull on what all class features have
    in common, which a prompt moves most. A per-example map, biased, and cheaper with many classes.

    Args:
        residual: Softmax minus one-hot, (…, n_cls).
        top_m: At least 2.

    Returns:
        Residuals (…, m), the true class first, and class ids (…, m).
    """
    true, at = residual.min(dim=-1, keepdim=True)  # the one that is not positive
    others, classes = residual.topk(top_m - 1, dim=-1)
    total = others.sum(dim=-1, keepdim=True)
    balanced = others * torch.where(total > 0, -true / total, 0.0)
    return torch.cat([true, balanced], dim=-1), torch.cat([at, classes], dim=-1)


def per_example_gradients(
    features: ClassFeatures, batches: Batches, logit_scale: float, *, workspace_bytes: int, top_m: int = 0
) -> Tensor:
    """Differentiate each example's cross-entropy with respect to its client's prompt.

    Guarantee:
        Row (k, i) is a function of prompt k and of example i alone (tests/guarantees/test_per_example.py), exact or
        with ``top_m``: which classes an example keeps is decided by its own residuals. How many prompts run at once to
        stay within the workspace changes nothing. A non-finite image feature makes its own row non-finite
        and no other; `clip_rows` turns such a row into zero. Padding gives exact zeros.

    Args:
        features: The forward pass of the prompts, in the order of ``batches``.
        batches: What to differentiate.
        logit_scale: s, CLIP's inverse temperature.
        workspace_bytes: Bound on the memory of one backward pass; one block of rows of one prompt always runs.
        top_m: 0: exact. Else the m largest absolute residuals of each example are back-propagated, see `largest`.

    Returns:
        (prompt, row, n_ctx, ctx_dim): the gradients of -log softmax(logits)[label].
    """
    classes = features.values
    some = 0 < top_m < classes.shape[1]
    gradients = [features.vjp(classes.new_zeros(len(classes), 1, *classes.shape[1:]))[:, :0]]  # the shape, if no rows
    budget = workspace_bytes if batches.x.is_cuda else min(workspace_bytes, _CPU_CACHE_BYTES)
    together = max(1, budget // max(1, features.bytes_per_row * rows_at_once(batches.x.device)))
    for block, prompts in batches.blocks():
        pieces = []
        for start in range(0, prompts, together):
            here = slice(start, min(start + together, prompts))
            x = batches.x[here, block]
            residual = residuals(classes[here], x, batches.y[here, block], logit_scale)
            narrow = features.narrow(here.start, here.stop)
            if some:
                kept, classes_kept = largest(residual, top_m)
                pieces.append(narrow.vjp_some(logit_scale * kept[..., None] * x[:, :, None], classes_kept))
            else:
                pieces.append(narrow.vjp(logit_scale * residual[..., None] * x[:, :, None]))
        rest = len(classes) - prompts  # they have no rows left
        gradients.append(torch.cat([*pieces, pieces[0].new_zeros(rest, *pieces[0].shape[1:])]))
    rows = torch.cat(gradients, dim=1)
    return torch.where(batches.is_row()[:, : rows.shape[1], None, None], rows, 0.0)


def summed_gradient(features: ClassFeatures, batches: Batches, logit_scale: float) -> Tensor:
    """Gradient of each client's *summed* cross-entropy, (prompt, n_ctx, ctx_dim): no clipping, no privacy.

    Equal to ``per_example_gradients(...).sum(1)`` up to rounding; used where no record is clipped. An example with
    non-finite features is left out, so that one bad record does not spoil a client under client-level DP.
    """
    classes, x = features.values, batches.readable
    weight = logit_scale * (batches.finite & batches.is_row())
    cotangent = torch.zeros_like(classes)
    for block, _ in batches.blocks():  # block by block, so that padding adds exact zeros
        residual = residuals(classes, x[:, block], batches.y[:, block], logit_scale) * weight[:, block, None]
        cotangent.baddbmm_(residual.transpose(1, 2), x[:, block])
    return features.vjp(cotangent[:, None])[:, 0]

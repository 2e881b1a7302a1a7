"""Exact per-example gradients of the classification loss with respect to prompts, for many prompts at once.

Class features W(P) do not depend on the example, so one forward pass serves every example of a client. With logits
s·x_i·W(P)ᵀ, example i's gradient is the vector-Jacobian product of W at P with cotangent s·(softmax_i − y_i) x_iᵀ.

A client may have a public class prior π. Its loss is then balanced softmax, the cross-entropy of logits + log π (Ren et
al. 2020, arXiv:2007.10740; the logit-adjusted loss of Menon et al. 2021, arXiv:2007.07314, with τ = 1), and only the
softmax changes.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.towers.base import ClassFeatures

# Rows go backward in blocks of one size, the last one padded, because the size of a matrix product can change the order
# of its sums. A client's numbers therefore do not depend on the other clients of a step. 8 rows fill a CPU core; a GPU
# needs more.
_CPU_ROWS, _CUDA_ROWS = 8, 64
# Activations that stay in the caches run fastest on a CPU: measured best between 16 and 64 MiB.
_CPU_CACHE_BYTES = 48 * 2**20
_MOST_OUTER_ROWS = 256
_OUTER_ENTRIES = 2**16  # entries of outer products at a time: half a MiB stays in a cache


def rows_at_once(device: torch.device) -> int:
    """Return the number of rows of one prompt in a block."""
    return _CUDA_ROWS if device.type == "cuda" else _CPU_ROWS


@dataclass(frozen=True, kw_only=True)
class Batches:
    """One batch per prompt, as look-ups in one table of records.

    Attributes:
        features: Image features (record, embed_dim), unit norm.
        labels: Class ids (record,).
        index: Record indices of each batch, (prompt, row), padded to a multiple of `rows_at_once`. Padding points at a
            record and is masked out.
        counts: Number of rows of each prompt without padding.
        log_prior: Log prior of each prompt's client, (prompt, n_cls), a public constant; None adds nothing.
    """

    features: Tensor
    labels: Tensor
    index: Tensor
    counts: tuple[int, ...]
    log_prior: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.index.shape[1] % rows_at_once(self.features.device) == 0

    @classmethod
    def of(cls, *records: tuple[Tensor, Tensor], log_prior: Tensor | None = None) -> Self:
        """Make batches of whole sets of records, each a pair (features (row, embed_dim), class ids (row,))."""
        counts = [len(labels) for _, labels in records]
        starts = np.cumsum([0, *counts[:-1]])
        picked = [np.arange(count) + start for start, count in zip(starts, counts, strict=True)]
        features, labels = torch.cat([x for x, _ in records]), torch.cat([y for _, y in records])
        return cls.gather(features, labels, picked, log_prior)

    @classmethod
    def gather(
        cls, features: Tensor, labels: Tensor, picked: Sequence[np.ndarray], log_prior: Tensor | None = None
    ) -> Self:
        """Make batches of the picked records; ``log_prior`` is in the order of ``picked``."""
        block, counts = rows_at_once(features.device), tuple(len(rows) for rows in picked)
        index = np.zeros((len(picked), -(-max(counts) // block) * block), dtype=np.int64)
        for place, rows in enumerate(picked):
            index[place, : len(rows)] = rows
        on_device = torch.from_numpy(index).to(features.device)
        return cls(features=features, labels=labels, index=on_device, counts=counts, log_prior=log_prior)

    def rows(self) -> list[Tensor]:
        """Return the record indices of each batch, without padding."""
        return [index[:count] for index, count in zip(self.index, self.counts, strict=True)]

    def is_row(self, prompts: slice = slice(None), rows: slice = slice(None)) -> Tensor:
        """Return True for each row that is a record and not padding, (prompt, row)."""
        device = self.features.device
        counts = torch.tensor(self.counts[prompts], device=device)
        return torch.arange(self.index.shape[1], device=device)[rows] < counts[:, None]

    @functools.cached_property
    def readable(self) -> tuple[Tensor, Tensor, Tensor]:
        """All rows at once: features with zeros for non-finite rows, class ids, and a mask of the rows to use."""
        x = self.features[self.index]
        finite = torch.isfinite(x.sum(dim=-1))  # features have unit norm: a sum overflows only if an entry does
        if not bool(finite.all()):
            x = torch.where(finite[..., None], x, 0.0)
        return x, self.labels[self.index], finite & self.is_row()

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Yield each block of rows, and how many prompts have a row in it."""
        step = rows_at_once(self.features.device)
        for start in range(0, max(self.counts, default=0), step):
            # On a GPU the size of a batch of products also selects the kernel, so there every prompt runs to the end.
            everybody = self.features.is_cuda
            prompts = len(self.counts) if everybody else sum(count > start for count in self.counts)
            yield slice(start, start + step), prompts


def residuals(classes: Tensor, x: Tensor, y: Tensor, logit_scale: float, log_prior: Tensor | None = None) -> Tensor:
    """Compute softmax minus one-hot of each example, (prompt, row, n_cls), from features (prompt, n_cls, embed_dim).

    ``log_prior``, (prompt, n_cls), is added to the logits of every row of its prompt.

    Each cosine is computed as a separate sum, which no matrix kernel rearranges by its place. With a matrix product, a
    row has so few cosines that a check of some rows would not reveal every effect of the kernel. The intermediate
    product is no larger than the cotangent that is made from the residuals.
    """
    return _softmax_minus_one_hot((x[:, :, None] * classes[:, None]).sum(dim=-1), y, logit_scale, log_prior)


def _softmax_minus_one_hot(cosines: Tensor, y: Tensor, logit_scale: float, log_prior: Tensor | None) -> Tensor:
    logits = cosines.mul_(logit_scale)
    if log_prior is not None:
        logits.add_(log_prior[:, None])
    residual = torch.softmax(logits, dim=-1)
    return residual.scatter_add_(-1, y[..., None], torch.full_like(residual[..., :1], -1.0))


def largest(residual: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
    """Keep each example's m residuals of largest absolute value, rescaled to sum to zero, with their classes.

    The true class is always among them, because its residual is minus the sum of the others. Its residual stays
    unchanged, and the other kept ones are scaled up to balance it. Without this balance they would pull on the common
    part of all class features, which a prompt moves most. This is a per-example map, biased, and cheaper with many
    classes.

    Args:
        residual: Softmax minus one-hot, (…, n_cls).
        top_m: At least 2.

    Returns:
        Residuals (…, m), the true class first, and class ids (…, m).
    """
    true, at = residual.min(dim=-1, keepdim=True)  # the only residual that is not positive
    others, classes = residual.topk(top_m - 1, dim=-1)
    total = others.sum(dim=-1, keepdim=True)
    balanced = others * torch.where(total > 0, -true / total, 0.0)
    return torch.cat([true, balanced], dim=-1), torch.cat([at, classes], dim=-1)


def gradient_blocks(
    features: ClassFeatures,
    batches: Batches,
    logit_scale: float,
    *,
    workspace_bytes: int,
    top_m: int = 0,
    apart: bool = False,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Differentiate each example's cross-entropy with respect to its client's prompt, some rows at a time.

    Guarantee:
        A row is a function of only its prompt, its example and the public log prior of its prompt's client
        (tests/guarantees/test_per_example.py, test_class_prior.py), exact or with ``top_m``: an example's own residuals
        decide which classes it keeps. The prior is a constant that no joining or leaving record changes. The number of
        prompts that run at once within the workspace changes nothing, and the memory in use never grows with a batch,
        whose size is private. A non-finite image feature makes its own row non-finite and no other; `clip_rows` turns
        such a row into zero. Padding gives exact zeros.
        The machine's kernels decide if a row is the same bit by bit at another place of its block or beside other
        prompts; `row_check` tests it. With ``apart`` no product holds two rows.

    Args:
        features: The forward pass of the prompts, in the order of ``batches``.
        batches: Batches to differentiate, the largest first, so that prompts with rows left are always the first ones.
        logit_scale: Scale s, CLIP's inverse temperature.
        workspace_bytes: Bound on the memory of one backward pass; one block of rows of one prompt always runs.
        top_m: 0 for exact gradients. Else the m largest absolute residuals of each example are back-propagated, see
            `largest`.
        apart: Give each row separate matrix products.

    Yields:
        Slice of prompts, slice of rows, and their gradients of -log softmax(logits)[label], (prompt, row, n_ctx,
        ctx_dim).
    """
    assert list(batches.counts) == sorted(batches.counts, reverse=True)
    classes, log_prior = features.values, batches.log_prior
    some = 0 < top_m < classes.shape[1]
    budget = workspace_bytes if classes.is_cuda else min(workspace_bytes, _CPU_CACHE_BYTES)
    copies = 2 if apart else 1  # see `SharedPrefixFeatures.vjp_apart`
    together = max(1, budget // max(1, copies * features.bytes_per_row * rows_at_once(classes.device)))
    for block, prompts in batches.blocks():
        for start in range(0, prompts, together):
            here = slice(start, min(start + together, prompts))
            index = batches.index[here, block]
            x = batches.features[index]
            prior = None if log_prior is None else log_prior[here]
            residual = residuals(classes[here], x, batches.labels[index], logit_scale, prior)
            narrow = features.narrow(here.start, here.stop)
            if some:
                top_residuals, top_classes = largest(residual, top_m)
                rows = narrow.vjp_some(logit_scale * top_residuals[..., None] * x[:, :, None], top_classes)
            else:
                pull = narrow.vjp_apart if apart else narrow.vjp
                rows = pull(logit_scale * residual[..., None] * x[:, :, None])
            yield here, block, torch.where(batches.is_row(here, block)[..., None, None], rows, 0.0)


def per_example_gradients(
    features: ClassFeatures,
    batches: Batches,
    logit_scale: float,
    *,
    workspace_bytes: int,
    top_m: int = 0,
    apart: bool = False,
) -> Tensor:
    """Compute all of `gradient_blocks` at once, (prompt, row, n_ctx, ctx_dim), padded: for tests and small batches."""
    rows = features.values.new_zeros(*batches.index.shape, *features.prompt_shape)
    for prompts, block, gradients in gradient_blocks(
        features, batches, logit_scale, workspace_bytes=workspace_bytes, top_m=top_m, apart=apart
    ):
        rows[prompts, block] = gradients
    return rows


def feature_blocks(
    classes: Tensor, x: Tensor, y: Tensor, logit_scale: float, log_prior: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both factors of each example's gradient at the *class features*, in blocks of one size; padding is zero.

    The gradient is the outer product s·(softmax_i − y_i) x_iᵀ, of Frobenius norm s·‖softmax_i − y_i‖·‖x_i‖.

    Guarantee:
        Row i is a function of ``classes``, the public ``log_prior`` and example i only, bit by bit: each cosine is a
        separate sum. No matrix kernel is used, because its rounding of a row may depend on the row's place or on the
        number of rows. The memory does not grow with a batch, whose size is private.

    Args:
        classes: Unit-norm class features (n_cls, embed_dim).
        x: Image features (batch, embed_dim); batch may be 0.
        y: Class ids (batch,).
        logit_scale: s.
        log_prior: Logarithm of the client's class prior, (n_cls,), a public constant; None adds nothing.

    Yields:
        s·(softmax_i − y_i), (row, n_cls), and x_i, (row, embed_dim), float64.
    """
    wide = classes.to(torch.float64)
    wide_prior = None if log_prior is None else log_prior.to(torch.float64)
    size = max(1, min(_MOST_OUTER_ROWS, _OUTER_ENTRIES // wide.numel()))
    for start in range(0, len(x), size):
        features, labels = x[start : start + size].to(torch.float64), y[start : start + size]
        lacking = size - len(features)
        if lacking:
            features = torch.cat([features, features.new_zeros(lacking, features.shape[1])])
            labels = torch.cat([labels, labels.new_zeros(lacking)])
        logits = logit_scale * (features[:, None] * wide).sum(dim=-1)
        if wide_prior is not None:
            logits.add_(wide_prior)
        residual = torch.softmax(logits, dim=1)
        residual = residual.scatter_add_(1, labels[:, None], torch.full_like(residual[:, :1], -1.0))
        if lacking:
            residual[-lacking:] = 0.0
        yield logit_scale * residual, features


def summed_gradient(features: ClassFeatures, batches: Batches, logit_scale: float) -> Tensor:
    """Compute the gradient of each client's *summed* cross-entropy, (prompt, n_ctx, ctx_dim): no clipping, no privacy.

    It equals ``per_example_gradients(...).sum(1)`` up to rounding and is used where no record is clipped. An example
    with non-finite features is left out, so that one bad record does not spoil a client under client-level DP.
    """
    classes = features.values
    x, y, usable = batches.readable
    step = rows_at_once(classes.device)  # all products have one size, and padding adds exact zeros
    blocks = [slice(start, start + step) for start in range(0, x.shape[1], step)]
    cotangent = torch.zeros_like(classes)
    if blocks:
        cosines = torch.cat([x[:, block] @ classes.mT for block in blocks], dim=1)
        residual = _softmax_minus_one_hot(cosines, y, logit_scale, batches.log_prior)
        residual.mul_((logit_scale * usable)[..., None])
        for block in blocks:
            cotangent.baddbmm_(residual[:, block].mT, x[:, block])
    return features.vjp(cotangent[:, None])[:, 0]

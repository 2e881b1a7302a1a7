"""Prompts through a text tower by autograd, one after the other: works for every tower, and tests the fast tower."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fl_dualpriv.models.base import Backbone

_BACKWARD_COPIES = 4  # a backward pass holds a few tensors of the largest size at a time
_PROBE_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One prompt's graph: ``values`` (n_cls, embed_dim) as a function of ``prompt`` (n_ctx, ctx_dim)."""

    prompt: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class DifferentiableFeatures:
    """`ClassFeatures` over autograd graphs.

    Attributes:
        passes: Graphs, one per prompt.
        bytes_per_row: Approximate memory of one row of `vjp`, in bytes.
    """

    passes: tuple[_Pass, ...]
    bytes_per_row: int

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Shape of one prompt, (n_ctx, ctx_dim)."""
        n_ctx, ctx_dim = self.passes[0].prompt.shape
        return n_ctx, ctx_dim

    @property
    def values(self) -> Tensor:
        """Class features, (prompt, n_cls, embed_dim), detached."""
        return torch.stack([one.values.detach() for one in self.passes])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents (prompt, row, n_cls, embed_dim) back to the prompts: (prompt, row, n_ctx, ctx_dim)."""
        rows = []
        for one, cotangent in zip(self.passes, cotangents, strict=True):
            if len(cotangent) == 0:
                rows.append(one.prompt.new_zeros(0, *one.prompt.shape))
                continue
            # The graph is kept, because the rows of a batch come in several calls.
            (pulled,) = torch.autograd.grad(
                one.values, one.prompt, grad_outputs=cotangent, is_grads_batched=True, retain_graph=True
            )
            rows.append(pulled.detach())
        return torch.stack(rows)

    def vjp_apart(self, cotangents: Tensor) -> Tensor:
        """As `vjp`, but with a separate backward pass for each row."""
        if cotangents.shape[1] == 0:
            return self.vjp(cotangents)
        return torch.cat([self.vjp(cotangents[:, row : row + 1]) for row in range(cotangents.shape[1])], dim=1)

    def vjp_some(self, cotangents: Tensor, classes: Tensor) -> Tensor:
        """As `vjp`, with cotangents (prompt, row, m, embed_dim) for only the ``classes`` (prompt, row, m) of a row."""
        prompts, rows, _, embed_dim = cotangents.shape
        whole = cotangents.new_zeros(prompts, rows, self.passes[0].values.shape[0], embed_dim)
        return self.vjp(whole.scatter_(2, classes[..., None].expand_as(cotangents), cotangents))

    def narrow(self, start: int, stop: int) -> Self:
        """Return the features of only the prompts from ``start`` up to and excluding ``stop``, with the same graphs."""
        return replace(self, passes=self.passes[start:stop])


class FunctionTower:
    """`PromptTower` around any differentiable function of one prompt.

    Args:
        function: Map from a prompt (n_ctx, ctx_dim) to class features (n_cls, embed_dim). They must have unit norm,
            because the tower does not normalise them.
        bytes_per_prompt: Memory in bytes that a forward pass of one prompt keeps; 0 if it does not matter.
        bytes_per_row: Memory in bytes of one row of a backward pass; 0 if it does not matter.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], bytes_per_prompt: int = 0, bytes_per_row: int = 0) -> None:
        self._function, self.bytes_per_prompt, self._bytes_per_row = function, bytes_per_prompt, bytes_per_row

    def __call__(self, prompts: Tensor) -> DifferentiableFeatures:
        """Run (prompt, n_ctx, ctx_dim) through the function, one prompt after the other."""
        passes = tuple(_forward(self._function, prompt) for prompt in prompts)
        return DifferentiableFeatures(passes=passes, bytes_per_row=self._bytes_per_row)

    @torch.no_grad()
    def values(self, prompts: Tensor) -> Tensor:
        """Compute class features (prompt, n_cls, embed_dim) and keep nothing for a backward pass."""
        return torch.stack([self._function(prompt) for prompt in prompts])


def _forward(function: Callable[[Tensor], Tensor], prompt: Tensor) -> _Pass:
    leaf = prompt.detach().clone().requires_grad_(True)
    # The fused attention kernels have no rule for a batched backward pass and would fall back to a slow loop.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return _Pass(prompt=leaf, values=function(leaf))


class PlainTower:
    """`PromptTower` that runs every class's whole sequence through the backbone's own text tower.

    If the tower fills rows (`Backbone.fills_rows`), rows have full length. Otherwise they are cut after the longest
    one, because the tower does not see the tokens that follow.

    Args:
        backbone: The frozen model.
        start: Embeddings of the start tokens, (n_start, ctx_dim).
        suffix: Embeddings of name tokens, end and padding, (n_cls, n_suffix, ctx_dim). If the tower fills rows, they
            must be long enough to fill them.
        lengths: Number of suffix tokens up to and including the end, (n_cls,).
    """

    def __init__(self, backbone: Backbone, start: Tensor, suffix: Tensor, lengths: Tensor) -> None:
        self._backbone, self._start, self._suffix, self._end = backbone, start, suffix, lengths - 1

    def features(self, context: Tensor) -> Tensor:
        """Compute unit-norm class features: (n_ctx, ctx_dim) → (n_cls, embed_dim), differentiable in ``context``."""
        n_cls = self._suffix.shape[0]
        prefix = torch.cat([self._start, context]).expand(n_cls, -1, -1)
        room = self._backbone.context_length - prefix.shape[1]
        suffix = self._suffix[:, :room] if self._backbone.fills_rows else self._suffix
        encoded = self._backbone.encode_embeddings(torch.cat([prefix, suffix], dim=1), prefix.shape[1] + self._end)
        return torch.nn.functional.normalize(encoded, dim=-1)

    @property
    def bytes_per_prompt(self) -> int:
        """Approximate memory that a forward pass of one prompt keeps, in bytes."""
        return self._tower.bytes_per_prompt

    def __call__(self, prompts: Tensor) -> DifferentiableFeatures:
        """Run (prompt, n_ctx, ctx_dim) through the backbone, one prompt after the other."""
        return self._tower(prompts)

    def values(self, prompts: Tensor) -> Tensor:
        """Compute class features (prompt, n_cls, embed_dim) and keep nothing for a backward pass."""
        return self._tower.values(prompts)

    @functools.cached_property
    def _tower(self) -> FunctionTower:
        return FunctionTower(self.features, *self._measure())

    def _measure(self) -> tuple[int, int]:
        """Measure the bytes of a forward pass and of a row of its backward pass, on a prompt of a few tokens."""
        room = self._backbone.context_length - self._start.shape[0] - int(self._end.max()) - 1
        sizes: dict[int, int] = {}  # by storage, because many tensors are views of one storage

        def keep(tensor: Tensor) -> Tensor:
            whole = tensor if tensor._base is None else tensor._base
            if not isinstance(whole, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # not the tensor itself: a graph that holds its own output is never freed

        probe = self._start.new_zeros(max(min(_PROBE_TOKENS, room), 0), self._backbone.ctx_dim)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _forward(self.features, probe)
        return sum(sizes.values()), _BACKWARD_COPIES * max(sizes.values(), default=0)

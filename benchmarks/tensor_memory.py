"""The most tensor memory that a step holds beyond what was there: the same number at each call.

On the ``meta`` device tensors have no values: steps of a shape that no machine at hand can run are counted there. What
kernels need inside is not counted, nor what an allocator loses between blocks.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fl_dualpriv.models.transformers import transformers


class LiveStorages(TorchDispatchMode):
    """Adds up the storages on a device that come to be inside, and takes off those that go.

    Attributes:
        held: Bytes now.
        most: The most so far.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device, self._known = device, set[int]()
        self.held = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what is new."""
        # What was there before is no part of a step, and an operator may return it.
        for leaf in tree_leaves((args, kwargs or {})):
            self._note(leaf, new=False)
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            self._note(leaf, new=True)
        return found

    def _note(self, leaf: object, new: bool) -> None:
        if not isinstance(leaf, Tensor) or leaf.device.type != self._device:
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if new else 0
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, a model of transformers runs on tensors without values, with the operators that a GPU would choose.

    Attention is one operator that keeps no scores, where torch would take it apart. And nobody looks into positions for
    several sequences in one row.
    """

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        mask = None if attn_mask is None else attn_mask.to(query.dtype)
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attention(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]

    with (
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend),
        mock.patch.object(transformers.masking_utils, "find_packed_sequence_indices", return_value=None),
    ):
        yield


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Run a step once; on CUDA the allocator says, elsewhere storages are counted as they come and go.

    Args:
        step: What it returns counts too.
        device: Where it allocates.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with without_values() if device.type == "meta" else nullcontext(), LiveStorages(device.type) as live:
        step()
    return live.most

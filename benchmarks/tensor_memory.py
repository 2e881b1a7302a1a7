"""Peak tensor memory of a step beyond the tensors that existed before it; the number is the same at each call.

On the ``meta`` device tensors have no values, so it can count steps that are too large for the available machines. The
count leaves out memory inside kernels and memory that an allocator loses between blocks.
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
    """Dispatch mode that adds the size of each storage created on a device, and subtracts it when it is freed.

    Attributes:
        held: Bytes held now.
        most: Largest value of ``held`` so far.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device, self._known = device, set[int]()
        self.held = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count the new storages."""
        # Existing storages do not belong to the step, and an operator may return them.
        for leaf in tree_leaves((args, kwargs or {})):
            self._note(leaf, new=False)
        outputs = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            self._note(leaf, new=True)
        return outputs

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
    """Let a transformers model run on tensors without values, with the operators that a GPU would use.

    Attention becomes one operator that does not store scores; on this device torch would split it into parts. The
    search for several sequences in one row, which reads positions, is switched off.
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
    """Run a step once and return its peak memory in bytes.

    On CUDA the number comes from the allocator. On other devices storages are counted when they are created and freed.

    Args:
        step: The step; its return value counts too.
        device: Device on which the step allocates.
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

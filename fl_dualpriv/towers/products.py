"""Products of many prompts with one weight; a prompt's result does not depend on the other prompts.

A matrix library chooses its kernels by the size of a product, and a kernel may treat the last rows differently from
the first. In one product of all prompts, the rounding of a prompt's rows thus depends on their place and on the number
of rows. Here the result is that of one product for each prompt. Faster forms are used if they give the same bits. Each
process tests that once for each shape, on random numbers.
"""

import functools
import math
from typing import Literal

import torch
from torch import Tensor

Form = Literal["one product", "a batch", "a loop"]

_LARGE_ROWS = 512
"""From this number of rows on, a separate product is as fast as a part of a larger one (docs/log.md, 2026-11-30)."""


def prompt_products(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each prompt's rows by a weight, and add a bias.

    Guarantee:
        ``result[p]`` is, bit by bit, that of ``x[p : p + 1]``: it depends on no other prompt, nor on their number, as
        far as a product of fixed shapes does not depend on where in memory its operands lie. `row_check` tests that
        on the whole learner.

    Args:
        x: Rows of the prompts, (prompt, …, k), in the precision of ``weight``.
        weight: Weight, (k, n).
        bias: Bias, (n,), or None.

    Returns:
        Products (prompt, …, n).
    """
    prompts, count, width = len(x), math.prod(x.shape[1:-1]), x.shape[-1]
    rows = x.reshape(prompts, count, width).contiguous()  # the memory layout of a matrix also decides about kernels
    form: Form = "a loop"
    if prompts > 1 and count < _LARGE_ROWS:
        transposed, biased = weight.stride(0) == 1, bias is not None
        form = exact_form(prompts, count, width, weight.shape[1], transposed, biased, weight.dtype, weight.device)
    return _product(form, rows, weight, bias).reshape(*x.shape[:-1], weight.shape[1])


@functools.lru_cache(maxsize=4096)
@torch.no_grad()
def exact_form(
    prompts: int, rows: int, k: int, n: int, transposed: bool, biased: bool, dtype: torch.dtype, device: torch.device
) -> Form:
    """Find the fastest form that equals the loop bit by bit on random numbers of this shape; depends on the machine."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) - 0.5).to(device, dtype)

    x, weight = random(prompts, rows, k), random(n, k).T if transposed else random(k, n)
    bias = random(n) if biased else None
    expected = _product("a loop", x, weight, bias)
    forms: tuple[Form, ...] = ("one product", "a batch")
    for form in forms:
        if torch.equal(_product(form, x, weight, bias).view_as(expected), expected):
            return form
    return "a loop"


def _product(form: Form, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute (prompt, row, k) times (k, n), plus (n,), in one form."""
    if form == "one product" or len(rows) == 1:
        flat = rows.flatten(0, 1)
        return flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    if form == "a batch":
        weights = weight.expand(len(rows), -1, -1)
        return torch.bmm(rows, weights) if bias is None else torch.baddbmm(bias, rows, weights)
    result = rows.new_empty(*rows.shape[:2], weight.shape[1])
    for prompt_rows, into in zip(rows, result, strict=True):
        if bias is None:
            torch.mm(prompt_rows, weight, out=into)
        else:
            torch.addmm(bias, prompt_rows, weight, out=into)
    return result

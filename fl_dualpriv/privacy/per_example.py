"""Exact per-example gradients of the classification loss with respect to one shared prompt."""

from collections.abc import Callable

import torch
from torch import Tensor


def per_example_gradients(
    text_features: Callable[[Tensor], Tensor],
    prompt: Tensor,
    image_features: Tensor,
    labels: Tensor,
    logit_scale: float,
    microbatch: int,
) -> Tensor:
    """Differentiate each example's cross-entropy with respect to the prompt.

    The class features W(P) do not depend on the example, so one forward serves all of them: with logits
    s·x_i·W(P)ᵀ, example i's gradient is the vector-Jacobian product of W at P with cotangent s·(softmax_i − y_i) x_iᵀ.

    Guarantee:
        Row i is a function of the prompt and of example i alone (tests/guarantees/test_per_example.py). Splitting the
        batch into microbatches bounds memory and changes nothing else. A non-finite image feature makes its own row
        non-finite and no other; `clip_rows` turns such a row into zero.

    Args:
        text_features: Maps a prompt (n_ctx, ctx_dim) to unit-norm class features (n_cls, embed_dim); differentiable.
        prompt: The effective prompt P, (n_ctx, ctx_dim).
        image_features: (batch, embed_dim), unit norm; batch may be 0.
        labels: (batch,) class ids.
        logit_scale: s, CLIP's inverse temperature.
        microbatch: How many backward passes run side by side; >= 1.

    Returns:
        (batch, n_ctx, ctx_dim), the gradients of -log softmax(logits_i)[labels_i].
    """
    if image_features.shape[0] == 0:
        return prompt.new_zeros((0, *prompt.shape))
    prompt = prompt.detach().requires_grad_(True)
    with torch.enable_grad():
        classes = text_features(prompt)
    rows = []
    for start in range(0, image_features.shape[0], microbatch):
        x = image_features[start : start + microbatch]
        y = labels[start : start + microbatch]
        with torch.no_grad():
            residual = torch.softmax(logit_scale * x @ classes.T, dim=1)
            residual[torch.arange(len(y), device=y.device), y] -= 1.0
            cotangents = logit_scale * residual[:, :, None] * x[:, None, :]
        (rows_here,) = torch.autograd.grad(
            classes, prompt, grad_outputs=cotangents, is_grads_batched=True, retain_graph=True
        )
        rows.append(rows_here.detach())
    return torch.cat(rows)


def summed_gradient(
    text_features: Callable[[Tensor], Tensor],
    prompt: Tensor,
    image_features: Tensor,
    labels: Tensor,
    logit_scale: float,
) -> Tensor:
    """Gradient of the *summed* cross-entropy, (n_ctx, ctx_dim): one backward pass, no clipping, no privacy.

    Equal to `per_example_gradients(...).sum(0)` up to rounding; used where no record is clipped. An example with
    non-finite features is left out, so that one bad record does not spoil a client under client-level DP.
    """
    readable = torch.isfinite(image_features).all(dim=1)
    image_features, labels = image_features[readable], labels[readable]
    if len(labels) == 0:
        return torch.zeros_like(prompt)
    prompt = prompt.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = logit_scale * image_features @ text_features(prompt).T
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, prompt)
    return gradient.detach()

"""What must hold of the gradients of every objective, checked on the code that runs; called by tests of the methods."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.learners import rows as per_example
from fl_dualpriv.learners.base import ClientData, Objective
from fl_dualpriv.learners.classification import Classification, ClassificationGradients
from fl_dualpriv.learners.rows import Batches
from fl_dualpriv.privacy.clipping import Arithmetic, ClippedSum
from fl_dualpriv.privacy.step import OuterBlock, clipped_sums
from fl_dualpriv.towers.base import ClassFeatures, PromptTower

CLIP = 0.3


@dataclass(frozen=True)
class FeatureRows:
    """`Rows` of one client in noise space ``feature``, from its class features and records."""

    classes: Tensor
    x: Tensor
    y: Tensor
    logit_scale: float

    def blocks(self) -> Iterator[OuterBlock]:
        for left, right in per_example.feature_blocks(self.classes, self.x, self.y, self.logit_scale):
            yield OuterBlock(client=0, left=left, right=right)

    def zeros(self) -> Tensor:
        return torch.zeros(1, *self.classes.shape, dtype=torch.float64)


def clipped_feature_sum(
    classes: Tensor, x: Tensor, y: Tensor, logit_scale: float, clip_norm: float, arithmetic: Arithmetic = "float"
) -> ClippedSum:
    """The clipped sum of one client's gradients at its class features."""
    return clipped_sums(FeatureRows(classes, x, y, logit_scale), clip_norm, arithmetic)[0]


def batch_rows(
    features: ClassFeatures, batches: Batches, logit_scale: float, *, workspace_bytes: int, top_m: int = 0
) -> ClassificationGradients:
    """The rows of batches, as a step makes them."""
    objective = Classification(
        tower=cast(PromptTower, None),
        logit_scale=logit_scale,
        top_m=top_m,
        noise_space="prompt",
        workspace_bytes=workspace_bytes,
    )
    return ClassificationGradients(objective, features, batches, None)


def of(data: ClientData, rows: Tensor | list[int]) -> ClientData:
    """Some records of a client, whose prior is a constant and stays."""
    index = torch.as_tensor(rows)
    of_records = {name: value for name, value in vars(data).items() if name != "log_prior"}
    return replace(data, **{name: value[index] for name, value in of_records.items() if isinstance(value, Tensor)})


def clipped_sum(
    objective: Objective[Any], prompt: Tensor, data: ClientData, clip: float = CLIP, arithmetic: Arithmetic = "float"
) -> Tensor:
    """One client's clipped sum over all its records, in real units."""
    gradients = objective.bind([data]).gradients(prompt[None], [np.arange(data.num_examples)])
    (found,) = clipped_sums(gradients, clip, arithmetic)
    assert found.sensitivity * (found.grid or 1.0) == clip or found.grid is not None
    return found.value * (found.grid or 1.0)


def gradients_are_autograds(
    objective: Objective[Any], prompt: Tensor, data: ClientData, loss: Callable[[Tensor, ClientData], Tensor]
) -> None:
    """Each record's gradient, unclipped, is that of its own loss; the plain sum is their sum."""
    total = torch.zeros_like(prompt)
    for i in range(data.num_examples):
        leaf = prompt.clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(loss(leaf, of(data, [i])), leaf)
        found = clipped_sum(objective, prompt, of(data, [i]), clip=1e6)
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max() + 1))
        total += expected
    sums = objective.bind([data]).gradients(prompt[None], [np.arange(data.num_examples)]).sums()[0]
    torch.testing.assert_close(sums.float(), total, rtol=1e-4, atol=1e-5 * float(total.abs().max() + 1))


def one_record_moves_the_sum_by_at_most_c(objective: Objective[Any], prompt: Tensor, data: ClientData) -> None:
    """With gradients that are longer than C, in floats and in integers; and some records do reach C."""
    for arithmetic in ("float", "integer"):
        whole = clipped_sum(objective, prompt, data, arithmetic=arithmetic)
        moves = []
        for i in range(data.num_examples):
            rest = of(data, [j for j in range(data.num_examples) if j != i])
            moves.append(float((whole - clipped_sum(objective, prompt, rest, arithmetic=arithmetic)).norm()))
        assert max(moves) <= CLIP * (1 + 1e-6), f"{arithmetic}: a record moves the sum by {max(moves):.3f}, C = {CLIP}"
        assert max(moves) >= 0.99 * CLIP, f"{arithmetic}: nothing is clipped, so nothing is tested"


def a_bad_record_is_a_zero(objective: Objective[Any], prompt: Tensor, data: ClientData, field: str) -> None:
    """Not finite in ``field``: it adds nothing and spoils nobody, clipped or not; an empty batch gives zeros."""
    kept = [j for j in range(data.num_examples) if j != 1]
    for bad in (float("nan"), float("inf"), float("-inf")):
        values = getattr(data, field).clone()
        values[1] = bad
        spoilt = replace(data, **{field: values})
        torch.testing.assert_close(
            clipped_sum(objective, prompt, spoilt), clipped_sum(objective, prompt, of(data, kept)), rtol=0, atol=1e-6
        )
        everyone, others = np.arange(data.num_examples), np.array(kept)
        sums = [
            objective.bind([own]).gradients(prompt[None], [rows]).sums()[0]
            for own, rows in ((spoilt, everyone), (data, others))
        ]
        torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-4)
    nobody = objective.bind([data]).gradients(prompt[None], [np.arange(0)])
    assert not clipped_sums(nobody, CLIP, "float")[0].value.any()


def clients_do_not_mix(objective: Objective[Any], prompts: Tensor, data: list[ClientData]) -> None:
    """Clients that step together have the sums that they have alone, whatever the order of their sizes."""
    picked = [np.arange(own.num_examples) for own in data]
    together = clipped_sums(objective.bind(data).gradients(prompts, picked), CLIP, "float")
    for prompt, own, found in zip(prompts, data, together, strict=True):
        assert torch.equal(found.value, clipped_sum(objective, prompt, own)), "a client's sum follows who steps along"

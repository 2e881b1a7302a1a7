"""One private step of a soft prompt by several methods, all on the same model and the same batch.

Every method gets projected visual tokens. DP-SGD and the zeroth-order method are written in the usual way: they run the
whole sequence with the batch in one pass, and the soft prompt is an embedding layer, which Opacus differentiates
exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from fl_dualpriv.learners.answers import BLOCK, AnswerRecords
from fl_dualpriv.learners.soft_prompt import SoftPromptObjective
from fl_dualpriv.models.llava import LlavaBackbone
from fl_dualpriv.privacy.step import client_rows, clipped_sums

CLIP = 1.0  # a whole number, because Opacus' ghost clipping takes an int
_STEP = 1e-3
"""Step size of the two-point estimate."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Common input of all methods."""

    backbone: LlavaBackbone
    records: AnswerRecords
    prompt: Tensor

    @property
    def batch(self) -> int:
        """Number of records."""
        return self.records.num_examples


class WholeSequence(nn.Module):
    """Module that maps visual tokens and text to each record's loss, with the prompt as the only parameter."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.prompt = nn.Embedding.from_pretrained(task.prompt.clone(), freeze=False)
        self._backbone = (task.backbone,)  # a tuple hides the frozen model from Opacus

    def forward(self, visual: Tensor, tokens: Tensor, in_answer: Tensor) -> Tensor:
        """Return the loss of each record: (row, embed_dim), (row, token), (row, token) → (row,)."""
        (backbone,) = self._backbone
        n_ctx = self.prompt.num_embeddings
        rows = torch.arange(n_ctx, device=tokens.device).repeat(len(tokens), 1)
        logits = whole_logits(backbone, visual, self.prompt(rows), tokens)
        each = nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        return (each * in_answer).sum(dim=1) / in_answer.sum(dim=1)


def whole_logits(backbone: LlavaBackbone, visual: Tensor, prompts: Tensor, tokens: Tensor) -> Tensor:
    """Compute the logits of each text token in one pass over the whole sequence, without those of visual tokens."""
    model = backbone._model
    dtype = model.lm_head.weight.dtype
    images = visual.unflatten(1, (backbone.n_visual, backbone.ctx_dim)).to(dtype)
    before = backbone._before.expand(len(tokens), -1, -1).to(dtype)
    text = model.model.language_model.embed_tokens(tokens[:, :-1])
    sequence = torch.cat([before, images, prompts.to(dtype), text], dim=1)
    hidden = model.model.language_model(inputs_embeds=sequence, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, -tokens.shape[1] :]).float()


def _given(task: Task) -> tuple[Tensor, Tensor, Tensor]:
    records, device = task.records, task.prompt.device
    position = torch.arange(records.tokens.shape[1])
    in_answer = (position >= records.answer_start[:, None]) & (position < records.length[:, None])
    return records.visual.to(device), records.tokens.to(device), in_answer.to(device)


def dpsgd_hooks(task: Task) -> Callable[[], Tensor]:
    """Make a step with Opacus: hooks store each example's gradient, and its optimizer clips and sums them."""
    module = GradSampleModule(WholeSequence(task), loss_reduction="sum")
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    optimizer = DPOptimizer(
        sgd, noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=task.batch, loss_reduction="sum"
    )
    given = _given(task)

    def step() -> Tensor:
        optimizer.zero_grad()
        module(*given).sum().backward()
        optimizer.clip_and_accumulate()
        (parameter,) = module.parameters()
        return parameter.summed_grad.detach()  # type: ignore[union-attr] - Opacus puts it there

    return step


def dpsgd_ghost(task: Task) -> Callable[[], Tensor]:
    """Make a step with Opacus' ghost clipping: one backward pass for the norms and one for the weighted sum."""
    module = GradSampleModuleFastGradientClipping(WholeSequence(task), loss_reduction="sum", max_grad_norm=int(CLIP))
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    optimizer = DPOptimizerFastGradientClipping(
        sgd, noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=task.batch, loss_reduction="sum"
    )
    given = _given(task)

    def step() -> Tensor:
        optimizer.zero_grad()
        DPTensorFastGradientClipping(module, optimizer, module(*given), "sum").backward()
        (parameter,) = module.parameters()
        assert parameter.grad is not None
        return parameter.grad.detach()

    return step


def zeroth_order(task: Task, rows: int = 0) -> Callable[[], Tensor]:
    """Make a step with a two-point estimate along one random direction.

    Each example's difference quotient is clipped, and the clipped quotients are summed.

    Args:
        task: Model, records and prompt.
        rows: Examples per pass; 0 runs all of them at once.

    Reference:
        MeZO (arXiv:2305.17333) for the estimate, DPZero (arXiv:2310.09639) for clipping the scalar of each example.
    """
    module, given = WholeSequence(task), _given(task)
    generator = torch.Generator().manual_seed(0)

    def step() -> Tensor:
        direction = torch.randn(task.prompt.shape, generator=generator).to(task.prompt)
        quotients = _along(module, task, given, direction, rows or task.batch)
        return quotients.clamp(-CLIP, CLIP).sum() * direction

    return step


@torch.no_grad()
def _along(module: WholeSequence, task: Task, given: tuple[Tensor, ...], direction: Tensor, rows: int) -> Tensor:
    """Return the difference quotient of each example's loss along a direction, (row,)."""
    quotients = direction.new_zeros(task.batch)
    for sign in (1.0, -1.0):
        module.prompt.weight.copy_(task.prompt + sign * _STEP * direction)
        for start in range(0, task.batch, rows):
            here = slice(start, start + rows)
            quotients[here] += sign * module(*(part[here] for part in given)) / (2 * _STEP)
    return quotients


def against_exact(task: Task) -> tuple[Tensor, Tensor]:
    """Return the quotients along one direction, and the exact gradients' products with it, (row,) each."""
    direction = torch.randn(task.prompt.shape, generator=torch.Generator().manual_seed(1)).to(task.prompt)
    quotients = _along(WholeSequence(task), task, _given(task), direction, task.batch)
    step = SoftPromptObjective(task.backbone).bind([task.records]).gradients(task.prompt[None], [np.arange(task.batch)])
    rows = torch.cat(list(client_rows(step, 0)))[: task.batch]
    return quotients, (rows * direction).sum(dim=(1, 2))


def ours(task: Task, block: int, checkpointing: bool) -> Callable[[], Tensor]:
    """Make a step with our objective.

    The tokens before the prompt run without gradients. After them, each example has a separate copy of the prompt.
    """
    objective = SoftPromptObjective(task.backbone, block=block, checkpointing=checkpointing)

    def step() -> Tensor:
        gradients = objective.bind([task.records]).gradients(task.prompt[None], [np.arange(task.batch)])
        return clipped_sums(gradients, CLIP, "float")[0].value

    return step


METHODS: dict[str, Callable[[Task], Callable[[], Tensor]]] = {
    "DP-SGD, hooks": dpsgd_hooks,
    "DP-SGD, ghost": dpsgd_ghost,
    "zeroth-order": zeroth_order,
    "zeroth-order, in blocks of 8": lambda task: zeroth_order(task, 8),
    "ours": lambda task: ours(task, BLOCK, False),
    "ours, checkpointing": lambda task: ours(task, BLOCK, True),
    "ours, little memory": lambda task: ours(task, 1, True),
}
"""Name → function that makes a step; the step returns the clipped sum without noise. "ours" runs 8 records at a time.
"ours, little memory" runs one at a time with checkpointing."""

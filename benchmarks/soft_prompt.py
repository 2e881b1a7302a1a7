"""Cost of exact per-example gradients of a soft prompt, relative to the non-private step of the same batch.

The models are of LLaVA's type with random weights, in fp32 on one thread. The non-private step is written in the usual
way: one prompt for the whole batch, one pass, the mean loss. Both steps look up the keys and values in front of the
prompt, which do not depend on it, in a table of images, and both run the batch as one block. In training, a client's
batches are drawn at random and run in padded blocks of a public size; the cost of this is printed separately.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import machine

machine.one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.harness import Costs, assert_equal, emit, interleaved, relative_difference, timed  # noqa: E402
from benchmarks.llava_models import DEMO, LARGER, TOY, LlavaShape, make_backbone, make_parts, make_records  # noqa: E402
from fl_dualpriv.learners.answers import BLOCK, AnswerRecords  # noqa: E402
from fl_dualpriv.learners.soft_prompt import SoftPromptObjective  # noqa: E402
from fl_dualpriv.models.answering import Prefix  # noqa: E402
from fl_dualpriv.models.llava import LlavaBackbone  # noqa: E402
from fl_dualpriv.privacy.clipping import clip_rows  # noqa: E402
from fl_dualpriv.privacy.step import client_rows, clipped_sums  # noqa: E402

BATCHES = (8, 32)
N_CTX = 8
_MAX_TOKENS = 16
_WORDS = (6, 11)
_CLIP = 0.1
_KEPT_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One batch of one model."""

    backbone: LlavaBackbone
    records: AnswerRecords
    prompt: Tensor
    prefix: Prefix
    keeping: SoftPromptObjective
    computing: SoftPromptObjective
    in_blocks: SoftPromptObjective
    everyone: np.ndarray


def make_setting(shape: LlavaShape, batch: int) -> Setting:
    """Make a model, a batch of random records, and the keys and values in front of the prompt."""
    backbone = make_backbone(make_parts(shape, "fp32", "cpu"), None, "fp32", "cpu")
    records = make_records(backbone, shape, batch, _WORDS, _MAX_TOKENS)
    return Setting(
        backbone=backbone,
        records=records,
        prompt=0.02 * torch.randn(N_CTX, backbone.ctx_dim, generator=torch.Generator().manual_seed(3)),
        prefix=backbone.prefix(records.visual),
        keeping=SoftPromptObjective(backbone, block=batch, kept_bytes=_KEPT_BYTES),
        computing=SoftPromptObjective(backbone, block=batch),
        in_blocks=SoftPromptObjective(backbone, kept_bytes=_KEPT_BYTES),
        everyone=np.arange(batch),
    )


def private_step(setting: Setting, objective: SoftPromptObjective) -> Tensor:
    """Compute per-example gradients, clip each one and sum them."""
    step = objective.bind([setting.records]).gradients(setting.prompt[None], [setting.everyone])
    return clipped_sums(step, _CLIP, "float")[0].value


def nonprivate_step(setting: Setting, prefix: Prefix) -> Tensor:
    """Compute the gradient of the batch's mean loss with one prompt, one pass and no clipping."""
    records, backbone = setting.records, setting.backbone
    prompt = setting.prompt.clone().requires_grad_(True)
    text = backbone.embed_tokens(records.tokens[:, :-1])
    embeddings = torch.cat([prompt.expand(len(text), -1, -1), text], dim=1)
    logits = backbone.logits(prefix, embeddings, len(prompt) - 1)
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), records.tokens, reduction="none")
    position = torch.arange(records.tokens.shape[1])
    counts = (position >= records.answer_start[:, None]) & (position < records.length[:, None])
    loss = ((each * counts).sum(dim=1) / counts.sum(dim=1)).mean()
    return torch.autograd.grad(loss, prompt)[0]


def check(setting: Setting) -> float:
    """Check per-example gradients, and return the largest relative difference.

    Their mean must equal the non-private gradient, and the private step must equal their clipped sum.
    """
    step = setting.keeping.bind([setting.records]).gradients(setting.prompt[None], [setting.everyone])
    rows = torch.cat(list(client_rows(step, 0)))[: len(setting.everyone)]
    norms = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    if not norms.max() > 10 * torch.finfo(torch.float32).eps:
        raise AssertionError("all gradients are zero, so the methods cannot be compared")
    clipped = clip_rows(rows, _CLIP)[0].sum(dim=0)
    differences = (
        relative_difference(rows.mean(dim=0), nonprivate_step(setting, setting.prefix)),
        relative_difference(private_step(setting, setting.keeping), clipped),
        relative_difference(private_step(setting, setting.computing), clipped),
        relative_difference(private_step(setting, setting.in_blocks), clipped),
    )
    return max(assert_equal("per-example gradients", difference, 1e-5) for difference in differences)


def main(arguments: list[str] | None = None) -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--self-check", action="store_true", help="toy sizes, a few seconds; the ratios mean nothing")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    toy = options.self_check
    shapes = {"4x128": TOY if toy else DEMO} | ({} if toy else {"8x512": LARGER})
    settings = {(name, batch): make_setting(shape, batch) for name, shape in shapes.items() for batch in BATCHES}
    largest = max(check(setting) for setting in settings.values())

    costs: dict[str, Costs] = {}
    for (name, batch), setting in settings.items():
        end = f", {name}, B={batch}"
        contestants: dict[str, Callable[[], object]] = {
            f"non-private{end}": lambda s=setting: nonprivate_step(s, s.prefix.take(s.records.image_of)),
            f"per-example{end}": lambda s=setting: private_step(s, s.keeping),
            f"non-private, prefix anew{end}": lambda s=setting: nonprivate_step(s, s.backbone.prefix(s.records.visual)),
            f"per-example, prefix anew{end}": lambda s=setting: private_step(s, s.computing),
        }
        if batch > BLOCK:
            contestants[f"per-example, in blocks{end}"] = lambda s=setting: private_step(s, s.in_blocks)
        # Many repeats of a short step, because other work on the machine then adds little to the fastest one.
        repeats = options.repeats * (1 if toy or name == "8x512" else 8)
        measured = {contestant: timed(work) for contestant, work in contestants.items()}
        costs |= interleaved(measured, repeats, warm_ups=1)

    def ratio(kind: str, name: str, batch: int) -> float:
        end = f"{kind}, {name}, B={batch}"
        return costs[f"per-example{end}"].best / costs[f"non-private{end}"].best

    headline = {f"over_nonprivate_b{batch}": ratio("", "4x128", batch) for batch in BATCHES}
    headline |= {f"over_nonprivate_{name}_b{b}": ratio("", name, b) for name, b in settings if name != "4x128"}
    by_median = {
        f"{name}, B={batch}": round(
            costs[f"per-example, {name}, B={batch}"].median / costs[f"non-private, {name}, B={batch}"].median, 3
        )
        for name, batch in settings
    }
    anew = {f"{name}, B={b}": round(ratio(", prefix anew", name, b), 3) for name, b in settings}
    prefix_speedups = {
        f"{name}, B={b}": round(
            costs[f"per-example, prefix anew, {name}, B={b}"].best / costs[f"per-example, {name}, B={b}"].best, 2
        )
        for name, b in settings
    }
    details = {
        "largest difference": float(f"{largest:.2e}"),
        "ratio of medians": by_median,
        "ratio with the prefix computed in each step": anew,
        f"the same batch in blocks of {BLOCK} / the non-private step": {
            f"{name}, B={b}": round(
                costs[f"per-example, in blocks, {name}, B={b}"].best / costs[f"non-private, {name}, B={b}"].best, 3
            )
            for name, b in settings
            if b > BLOCK
        },
        "step without kept prefixes / with": prefix_speedups,
        "prompt, text and visual tokens": [N_CTX, _MAX_TOKENS, next(iter(shapes.values())).n_patches],
    }
    kind = "self-check" if toy else "full"
    emit("soft_prompt", headline=headline, costs=costs, unit="step", details=details, kind=kind)


if __name__ == "__main__":
    main()

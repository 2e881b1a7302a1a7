"""Cost of exact per-example gradients of a prompt, relative to the non-private step and to Opacus.

The model is a text tower of ViT-B/16's size with random weights, 16 context vectors and cached image features, in fp32
on one thread. Every exact contestant is compared with Opacus' grad_sample or with the others before a time counts.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from benchmarks import machine

machine.one_thread()

import torch  # noqa: E402
from opacus.grad_sample import GradSampleModule  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.harness import BENCH_DIR, assert_equal, emit, interleaved, relative_difference, timed  # noqa: E402
from benchmarks.our_runs import full_config  # noqa: E402
from benchmarks.towers import (  # noqa: E402
    TOY,
    VIT_B_16,
    Setting,
    batches,
    make_model,
    make_setting,
    our_gradients,
)
from fl_dualpriv.learners.classification import Classification, ClassificationGradients  # noqa: E402
from fl_dualpriv.learners.rows import per_example_gradients, residuals  # noqa: E402
from fl_dualpriv.privacy.clipping import clipped_sum  # noqa: E402
from fl_dualpriv.privacy.step import clipped_sums  # noqa: E402
from fl_dualpriv.tasks.build import image_task  # noqa: E402
from fl_dualpriv.towers.base import ClassFeatures  # noqa: E402
from fl_dualpriv.towers.shared_prefix import SharedPrefixTower  # noqa: E402

BATCH, OPACUS_BATCH = 16, 8
TOP_M = (2, 3, 10)
_VMAP_CHUNK = 4
_CLIP = 1.0
_WORKSPACE = 512 * 2**20


def rows_of(setting: Setting, top_m: int = 0) -> Tensor:
    """Compute the per-example gradients of the first client's batch with our engine, (batch, n_ctx, ctx_dim).

    With ``top_m`` = 0 they are exact.
    """
    taken = batches(setting, slice(0, 1))
    features = setting.ours(setting.prompts[:1])
    rows = per_example_gradients(features, taken, setting.scale, workspace_bytes=_WORKSPACE, top_m=top_m)
    return rows[0, : taken.counts[0]]


def rows_by_class(setting: Setting) -> Tensor:
    """Compute the exact per-example gradients through the code of top-m, with all classes chosen."""
    x, y = setting.images[:1], setting.labels[:1]
    features = setting.ours(setting.prompts[:1])
    residual = residuals(features.values, x, y, setting.scale)
    classes = torch.arange(residual.shape[-1]).expand(residual.shape)
    return features.vjp_some(setting.scale * residual[..., None] * x[:, :, None], classes)[0]


def gradients(
    setting: Setting, features: ClassFeatures, space: Literal["prompt", "feature"], top_m: int = 0
) -> ClassificationGradients:
    """Return the rows of one client's batch, as a step makes them."""
    objective = Classification(
        tower=setting.ours,
        logit_scale=setting.scale,
        top_m=top_m,
        noise_space=space,
        workspace_bytes=_WORKSPACE,
    )
    return ClassificationGradients(objective, features, batches(setting, slice(0, 1)), None)


def private_step(setting: Setting, top_m: int = 0) -> Tensor:
    """Compute, clip and sum per-example gradients, as a client's step does."""
    features = setting.ours(setting.prompts[:1])
    return clipped_sums(gradients(setting, features, "prompt", top_m), _CLIP)[0].value


def feature_space_step(setting: Setting) -> Tensor:
    """Clip and noise d loss / d class features, whose norm has a closed form; then run one backward pass per batch."""
    features = setting.ours(setting.prompts[:1])
    (clean,) = clipped_sums(gradients(setting, features, "feature"), _CLIP)
    noised = clean.value + torch.randn_like(clean.value)
    return features.vjp(noised.float()[None, None])[0, 0]


class PromptClassifier(nn.Module):
    """Module that maps cached features to logits, with the context as its only parameter, so Opacus is exact."""

    def __init__(self, text: nn.Module, context: Tensor, scale: float) -> None:
        super().__init__()
        self.context = nn.Parameter(context.clone())
        # A tuple hides the module, because Opacus refuses a child's buffers and would differentiate frozen parameters.
        self._text, self._scale = (text,), scale

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, n_cls) of features (batch, embed_dim)."""
        return self._scale * images @ self._text[0](self.context).T


def opacus_rows(model: GradSampleModule, images: Tensor, labels: Tensor) -> Tensor:
    """Compute Opacus' grad_sample of the context, (batch, n_ctx, ctx_dim)."""
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    (parameter,) = model.parameters()
    return parameter.grad_sample.detach()  # type: ignore[union-attr] - Opacus puts it there


def vmap_rows(setting: Setting, batch: int) -> Tensor:
    """Compute the gradients with torch.func's vmap(grad) over examples, in chunks, on the model without padding."""

    def loss(context: Tensor, image: Tensor, label: Tensor) -> Tensor:
        logits = setting.scale * image @ setting.short(context).T
        return nn.functional.cross_entropy(logits[None], label[None])

    one = torch.func.grad(loss)
    per_example = torch.func.vmap(one, in_dims=(None, 0, 0), chunk_size=_VMAP_CHUNK)
    return per_example(setting.prompts[0], setting.images[0, :batch], setting.labels[0, :batch])


def top_m_bias(setting: Setting) -> dict[int, float]:
    """Return, for each m, the relative difference of the clipped sum to the exact one.

    The clip norm is the median of the exact norms.
    """
    rows = rows_of(setting)
    clip_norm = float(rows.flatten(1).norm(dim=1).median())
    exact = clipped_sum(rows, clip_norm).value
    return {m: relative_difference(clipped_sum(rows_of(setting, m), clip_norm).value, exact) for m in TOP_M}


def on_the_demo(setting: Setting) -> Setting:
    """Return the setting with the embedded demo's tower, all 100 class names, and one client's real records.

    Bias is measured on real records, because random features say little about it.
    """
    config = full_config({"resources.device": "cpu", "resources.feature-cache": str(BENCH_DIR / "features")})
    task = image_task(config)
    data = task.client_data(0, 1)
    tower = task.text.tower
    assert isinstance(tower, SharedPrefixTower)
    return replace(
        setting,
        ours=tower,
        prompts=task.initial_prompt(config)[None],
        images=data.features[None],
        labels=data.labels[None],
        scale=task.backbone.logit_scale,
    )


def main(arguments: list[str] | None = None) -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--self-check", action="store_true", help="toy sizes, a few seconds; the ratios mean nothing")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    toy, repeats = options.self_check, options.repeats
    warnings.filterwarnings("ignore", message=".*(performance drop|backward hook).*")
    model = make_model(TOY if toy else VIT_B_16)
    small = make_setting(model, n_cls=10, clients=1, batch=BATCH)
    eight = make_setting(model, n_cls=10, clients=1, batch=OPACUS_BATCH)
    large = make_setting(model, n_cls=12 if toy else 100, clients=1, batch=BATCH)
    wrapped = GradSampleModule(PromptClassifier(eight.coop, eight.prompts[0], eight.scale))

    rows = rows_of(small)
    differences = {
        "opacus": relative_difference(rows_of(eight), opacus_rows(wrapped, eight.images[0], eight.labels[0])),
        "vmap(grad)": relative_difference(rows, vmap_rows(small, BATCH)),
        "their mean and the non-private step": relative_difference(
            rows.mean(dim=0), our_gradients(small, slice(0, 1))[0]
        ),
        "top-m of all classes": relative_difference(rows_by_class(small), rows),
    }
    for name, difference in differences.items():
        assert_equal(name, difference, 1e-5)
    bias, demo_bias = top_m_bias(large), top_m_bias(on_the_demo(large))

    contestants: dict[str, Callable[[], object]] = {
        "non-private, B=16": lambda: our_gradients(small, slice(0, 1)),
        "exact, B=16": lambda: private_step(small),
        "feature space, B=16": lambda: feature_space_step(small),
        "exact, B=8": lambda: private_step(eight),
        "non-private, C=100": lambda: our_gradients(large, slice(0, 1)),
        **{f"top-{m}, C=100": lambda m=m: private_step(large, m) for m in TOP_M},
    }
    times = dict.fromkeys(contestants, 1 if toy else 4) | {"top-10, C=100": 1}
    measured = {name: timed(work, times[name]) for name, work in contestants.items()}
    measured["opacus, 77 tokens, B=8"] = timed(lambda: opacus_rows(wrapped, eight.images[0], eight.labels[0]))
    measured["vmap(grad), no padding, B=16"] = timed(lambda: vmap_rows(small, BATCH))
    costs = interleaved(measured, repeats)
    nonprivate, exact = costs["non-private, B=16"].best, costs["exact, B=16"].best
    base = costs["non-private, C=100"].best
    headline = {
        "over_nonprivate": exact / nonprivate,
        "over_nonprivate_topm": costs["top-3, C=100"].best / base,
        "vs_opacus": costs["opacus, 77 tokens, B=8"].best / costs["exact, B=8"].best,
    }
    details = {
        "largest difference": max(differences.values()),
        "differences": {name: float(f"{value:.2e}") for name, value in differences.items()},
        "vmap(grad) over exact, B=16": round(costs["vmap(grad), no padding, B=16"].best / exact, 2),
        "feature space over non-private": round(costs["feature space, B=16"].best / nonprivate, 2),
        "top-m over non-private": {m: round(costs[f"top-{m}, C=100"].best / base, 2) for m in TOP_M},
        "top-m bias of the clipped sum, relative": {m: round(value, 4) for m, value in bias.items()},
        "the same on the demo's data, before training": {m: round(value, 4) for m, value in demo_bias.items()},
        "floor (F + B b)/(F + b)": round(small.shape.floor_over_nonprivate(BATCH), 2),
    }
    emit(
        "per_example",
        headline=headline,
        costs=costs,
        unit="step",
        details=details,
        kind="self-check" if toy else "full",
    )


if __name__ == "__main__":
    main()

"""From class names to towers: which one is taken, and that a wrong one is found out before it is used."""

import logging
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners import context as learner
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.models.open_clip import OpenClipBackbone, load_backbone

NAMES = ("cat", "red fire truck", "dog", "the great wall of china", "tree")
SHAPES = {
    "LAION style": {},
    "wider than deep": {"text_cfg": {"width": 64, "heads": 4, "layers": 1}, "embed_dim": 48},
    "OpenAI style": {"quick_gelu": True},
    "tanh": {"text_cfg": {"act_kwargs": {"approximate": "tanh"}}},
    "layer scale, linear projection, other eps": {
        "text_cfg": {"ls_init_value": 0.3, "proj_bias": True, "norm_kwargs": {"eps": 1e-3}}
    },
    "no projection, apart, eos": {
        "custom_text": True,
        "text_cfg": {"proj_type": "none", "pool_type": "eos", "eos_id": 49407},
    },
}


def load(folder: Path, precision: str = "fp32") -> OpenClipBackbone:
    return load_backbone(f"local-dir:{folder}", "", "cpu", None, precision)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _say_again():
    learner._say_once.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "fl_dualpriv"]


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def any_backbone(request: pytest.FixtureRequest, make_clip_dir: Callable[..., Path]) -> OpenClipBackbone:
    return load(make_clip_dir(request.param))


@pytest.mark.parametrize("template", ["a photo of a {}", "a drawing of a {}, very small", "{}"])
def test_shared_prefix_equals_plain_tower_in_value_and_gradient(any_backbone: OpenClipBackbone, template: str) -> None:
    backbone = any_backbone
    text = PromptedText(backbone, NAMES, template)
    assert text.shares_prefix  # the check at start-up: values, gradients, gradients of some classes
    # And on other prompts, of another length than the template's.
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(3, 6, backbone.ctx_dim, generator=generator) * 0.1
    cotangents = torch.randn(3, 2, len(NAMES), backbone.embed_dim, generator=generator)
    fast, slow = text.tower(prompts), text.plain_tower(prompts)
    assert (fast.values - slow.values).abs().max() <= 1e-5 * slow.values.abs().max()
    gradients = slow.vjp(cotangents)
    assert (fast.vjp(cotangents) - gradients).abs().max() <= 1e-5 * gradients.abs().max()


@pytest.mark.parametrize(
    "changes",
    [{}, {"text_cfg": {"no_causal_mask": True, "pool_type": "last"}, "custom_text": True},
     {"text_cfg": {"pool_type": "last"}}, {"text_cfg": {"no_causal_mask": True, "pool_type": "first"}}],
    ids=["shared", "SigLIP style", "last", "first"],
)  # fmt: skip
def test_template_context_gives_the_zero_shot_features(make_clip_dir: Callable[..., Path], changes: dict) -> None:
    text = PromptedText(load(make_clip_dir(changes)), NAMES, "a photo of a {}, up close")
    assert text.shares_prefix == (not changes)
    learned = text.class_features(text.template_context(4))
    assert torch.allclose(learned, text.zero_shot_features(), atol=1e-6)
    assert torch.allclose(learned.norm(dim=1), torch.ones(len(NAMES)), atol=1e-6)


def test_a_tower_whose_prefix_cannot_be_shared_takes_the_plain_path_and_says_so_once(
    make_clip_dir: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    backbone = load(make_clip_dir({"text_cfg": {"qk_norm": True}}))
    with caplog.at_level(logging.INFO, "fl_dualpriv"):
        for _ in range(2):
            text = PromptedText(backbone, NAMES, "a photo of a {}")
            assert not text.shares_prefix
            assert text.tower is text.plain_tower
    assert [message.partition(": ")[2] for message in said(caplog)] == [
        "its text tower has custom blocks, so every class runs its whole row"
    ]


@pytest.fixture(scope="module")
def four_heads(make_clip_dir: Callable[..., Path]) -> Path:
    return make_clip_dir({"text_cfg": {"heads": 4}})


@pytest.mark.parametrize(
    ("precision", "part"),
    [("fp32", "weight"), ("fp32", "heads"), ("fp32", "activation"), ("fp32", "nan"),
     ("bf16", "weight"), ("bf16", "heads"), ("bf16", "nan")],
)  # fmt: skip
def test_a_planted_error_is_caught(
    four_heads: Path, caplog: pytest.LogCaptureFixture, precision: str, part: str
) -> None:
    backbone = copy(load(four_heads, precision))
    stack = backbone.text_stack
    assert stack is not None
    assert PromptedText(backbone, NAMES, "a photo of a {}").shares_prefix
    if part in ("weight", "nan"):
        up = stack.blocks[1].up
        wrong = up.weight.clone()
        wrong[3] += float("nan") if part == "nan" else 1e-3 if precision == "fp32" else 1.0
        block = replace(stack.blocks[1], up=replace(up, weight=wrong))
        backbone.text_stack = replace(stack, blocks=(stack.blocks[0], block))
    else:
        backbone.text_stack = replace(stack, heads=2) if part == "heads" else replace(stack, activation="quick_gelu")
    with caplog.at_level(logging.WARNING, "fl_dualpriv"):
        for _ in range(2):
            text = PromptedText(backbone, NAMES, "a photo of a {}")
            assert text.tower is text.plain_tower
    (message,) = said(caplog)
    assert "differs from the plain one by" in message


def test_bf16_is_compared_with_float32(tiny_clip_dir: Path) -> None:
    text = PromptedText(load(tiny_clip_dir, "bf16"), NAMES, "a photo of a {}")
    assert text.shares_prefix
    assert 1e-5 < text._difference() <= 5e-2


def test_the_check_takes_few_of_many_classes(tiny_clip_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(learner, "PlainTower", lambda *parts: seen.append(parts) or PLAIN(*parts))
    text = PromptedText(load(tiny_clip_dir), (*NAMES, *(f"tree {i}" for i in range(60))), "a photo of a {}")
    assert text.shares_prefix
    assert len(seen) == 2  # the text's own, and one for the check
    lengths = seen[1][3]
    assert len(lengths) == 12
    assert {int(lengths.min()), int(lengths.max())} == {2, 6}  # "cat" and its end, "the great wall of china" and its


PLAIN = learner.PlainTower


def test_wrong_context_length_says_what_to_set(tiny_clip_dir: Path) -> None:
    text = PromptedText(load(tiny_clip_dir), NAMES, "a photo of a {}")
    with pytest.raises(ConfigError, match=r"prompt\.n-ctx = 6, but the template has 4 tokens.*set prompt\.n-ctx = 4"):
        text.template_context(6)


def test_too_long_sequences_are_refused(tiny_clip_dir: Path) -> None:
    text = PromptedText(load(tiny_clip_dir), NAMES, "a photo of a {}")
    text.check_length(25)  # 1 + 25 + 5 name tokens + EOT = 32
    with pytest.raises(ConfigError, match=r"33 tokens.*takes 32.*n-ctx <= 25"):
        text.check_length(26)
    # A name longer than the tower is no shorter for being cut by the tokenizer.
    long = PromptedText(load(tiny_clip_dir), ("cat " * 40,), "a photo of a {}")
    with pytest.raises(ConfigError, match="makes sequences of 46 tokens"):
        long.check_length(4)
    assert long.zero_shot_features().isfinite().all()  # the tokenizer's cut

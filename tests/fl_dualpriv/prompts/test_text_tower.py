"""The shared prefix is the plain tower, computed once: same values, same gradients."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fl_dualpriv.backbones.open_clip import load_backbone
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.prompts.learner import PromptedText

NAMES = ("cat", "red fire truck", "dog", "the great wall of china", "tree")
SHAPES = {
    "openai style": {},
    "wider than deep": {"text_cfg": {"width": 64, "heads": 4, "layers": 1}, "embed_dim": 48},
    "quick gelu": {"quick_gelu": True},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("template", ["a photo of a {}", "a drawing of a {}, very small", "{}"])
def test_shared_prefix_equals_plain_tower_in_value_and_gradient(
    make_clip_dir: Callable[..., Path], changes: dict, template: str
) -> None:
    backbone = load_backbone(f"local-dir:{make_clip_dir(changes)}", "", "cpu", 1.0, 2)
    text = PromptedText(backbone, NAMES, template)
    assert text.shares_prefix
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(4, backbone.ctx_dim, generator=generator) * 0.1
    weights = torch.randn(len(NAMES), backbone.embed_dim, generator=generator)
    values, gradients = [], []
    for tower in (text._tower, text.plain_tower):
        leaf = context.clone().requires_grad_(True)
        out = tower(leaf)
        values.append(out.detach())
        gradients.append(torch.autograd.grad((out * weights).sum(), leaf)[0])
    assert (values[0] - values[1]).abs().max() <= 1e-5 * values[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()


def test_template_context_gives_the_zero_shot_features(tiny_clip_dir: Path) -> None:
    backbone = load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", 1.0, 2)
    text = PromptedText(backbone, NAMES, "a photo of a {}, up close")
    learned = text.class_features(text.template_context(4))
    assert torch.allclose(learned, text.zero_shot_features(), atol=1e-6)
    assert torch.allclose(learned.norm(dim=1), torch.ones(len(NAMES)), atol=1e-6)


@pytest.mark.parametrize("missing", ["causal", "eot_pooling", "default_blocks"])
def test_a_tower_whose_prefix_cannot_be_shared_takes_the_plain_path(tiny_clip_dir: Path, missing: str) -> None:
    backbone = copy(load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", 1.0, 2))
    backbone.text_parts = replace(backbone.text_parts, **{missing: False})
    text = PromptedText(backbone, NAMES, "a photo of a {}")
    assert not text.shares_prefix
    assert text._tower is text.plain_tower


def test_wrong_context_length_says_what_to_set(tiny_clip_dir: Path) -> None:
    text = PromptedText(load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", 1.0, 2), NAMES, "a photo of a {}")
    with pytest.raises(ConfigError, match=r"prompt\.n-ctx = 6, but the template has 4 tokens.*set prompt\.n-ctx = 4"):
        text.template_context(6)


def test_too_long_sequences_are_refused(tiny_clip_dir: Path) -> None:
    text = PromptedText(load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", 1.0, 2), NAMES, "a photo of a {}")
    text.check_length(25)  # 1 + 25 + 5 name tokens + EOT = 32
    with pytest.raises(ConfigError, match=r"33 tokens.*takes 32.*n-ctx <= 25"):
        text.check_length(26)

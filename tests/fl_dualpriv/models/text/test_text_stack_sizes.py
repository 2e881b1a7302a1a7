"""Text towers of the usual sizes, random weights: their stack gives `encode_text`, in values and gradients."""

import json

import pytest
import torch

from fl_dualpriv.assets import demo_folder
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.models.open_clip import OpenClipBackbone, open_clip
from fl_dualpriv.models.tokenizer import TrimmedTokenizer

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
NAMES = ("cat", "t-shirt")
TEMPLATE = "a drawing of a {}"
SIZES = {"ViT-B/16": (512, 8), "ViT-L/14": (768, 12)}


def backbone(width: int, heads: int, *, quick_gelu: bool) -> OpenClipBackbone:
    """12 layers, 77 tokens, the demo's vocabulary: all but the embedding table is as large as the real one."""
    ids = json.loads((demo_folder() / "vocabulary.json").read_text())["bpe_ids"]
    text = {"context_length": 77, "vocab_size": len(ids), "width": width, "heads": heads, "layers": 12}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(width, VISION, text, quick_gelu=quick_gelu).eval().requires_grad_(False)  # type: ignore[arg-type]
        for parameter in model.parameters():
            if parameter.ndim == 1:  # zeros and ones at first, which would hide a wrong use of them
                parameter += 0.1 * torch.randn(parameter.shape)
    return OpenClipBackbone(width, model, TrimmedTokenizer(ids, 77), torch.device("cpu"), None, "fp32", {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "quick_gelu"),
    [
        pytest.param("ViT-B/16", True, id="ViT-B/16, OpenAI", marks=pytest.mark.slow),
        pytest.param("ViT-B/16", False, id="ViT-B/16, LAION", marks=pytest.mark.slow),
        pytest.param("ViT-L/14", False, id="ViT-L/14, LAION", marks=pytest.mark.slow),
        pytest.param("ViT-L/14", True, id="ViT-L/14, OpenAI", marks=pytest.mark.slow),
    ],
)
def test_shared_prefix_equals_encode_text(size: str, quick_gelu: bool):
    clip = backbone(*SIZES[size], quick_gelu=quick_gelu)
    assert clip.text_stack is not None
    assert clip.text_stack.activation == ("quick_gelu" if quick_gelu else "gelu")
    text = PromptedText(clip, NAMES, TEMPLATE)
    assert text.shares_prefix  # the check at start-up: values and gradients
    with torch.no_grad():
        tokens = clip.tokenize([TEMPLATE.format(name) for name in NAMES])
        expected = clip._model.encode_text(tokens, normalize=True)
    actual = text.class_features(text.template_context(4))
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()

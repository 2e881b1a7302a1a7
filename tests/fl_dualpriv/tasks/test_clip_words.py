"""The light form of CLIP's encoding says what open_clip's tokenizer says."""

import json
from pathlib import Path

import numpy as np
import pytest

from fl_dualpriv.models import torchvision_shim
from fl_dualpriv.tasks.clip_words import encode, text_rules

ODD = [
    "it's",
    "don't",
    "12345",
    "&amp;",
    "<end_of_text>",
    "naïve",
    "日本語",
    "  two  spaces ",
    "a\tb\nc",
    "ﬁ",
    "😀",
    "",
    "-",
]


def test_ids_are_those_of_open_clips_tokenizer() -> None:
    torchvision_shim.install()
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer, rng = SimpleTokenizer(), np.random.default_rng(0)
    drawn = ["".join(rng.choice(list("aabcdenostz '"), rng.integers(1, 16))) for _ in range(2000)]
    for text in [*ODD, *drawn, "aaaaaaa", "lololololol", "mississippi banana zebra"]:
        assert list(encode(text)) == tokenizer.encode(text), repr(text)


def test_the_rules_of_models(tmp_path: Path) -> None:
    demo = text_rules("demo")
    assert demo is not None
    assert demo.unknown("a photo of a zorblax cat") == ["photo", "zorblax"]
    whole = text_rules("ViT-B-16")
    assert whole is not None
    assert (whole.context_length, whole.count("a photo of a"), whole.unknown("zorblax")) == (77, 4, [])
    # Another tokenizer, a name that only the loader knows, and folders that only the loader can judge.
    (tmp_path / "open_clip_config.json").write_text("{")
    for name in ("ViT-B-16-SigLIP", "hf:x", "hf-hub:x/y", "../x", f"local-dir:{tmp_path}", "local-dir:/nowhere"):
        assert text_rules(name) is None, name


@pytest.mark.parametrize("trimmed", [True, False])
def test_the_rules_of_a_folder(tmp_path: Path, *, trimmed: bool) -> None:
    text = {"context_length": 16, "vocab_size": 49408}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
    if trimmed:
        (cat,) = encode("cat")
        (tmp_path / "vocabulary.json").write_text(json.dumps({"context_length": 12, "bpe_ids": [0, cat]}))
    rules = text_rules(f"local-dir:{tmp_path}")
    assert rules is not None
    assert rules.context_length == (12 if trimmed else 16)
    assert rules.unknown("cat dog") == (["dog"] if trimmed else [])

"""A model that somebody else chose: none of its code runs, and its tokenizer cannot make one record end a run."""

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.answers import AnswerRecords, answer_records
from fl_dualpriv.learners.soft_prompt import SoftPromptObjective
from fl_dualpriv.models.llava import LlavaBackbone
from fl_dualpriv.models.load import load_answering_model
from fl_dualpriv.privacy.step import clipped_sums
from tests.tiny_llava import WORDS


def load(folder: Path) -> LlavaBackbone:
    found = load_answering_model(f"hf:{folder}", "cpu", None)
    assert isinstance(found, LlavaBackbone)
    return found


def change(file: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


CODE = {
    "config.json": {"model_type": "new", "auto_map": {"AutoConfig": "own.Own"}},
    "processor_config.json": {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}},
}


@pytest.mark.parametrize("file", list(CODE))
def test_code_of_a_model_never_runs_whoever_says_yes(
    llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Left to itself transformers asks at the terminal."""
    folder, proof = shutil.copytree(llava_dir, tmp_path / "model"), tmp_path / "it ran"
    change(folder / file, lambda content: content.update(CODE[file]))
    (folder / "own.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Own: pass\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(folder)
    assert not proof.exists()
    assert not asked


def test_a_model_names_no_kernel_to_fetch(llava_dir: Path, tmp_path: Path) -> None:
    """``attn_implementation`` of a configuration may name a repository of native code; ours is always PyTorch's."""
    folder = shutil.copytree(llava_dir, tmp_path / "model")
    change(folder / "config.json", lambda content: content.update(attn_implementation="somebody/kernel"))
    config: Any = load(folder).language_model.config
    assert config._attn_implementation == "sdpa"


def in_records(model: LlavaBackbone, question: str, answer: str = "red") -> AnswerRecords:
    """A good record and this one, as under DP."""
    return answer_records(
        model, ["what is this ?", question], ["yes", answer], np.arange(2), np.zeros(2, dtype=np.int64),
        torch.zeros(2, model.embed_dim), 24, "keep",
    )  # fmt: skip


ODD = [
    "",
    " ",
    "\u200b",
    "\ud800",
    "what is this ?\ud800",
    "what <image> ?",
    "what </s>",
    "x" * 1_000_000,
    "\0",
    "\u0645",
]


@pytest.mark.parametrize("question", ODD, ids=range(len(ODD)))
def test_a_question_that_cannot_be_written_is_one_bad_record(llava_dir: Path, question: str) -> None:
    model = load(llava_dir)
    assert in_records(model, question).usable.tolist() == [True, False]
    assert in_records(model, "is the square red ?", question).usable.tolist() == [True, False]
    with pytest.raises(ConfigError):
        answer_records(
            model, [question], ["red"], np.zeros(1), np.zeros(1), torch.zeros(1, model.embed_dim), 24, "raise"
        )


def add_token(text: str) -> Callable[[Any], object]:
    """A token of the next id, which the model does not know."""

    def edit(content: Any) -> None:
        token = {**content["added_tokens"][-1], "id": 4 + len(WORDS), "content": text, "special": False}
        content["added_tokens"].append(token)

    return edit


TRAPS = {"swallows the image": "<image>\nwhat color", "is beyond the model": "\nwhat color"}


@pytest.mark.parametrize("trap", list(TRAPS))
def test_a_token_laid_out_for_a_question_shows_nobody_who_asks_it(llava_dir: Path, tmp_path: Path, trap: str) -> None:
    """Else a server could put a person's question into a tokenizer, and see which client fails."""
    folder = shutil.copytree(llava_dir, tmp_path / "model")
    change(folder / "tokenizer.json", add_token(TRAPS[trap]))
    model = load(folder)
    records = in_records(model, "what color is the circle ?")
    assert records.usable.tolist() == [True, False]
    step = SoftPromptObjective(model).bind([records]).gradients(torch.zeros(1, 2, 32), [np.arange(2)])
    (found,) = clipped_sums(step, 1.0, "float")
    assert bool(found.value.any())


def without_an_unknown_token(content: Any) -> None:
    """A unigram model then raises at letters that it lacks."""
    pieces = [*("<unk>", "<s>", "</s>", "<image>"), *WORDS, *(set(string.ascii_letters) - {"a", "z"})]
    whole = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=None))
    content["model"] = json.loads(whole.to_str())["model"]


def tries_too_hard(content: Any) -> None:
    """This expression gives up on a long row of x, and that is a panic, which is no `Exception`."""
    whole = Tokenizer(models.WordLevel({}, "<unk>"))
    splits = [pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated"), pre_tokenizers.Whitespace()]
    whole.pre_tokenizer = pre_tokenizers.Sequence(splits)  # pyright: ignore[reportAttributeAccessIssue]
    content["pre_tokenizer"] = json.loads(whole.to_str())["pre_tokenizer"]


@pytest.mark.parametrize("edit", [without_an_unknown_token, tries_too_hard], ids=lambda edit: edit.__name__)
def test_a_tokenizer_that_raises_spoils_one_record(
    llava_dir: Path, tmp_path: Path, edit: Callable[[Any], object]
) -> None:
    folder = shutil.copytree(llava_dir, tmp_path / "model")
    change(folder / "tokenizer.json", edit)
    records = in_records(load(folder), "what is this zebra ? " + "x" * 40)
    assert records.usable.tolist() == [True, False]

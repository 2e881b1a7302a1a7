"""The trimmed tokenizer: rows as open_clip's text tower wants them, and words it does not know refused by name."""

import pytest
import torch

from fl_dualpriv.assets import demo_folder
from fl_dualpriv.data.demo.images import demo_template, load_demo
from fl_dualpriv.models.tokenizer import PADDING_ID, TrimmedTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> TrimmedTokenizer:
    return TrimmedTokenizer.from_json(demo_folder() / "vocabulary.json")


def test_rows_start_end_and_are_padded(tokenizer: TrimmedTokenizer) -> None:
    rows = tokenizer(["a drawing of a cat", "cat"])
    assert rows.dtype == torch.int64
    assert rows.shape == (2, tokenizer.context_length)
    assert rows[:, 0].tolist() == [tokenizer.sot_token_id] * 2
    assert rows.argmax(dim=-1).tolist() == [6, 2]
    assert rows[1, 3:].tolist() == [PADDING_ID] * (tokenizer.context_length - 3)
    assert rows.max() == tokenizer.eot_token_id == tokenizer.vocab_size - 1


def test_one_text_is_a_batch_of_one_and_case_does_not_matter(tokenizer: TrimmedTokenizer) -> None:
    torch.testing.assert_close(tokenizer("A Drawing of a CAT"), tokenizer(["a drawing of a cat"]))


def test_every_class_name_is_known_and_no_two_read_the_same(tokenizer: TrimmedTokenizer) -> None:
    names = load_demo()["train"].class_names
    rows = tokenizer([demo_template().format(name) for name in names])
    assert len({tuple(row.tolist()) for row in rows}) == len(names)


def test_ids_are_those_of_open_clip(tokenizer: TrimmedTokenizer) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    text = "a sketch of a small red t-shirt on striped blue paper"
    back = {index: bpe_id for bpe_id, index in tokenizer._trimmed.items()}
    assert [back[index] for index in tokenizer.encode(text)] == SimpleTokenizer().encode(text)


def test_unknown_words_are_named(tokenizer: TrimmedTokenizer) -> None:
    with pytest.raises(ValueError, match=r"'radiograph'.*small vocabulary"):
        tokenizer(["a drawing of a cat", "a radiograph of a cat"])


def test_padding_stands_for_no_word(tokenizer: TrimmedTokenizer) -> None:
    with pytest.raises(ValueError, match="'!'"):
        tokenizer("!")


def test_too_long_a_text_is_refused(tokenizer: TrimmedTokenizer) -> None:
    with pytest.raises(ValueError, match="tokens"):
        tokenizer("cat " * tokenizer.context_length)


def test_end_of_text_must_come_last(tokenizer: TrimmedTokenizer) -> None:
    ids = list(tokenizer._trimmed)
    with pytest.raises(ValueError, match="largest"):
        TrimmedTokenizer([0, *reversed(ids)], 8)

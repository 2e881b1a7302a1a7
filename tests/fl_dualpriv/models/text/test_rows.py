"""Start, end and padding read off a tokenizer's row."""

import pytest

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.text.rows import TokenRows, read_rows


@pytest.mark.parametrize(
    ("row", "start", "end", "pad"),
    [
        ([98, 5, 6, 99, 0, 0], (98,), 99, 0),  # CLIP
        ([98, 5, 6, 99, 99, 99], (98,), 99, 99),  # CLIP of transformers
        ([5, 6, 1, 1, 1, 1], (), 1, 1),  # SigLIP
        ([98, 97, 5, 6, 99, 0], (98, 97), 99, 0),
    ],
)
def test_read(row: list[int], start: tuple[int, ...], end: int, pad: int):
    assert read_rows("x", row, [5, 6], "none") == TokenRows(start=start, end=end, pad=pad, end_rule="none")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([98, 5, 6, 99, 0, 97], [5, 6]),  # a class token at the very end
        ([98, 5, 7, 99, 0, 0], [5, 6]),  # the words are not there
        ([98, 5, 6, 99], [5, 6]),  # no padding
        ([98, 99, 0, 0], []),
    ],
)
def test_rows_of_another_build_are_refused(row: list[int], words: list[int]):
    with pytest.raises(ConfigError, match="'x': its tokenizer does not build rows of start, words, end and padding"):
        read_rows("x", row, words, "none")


@pytest.mark.parametrize(
    ("rule", "words", "ends"),
    [
        ("largest", [5, 98], False),
        ("largest", [5, 99], True),
        ("largest", [5, 100], True),
        ("first", [5, 100], False),
        ("first", [5, 99], True),
        ("none", [5, 99], False),
    ],
)
def test_words_that_would_end_the_text(rule, words: list[int], ends: bool):
    rows = TokenRows(start=(98,), end=99, pad=0, end_rule=rule)
    if ends:
        with pytest.raises(ConfigError, match="'text' holds a token that ends a text"):
            rows.check_words("x", "text", words)
    else:
        assert rows.check_words("x", "text", words) == words

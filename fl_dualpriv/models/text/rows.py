"""Layout of a tokenizer's rows: start, words, end, padding. It is read from rows that the tokenizer makes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fl_dualpriv.errors import ConfigError

PROBE = "a photo"
"""Text whose row shows the layout."""

EndRule = Literal["largest", "first", "none"]
"""Rule by which a tower finds the end of text: the largest id of a row, or the first end token. ``none``: the tower
does not read its feature at the end of text."""


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """A row is ``start``, the words, ``end``, then ``pad`` up to the context length.

    Attributes:
        start: Ids before the words; SigLIP has none.
        end: Id after the words.
        pad: Id that fills up the rest of the row.
        end_rule: Rule by which the tower finds the end.
    """

    start: tuple[int, ...]
    end: int
    pad: int
    end_rule: EndRule

    def check_words(self, name: str, text: str, words: list[int]) -> list[int]:
        """Return ``words`` unchanged if the tower takes none of them for the end of the text.

        Raises:
            ConfigError: If the tower would take one of the words for the end of the text.
        """
        if self.end_rule == "largest":
            taken = [word for word in words if word >= self.end]
        else:
            taken = [word for word in words if word == self.end] if self.end_rule == "first" else []
        if taken:
            raise ConfigError(f"backbone.name = {name!r}: {text!r} holds a token that ends a text; use other words")
        return words


def read_rows(name: str, row: list[int], words: list[int], end_rule: EndRule) -> TokenRows:
    """Read start, end and padding from one row of a tokenizer.

    Args:
        name: Name of the backbone, for messages.
        row: The whole row of a short text.
        words: Ids of only the words of that text, without special tokens.
        end_rule: See `TokenRows`.

    Raises:
        ConfigError: If the row does not have the layout that `TokenRows` describes.
    """
    for begin in range(len(row) - len(words) - 1 if words else 0):
        if row[begin : begin + len(words)] == words:
            end, *padding = row[begin + len(words) :]
            if len(set(padding)) == 1:
                return TokenRows(start=tuple(row[:begin]), end=end, pad=padding[0], end_rule=end_rule)
            break
    raise ConfigError(f"backbone.name = {name!r}: its tokenizer does not build rows of start, words, end and padding")


def joint(name: str, split: Callable[[str], list[int]]) -> str:
    """Return the text that must stand before words behind other words, so that their tokens are those of the sentence.

    It is empty for most tokenizers. Those that mark the start of a word by a space, and add none to the first word,
    need that space.

    Args:
        name: Name of the backbone, for messages.
        split: Function from a text to the ids of its words.

    Raises:
        ConfigError: If the tokens of a sentence are not those of its parts.
    """
    whole, first = split("photo cat"), split("photo")
    for between in ("", " "):
        if whole == first + split(f"{between}cat"):
            return between
    raise ConfigError(f"backbone.name = {name!r}: its tokenizer does not split a sentence between its words")


def named_unknown(name: str, text: str, unknown: int, split: Callable[[str], list[int]]) -> ConfigError:
    """Return the error for a text with words that the tokenizer does not know.

    Args:
        name: Name of the backbone.
        text: The text.
        unknown: Id that stands for what the vocabulary lacks.
        split: Function from a text to the ids of its words.
    """
    lost = [word for word in text.split() if unknown in split(word)] or [text]
    return ConfigError(
        f"backbone.name = {name!r} does not know {', '.join(map(repr, lost))}; use other words, or another model"
    )

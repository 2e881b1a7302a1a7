"""How a tokenizer builds a row around the words of a text: start, words, end, padding. Read off its own rows."""

from dataclasses import dataclass
from typing import Literal

from fl_dualpriv.errors import ConfigError

PROBE = "a photo"
"""Text to read a layout from."""

EndRule = Literal["largest", "first", "none"]
"""How a tower finds the end of text: as the largest id of a row, as the first end token, or it reads elsewhere."""


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """A row is ``start``, the words, ``end``, then ``pad`` up to the context length.

    Attributes:
        start: Ids before the words; SigLIP has none.
        end: Id after the words.
        pad: Id of what fills a row up.
        end_rule: How the tower finds the end.
    """

    start: tuple[int, ...]
    end: int
    pad: int
    end_rule: EndRule

    def check_words(self, name: str, text: str, words: list[int]) -> list[int]:
        """The same words, unless the tower would take one of them for the end of the text.

        Raises:
            ConfigError: If it would.
        """
        if self.end_rule == "largest":
            taken = [word for word in words if word >= self.end]
        else:
            taken = [word for word in words if word == self.end] if self.end_rule == "first" else []
        if taken:
            raise ConfigError(f"backbone.name = {name!r}: {text!r} holds a token that ends a text; write it otherwise")
        return words


def read_rows(name: str, row: list[int], words: list[int], end_rule: EndRule) -> TokenRows:
    """Read start, end and padding off one row of a tokenizer.

    Args:
        name: Of the backbone, for messages.
        row: The whole row of a short text.
        words: Ids of its words alone, without special tokens.
        end_rule: See `TokenRows`.

    Raises:
        ConfigError: If the row is built otherwise than `TokenRows` says.
    """
    for begin in range(len(row) - len(words) - 1 if words else 0):
        if row[begin : begin + len(words)] == words:
            end, *padding = row[begin + len(words) :]
            if len(set(padding)) == 1:
                return TokenRows(start=tuple(row[:begin]), end=end, pad=padding[0], end_rule=end_rule)
            break
    raise ConfigError(f"backbone.name = {name!r}: its tokenizer does not build rows of start, words, end and padding")

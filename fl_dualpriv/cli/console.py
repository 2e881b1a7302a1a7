"""Output of commands, on a terminal or into a file that may not be able to show every character.

Python raises an error for a character that the encoding of its output lacks, such as ε with
``PYTHONIOENCODING=ascii``. This module replaces such a character by a word. Other characters stay.
"""

import codecs
import functools
import io
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

ERRORS = "fl_dualpriv.words"
"""Name of the error handler, for ``errors=`` of a text stream."""

WORDS = {
    **{"ε": "epsilon", "δ": "delta", "σ": "sigma", "λ": "lambda", "μ": "mu", "τ": "tau", "∞": "inf"},
    **{"±": "+/-", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "−": "-", "×": "x", "√": "sqrt"},
    **{"·": "|", "•": "*", "…": "...", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "²": "^2"},
}


def _words(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    spelled = "".join(_spelled_letter(letter, error.encoding) for letter in text)
    return spelled, error.end


codecs.register_error(ERRORS, _words)


@functools.lru_cache(maxsize=1024)
def _spelled_letter(letter: str, encoding: str) -> str:
    try:
        letter.encode(encoding)
        return letter
    except UnicodeEncodeError:
        return WORDS.get(letter) or letter.encode("ascii", "backslashreplace").decode("ascii")


def spelled(text: str, encoding: str) -> str:
    """Replace each character of ``text`` that ``encoding`` lacks by a word, or by Python's escape."""
    if text.isascii():
        return text
    return "".join(_spelled_letter(letter, encoding) for letter in text)


def spell_out_what_cannot_be_shown() -> None:
    """Let the standard streams of this process write words for the characters that their encodings lack."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has other objects there
            stream.reconfigure(errors=ERRORS)


class Output(Console):
    """Rich's console, which spells characters out before it lays out a table, so that columns fit their words.

    Args:
        stderr: True to write to the standard error.
        pipe_width: Width in columns if the output is not a terminal and so has no width. None means rich's choice.
    """

    def __init__(self, *, stderr: bool = False, pipe_width: int | None = None) -> None:
        super().__init__(stderr=stderr)
        if pipe_width is not None and not self.is_terminal:
            self.width = pipe_width

    def render_str(self, text: str, **options: Any) -> Text:
        """Spell out a text. Rich calls this for every printed text, titles and cells of tables included."""
        return super().render_str(spelled(text, self.encoding), **options)


def write_line(text: str) -> None:
    """Write a line to the standard output at once, in the output's encoding."""
    sys.stdout.write(spelled(text, sys.stdout.encoding or "utf-8") + "\n")
    sys.stdout.flush()

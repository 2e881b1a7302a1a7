"""The output of commands, on a terminal or into a file that may not be able to show every letter.

Python stops with an error at a letter that the encoding of its output does not have, such as ε where
``PYTHONIOENCODING=ascii``. Here such a letter becomes a word. A letter that the encoding has stays.
"""

import codecs
import functools
import io
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

ERRORS = "fl_dualpriv.words"
"""Name of the error handler; for ``errors=`` of a text stream."""

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
    """``text`` with a word, or Python's escape, for each letter that ``encoding`` does not have."""
    if text.isascii():
        return text
    return "".join(_spelled_letter(letter, encoding) for letter in text)


def spell_out_what_cannot_be_shown() -> None:
    """Let the standard streams of this process write words for the letters that their encodings do not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook puts another thing there
            stream.reconfigure(errors=ERRORS)


class Output(Console):
    """Rich's console, which spells letters out before it lays a table out: so columns are as wide as their words.

    Args:
        stderr: Whether it writes to the standard error.
        pipe_width: Columns where the output is no terminal, which has no width of its own; None: rich's choice.
    """

    def __init__(self, *, stderr: bool = False, pipe_width: int | None = None) -> None:
        super().__init__(stderr=stderr)
        if pipe_width is not None and not self.is_terminal:
            self.width = pipe_width

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich calls this for every text that is printed, titles and cells of tables among them."""
        return super().render_str(spelled(text, self.encoding), **options)


def write_line(text: str) -> None:
    """Write a line to the standard output, in the encoding that it has, and at once."""
    sys.stdout.write(spelled(text, sys.stdout.encoding or "utf-8") + "\n")
    sys.stdout.flush()

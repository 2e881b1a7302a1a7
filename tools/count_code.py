"""Count the lines of code of folders, without docstrings, comments and blank lines.

``python -m tools.count_code fl_dualpriv clients`` prints the sum, and the sum of each folder below.
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    r"""Count the lines of a module that hold code.

    A string that is a statement by itself is a docstring, also below an attribute.

    Example:
        >>> code_lines("x = (1,\n     2)  # two lines\n\ndef f():\n    'Doc.'\n    return x\n")
        4
    """
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def main(folders: list[str]) -> None:
    """Print the counts of all Python files below some folders."""
    counts: Counter[str] = Counter()
    for folder in folders:
        for file in sorted(Path(folder).rglob("*.py")):
            counts["/".join(file.parts[:2])] += code_lines(file.read_text(encoding="utf-8"))
    for place, count in counts.most_common():
        print(f"{count:7} {place}")
    print(f"{sum(counts.values()):7} lines of code")


if __name__ == "__main__":
    main(sys.argv[1:] or ["fl_dualpriv", "clients"])

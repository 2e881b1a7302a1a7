"""Lines of code are counted without docstrings, comments and blank lines."""

import subprocess
import sys
from pathlib import Path

from tools.count_code import code_lines

ROOT = Path(__file__).parents[2]


def test_what_counts():
    assert code_lines("") == 0
    assert code_lines('"""Doc."""\n\n# comment\nx = 1  # and code\n') == 1
    assert code_lines('def f(\n    a,\n):\n    """Doc\n    on lines.\n    """\n    return """a\nb"""\n') == 5
    assert code_lines('class A:\n    b = 1\n    """Of b."""\n') == 2


def test_the_command_prints_a_sum():
    done = subprocess.run(
        [sys.executable, "-m", "tools.count_code"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *places, total = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert total[1] == "lines of code"
    assert int(total[0]) == sum(int(count) for count, _ in places) > 10_000

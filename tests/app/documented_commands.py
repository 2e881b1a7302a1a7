"""The commands that README.md and docs/*.md show: read from their fences, and made ready to be run."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("docs/deploy.md", "docs/prompts.md", "README.md", "docs/resume.md")
"""In this order the runner reads them, then all others by name: a later page uses what an earlier one made."""

SHELL = frozenset({"sh", "bash", "shell", "console"})
LANGUAGES = SHELL | {"", "toml", "python"}
"""All languages that a fence may have; a block without a language is output, and no command."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block.

    Attributes:
        document: Path below the root.
        line: Of its first line of text, from 1.
        language: As the fence says.
        text: Without the fence.
    """

    document: str
    line: int
    language: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of a shell block.

    Attributes:
        document: Path below the root.
        line: Where it begins, from 1.
        text: On one line, without its comment.
    """

    document: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"


def documents(root: Path = ROOT) -> list[str]:
    found = ["README.md", *sorted(f"docs/{file.name}" for file in (root / "docs").glob("*.md"))]
    return [*(name for name in DOCUMENTS if name in found), *(name for name in found if name not in DOCUMENTS)]


def blocks_of(document: str, root: Path = ROOT) -> list[Block]:
    """All fenced blocks of a document.

    Raises:
        ValueError: If a fence is not closed: then what follows would be read as text.
    """
    found, begun, language = [], 0, ""
    lines = (root / document).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.lstrip().startswith("```"):
            continue
        if begun:
            found.append(Block(document=document, line=begun, language=language, text="\n".join(lines[begun - 1 : number - 1]) + "\n"))  # fmt: skip  # noqa: E501
            begun = 0
        else:
            begun, language = number + 1, line.lstrip().removeprefix("```").strip()
    if begun:
        raise ValueError(f"{document}:{begun - 1}: a fence that is not closed")
    return found


def commands_of(document: str, root: Path = ROOT) -> list[Command]:
    """All commands of a document, in order."""
    return [command for block in blocks_of(document, root) if block.language in SHELL for command in _commands(block)]


def _commands(block: Block) -> Iterator[Command]:
    text, begun = "", 0
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        begun = begun if text else number
        part = without_comment(line).strip().removeprefix("$ ")
        text = f"{text} {part}".strip()
        if text.endswith("\\"):
            text = text.removesuffix("\\").strip()
            continue
        if text:
            yield Command(document=block.document, line=begun, text=text)
        text = ""
    if text:
        raise ValueError(f"{block.document}:{begun}: the block ends in a line that goes on")


def without_comment(line: str) -> str:
    """A line of a shell without its comment: from a ``#`` that begins a word outside of quotes."""
    quote = ""
    for index, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (index == 0 or line[index - 1].isspace()):
            return line[:index]
    return line


def filled(text: str, values: Mapping[str, str]) -> str:
    """A command with something real for each placeholder.

    Raises:
        ValueError: If one of them is not there: then the list speaks of another command.
    """
    for name, value in sorted(values.items(), key=lambda pair: -len(pair[0])):
        found = re.compile(rf"(?<![\w/]){re.escape(name)}(?!\w)")
        if not found.search(text):
            raise ValueError(f"{text}: it has no {name}")
        text = found.sub(lambda _match, value=value: value, text)
    return text

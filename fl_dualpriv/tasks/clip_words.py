"""CLIP's byte-pair encoding without torch and open_clip, to check class names and template before a model is loaded.

open_clip's `SimpleTokenizer` gives the same ids (tests/fl_dualpriv/tasks/test_clip_words.py). Its import takes several
seconds, because it also imports torch.
"""

import functools
import gzip
import html
import importlib.util
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy
import regex

from fl_dualpriv.assets import embedded_model_folder

_SPECIAL = ("<start_of_text>", "<end_of_text>")
_MERGES = 49152 - 256 - 2
_PATTERN = regex.compile(
    "|".join(_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_LOCAL = "local-dir:"
_CONTEXT_LENGTH = 77
_OTHER_TOKENIZERS = ("hf_tokenizer_name", "hf_model_name", "tokenizer_kwargs")


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """Limits of the text side of a model.

    Attributes:
        context_length: Longest text in tokens, start and end included.
        known: Ids of CLIP's encoding that the model knows; None if it knows all.
    """

    context_length: int
    known: frozenset[int] | None

    def count(self, text: str) -> int:
        """Count the tokens of a text without start and end."""
        return len(encode(text))

    def unknown(self, text: str) -> list[str]:
        """Return the words that the model does not know."""
        if self.known is None:
            return []
        return [word for word in text.split() if not self.known.issuperset(encode(word))]


@functools.lru_cache(maxsize=4)
def text_rules(backbone: str) -> TextRules | None:
    """Return the rules of a model that reads CLIP's encoding; None if they are not known before it is loaded.

    Args:
        backbone: Value of ``backbone.name``.
    """
    try:
        embedded = embedded_model_folder(backbone)
        if embedded is not None or backbone.startswith(_LOCAL):
            folder = embedded or Path(backbone.removeprefix(_LOCAL)).expanduser()
            vocabulary = folder / "vocabulary.json"
            if vocabulary.is_file():
                content = json.loads(vocabulary.read_text(encoding="utf-8"))
                known = frozenset(content["bpe_ids"][1:])  # entry 0 is padding
                return TextRules(context_length=content["context_length"], known=known)
            config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
        else:
            config = json.loads((_open_clip() / "model_configs" / f"{backbone}.json").read_text(encoding="utf-8"))
        text: Mapping[str, Any] = config["text_cfg"]
        if any(text.get(key) for key in _OTHER_TOKENIZERS):
            return None
        return TextRules(context_length=int(text.get("context_length", _CONTEXT_LENGTH)), known=None)
    except (OSError, ValueError, KeyError, TypeError):  # the loader of the model reports the problem
        return None


@functools.lru_cache(maxsize=4096)
def encode(text: str) -> tuple[int, ...]:
    """Return the ids of a text in CLIP's encoding, without start and end."""
    ids, ranks, letters = _table()
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    token_ids: list[int] = []
    for token in _PATTERN.findall(" ".join(text.split()).lower()):
        if token in _SPECIAL:
            token_ids.append(ids[token])
            continue
        parts = [letters[byte] for byte in token.encode("utf-8")]
        parts[-1] += "</w>"
        token_ids += [ids[part] for part in _merged(parts, ranks)]
    return tuple(token_ids)


def _merged(parts: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge neighbours until no pair has a rank; each pass merges all occurrences of the pair of lowest rank."""
    while len(parts) > 1:
        pairs = itertools.pairwise(parts)
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined: list[str] = []
        for part in parts:
            # The previous part is unmerged here: a part that has just been merged never equals the first of the pair.
            if joined and (joined[-1], part) == best:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return parts


def _open_clip() -> Path:
    """Return the folder of open_clip without importing it.

    Raises:
        OSError: If open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("open_clip is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


@functools.lru_cache(maxsize=1)
def _table() -> tuple[dict[str, int], dict[tuple[str, str], int], dict[int, str]]:
    """Read the id of each part, the rank of each pair, and the letter that stands for each byte."""
    with gzip.open(_open_clip() / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as stream:
        lines = stream.read().split("\n")[1 : 1 + _MERGES]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    single = list(letters.values())
    parts = [*single, *(letter + "</w>" for letter in single), *(a + b for a, b in merges), *_SPECIAL]
    return {part: i for i, part in enumerate(parts)}, {pair: i for i, pair in enumerate(merges)}, letters

"""Write and read the file of a published prompt: safetensors with two tensors and one text of facts, plus a model card.

The file is written in one step, and the same prompt gives the same bytes. A reader trusts no part of the file: it reads
the file whole and once, and checks sizes, types, names and numbers before it uses them.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.files import write_bytes
from fl_dualpriv.publish.card import PublishedFacts, parse_facts
from fl_dualpriv.publish.model_card import model_card

SUFFIX = ".safetensors"
KEY = "fl-dualpriv"
"""The only entry of the metadata, because safetensors writes several entries in random order."""

_MOST_BYTES = 2**28
_MOST_HEADER_BYTES = 2**23


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedPrompt:
    """Prompt with its facts.

    Attributes:
        prompt: The effective prompt P, (rows, cols) float32.
        probe: Outputs for one fixed synthetic image, see `Reader.probe`, (numbers,) float32. Another model, tokenizer
            or preparation of images gives other numbers.
        facts: See `PublishedFacts`.
    """

    prompt: Tensor
    probe: Tensor
    facts: PublishedFacts


def card_path(path: Path) -> Path:
    """Return the path of a prompt's model card."""
    return path.with_suffix(".md")


def write_published(path: Path, published: PublishedPrompt) -> None:
    """Write a prompt and its card, each in one step. The card comes first, so that no prompt is ever without a card.

    Raises:
        ConfigError: If the prompt could not be read back, or the file name has another suffix.
        PrivacyError: If the guarantee is missing.
    """
    if path.suffix != SUFFIX:
        raise ConfigError(f"{path}: the file of a prompt ends in {SUFFIX}")
    tensors = {"prompt": published.prompt.contiguous(), "probe": published.probe.contiguous()}
    content = save(tensors, {KEY: published.facts.to_json()})
    parse_published(content)  # the file must be readable
    write_bytes(card_path(path), model_card(published.facts, path.name, tuple(published.prompt.shape)).encode())
    write_bytes(path, content)


def read_published(path: Path) -> PublishedPrompt:
    """Read a published prompt.

    Raises:
        ConfigError: If the file cannot be read, is not a published prompt, or is damaged.
        PrivacyError: If the file does not say what the prompt reveals.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return parse_published(content)
    except (ConfigError, PrivacyError) as error:
        raise type(error)(f"{path} is not used as a prompt: {error}") from error


def parse_published(content: bytes) -> PublishedPrompt:
    """Parse the bytes of a published prompt's file.

    Raises:
        ConfigError: If the bytes are not a published prompt, or are damaged.
        PrivacyError: If the file does not say what the prompt reveals.
    """
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"it is larger than {_MOST_BYTES // 2**20} MiB, the largest size of a prompt's file")
    facts = parse_facts(_described(content))
    try:
        tensors = load(content)
    except Exception as error:  # safetensors and torch each raise their own kinds
        raise ConfigError(f"it is damaged or cut off: {str(error).strip()[:200]}") from error
    if tensors.keys() != {"prompt", "probe"}:
        raise ConfigError("it does not hold exactly the two tensors prompt and probe")
    prompt, probe = tensors["prompt"], tensors["probe"]
    for name, tensor, dims in (("prompt", prompt, 2), ("probe", probe, 1)):
        if tensor.dtype != torch.float32 or tensor.ndim != dims or not tensor.numel():
            raise ConfigError(
                f"its {name} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}; expected "
                f"float32 with {dims} dimension{'s' * (dims > 1)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"its {name} holds numbers that are not finite")
    return PublishedPrompt(prompt=prompt, probe=probe, facts=facts)


def _described(content: bytes) -> str:
    """Return the text of facts in the header. It is read before the tensors, because a header may claim any size."""
    (size,) = struct.unpack("<Q", content[:8]) if len(content) >= 8 else (0,)
    if not 0 < size <= min(_MOST_HEADER_BYTES, len(content) - 8):
        raise ConfigError("it is not a safetensors file, or it is cut off")
    try:
        header: Any = json.loads(content[8 : 8 + size])
        metadata = header["__metadata__"]
        text = metadata[KEY]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        # A prompt in a run's folder has no such text, and no user may mistake it for a published prompt.
        raise PrivacyError(
            "it holds no guarantee line: it is not a file that `fl-dualpriv export` wrote, and nothing says what it "
            "reveals"
        ) from error
    if not isinstance(text, str):
        raise ConfigError("its description is not a text")
    return text

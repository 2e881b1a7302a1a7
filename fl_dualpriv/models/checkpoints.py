"""Checks of a model before it is built: device, folder, text tower, checkpoint file. Does not import open_clip.

Every function raises `ConfigError` with the key, the value, what is allowed and what to do.
"""

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import safe_open
from torch import Tensor

from fl_dualpriv.errors import ConfigError

CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE = "open_clip_config.json", "open_clip_model.safetensors", "vocabulary.json"
OLD_WEIGHTS_FILE = "open_clip_pytorch_model.bin"
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

Shapes = Mapping[str, tuple[int, ...]]

_SUPPORTED_TEXT = (
    "supported are text towers that read the end of text, the last token, a CLS token (CoCa) or, without a causal "
    "mask, the first one; transformers' own models are named hf:NAME"
)
_PROBE_SECONDS = 5.0
_QUOTED = 3  # number of differences that an error names


def resolve_device(device: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; from then on fp32 convolutions use full fp32."""
    # cuDNN's default is TF32 with 10 bits of mantissa: features from a GPU would differ from the CPU's by 1e-3.
    torch.backends.cudnn.allow_tf32 = False
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not (device == "cuda" or index.isdecimal())):
        raise ConfigError(f"resources.device = {device!r}: must be auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f'resources.device = {device!r}: torch sees {count} CUDA devices; set "auto" or "cpu"')
    return torch.device(device)


def read_folder_config(name: str, folder: Path) -> dict[str, Any]:
    """Check that a folder is complete, and return the model section of its configuration."""
    config_file, weights_file = folder / CONFIG_FILE, weights_of(folder)
    for path, exists in (
        (folder, folder.is_dir()),
        (config_file, config_file.is_file()),
        (weights_file, weights_file.is_file()),
    ):
        if not exists:
            raise ConfigError(
                f"backbone.name = {name!r}: {path} does not exist; the folder must hold {CONFIG_FILE} and "
                f"{WEIGHTS_FILE} or {OLD_WEIGHTS_FILE}"
            )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))["model_cfg"]
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{config_file} is not an open_clip configuration: {reason}") from error
    if missing:
        raise ConfigError(f"{config_file}: model_cfg lacks {', '.join(missing)}")
    return config


def weights_of(folder: Path) -> Path:
    """Return the file of weights in a folder of open_clip: safetensors before the older pickle of tensors."""
    old = folder / OLD_WEIGHTS_FILE
    return old if old.is_file() and not (folder / WEIGHTS_FILE).is_file() else folder / WEIGHTS_FILE


def check_text_tower(name: str, config: Mapping[str, Any]) -> None:
    """Refuse text towers that would not read the prompt."""
    text = config["text_cfg"]
    if text.get("hf_model_name") or text.get("embed_cls"):
        return
    pool, causal = text.get("pool_type", "argmax"), not text.get("no_causal_mask", False)
    if pool not in ("argmax", "eos", "last") and (causal or pool != "first"):
        raise ConfigError(f"backbone.name = {name!r}: its text tower has pool_type = {pool!r}; {_SUPPORTED_TEXT}")


def read_shapes(checkpoint: Path) -> Shapes:
    """Return name and shape of every tensor in a checkpoint."""
    try:
        if checkpoint.suffix == ".safetensors":
            with safe_open(checkpoint, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        else:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
            shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # pickle, zip, safetensors and torch each raise different kinds
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{checkpoint} cannot be read as a checkpoint: {type(error).__name__}: {reason}") from error
    if not shapes:
        raise ConfigError(f"{checkpoint} holds no tensors; it must be a state dict, or hold one under 'state_dict'")
    return {key.removeprefix("module."): shape for key, shape in shapes.items()}


def mismatches(expected: Shapes, shapes: Shapes) -> str:
    """Return the first few differences of two sets of tensors as text; empty if there is none."""
    both = [key for key in expected if key in shapes]
    problems = [f"{key} is {shapes[key]}, expected {expected[key]}" for key in both if shapes[key] != expected[key]]
    problems += [f"{key} is missing" for key in expected if key not in shapes]
    problems += [f"{key} is unknown" for key in shapes if key not in expected]
    more = [f"and {len(problems) - _QUOTED} more"] if len(problems) > _QUOTED else []
    return "; ".join(problems[:_QUOTED] + more)


@contextlib.contextmanager
def no_retries_when_offline() -> Iterator[None]:
    """Read only the local cache if the model hub does not answer: its client would retry for most of a minute."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # an error page also shows that the hub answers
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True

"""Frozen open_clip model behind one small class. Only this file and `models.tokenizer` import open_clip.

`load_backbone` finds the model, checks it and freezes it. The weights are always loaded, never random. Every problem
with a name, a path or a checkpoint raises one `ConfigError`.
"""

import contextlib
import difflib
import functools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import PIL.Image
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fl_dualpriv.assets import embedded_model_folder
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models import archives, checkpoints, torchvision_shim
from fl_dualpriv.models.base import Precision
from fl_dualpriv.models.frozen import FrozenModel, encode_images
from fl_dualpriv.models.pruning.in_tower import check_prunable, encode_pruned, open_clip_tower
from fl_dualpriv.models.pruning.tokens import TokenPruner
from fl_dualpriv.models.pruning.towers import ImageTower
from fl_dualpriv.models.text.open_clip_others import CocaText, HuggingFaceText
from fl_dualpriv.models.text.open_clip_text import OpenClipText
from fl_dualpriv.models.text.rows import PROBE, TokenRows, joint, named_unknown, read_rows
from fl_dualpriv.models.tokenizer import TrimmedTokenizer

torchvision_shim.install()  # open_clip imports torchvision, which CPU torch cannot import by itself

import open_clip  # noqa: E402
from open_clip import hf_model, zero_shot_metadata  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

from fl_dualpriv.models.embedded import conv_stem  # noqa: E402

conv_stem.register()

_LOCAL_DIR, _HUB = "local-dir:", "hf-hub:"
_HUB_FILES = (checkpoints.CONFIG_FILE, checkpoints.WEIGHTS_FILE, checkpoints.OLD_WEIGHTS_FILE, "*token*", "*vocab*")
_log = logging.getLogger("fl_dualpriv")


class OpenClipBackbone(FrozenModel):
    """A frozen open_clip model; see `Backbone`."""

    visual_prompts = False

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        device: torch.device,
        pruner: TokenPruner | None,
        precision: Precision,
        model_config: Mapping[str, Any],
    ) -> None:
        clip: Any = model
        self._tower = None
        if pruner is not None:
            self._tower = open_clip_tower(clip.visual)
            check_prunable(self._tower, pruner)
        self._text = _text_side(name, clip, tokenizer)
        self.name, self.device, self.pruner, self._precision = name, device, pruner, precision
        stack, self.plain_reason = self._text.stack, self._text.plain_reason
        self.text_stack = stack.to_precision(torch.bfloat16) if stack is not None and precision == "bf16" else stack
        self.fills_rows = self._text.fills_rows
        self.ctx_dim, self.embed_dim = self._text.ctx_dim, self._text.embed_dim
        self.context_length = self._text.context_length
        self.logit_scale = float(clip.logit_scale.exp())
        self._model, self._tokenizer, self._model_config = clip, tokenizer, model_config
        self.rows = self._read_rows()
        self._joint = "" if hasattr(tokenizer, "sot_token_id") else joint(name, lambda text: _words(tokenizer, text))
        self._transform: Any = image_transform_v2(
            PreprocessCfg(**open_clip.get_model_preprocess_cfg(clip)), is_train=False
        )

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Apply open_clip's inference transform; the result is float32 (3, height, width)."""
        return self._transform(image)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokenize texts into whole rows, int64 (n, context_length), on the CPU.

        Raises:
            ConfigError: If a trimmed vocabulary lacks a word.
        """
        try:
            return self._tokenizer(list(texts))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def words(self, text: str, *, behind: bool = False) -> list[int]:
        """Return only the token ids of a text's words; see `Backbone`.

        Raises:
            ConfigError: If a trimmed vocabulary lacks a word, or a word would end the text or is not known.
        """
        try:
            words = _words(self._tokenizer, self._joint + text if behind and text else text)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if (unknown := _unknown(self._tokenizer)) in words and unknown != self.rows.end:
            raise named_unknown(self.name, text, unknown, lambda word: _words(self._tokenizer, word))
        if isinstance(self._text, CocaText) and self._text.pad in words:
            raise ConfigError(
                f"backbone.name = {self.name!r} takes a token of {text!r} for padding, as it does with '!'; use other "
                "words"
            )
        return self.rows.check_words(self.name, text, words)

    def _read_rows(self) -> TokenRows:
        rules = {"argmax": "largest", "eos": "first"}
        rule: Any = rules.get(self._text.pool_type, "none")
        if hasattr(self._tokenizer, "sot_token_id"):  # CLIP's own tokenizer, whole or trimmed: both pad with 0
            start, end = (self._tokenizer.sot_token_id,), self._tokenizer.eot_token_id
            rows = TokenRows(start=start, end=end, pad=0, end_rule=rule)
        else:
            words = _words(self._tokenizer, PROBE)
            rows = read_rows(self.name, self._tokenizer([PROBE])[0].tolist(), words, rule)
        if rule == "first" and rows.end != self._text.eos_id:
            raise ConfigError(
                f"backbone.name = {self.name!r}: its text tower reads token {self._text.eos_id} (eos_id), but its "
                f"tokenizer ends a text with {rows.end}"
            )
        return rows

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Look up token embeddings without positions: ids (..., token) → (..., token, ctx_dim)."""
        return self._text.token_embedding(tokens.to(self.device))

    def encode_embeddings(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Compute text features of token embeddings, (n, embed_dim); see `Backbone`.

        Raises:
            ValueError: If the rows have a length that the tower cannot read.
        """
        self._check_row_length(embeddings.shape[1])
        return self._text.encode(embeddings, end)

    def image_features(self, images: Tensor) -> Tensor:
        """Compute unit-norm image features, float32 (n, embed_dim); see `Backbone`."""
        return encode_images(self._encode_images, images, self.embed_dim, self.device, self._precision)

    def _encode_images(self, images: Tensor) -> Tensor:
        if self.pruner is None or self._tower is None:
            return self._model.encode_image(images, normalize=False)  # CoCa's default is True
        return encode_pruned(self._tower, images, self.pruner)

    def image_tower(self) -> ImageTower:
        """Return the image side, taken apart; see `FrozenModel`."""
        return open_clip_tower(self._model.visual)

    def _described(self) -> list[Any]:
        return [
            str(self._model.visual),
            _heads(self._model.visual),
            self._model_config,  # holds the pooling of tokens, which is neither a weight nor in the printed module
            open_clip.get_model_preprocess_cfg(self._model),
            repr(self.pruner),
            self._precision,
        ]


def published_templates(name: str) -> tuple[str, ...]:
    """Return the templates of a set that OpenAI published with CLIP, each with one ``{}``, from open_clip's own lists.

    Args:
        name: ``clip-imagenet-80`` or ``clip-imagenet-7``, see `PUBLISHED_SETS`.

    Reference:
        Radford et al. 2021, arXiv:2103.00020; the notebook "Prompt Engineering for ImageNet" of openai/CLIP (MIT).
    """
    sets: dict[str, Sequence[Any]] = {
        "clip-imagenet-80": zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES,
        "clip-imagenet-7": zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES,
    }
    return tuple(fill("{}") for fill in sets[name])


def _text_side(name: str, model: Any, tokenizer: Any) -> OpenClipText | HuggingFaceText | CocaText:
    """Return the text tower in the form of its kind.

    Raises:
        ConfigError: If it pools its tokens in a way that is not supported.
    """
    tower: Any = getattr(model, "text", model)
    if type(tower).__name__ == "HFTextEncoder":
        try:
            return HuggingFaceText(tower, tokenizer([""]).shape[1])
        except ConfigError as error:
            raise ConfigError(f"backbone.name = {name!r}: {error}") from error
    return CocaText(tower) if getattr(tower, "cls_emb", None) is not None else OpenClipText(model)


def _unknown(tokenizer: Any) -> int:
    """Return the id that stands for what a vocabulary lacks; -1 if there is none."""
    unknown = getattr(getattr(tokenizer, "tokenizer", None), "unk_token_id", None)
    return -1 if unknown is None else unknown


def _words(tokenizer: Any, text: str) -> list[int]:
    """Return ids without start, end and padding; ValueError if a trimmed vocabulary lacks a word."""
    if hasattr(tokenizer, "sot_token_id"):
        return tokenizer.encode(text)
    cleaned = tokenizer.clean_fn(text)
    return tokenizer.tokenizer(" " + cleaned if text[:1] == " " else cleaned, add_special_tokens=False)["input_ids"]


def _heads(visual: nn.Module) -> list[int]:
    """Return the head counts, because neither the weights nor the printed module show them."""
    return [module.num_heads for module in visual.modules() if isinstance(module, nn.MultiheadAttention)]


@functools.lru_cache
def load_backbone(
    name: str,
    pretrained: str,
    device: str,
    pruner: TokenPruner | None = None,
    precision: Precision = "fp32",
) -> OpenClipBackbone:
    """Load and freeze an open_clip model; arguments as in `models.load.load_backbone`.

    The weights are read once per process. In a ``local-dir:`` folder a vocabulary.json selects the trimmed tokenizer.

    Raises:
        ConfigError: If the model cannot be used exactly as the arguments say.
    """
    resolved = checkpoints.resolve_device(device)
    model, tokenizer, model_config = _load_model(name, pretrained, str(resolved))
    return OpenClipBackbone(name, model, tokenizer, resolved, pruner, precision, model_config)


@functools.lru_cache
def _load_model(name: str, pretrained: str, device: str) -> tuple[nn.Module, Any, Mapping[str, Any]]:
    """Load the frozen model, its tokenizer and its configuration.

    Backbones that differ only in pruning or precision share them. The configuration is open_clip's ``model_cfg``; the
    changes that a checkpoint's tag makes to it show in the printed module.
    """
    embedded = embedded_model_folder(name)
    folder = None if embedded is None else Path(str(embedded))
    if name.startswith(_LOCAL_DIR):
        folder = Path(name.removeprefix(_LOCAL_DIR)).expanduser()
    elif name.startswith(_HUB):
        folder = _of_hub(name)
    if folder is None:
        architecture = _check_model_name(name)
        config: Mapping[str, Any] = open_clip.get_model_config(architecture) or {}
        checkpoints.check_text_tower(name, config)
        checkpoint, tag = _find_checkpoint(architecture, pretrained)
    else:
        if pretrained:
            raise ConfigError(
                f"backbone.pretrained = {pretrained!r} has no effect for backbone.name = {name!r}, which holds its own "
                'weights; set backbone.pretrained = "" or name an open_clip model'
            )
        architecture, checkpoint, tag = f"{_LOCAL_DIR}{folder}", checkpoints.weights_of(folder), {}
        config = checkpoints.read_folder_config(name, folder)
        checkpoints.check_text_tower(name, config)
    model = _create(name, architecture, checkpoint, tag).eval().requires_grad_(False)
    return model.to(device), _load_tokenizer(name, architecture, folder, model), config


def _of_hub(name: str) -> Path:
    """Return the folder of an open_clip model of the hub; it is downloaded unless the cache has it.

    Raises:
        ConfigError: If the hub or its cache does not have it.
    """
    try:
        with checkpoints.no_retries_when_offline():
            found = huggingface_hub.snapshot_download(name.removeprefix(_HUB), allow_patterns=list(_HUB_FILES))
    except Exception as error:  # the hub raises many kinds
        raise ConfigError(
            f"backbone.name = {name!r}: not on this machine, and it cannot be downloaded ({type(error).__name__}). "
            f"Load it once where there is a network and keep its cache (HF_HOME), or give a folder, {_LOCAL_DIR}PATH; "
            "a model in the form of transformers is named hf:NAME"
        ) from error
    return Path(found)


def _check_model_name(name: str) -> str:
    """Return open_clip's spelling of a model name; ConfigError if open_clip has no such model."""
    if (place := Path(name).expanduser()).is_dir():
        is_open_clip = (place / checkpoints.CONFIG_FILE).is_file()
        raise ConfigError(
            f"backbone.name = {name!r} is a folder: write {_LOCAL_DIR if is_open_clip else 'hf:'}{name}"
            + ("" if is_open_clip else f" for a model of transformers, or {_LOCAL_DIR}{name} for one of open_clip")
        )
    known, spelled = open_clip.list_models(), name.replace("/", "-")
    if spelled in known:
        return spelled
    by_lower = {model.lower(): model for model in known}
    close = [by_lower[match] for match in difflib.get_close_matches(spelled.lower(), by_lower, n=3)]
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(
        f"backbone.name = {name!r} is not demo, shelf, {_LOCAL_DIR}PATH, {_HUB}NAME, hf:NAME (transformers) or one of "
        f"open_clip's {len(known)} models{hint}"
    )


def _find_checkpoint(model: str, pretrained: str) -> tuple[Path, Mapping[str, Any]]:
    """Return the checkpoint file, and open_clip's configuration of the tag (preprocessing, activation)."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    suffixes = checkpoints.CHECKPOINT_SUFFIXES
    offer = f"tags of {model}: {', '.join(tags) or 'none'}; or a {', '.join(suffixes)} file"
    if not pretrained:
        raise ConfigError(f"backbone.pretrained is empty, and weights are never random; {offer}")
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if tag:
        return _download(model, pretrained, tag), tag
    path = Path(pretrained).expanduser()
    if path.suffix in suffixes:
        if not path.is_file():
            raise ConfigError(f"backbone.pretrained = {pretrained!r}: there is no such file (seen from {Path.cwd()})")
        if archives.is_archive(path):
            return path, {"quick_gelu": True}  # only OpenAI distributes such archives, and its models have QuickGELU
        if f"{model}-quickgelu" in open_clip.list_models():
            _log.warning(
                "backbone.pretrained = %s: a file does not say which activation it was trained with; %s uses GELU. For "
                "weights of OpenAI, MetaCLIP or DFN set backbone.name = %s-quickgelu",
                *(pretrained, model, model),
            )
        return path, {}
    close = difflib.get_close_matches(pretrained, tags, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"backbone.pretrained = {pretrained!r} is neither a tag nor a checkpoint file; {hint}{offer}")


def weights_are_here(model: str, pretrained: str) -> bool:
    """Return True if the weights of a published tag are in a cache of this machine. Nothing is downloaded."""
    tag = open_clip.get_pretrained_cfg(model, pretrained) or {}
    repository, _, file = str(tag.get("hf_hub", "")).rpartition("/")
    names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    if repository and any(isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str) for name in names):
        return True
    url = str(tag.get("url", ""))
    return bool(url) and (Path.home() / ".cache" / "clip" / url.rpartition("/")[2]).is_file()


def _download(model: str, pretrained: str, tag: dict[str, Any]) -> Path:
    try:
        with checkpoints.no_retries_when_offline():
            return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # the hub, urllib and open_clip each raise different kinds
        source = tag.get("hf_hub") or tag.get("url")
        raise ConfigError(
            f"backbone.pretrained = {pretrained!r}: the weights of {model} are not on this machine and cannot be "
            f"downloaded from {source}. Load them once where there is a network and keep the cache (HF_HOME), or set "
            f"backbone.pretrained to a local file. Last error: {type(error).__name__}: {error}"
        ) from error


def _create(name: str, architecture: str, checkpoint: Path, tag: Mapping[str, Any]) -> nn.Module:
    """Build the model on the CPU with exactly the weights of this checkpoint."""
    if checkpoint.is_file() and archives.is_archive(checkpoint):
        return _of_archive(name, architecture, checkpoint, tag)
    shapes = checkpoints.read_shapes(checkpoint)
    # A configuration may name a text encoder whose own configuration names code; it must not run.
    vars(hf_model.transformers)["dynamic_module_utils"].TIME_OUT_REMOTE_CODE = 0
    try:
        model = open_clip.create_model(
            architecture,
            pretrained=None if architecture.startswith(_LOCAL_DIR) else str(checkpoint),
            force_quick_gelu=bool(tag.get("quick_gelu", False)),
            force_preprocess_cfg=dict(tag),
            require_pretrained=True,
        )
    except Exception as error:  # open_clip raises RuntimeError, ValueError, KeyError, AssertionError, TypeError here
        raise ConfigError(_describe_failure(name, architecture, checkpoint, shapes, error)) from error
    # open_clip interpolates positions silently if image size or text length differ.
    positions = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.endswith("positional_embedding")}
    if problems := checkpoints.mismatches(positions, {k: shapes.get(k, positions[k]) for k in positions}):
        raise ConfigError(f"{checkpoint} is a checkpoint of another architecture than {name!r}: {problems}")
    if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        raise ConfigError(f"{checkpoint} holds weights that are not finite numbers; use an intact checkpoint")
    return model


def _of_archive(name: str, architecture: str, checkpoint: Path, tag: Mapping[str, Any]) -> nn.Module:
    """Build the model with the weights of a TorchScript archive; see `read_archive`."""
    try:
        tensors = archives.read_archive(checkpoint)
    except Exception as error:  # pickle, zip and torch each raise different kinds on a damaged or hostile file
        raise ConfigError(f"{checkpoint} cannot be read as a TorchScript archive: {error}") from error
    with tempfile.TemporaryDirectory(prefix="fdp-weights-") as folder:
        converted = Path(folder) / f"{checkpoint.stem}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, converted)
        return _create(name, architecture, converted, tag)


def _describe_failure(
    name: str, architecture: str, checkpoint: Path, shapes: checkpoints.Shapes, error: Exception
) -> str:
    try:
        bare = open_clip.create_model(architecture, load_weights=False)
    except Exception as broken:  # the architecture cannot be built at all
        return f"backbone.name = {name!r} cannot be built: {type(broken).__name__}: {broken}"
    expected = {key: tuple(value.shape) for key, value in bare.state_dict().items()}
    if problems := checkpoints.mismatches(expected, shapes):
        return f"{checkpoint} is a checkpoint of another architecture than {name!r}: {problems}"
    return f"{checkpoint} cannot be loaded into {name!r}: {type(error).__name__}: {error}"


def _load_tokenizer(name: str, architecture: str, folder: Path | None, model: nn.Module) -> Any:
    """Load the model's tokenizer and check that it fits the text tower."""
    try:
        if folder is not None and (folder / checkpoints.VOCABULARY_FILE).is_file():
            tokenizer: Any = TrimmedTokenizer.from_json(folder / checkpoints.VOCABULARY_FILE)
        else:
            # CLIP's own vocabulary comes with open_clip. Another one, such as SigLIP's, may come from the hub.
            hub = (open_clip.get_model_config(architecture) or {}).get("text_cfg", {}).get("hf_tokenizer_name")
            with checkpoints.no_retries_when_offline() if hub else contextlib.nullcontext():
                tokenizer = open_clip.get_tokenizer(architecture)
        tokens = tokenizer([""])[0]  # start and end of text, which have the largest ids
    except Exception as error:  # JSON, transformers and the hub each raise different kinds
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"backbone.name = {name!r}: its tokenizer cannot be loaded: {reason}") from error
    text: Any = getattr(model, "text", model)
    is_encoder = type(text).__name__ == "HFTextEncoder"
    table = text.transformer.get_input_embeddings() if is_encoder else text.token_embedding
    if (largest := int(tokens.max())) >= (rows := table.num_embeddings):
        raise ConfigError(
            f"backbone.name = {name!r}: the tokenizer has ids up to {largest}, the model embeds {rows}; "
            f"a trimmed vocabulary needs its {checkpoints.VOCABULARY_FILE} in the model's folder"
        )
    if len(tokens) > text.context_length or (len(tokens) < text.context_length and not is_encoder):
        raise ConfigError(
            f"backbone.name = {name!r}: the tokenizer makes rows of {len(tokens)}, the text tower reads "
            f"{text.context_length}"
        )
    return tokenizer

"""Frozen open_clip model behind one narrow class. The library's import site of open_clip.

`load_backbone` finds the model, checks it and freezes it; weights are always loaded, never random. Everything that can
be wrong with a name, a path or a checkpoint ends in one `ConfigError`.
"""

import difflib
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from fl_dualpriv import torchvision_shim
from fl_dualpriv.backbones import checkpoints
from fl_dualpriv.backbones.tokenizer import TrimmedTokenizer
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.pruning.visual_tokens import ClsAttentionPruner, TokenPruner, check_prunable, encode_pruned

torchvision_shim.install()  # open_clip imports torchvision, which CPU torch cannot import by itself

import open_clip  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402
from open_clip.transformer import ResidualAttentionBlock  # noqa: E402

_DEMO, _LOCAL_DIR = "demo", "local-dir:"


@dataclass(frozen=True)
class TextParts:
    """The text tower's parts, for code that runs it in another order."""

    token_embedding: nn.Embedding
    positional_embedding: Tensor
    """(context_length, ctx_dim)."""
    transformer: nn.Module
    """Has ``resblocks``."""
    ln_final: nn.Module
    text_projection: Tensor | nn.Linear | None
    """As a tensor (ctx_dim, embed_dim)."""
    attn_mask: Tensor | None
    causal: bool
    eot_pooling: bool
    default_blocks: bool
    """All blocks hold a plain `nn.MultiheadAttention`, so their weights can be read."""


class OpenClipBackbone:
    """A frozen CLIP: evaluation mode, no parameter requires a gradient.

    Attributes:
        name: As configured.
        ctx_dim: Width of a token embedding.
        embed_dim: Width of the joint feature space.
        context_length: Longest text, in tokens.
        logit_scale: Factor on the cosine similarity (the exponential of the model's parameter).
        device: Where the model is.
        text_parts: See `TextParts`.
        pruner: Visual token pruner, or None.
    """

    def __init__(
        self, name: str, model: nn.Module, tokenizer: Any, device: torch.device, pruner: TokenPruner | None
    ) -> None:
        if pruner is not None:
            check_prunable(model.get_submodule("visual"), pruner)
        clip: Any = model
        text = getattr(clip, "text", clip)  # CustomTextCLIP keeps the text tower apart, CLIP spreads it over itself
        projection = text.text_projection
        blocks = text.transformer.resblocks
        self.name, self.device, self.pruner = name, device, pruner
        self.text_parts = TextParts(
            token_embedding=text.token_embedding,
            positional_embedding=text.positional_embedding,
            transformer=text.transformer,
            ln_final=text.ln_final,
            text_projection=projection,
            attn_mask=text.attn_mask,
            causal=text.attn_mask is not None,
            eot_pooling=getattr(text, "pool_type", getattr(text, "text_pool_type", None)) in ("argmax", "eos"),
            default_blocks=all(
                isinstance(b, ResidualAttentionBlock) and type(b.attn) is nn.MultiheadAttention for b in blocks
            ),
        )
        self.ctx_dim: int = text.token_embedding.embedding_dim
        if projection is None:
            self.embed_dim = self.ctx_dim
        else:
            self.embed_dim = projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
        self.context_length: int = text.context_length
        self.logit_scale = float(clip.logit_scale.exp())
        self._model, self._tokenizer = clip, tokenizer
        self._transform: Any = image_transform_v2(
            PreprocessCfg(**open_clip.get_model_preprocess_cfg(clip)), is_train=False
        )

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """open_clip's inference transform: float32 (3, height, width)."""
        return self._transform(image)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 (n, context_length), on the CPU. End of text has the largest id of each row.

        Raises:
            ConfigError: If a trimmed vocabulary lacks a word.
        """
        try:
            return self._tokenizer(list(texts))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Ids (..., token) → embeddings (..., token, ctx_dim), without positions."""
        return self.text_parts.token_embedding(tokens.to(self.device))

    def encode_embeddings(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """Text features of token embeddings; differentiable in them.

        Equal to open_clip's ``encode_text`` for the embeddings of whole rows, and for rows cut anywhere after their end
        of text, since no earlier token sees what is cut off.

        Args:
            embeddings: (n, token, ctx_dim) without positions, ``token <= context_length``.
            eot: Index of each row's end of text, (n,).

        Returns:
            (n, embed_dim), not normalised.

        Raises:
            ValueError: If the rows are longer than the context.
        """
        parts, length = self.text_parts, embeddings.shape[1]
        if length > self.context_length:
            raise ValueError(f"{length} tokens: the text tower of {self.name!r} reads at most {self.context_length}")
        mask = None if parts.attn_mask is None else parts.attn_mask[:length, :length]
        x = parts.transformer(embeddings + parts.positional_embedding[:length], attn_mask=mask)
        x = parts.ln_final(x)[torch.arange(x.shape[0], device=x.device), eot.to(x.device)]
        if parts.text_projection is None:
            return x
        return parts.text_projection(x) if isinstance(parts.text_projection, nn.Module) else x @ parts.text_projection

    @torch.no_grad()  # not inference_mode: its tensors may not enter a later backward pass
    def image_features(self, images: Tensor) -> Tensor:
        """Unit-norm image features, through the pruner if there is one.

        Guarantee:
            Per image: no value of one image enters another's features. A NaN image gives a NaN row of its own. The size
            of the batch can change a feature by float rounding, since it changes the order of summation.

        Args:
            images: Preprocessed, (n, 3, height, width); n may be 0.

        Returns:
            float32 (n, embed_dim).
        """
        if images.shape[0] == 0:
            return torch.zeros(0, self.embed_dim, device=self.device)
        images = images.to(self.device, torch.float32)
        if self.pruner is None:
            features = self._model.encode_image(images)
        else:
            features = encode_pruned(self._model.visual, images, self.pruner)
        return nn.functional.normalize(features, dim=-1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over names, types, shapes and bytes of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def feature_key(self) -> str:
        """Changes whenever `image_features` of a file may change: weights, architecture, transform and pruner."""
        transform = open_clip.get_model_preprocess_cfg(self._model)
        described = [
            self.fingerprint,
            str(self._model.visual),
            _heads(self._model.visual),
            transform,
            repr(self.pruner),
        ]
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _heads(visual: nn.Module) -> list[int]:
    """Head counts, which neither the weights nor the printed module show."""
    return [module.num_heads for module in visual.modules() if isinstance(module, nn.MultiheadAttention)]


@functools.lru_cache
def load_backbone(
    name: str, pretrained: str, device: str, visual_keep_ratio: float, visual_layer: int
) -> OpenClipBackbone:
    """Load and freeze a backbone; the weights are read once per process.

    Args:
        name: ``demo`` (the embedded CLIP), ``local-dir:PATH`` (a folder with open_clip_config.json and
            open_clip_model.safetensors; a vocabulary.json beside them selects the trimmed tokenizer), or the name of an
            open_clip model.
        pretrained: For a model name, an open_clip tag or a .safetensors, .pt or .pth file; else empty.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        visual_keep_ratio: Share of patch tokens kept in the image tower, in (0, 1]; 1 switches pruning off.
        visual_layer: Prune after this many blocks.

    Raises:
        ConfigError: If the model cannot be used exactly as asked for.
    """
    pruner = ClsAttentionPruner(keep_ratio=visual_keep_ratio, layer=visual_layer) if visual_keep_ratio != 1 else None
    resolved = checkpoints.resolve_device(device)
    model, tokenizer = _load_model(name, pretrained, str(resolved))
    return OpenClipBackbone(name, model, tokenizer, resolved, pruner)


@functools.lru_cache
def _load_model(name: str, pretrained: str, device: str) -> tuple[nn.Module, Any]:
    """The frozen model and its tokenizer, shared by every backbone that differs in pruning alone."""
    folder = None
    if name == _DEMO:
        folder = Path(str(importlib.resources.files("fl_dualpriv.assets"))) / "demo"
    elif name.startswith(_LOCAL_DIR):
        folder = Path(name.removeprefix(_LOCAL_DIR)).expanduser()
    if folder is None:
        architecture = _check_model_name(name)
        checkpoints.check_text_tower(name, open_clip.get_model_config(architecture) or {})
        checkpoint, tag = _find_checkpoint(architecture, pretrained)
    else:
        if pretrained:
            raise ConfigError(
                f"backbone.pretrained = {pretrained!r} has no effect for backbone.name = {name!r}, which holds its own "
                'weights; set backbone.pretrained = "" or name an open_clip model'
            )
        architecture, checkpoint, tag = f"{_LOCAL_DIR}{folder}", folder / checkpoints.WEIGHTS_FILE, {}
        checkpoints.check_text_tower(name, checkpoints.read_folder_config(name, folder))
    model = _create(name, architecture, checkpoint, tag).eval().requires_grad_(False)
    return model.to(device), _load_tokenizer(name, architecture, folder, model)


def _check_model_name(name: str) -> str:
    """open_clip's spelling of a model name."""
    known, spelled = open_clip.list_models(), name.replace("/", "-")
    if spelled in known:
        return spelled
    by_lower = {model.lower(): model for model in known}
    close = [by_lower[match] for match in difflib.get_close_matches(spelled.lower(), by_lower, n=3)]
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(
        f"backbone.name = {name!r} is not demo, {_LOCAL_DIR}PATH or one of open_clip's {len(known)} models{hint}"
    )


def _find_checkpoint(model: str, pretrained: str) -> tuple[Path, Mapping[str, Any]]:
    """Checkpoint file, and what open_clip knows about the tag (preprocessing, activation)."""
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
        return path, {}
    close = difflib.get_close_matches(pretrained, tags, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"backbone.pretrained = {pretrained!r} is neither a tag nor a checkpoint file; {hint}{offer}")


def _download(model: str, pretrained: str, tag: dict[str, Any]) -> Path:
    try:
        with checkpoints.no_retries_when_offline():
            return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # the hub, urllib and open_clip each raise their own kinds
        source = tag.get("hf_hub") or tag.get("url")
        raise ConfigError(
            f"backbone.pretrained = {pretrained!r}: the weights of {model} are not on this machine and cannot be "
            f"downloaded from {source}. Load them once where there is a network and keep the cache (HF_HOME), or set "
            f"backbone.pretrained to a local file. Last error: {type(error).__name__}: {error}"
        ) from error


def _create(name: str, architecture: str, checkpoint: Path, tag: Mapping[str, Any]) -> nn.Module:
    """Build the model on the CPU with exactly this checkpoint's weights."""
    found = checkpoints.read_shapes(checkpoint)
    try:
        model = open_clip.create_model(
            architecture,
            pretrained=None if architecture.startswith(_LOCAL_DIR) else str(checkpoint),
            force_quick_gelu=bool(tag.get("quick_gelu", False)),
            force_preprocess_cfg=dict(tag),
            require_pretrained=True,
        )
    except Exception as error:  # open_clip raises RuntimeError, ValueError, KeyError, AssertionError, TypeError here
        raise ConfigError(_describe_failure(name, architecture, checkpoint, found, error)) from error
    # open_clip interpolates positions silently if image size or text length differ.
    positions = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.endswith("positional_embedding")}
    if problems := checkpoints.mismatches(positions, {k: found.get(k, positions[k]) for k in positions}):
        raise ConfigError(f"{checkpoint} is a checkpoint of another architecture than {name!r}: {problems}")
    if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        raise ConfigError(f"{checkpoint} holds weights that are not finite numbers; use an intact checkpoint")
    return model


def _describe_failure(
    name: str, architecture: str, checkpoint: Path, found: checkpoints.Shapes, error: Exception
) -> str:
    try:
        bare = open_clip.create_model(architecture, load_weights=False)
    except Exception as broken:  # the architecture cannot be built at all
        return f"backbone.name = {name!r} cannot be built: {type(broken).__name__}: {broken}"
    expected = {key: tuple(value.shape) for key, value in bare.state_dict().items()}
    if problems := checkpoints.mismatches(expected, found):
        return f"{checkpoint} is a checkpoint of another architecture than {name!r}: {problems}"
    return f"{checkpoint} cannot be loaded into {name!r}: {type(error).__name__}: {error}"


def _load_tokenizer(name: str, architecture: str, folder: Path | None, model: nn.Module) -> Any:
    """The model's tokenizer, checked against its text tower."""
    try:
        if folder is not None and (folder / checkpoints.VOCABULARY_FILE).is_file():
            tokenizer: Any = TrimmedTokenizer.from_json(folder / checkpoints.VOCABULARY_FILE)
        else:
            tokenizer = open_clip.get_tokenizer(architecture)
        tokens = tokenizer([""])[0]  # start and end of text, the largest ids
    except Exception as error:  # JSON, transformers and the hub each raise their own kinds
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"backbone.name = {name!r}: its tokenizer cannot be loaded: {reason}") from error
    text: Any = getattr(model, "text", model)
    if (largest := int(tokens.max())) >= (rows := text.token_embedding.num_embeddings):
        raise ConfigError(
            f"backbone.name = {name!r}: the tokenizer has ids up to {largest}, the model embeds {rows}; "
            f"a trimmed vocabulary needs its {checkpoints.VOCABULARY_FILE} in the model's folder"
        )
    if len(tokens) != text.context_length:
        raise ConfigError(
            f"backbone.name = {name!r}: the tokenizer makes rows of {len(tokens)}, the text tower reads "
            f"{text.context_length}"
        )
    return tokenizer

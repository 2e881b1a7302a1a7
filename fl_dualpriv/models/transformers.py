"""Frozen dual encoders of transformers: CLIP, SigLIP and their kind. Only this file imports transformers.

The NAME in ``hf:NAME`` is a folder that ``save_pretrained`` wrote, or a name on the hub. Model, tokenizer and image
processor come from the same place. The weights are always loaded, never random. Every problem raises one `ConfigError`.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models import checkpoints, torchvision_shim
from fl_dualpriv.models.base import HUGGING_FACE, Precision
from fl_dualpriv.models.families import FAMILIES, encode_text, image_encoder, packed
from fl_dualpriv.models.frozen import FrozenModel, encode_images
from fl_dualpriv.models.pruning.in_tower import check_prunable, encode_pruned, transformers_tower
from fl_dualpriv.models.pruning.tokens import TokenPruner
from fl_dualpriv.models.pruning.towers import ImageTower
from fl_dualpriv.models.text.rows import PROBE, TokenRows, joint, named_unknown, read_rows
from fl_dualpriv.models.text.text_stack import Activation, Linear, TextBlock, TextStack, read_linear, read_norm

torchvision_shim.install()  # transformers' image models import torchvision, which CPU torch cannot import by itself

import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()  # every worker would print a bar for each file

_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_EXTRAS = {"sentencepiece": "siglip", "tiktoken": "siglip"}
"""Packages that a tokenizer may need, and the extra that installs them."""

_TRIAL_SIZE = (48, 40)
_LEGACY_EOS = 2
"""End token that CLIP configurations from before 2023 name; transformers then reads the largest id instead."""


class TransformersBackbone(FrozenModel):
    """A frozen dual encoder of transformers; see `Backbone`.

    Args:
        name: Configured name of the model.
        model: Model of one of `FAMILIES`.
        tokenizer: Tokenizer of transformers.
        image_processor: Image processor of transformers that works on PIL images.
        device: Device that holds the model.
        pruner: Visual token pruner, or None.
        precision: Precision of the matrix products.
    """

    visual_prompts = False

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        image_processor: Any,
        device: torch.device,
        pruner: TokenPruner | None,
        precision: Precision,
    ) -> None:
        self.name, self.device, self.pruner, self._precision = name, device, pruner, precision
        self._model: Any = model
        self._tower = None
        if pruner is not None:
            self._tower = transformers_tower(model)
            check_prunable(self._tower, pruner)
        self._tokenizer, self._image_processor = tokenizer, image_processor
        config = self._model.config.text_config
        self._family = FAMILIES[self._model.config.model_type]
        self._encode_model = image_encoder(self._model, self._family)
        self.mirrors = not self._family.patches
        self.ctx_dim: int = config.hidden_size
        projection = getattr(self._model, "text_projection", None)
        self.embed_dim: int = (projection or self._model.text_model.head).out_features
        self.context_length: int = config.max_position_embeddings - self._family.offset
        self.logit_scale = float(self._model.logit_scale.exp())
        self.fills_rows = self._family.text == "whole row"
        self.plain_reason = self._why_plain(config)
        stack = None if self.plain_reason else _read_stack(self._model)
        self.text_stack = stack.to_precision(torch.bfloat16) if stack is not None and precision == "bf16" else stack
        self.rows = self._read_rows(config)
        self._joint = joint(name, self._words)

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Apply the image processor's transform; the result is float32 (3, height, width), or `packed`."""
        made = self._image_processor(images=image.convert("RGB"), return_tensors="pt")
        return packed(made) if self._family.patches else made["pixel_values"][0]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokenize texts into whole rows, int64 (n, context_length), on the CPU."""
        rows = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return rows["input_ids"]

    def words(self, text: str, *, behind: bool = False) -> list[int]:
        """Return only the token ids of a text's words; see `Backbone`.

        Raises:
            ConfigError: If a word would end the text, or the model does not know it.
        """
        words = self._words(self._joint + text if behind and text else text)
        if words and max(words) >= (known := self._model.config.text_config.vocab_size):
            raise ConfigError(f"backbone.name = {self.name!r}: {text!r} has token {max(words)}, the model has {known}")
        if (unknown := self._unknown) is not None and unknown in words:
            raise named_unknown(self.name, text, unknown, self._words)
        return self.rows.check_words(self.name, text, words)

    @property
    def _unknown(self) -> int | None:
        """Id that stands for what the vocabulary lacks; None without one. CLIP's is the end of text."""
        unknown = self._tokenizer.unk_token_id
        return None if unknown == self.rows.end else unknown

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Look up token embeddings without positions: ids (..., token) → (..., token, ctx_dim)."""
        return self._model.text_model.get_input_embeddings()(tokens.to(self.device))

    def encode_embeddings(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Compute text features of token embeddings, (n, embed_dim); see `Backbone`.

        Raises:
            ValueError: If the rows have a length that the tower cannot read.
        """
        self._check_row_length(embeddings.shape[1])
        return encode_text(self._model, self._family, embeddings, end)

    def image_features(self, images: Tensor) -> Tensor:
        """Compute unit-norm image features, float32 (n, embed_dim); see `Backbone`."""
        return encode_images(self._encode_images, images, self.embed_dim, self.device, self._precision)

    def _encode_images(self, images: Tensor) -> Tensor:
        if self.pruner is None or self._tower is None:
            return self._encode_model(images)
        return encode_pruned(self._tower, images, self.pruner)

    def image_tower(self) -> ImageTower:
        """Return the image side, taken apart; see `FrozenModel`."""
        return transformers_tower(self._model)

    def _described(self) -> list[Any]:
        vision = self._model.config.vision_config.to_diff_dict()
        return [
            type(self._model).__name__,
            vision,
            self._image_processor.to_dict(),
            repr(self.pruner),
            self._precision,
        ]

    def _words(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _why_plain(self, config: Any) -> str:
        if self._family.text != "causal":
            return "its text tower is not causal"
        if config.hidden_act not in _ACTIVATIONS:
            return f"its text blocks have another activation, {config.hidden_act}"
        return ""

    def _read_rows(self, config: Any) -> TokenRows:
        legacy = config.eos_token_id == _LEGACY_EOS and self._model.config.model_type == "clip"
        if self._words("cat") == self._words("dog"):  # without files, transformers makes an empty tokenizer
            raise ConfigError(f"backbone.name = {self.name!r}: its tokenizer has no vocabulary; add its files")
        row = self.tokenize([PROBE])[0].tolist()
        if len(row) != self.context_length:
            raise ConfigError(
                f"backbone.name = {self.name!r}: the tokenizer makes rows of {len(row)}, the text tower reads "
                f"{self.context_length}"
            )
        rule = "none" if self._family.text != "causal" else "largest" if legacy else "first"
        rows = read_rows(self.name, row, self._words(PROBE), rule)
        if rule == "first" and rows.end != config.eos_token_id:
            raise ConfigError(
                f"backbone.name = {self.name!r}: its text tower reads token {config.eos_token_id} (eos_token_id), but "
                f"its tokenizer ends a text with {rows.end}"
            )
        return rows


@torch.no_grad()
def _read_stack(model: Any) -> TextStack:
    text, config = model.text_model, model.config.text_config
    return TextStack(
        blocks=tuple(_read_block(layer) for layer in text.encoder.layers),
        heads=config.num_attention_heads,
        activation=_ACTIVATIONS[config.hidden_act],
        positions=text.embeddings.position_embedding.weight.detach(),
        final=read_norm(text.final_layer_norm),
        projection=read_linear(model.text_projection),
    )


def _read_block(layer: Any) -> TextBlock:
    parts = [read_linear(getattr(layer.self_attn, f"{letter}_proj")) for letter in "qkv"]
    return TextBlock(
        ln_1=read_norm(layer.layer_norm1),
        qkv=Linear(weight=torch.cat([p.weight for p in parts]), bias=torch.cat([p.bias for p in parts])),
        out=read_linear(layer.self_attn.out_proj),
        ln_2=read_norm(layer.layer_norm2),
        up=read_linear(layer.mlp.fc1),
        down=read_linear(layer.mlp.fc2),
    )


@functools.lru_cache
def load_backbone(
    name: str,
    pretrained: str,
    device: str,
    pruner: TokenPruner | None = None,
    precision: Precision = "fp32",
) -> TransformersBackbone:
    """Load and freeze a model of transformers; arguments as in `models.load.load_backbone`.

    Raises:
        ConfigError: If the model cannot be used exactly as the arguments say.
    """
    if pretrained:
        raise ConfigError(
            f"backbone.pretrained = {pretrained!r} has no effect for backbone.name = {name!r}, which holds its own "
            'weights; set backbone.pretrained = ""'
        )
    resolved = checkpoints.resolve_device(device)
    backbone = TransformersBackbone(name, *_load_parts(name, str(resolved)), resolved, pruner, precision)
    _try_an_image(backbone)
    return backbone


def _try_an_image(backbone: TransformersBackbone) -> None:
    """Refuse an image processor that does not fit the model: in a run, its errors would look like bad images."""
    try:
        features = backbone.image_features(backbone.preprocess(PIL.Image.new("L", _TRIAL_SIZE))[None])
    except Exception as error:  # image processor and model may raise any kind
        reason = f"{type(error).__name__}: {str(error).strip()}"
        raise ConfigError(
            f"backbone.name = {backbone.name!r} cannot read the output of its image processor: {reason}"
        ) from error
    if features.shape != (1, backbone.embed_dim):
        raise ConfigError(
            f"backbone.name = {backbone.name!r}: image features are {features.shape[-1]} wide, text features "
            f"{backbone.embed_dim}"
        )


@functools.lru_cache
def _load_parts(name: str, device: str) -> tuple[nn.Module, Any, Any]:
    """Load the frozen model, its tokenizer and its image processor.

    Backbones that differ only in pruning or precision share them.
    """
    place, local = find_place(name, name.removeprefix(HUGGING_FACE))
    with checkpoints.no_retries_when_offline():
        config = load_part(name, "configuration", transformers.AutoConfig.from_pretrained, place, local)
        if config.model_type not in FAMILIES:
            raise ConfigError(
                f"backbone.name = {name!r} is a model of type {config.model_type!r}; supported are "
                f"{', '.join(FAMILIES)} (SigLIP 2 with images of a fixed size is of type siglip)"
            )
        kind = getattr(transformers, FAMILIES[config.model_type].kind)
        model = load_weights(name, kind, place, local, torch.float32)
        tokenizer = load_part(name, "tokenizer", transformers.AutoTokenizer.from_pretrained, place, local)
        images = functools.partial(transformers.AutoImageProcessor.from_pretrained, backend="pil")
        image_processor = load_part(name, "image processor", images, place, local)
    return model.eval().requires_grad_(False).to(device), tokenizer, image_processor


def find_place(name: str, source: str) -> tuple[str, bool]:
    """Return the place from which transformers reads (a folder, or a name on the hub), and True if it is a folder."""
    if not source.strip():  # an empty path would mean the working directory
        raise ConfigError(f"backbone.name = {name!r}: name a folder or a model on the hub after {HUGGING_FACE!r}")
    folder = Path(source).expanduser()
    return (str(folder), True) if folder.is_dir() else (source, False)


def load_part(name: str, part: str, load: Callable[..., Any], place: str, local: bool) -> Any:
    """Read one part of a model from a folder or the hub with a function of transformers; ConfigError if that fails.

    Guarantee:
        No code that comes with a model runs. A server names the models, and without ``trust_remote_code=False``
        transformers would ask at the terminal.
    """
    try:
        return load(place, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers, the hub and JSON each raise different kinds
        reason = " ".join(str(error).split())
        if lacking := next((name for name in _EXTRAS if name in reason.lower()), None):
            raise ConfigError(
                f"backbone.name = {name!r}: its {part} needs the package {lacking}: "
                f'pip install "fl-dualpriv[{_EXTRAS[lacking]}]"'
            ) from error
        raise ConfigError(
            f"backbone.name = {name!r}: its {part} cannot be loaded; name a folder that holds model, tokenizer and "
            f"image processor (as save_pretrained writes them), or a hub name. {type(error).__name__}: {reason}"
        ) from error


def load_weights(name: str, kind: Any, place: str, local: bool, dtype: torch.dtype) -> nn.Module:
    """Load a model of the class ``kind`` with weights of type ``dtype``.

    The arguments and checks are needed because transformers would take the checkpoint's own precision, and would fill
    missing weights at random.

    Raises:
        ConfigError: If the weights cannot be read, do not fill the model or are not finite.
    """
    # Without attn_implementation, a configuration could name a repository of native code for its attention.
    load = functools.partial(kind.from_pretrained, dtype=dtype, output_loading_info=True, attn_implementation="sdpa")
    model, loaded = load_part(name, "model", load, place, local)
    problems = [f"{key} is missing" for key in sorted(loaded["missing_keys"])]
    problems += [f"{key} has another shape" for key, *_ in loaded["mismatched_keys"]]
    problems += [str(message) for message in loaded.get("error_msgs", [])]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(
            f"backbone.name = {name!r}: its weights do not fill the model, and weights are never random: "
            f"{'; '.join(problems[:3])}{more}"
        )
    if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        raise ConfigError(f"backbone.name = {name!r} holds weights that are not finite numbers")
    return model

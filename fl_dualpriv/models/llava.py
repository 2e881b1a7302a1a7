"""Frozen LLaVA models of transformers: vision tower, projector and a causal language model that reads visual tokens.

The language model is that of transformers. It runs in two parts: first the tokens before a prompt, without gradients,
into keys and values that are kept; then the remaining tokens, which attend to those keys and values.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models import checkpoints
from fl_dualpriv.models.answering import Prefix
from fl_dualpriv.models.base import Precision
from fl_dualpriv.models.chat_layout import ChatLayout
from fl_dualpriv.models.frozen import FrozenModel
from fl_dualpriv.models.pruning.published import n_visual_tokens, pruned_hidden
from fl_dualpriv.models.pruning.tokens import OFF, TokenPruner
from fl_dualpriv.models.transformers import find_place, load_part, load_weights, transformers

_VISION = ("clip_vision_model", "siglip_vision_model")
_LANGUAGE = ("llama", "mistral", "qwen2")
_TYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TRIAL_SIZE = (48, 40)
# transformers 5.24 renamed this argument and warns about the old name.
_CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"


class LlavaBackbone(FrozenModel):
    """A frozen LLaVA of transformers; see `AnsweringModel`.

    Args:
        name: Configured name of the model.
        model: `transformers.LlavaForConditionalGeneration`.
        processor: Processor of transformers, with a tokenizer and an image processor that works on PIL images.
        device: Device that holds the model.
        pruner: Pruner of the visual tokens of each image; None keeps all.
        precision: Precision of the weights.

    Raises:
        ConfigError: If model, processor and pruner do not fit together.
    """

    visual_prompts = False
    mirrors = True
    fills_rows = False
    text_stack = None

    def __init__(
        self,
        name: str,
        model: nn.Module,
        processor: Any,
        device: torch.device,
        pruner: TokenPruner | None,
        precision: Precision,
    ) -> None:
        self.name, self.device, self.pruner, self._precision = name, device, pruner, precision
        self._model: Any = model
        self._language: Any = self._model.model.language_model
        self._image_processor = processor.image_processor
        config = self._model.config
        self.ctx_dim: int = config.text_config.hidden_size
        self.context_length: int = config.text_config.max_position_embeddings
        table = self._language.embed_tokens.weight
        self._type = table.dtype
        self._layout = ChatLayout(name, processor, config.image_token_id, len(table))
        self.end = self._layout.end
        self._before = self.embed_tokens(torch.tensor(self._layout.before, dtype=torch.long))
        if pruner is not None:
            self._check_prunable(config, pruner)
        self.n_visual = self._count_visual()
        self.embed_dim = self.n_visual * self.ctx_dim

    @property
    def language_model(self) -> nn.Module:
        """The frozen language model without the output layer; every backbone with these weights shares it."""
        return self._language

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Apply the image processor's transform; the result is float32 (3, height, width)."""
        return self._image_processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()  # not inference_mode: a later backward pass could not use its tensors
    def image_features(self, images: Tensor) -> Tensor:
        """Compute projected visual tokens, float32 (n, n_visual * ctx_dim); see `AnsweringModel`."""
        if images.shape[0] == 0:
            return torch.zeros(0, self.embed_dim, device=self.device)
        images = images.to(self.device, torch.float32)
        finite = torch.isfinite(images).flatten(1).all(dim=1)
        clean = torch.where(finite[:, None, None, None], images, 0.0)
        tokens = self._visual_tokens(clean.to(self._type)).float().flatten(1)
        return torch.where(finite[:, None], tokens, float("nan"))

    def words(self, text: str) -> list[int]:
        """Return the token ids of a text; see `AnsweringModel`."""
        return self._layout.words(text)

    @torch.no_grad()
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Look up token embeddings: ids (..., token) → float32 (..., token, ctx_dim)."""
        return self._language.embed_tokens(tokens.to(self.device)).float()

    def question_tokens(self, question: str) -> list[int]:
        """Return the ids between the prompt and the answer; see `AnsweringModel`."""
        return self._layout.question(question)

    def answer_tokens(self, answer: str) -> list[int]:
        """Return the ids of an answer and the end token; see `AnsweringModel`."""
        return self._layout.answer(answer)

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids; see `AnsweringModel`."""
        return self._layout.text(ids)

    def check_length(self, n_ctx: int, max_tokens: int) -> None:
        """Raise ConfigError if image, prompt, question and answer exceed the context; see `AnsweringModel`."""
        before = len(self._layout.before)
        needed = before + self.n_visual + n_ctx + max_tokens
        if needed > self.context_length:
            fitting = max_tokens - needed + self.context_length
            advice = f"set data.max-tokens <= {fitting}, or" if fitting > 1 else "set a shorter prompt, or"
            raise ConfigError(
                f"a prompt of {n_ctx} tokens and data.max-tokens = {max_tokens} make sequences of {needed} tokens with "
                f"{before + self.n_visual} before the prompt; {self.name!r} reads {self.context_length}: "
                f"{advice} keep fewer visual tokens"
            )

    @torch.no_grad()
    def prefix(self, visual: Tensor) -> Prefix:
        """Compute keys and values of the tokens before a prompt; see `AnsweringModel`."""
        cache: Any = transformers.DynamicCache()  # without a configuration its layers keep every token
        self._run(self._in_front(visual), cache, 0)
        return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers))

    def logits(self, prefix: Prefix, embeddings: Tensor, first: int, *, checkpointing: bool = False) -> Tensor:
        """Compute the scores of the next token after each position; see `AnsweringModel`."""
        cache: Any = transformers.DynamicCache()
        cache.layers = [_KeptLayer(keys, values) for keys, values in prefix.layers]
        past = prefix.layers[0][0].shape[2]
        with _checkpointed(self._language.layers) if checkpointing else contextlib.nullcontext():
            hidden = self._run(embeddings.to(self._type), cache, past)
        return self._model.lm_head(hidden[:, first:]).float()

    def whole_logits(self, language: Callable[..., Any], visual: Tensor, embeddings: Tensor, first: int) -> Tensor:
        """Compute the scores of whole sequences with a variant of the language model; no kept prefix is used.

        Gradients flow through all tokens, from the first token on.

        Args:
            language: Callable like `language_model`, such as one with LoRA layers.
            visual: Visual tokens of n images, (n, embed_dim).
            embeddings: Embeddings that follow the visual tokens, (n, token, ctx_dim), without positions.
            first: Position in ``embeddings`` of the first score that is returned.

        Returns:
            float32 (n, token - first, vocabulary).
        """
        front = self._in_front(visual)
        hidden = language(inputs_embeds=torch.cat([front, embeddings.to(self._type)], dim=1), use_cache=False)
        return self._model.lm_head(hidden.last_hidden_state[:, front.shape[1] + first :]).float()

    def _in_front(self, visual: Tensor) -> Tensor:
        """Return the embeddings of ``[before][visual tokens]``, (n, token, ctx_dim)."""
        tokens = visual.to(self.device, self._type).unflatten(1, (self.n_visual, self.ctx_dim))
        return torch.cat([self._before.to(self._type).expand(len(tokens), -1, -1), tokens], dim=1)

    def _run(self, embeddings: Tensor, cache: Any, past: int) -> Tensor:
        positions = torch.arange(past, past + embeddings.shape[1], device=self.device)[None]
        arguments = {_CACHE: cache, "position_ids": positions, "inputs_embeds": embeddings, "use_cache": True}
        return self._language(**arguments).last_hidden_state

    def _visual_tokens(self, pixels: Tensor) -> Tensor:
        """Compute visual tokens: (n, 3, height, width) → (n, n_visual, ctx_dim)."""
        if self.pruner is not None:
            hidden = pruned_hidden(self._model.model.vision_tower, pixels, self.pruner)
            return self._model.model.multi_modal_projector(hidden)
        return torch.stack(list(self._model.get_image_features(pixel_values=pixels).pooler_output))

    def _check_prunable(self, config: Any, pruner: TokenPruner) -> None:
        """Refuse a pruner whose tokens would differ in kind from those that the language model was trained on."""
        tower = self._model.model.vision_tower
        n_visual_tokens(tower, pruner)
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        wanted = "default" if config.vision_config.model_type == _VISION[0] else "full"
        states = config.vision_config.num_hidden_layers + 1
        if not isinstance(layer, int) or layer % states != pruner.layer % states:
            raise ConfigError(
                f"pruning.visual-layer = {pruner.layer}: {self.name!r} reads hidden state {layer} of its vision tower "
                "(vision_feature_layer); only a single hidden state can be pruned, and only the one that is read; "
                f"{OFF}, or set pruning.visual-layer to that state"
            )
        if strategy != wanted:
            raise ConfigError(
                f"backbone.name = {self.name!r}: tokens of its vision tower can be pruned if the language model reads "
                f"only patches (vision_feature_select_strategy = {wanted!r}); it is {strategy!r}; {OFF}"
            )

    def _count_visual(self) -> int:
        """Count the visual tokens of an image; refuse an image processor that does not fit."""
        try:
            pixels = self.preprocess(PIL.Image.new("L", _TRIAL_SIZE))[None].to(self.device, self._type)
            with torch.no_grad():
                return self._visual_tokens(pixels).shape[1]
        except Exception as error:  # image processor and model may raise any kind
            reason = f"{type(error).__name__}: {str(error).strip()}"
            raise ConfigError(
                f"backbone.name = {self.name!r} cannot read the output of its image processor: {reason}"
            ) from error

    def _described(self) -> list[Any]:
        config = self._model.config
        vision = (config.vision_config.to_diff_dict(), config.vision_feature_layer)
        projector = (config.vision_feature_select_strategy, config.projector_hidden_act)
        return ["llava", vision, projector, self._image_processor.to_dict(), repr(self.pruner), self._precision]


class _KeptLayer(transformers.cache_utils.DynamicLayer):
    """Keys and values of one block that only get read and never grow, so that a block can run twice (checkpointing)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys: Tensor = keys
        self.values: Tensor = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the kept keys and values followed by the new ones, without keeping the new ones."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


@contextlib.contextmanager
def _checkpointed(layers: nn.ModuleList) -> Iterator[None]:
    """Make blocks keep only their input and run again in the backward pass, inside the context.

    transformers' own checkpointing would drop the keys and values before the prompt.
    """
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@functools.lru_cache
def load_llava(
    name: str, source: str, device: str, pruner: TokenPruner | None, precision: Precision = "fp32"
) -> LlavaBackbone:
    """Load and freeze a LLaVA from ``source``, a folder or hub name.

    The other arguments are those of `models.load.load_answering_model`.

    Raises:
        ConfigError: If the model cannot be used exactly as the arguments say.
    """
    resolved = checkpoints.resolve_device(device)
    return LlavaBackbone(name, *_load_parts(name, source, str(resolved), precision), resolved, pruner, precision)


@functools.lru_cache
def _load_parts(name: str, source: str, device: str, precision: Precision) -> tuple[nn.Module, Any]:
    """Load the frozen model and its processor; backbones that differ only in pruning share them."""
    place, local = find_place(name, source)
    with contextlib.nullcontext() if local else checkpoints.no_retries_when_offline():
        config = load_part(name, "configuration", transformers.AutoConfig.from_pretrained, place, local)
        _check_types(name, config)
        model = load_weights(name, transformers.AutoModelForImageTextToText, place, local, _TYPES[precision])
        read = functools.partial(transformers.AutoProcessor.from_pretrained, backend="pil")
        processor = load_part(name, "processor", read, place, local)
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):  # in a folder with only a tokenizer, transformers returns the tokenizer
            raise ConfigError(
                f"backbone.name = {name!r}: its processor has no {part}; add the files that its save_pretrained writes"
            )
    return model.eval().requires_grad_(False).to(device), processor


def _check_types(name: str, config: Any) -> None:
    model_type = config.model_type
    if model_type == "llava":
        for part, supported in ((config.vision_config, _VISION), (config.text_config, _LANGUAGE)):
            if part.model_type not in supported:
                raise ConfigError(
                    f"backbone.name = {name!r} is a LLaVA with a part of type {part.model_type!r}; supported are "
                    f"{', '.join(supported)}"
                )
    else:
        raise ConfigError(
            f"backbone.name = {name!r} is a model of type {model_type!r}; supported for questions is llava, with a "
            f"vision tower of type {' or '.join(_VISION)} and a language model of type {', '.join(_LANGUAGE)}"
        )

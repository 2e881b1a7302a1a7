"""Readers: a frozen model with a published prompt. One reader names the class of an image, one answers questions."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.data.images import probe_image
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.answers import BLOCK
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.learners.head import LowRankHead
from fl_dualpriv.learners.linear_probe import LinearProbe
from fl_dualpriv.learners.prototypes import prototype_directions
from fl_dualpriv.models.answering import AnsweringModel
from fl_dualpriv.models.base import Backbone, ImageEncoder
from fl_dualpriv.models.load import load_answering_model, load_backbone
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner
from fl_dualpriv.tasks.use_facts import BackboneFacts, UseFacts

_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Tolerance of a probe, relative to its largest entry, by precision of products: another device rounds differently."""
_PROBED = 256
"""Number of word scores in the probe of a model that answers questions."""

Reply = tuple[str, dict[str, float]]
"""Label or answer, and probabilities of the classes, the likeliest first (empty for answers)."""


class Reader(Protocol):
    """Frozen model with a prompt."""

    @property
    def model(self) -> ImageEncoder:
        """The frozen model."""
        ...

    def replies(self, features: np.ndarray, question: str) -> list[Reply | None]:
        """Return the reply for each image, from features (image, embed_dim); None if its features are not finite."""
        ...

    def probe(self) -> Tensor:
        """Return the outputs for one fixed synthetic image: numbers (n,) on the CPU.

        The numbers change with weights, architecture, tokenizer, preparation of images, pruner and prompt.
        """
        ...


class Classifier:
    """`Reader` that names the class of an image.

    Args:
        use: Facts that a reader needs to use the prompt.
        prompt: (rows, cols).
        backbone: The frozen model.

    Raises:
        ConfigError: If the prompt does not fit the model.
    """

    def __init__(self, use: UseFacts, prompt: Tensor, backbone: Backbone) -> None:
        self.model, self._names = backbone, use.classes
        self._has_bias = use.kind == "linear-probe"
        self._classes = _class_features(use, prompt.to(backbone.device), backbone)

    def replies(self, features: np.ndarray, question: str) -> list[Reply | None]:
        """See `Reader`: a softmax over all classes, in the order of the products by which a run scores."""
        cosines = self._cosines(torch.from_numpy(features))
        shares = (self.model.logit_scale * cosines).softmax(dim=-1)
        return [self._reply(*pair) for pair in zip(cosines, shares, strict=True)]

    def _reply(self, cosines: Tensor, shares: Tensor) -> Reply | None:
        if not bool(torch.isfinite(cosines).all()):
            return None
        order = cosines.argsort(descending=True, stable=True).tolist()
        return self._names[order[0]], {self._names[i]: float(shares[i]) for i in order}

    def probe(self) -> Tensor:
        """See `Reader`: products of the probe image with every class."""
        return self._cosines(_probe_features(self.model))[0]

    def _cosines(self, features: Tensor) -> Tensor:
        features = torch.nn.functional.pad(features, (0, int(self._has_bias)), value=1.0)
        return (features.to(self._classes) @ self._classes.T).cpu()


def _class_features(use: UseFacts, prompt: Tensor, backbone: Backbone) -> Tensor:
    """Return the matrix that multiplies image features, (n_cls, embed_dim), plus a bias column if there is a bias."""
    n_cls = len(use.classes)
    if use.kind == "linear-probe":
        probe = LinearProbe(n_cls, backbone.embed_dim)
        _check_shape(prompt, probe.shape)
        return probe.values(prompt)
    if use.kind == "prototypes":
        _check_shape(prompt, (n_cls, backbone.embed_dim))
        return prototype_directions(prompt)
    text = PromptedText(backbone, use.classes, use.template)
    if use.kind == "head":
        head = LowRankHead(text.zero_shot_features())
        _check_shape(prompt, head.shape(len(prompt)))
        return head(prompt[None]).values[0]
    text.check_length(len(prompt))
    _check_shape(prompt, (len(prompt), backbone.ctx_dim))
    return text.tower(prompt[None]).values[0]


class Answerer:
    """`Reader` that answers questions by greedy decoding. If a run counts an answer as correct, it gives that answer.

    Args:
        use: Facts that a reader needs to use the prompt.
        prompt: (rows, cols).
        model: The frozen model.

    Raises:
        ConfigError: If the prompt does not fit the model.
    """

    def __init__(self, use: UseFacts, prompt: Tensor, model: AnsweringModel) -> None:
        self.model, self._prompt = model, prompt.to(model.device)
        self._max_tokens, self._lora = use.max_tokens, None
        words = len(prompt)
        if use.kind == "lora":
            from fl_dualpriv.models.llava import LlavaBackbone
            from fl_dualpriv.models.lora import load_lora  # late: peft is an extra

            assert isinstance(model, LlavaBackbone)
            self._lora = load_lora(model, len(prompt))
            self._words = model.embed_tokens(torch.tensor(model.words(use.template), device=model.device))
            words = len(self._words)
        _check_shape(prompt, (len(prompt), model.ctx_dim) if self._lora is None else self._lora.shape)
        model.check_length(words, use.max_tokens)

    def replies(self, features: np.ndarray, question: str) -> list[Reply | None]:
        """See `Reader`. Raise ConfigError if the model's tokens cannot express the question, or no room is left."""
        asked = self.model.question_tokens(question)
        if (room := self._max_tokens - len(asked)) < 1:
            raise ConfigError(f"the question has {len(asked)} tokens; with its answer at most {self._max_tokens}")
        rows = torch.from_numpy(features)
        usable = torch.isfinite(rows).all(dim=1)
        replies: list[Reply | None] = [None] * len(rows)
        for places in _blocks(usable.nonzero().flatten().tolist()):
            answers = self._decode(rows[places].to(self.model.device), asked, room)
            for place, ids in zip(places, answers, strict=True):
                replies[place] = (self.model.text(ids), {})
        return replies

    @torch.no_grad()
    def _decode(self, visual: Tensor, asked: list[int], room: int) -> list[list[int]]:
        """Return the token ids of each image's answer, without the end token."""
        tokens = torch.tensor(asked, device=visual.device).expand(len(visual), -1)
        ended = torch.zeros(len(visual), dtype=torch.bool, device=visual.device)
        for _ in range(room):
            tokens = torch.cat([tokens, self._next(visual, tokens).argmax(dim=-1, keepdim=True)], dim=1)
            ended |= tokens[:, -1] == self.model.end
            if bool(ended.all()):
                break
        answers = tokens[:, len(asked) :].tolist()
        return [ids[: ids.index(self.model.end)] if self.model.end in ids else ids for ids in answers]

    def _next(self, visual: Tensor, tokens: Tensor) -> Tensor:
        """Return the scores of the token that follows a sequence, (image, vocabulary)."""
        in_front = self._prompt if self._lora is None else self._words
        text = self.model.embed_tokens(tokens)
        embeddings = torch.cat([in_front.to(text.dtype).expand(len(visual), -1, -1), text], dim=1)
        last = embeddings.shape[1] - 1
        if self._lora is not None:
            return self._lora.logits(self._prompt, visual, embeddings, last)[:, 0]
        return self.model.logits(self.model.prefix(visual), embeddings, last)[:, 0]

    @torch.no_grad()
    def probe(self) -> Tensor:
        """See `Reader`: scores of the first `_PROBED` words of the vocabulary after an empty question."""
        visual = _probe_features(self.model)
        nothing = torch.zeros(1, 0, dtype=torch.long, device=visual.device)
        return self._next(visual, nothing)[0, :_PROBED].float().cpu()


def _blocks(places: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(places), BLOCK):
        yield places[start : start + BLOCK]


def load_reader(use: UseFacts, prompt: Tensor, name: str, pretrained: str, device: str) -> Reader:
    """Load a model and combine it with a prompt.

    Args:
        use: Facts that a reader needs to use the prompt.
        prompt: (rows, cols).
        name: Name of the backbone, as in `load_backbone`.
        pretrained: Weights of the backbone, as in `load_backbone`.
        device: Device of the model, as in `load_backbone`.

    Raises:
        ConfigError: If the model cannot be loaded, if its weights are not those that the prompt was trained on, or if
            the prompt does not fit the model.
    """
    pruner = None if use.pruner is None else VisualTokenPruner(**asdict(use.pruner))
    if use.asks_questions:
        model = load_answering_model(name, device, pruner, use.backbone.precision)
        _check_fingerprint(use.backbone, model.fingerprint, name)
        return Answerer(use, prompt, model)
    backbone = load_backbone(name, pretrained, device, pruner, use.backbone.precision)
    _check_fingerprint(use.backbone, backbone.fingerprint, name)
    return Classifier(use, prompt, backbone)


def check_probe(reader: Reader, expected: Tensor, precision: str) -> None:
    """Raise ConfigError if a model with the same weights reads images or texts differently than at publication."""
    output = reader.probe()
    if output.shape == expected.shape:
        difference = float((output - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if difference <= _TOLERANCE[precision]:
            return
        reason = f"differs by {difference:.1e} (allowed {_TOLERANCE[precision]:g}, relative)"
    else:
        reason = f"has {len(output)} numbers instead of {len(expected)}"
    raise ConfigError(
        f"the backbone differs: its weights are those of the prompt, but its output for a known image {reason}; "
        "tokenizer, activation or preparation of images differ, or the file was changed"
    )


def _check_fingerprint(facts: BackboneFacts, fingerprint: str, name: str) -> None:
    if fingerprint != facts.fingerprint:
        raise ConfigError(
            f"the backbone differs: the prompt is for {facts.name!r} with weights {facts.fingerprint}, and {name!r} "
            f"has {fingerprint}; name the model that it was trained on"
        )


def _check_shape(prompt: Tensor, fitting: tuple[int, ...]) -> None:
    if tuple(prompt.shape) != fitting:
        raise ConfigError(f"a prompt of shape {tuple(prompt.shape)}; this model and these classes need {fitting}")


def _probe_features(model: ImageEncoder) -> Tensor:
    return model.image_features(model.preprocess(probe_image())[None].to(model.device))

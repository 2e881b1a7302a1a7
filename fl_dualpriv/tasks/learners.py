"""Learners of image classification: a prompt, or the tensor that a method learns instead of one."""

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_dualpriv.config.plugins import load_class, read_table
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.base import ClientData, Objective
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.learners.factored import FactoredTower
from fl_dualpriv.learners.fedotp import TransportObjective
from fl_dualpriv.learners.head import LowRankHead
from fl_dualpriv.learners.linear_probe import LinearProbe, ProbeObjective, with_bias
from fl_dualpriv.learners.prototypes import PrototypeObjective, prototype_directions
from fl_dualpriv.models.base import Backbone
from fl_dualpriv.tasks.base import random_prompt
from fl_dualpriv.tasks.candidates import fitting_candidates
from fl_dualpriv.towers.base import PromptTower


@dataclass(frozen=True, kw_only=True)
class ImageLearner:
    """One kind of learned tensor.

    Attributes:
        shape: Shape of the learned tensor that travels, (rows, cols).
        initial: Function that returns the tensor before round 1, float32; a function of public numbers.
        objective: Loss of records.
        logits: Function that yields the logits (image, n_cls) of each of (prompt, rows, cols) on all images, up to a
            factor.
        logit_scale: Factor that makes them the logits of the loss.
        context: Function that returns the equivalent context prompt (n_ctx, ctx_dim). None if the learned tensor is
            already a context prompt or has no equivalent.
    """

    shape: tuple[int, int]
    initial: Callable[[], Tensor]
    objective: Objective[ClientData]
    logits: Callable[[Tensor, ClientData], Iterator[Tensor]]
    logit_scale: float
    context: Callable[[Tensor], Tensor] | None = None


def image_learner(config: RunConfig, backbone: Backbone, text: PromptedText, head: LowRankHead | None) -> ImageLearner:
    """Build the learner of a run.

    Args:
        config: Configuration of the run.
        backbone: The frozen model.
        text: Class features of the model from prompts.
        head: Low-rank head that is learned instead of words if ``prompt.learner`` is ``head``; else None.
    """
    learns = config.local_method.learns
    if learns == "linear-probe":
        return _linear_probe(config, backbone, text)
    if learns == "prototypes":
        return _prototypes(config, text)
    if learns in ("dp-lora", "ffa-lora"):
        return _factored(config, backbone, text, fixed=learns == "ffa-lora")
    if learns == "fedotp":
        return _transport(config, backbone, text)
    if config.prompt.learns_a_module:
        return _module(config, backbone, text)
    if head is not None:
        factors = head
        return ImageLearner(
            shape=factors.shape(config.prompt.rank),
            initial=lambda: factors.initial(config.prompt.rank, config.seed),
            objective=_classification(config, backbone, factors),
            logits=_cosines(factors),
            logit_scale=backbone.logit_scale,
        )
    return ImageLearner(
        shape=(config.prompt.n_ctx, backbone.ctx_dim),
        initial=lambda: _words(config, backbone, text),
        objective=_classification(config, backbone, text.tower),
        logits=_cosines(text.tower),
        logit_scale=backbone.logit_scale,
    )


def _words(config: RunConfig, backbone: Backbone, text: PromptedText, purpose: str = "initial-prompt") -> Tensor:
    """Return the template's words, the mean of the candidates, or a draw from N(0, 0.02²) for a purpose.

    The mean is also where a run begins whose start is selected later.
    """
    prompt = config.prompt
    if prompt.init == "template":
        return text.template_context(prompt.n_ctx, filled=prompt.has_candidates)
    if prompt.init in ("mean", "select"):
        return fitting_candidates(text, prompt.candidates, prompt.n_ctx).contexts.mean(dim=0)
    return random_prompt(config.prompt.n_ctx, backbone.ctx_dim, config.seed, purpose)


def _classification(config: RunConfig, backbone: Backbone, tower: PromptTower) -> Classification:
    kind = ProbeObjective if isinstance(tower, LinearProbe) else Classification
    return kind(
        tower=tower,
        logit_scale=backbone.logit_scale,
        top_m=config.train.top_m,
        noise_space=config.privacy.record.noise_space,
        workspace_bytes=config.resources.workspace_mib * 2**20,
    )


def _cosines(tower: PromptTower) -> Callable[[Tensor, ClientData], Iterator[Tensor]]:
    def logits(prompts: Tensor, images: ClientData) -> Iterator[Tensor]:
        return (images.features @ classes.T for classes in tower(prompts).values)

    return logits


def _factored(config: RunConfig, backbone: Backbone, text: PromptedText, *, fixed: bool) -> ImageLearner:
    base = _words(config, backbone, text).to(backbone.device)
    tower = FactoredTower(text.tower, base, config.prompt.rank, config.seed, fixed=fixed)
    return ImageLearner(
        shape=tower.shape,
        initial=tower.initial,
        objective=_classification(config, backbone, tower),
        logits=_cosines(tower),
        logit_scale=backbone.logit_scale,
        context=lambda factors: tower.effective(factors[None].to(base.device))[0],
    )


def _transport(config: RunConfig, backbone: Backbone, text: PromptedText) -> ImageLearner:
    local = _words(config, backbone, text, "initial-local-prompt").to(backbone.device)
    objective = TransportObjective(
        tower=text.tower,
        local_start=local,
        logit_scale=backbone.logit_scale,
        mass=config.fedotp.mass,
        regularisation=config.fedotp.regularisation,
        iterations=config.fedotp.iterations,
        workspace_bytes=config.resources.workspace_mib * 2**20,
    )
    return ImageLearner(
        shape=(config.prompt.n_ctx, backbone.ctx_dim),
        initial=lambda: _words(config, backbone, text),
        objective=objective,
        logits=objective.logits,
        logit_scale=1.0,
    )


def _linear_probe(config: RunConfig, backbone: Backbone, text: PromptedText) -> ImageLearner:
    probe = LinearProbe(text.n_cls, backbone.embed_dim)
    cosines = _cosines(probe)
    return ImageLearner(
        shape=probe.shape,
        initial=lambda: torch.nn.functional.pad(_class_features(config, text), (0, 1)),
        objective=_classification(config, backbone, probe),
        logits=lambda prompts, images: cosines(prompts, with_bias(images)),
        logit_scale=backbone.logit_scale,
    )


def _prototypes(config: RunConfig, text: PromptedText) -> ImageLearner:
    start = _class_features(config, text)
    shape = (start.shape[0], start.shape[1])
    return ImageLearner(
        shape=shape,
        initial=lambda: start,
        objective=PrototypeObjective(shape=shape),
        logits=lambda prompts, images: (images.features @ w.T for w in prototype_directions(prompts)),
        logit_scale=1.0,  # the loss of prototypes has no logits
    )


def _class_features(config: RunConfig, text: PromptedText) -> Tensor:
    """Return the start of a linear probe or of prototypes: the zero-shot class features, or zero."""
    features = text.zero_shot_features()
    return features if config.prompt.init == "template" else torch.zeros_like(features)


def _module(config: RunConfig, backbone: Backbone, text: PromptedText) -> ImageLearner:
    """Return the learner of a user's module, which is made from the zero-shot class features.

    Raises:
        ConfigError: If the class cannot be imported, made or trained, or if an option does not fit.
    """
    from fl_dualpriv.learners.module import ModuleObjective  # late: Opacus takes seconds to load

    prompt = config.prompt
    module_class = load_class("prompt.learner", prompt.learner, torch.nn.Module, prompt.learner_path)
    table = f"plugin.{module_class.__name__.lower()}."
    _, *parameters = inspect.signature(module_class).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    options = json.loads(prompt.learner_options or "{}")
    values = read_table(table, module_class.__name__, defaults, options, none=inspect.Parameter.empty)
    features = text.zero_shot_features()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # every process makes the same start
            module = module_class(features, **values).to(backbone.device)
        n_cls = len(features)
        shape = tuple(module(features).shape)
    except Exception as error:  # a user's class can raise any error
        raise ConfigError(
            f"prompt.learner = {prompt.learner!r}: {type(error).__name__} when it is made from class features of shape "
            f"{tuple(features.shape)} and called with such features: {error}"
        ) from error
    if shape != (n_cls, n_cls):
        raise ConfigError(
            f"prompt.learner = {prompt.learner!r}: {n_cls} features give outputs of shape {shape}; they must be logits "
            f"of {n_cls} classes, {(n_cls, n_cls)}"
        )
    objective = ModuleObjective(module)
    start = objective.learner.vector()[None].cpu()
    return ImageLearner(
        shape=(1, objective.learner.size),
        initial=lambda: start,
        objective=objective,
        logits=objective.logits,
        logit_scale=1.0,
    )

"""Describe how the prompts of a run are used outside it.

A model in a folder may be replaced after a run. The description is therefore made during the run. It names the weights
and the classes that a prompt was trained on.
"""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.models.answering import AnsweringModel
from fl_dualpriv.models.base import HUGGING_FACE, Backbone
from fl_dualpriv.models.checkpoints import CHECKPOINT_SUFFIXES
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner
from fl_dualpriv.tasks.base import Task
from fl_dualpriv.tasks.use_facts import BackboneFacts, Kind, PrunerFacts, UseFacts

_LOCAL = "local-dir:"


def kind_of(config: RunConfig) -> Kind | None:
    """Return the kind of the learned tensor; None if it cannot be used without the run."""
    learns, learner = config.local_method.learns, config.prompt.learner
    if config.data.asks_questions:
        return "lora" if learner == "lora" else "soft-prompt"
    if config.prompt.learns_a_module:
        return None  # a published file holds no code
    if learns == "prompt":
        return "head" if learner == "head" else "context"
    if learns in ("dp-lora", "ffa-lora"):
        return "context"  # the factors are published as their equivalent context prompt
    return learns if learns in ("linear-probe", "prototypes") else None


def describe_use(
    config: RunConfig,
    backbone: Backbone | AnsweringModel,
    *,
    classes: tuple[str, ...],
    template: str,
    max_tokens: int,
) -> UseFacts | None:
    """Describe how a prompt of this run is used.

    Args:
        config: Configuration of the run.
        backbone: The frozen model, with its pruner of visual tokens if there is one.
        classes: Class names in the order of the classifier; empty for questions.
        template: Template with one ``{}``, or the words of the un-tuned model for questions.
        max_tokens: Tokens of a question and its answer; 0 for images.

    Returns:
        The facts, or None if the prompt cannot be used without the run.
    """
    kind, pruner = kind_of(config), backbone.pruner
    is_known = pruner is None or (isinstance(pruner, VisualTokenPruner) and pruner.keep_ratio is not None)
    if kind is None or not is_known:
        return None
    return UseFacts(
        kind=kind,
        classes=classes,
        template=template,
        max_tokens=max_tokens,
        backbone=_backbone_facts(config, backbone),
        pruner=_pruner_facts(pruner),
    )


def _backbone_facts(config: RunConfig, backbone: Backbone | AnsweringModel) -> BackboneFacts:
    name, pretrained = config.backbone.name, config.backbone.pretrained
    prefix = next((p for p in (_LOCAL, HUGGING_FACE) if name.startswith(p)), "")
    source = Path(name.removeprefix(prefix)).expanduser()
    is_folder = prefix == _LOCAL or (prefix == HUGGING_FACE and source.is_dir())
    is_local = is_folder or pretrained.endswith(CHECKPOINT_SUFFIXES)
    return BackboneFacts(
        name=prefix + _label(source.name) if is_folder else name,
        pretrained=_label(Path(pretrained).name),
        is_local=is_local,
        precision=config.backbone.precision,
        fingerprint=backbone.fingerprint,
        image_side=backbone.feature_key,
    )


def _label(name: str) -> str:
    """Replace all characters of a file name but letters, digits, underscore, dot and hyphen."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".")


def _pruner_facts(pruner: object) -> PrunerFacts | None:
    if pruner is None:
        return None
    return PrunerFacts(**{field.name: getattr(pruner, field.name) for field in fields(PrunerFacts)})


def metadata_of_global(config: RunConfig, task: Task, run_token: str) -> dict[str, str]:
    """Metadata of the global prompt in a run's folder."""
    use = task.use_facts(config)
    return {
        "method": config.method,
        "backbone": config.backbone.name,
        "randomness": config.privacy.randomness,
        "run-token": run_token,
        "use": json.dumps(None if use is None else asdict(use)),
    }

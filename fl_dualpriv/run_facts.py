"""What a run, or a node, writes down so that its prompts can be published later: nothing of it is private.

A model that lies in a folder may be exchanged after a run: which weights and which classes a prompt was trained on is
written down beside the prompt, while they are there.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fl_dualpriv import __version__
from fl_dualpriv.backbones.backbone import HUGGING_FACE, ImageEncoder
from fl_dualpriv.backbones.checkpoints import CHECKPOINT_SUFFIXES
from fl_dualpriv.config import RunConfig
from fl_dualpriv.evaluation import Score
from fl_dualpriv.files import write_json, write_tensors
from fl_dualpriv.image_world import ImageWorld
from fl_dualpriv.methods import METHODS
from fl_dualpriv.plans import client_level_plan, record_level_plan
from fl_dualpriv.privacy.plan import record_level_releases
from fl_dualpriv.prompt_facts import BackboneFacts, Kind, PrunerFacts, UseFacts
from fl_dualpriv.pruning.visual_tokens import VisualTokenPruner
from fl_dualpriv.world import World

NODE_RUN_FILE, SCORED_FILE = "node-run.json", "scored.safetensors"
_LOCAL = "local-dir:"


@dataclass(frozen=True, kw_only=True)
class NodeRun:
    """What a deployed node keeps of the run that its prompt is of, in ``node-run.json``.

    Attributes:
        run_token: Of the run.
        client: Which client the node was.
        method: Of the run.
        rounds: Of the run.
        population: Of the run.
        version: Of fl-dualpriv.
        randomness: Of the noise.
        split: That is scored.
        releases: Entries of the privacy table of one client at record level; empty without it.
        claims_client_level: Whether the run states an ε of clients, too, which covers no personal prompt.
        use: See `use_facts`.
        backbone: Name of the model, as configured; it stays on the node.
        pretrained: Likewise.
    """

    run_token: str
    client: int
    method: str
    rounds: int
    population: int
    version: str
    randomness: Literal["os", "seeded"]
    split: str
    releases: Sequence[Mapping[str, Any]]
    claims_client_level: bool
    use: Mapping[str, Any] | None
    backbone: str
    pretrained: str


def kind_of(config: RunConfig) -> Kind | None:
    """What a run learns; None if that cannot be used without the run."""
    learns, learner = METHODS[config.method].learns, config.prompt.learner
    if config.data.asks_questions:
        return "lora" if learner == "lora" else "soft-prompt"
    if learns == "prompt":
        return "head" if learner == "head" else "context"
    if learns in ("dp-lora", "ffa-lora"):
        return "context"  # what the factors amount to
    return learns if learns in ("linear-probe", "prototypes") else None


def use_facts(config: RunConfig, world: World) -> UseFacts | None:
    """How a prompt of this run is used; None if it cannot be used without the run."""
    kind, pruner = kind_of(config), getattr(world.backbone, "pruner", None)
    is_known = pruner is None or (isinstance(pruner, VisualTokenPruner) and pruner.keep_ratio is not None)
    if kind is None or not is_known:
        return None
    if isinstance(world, ImageWorld):
        classes, template, max_tokens = world.data.class_names, world.data.template, 0
        fingerprint = world.backbone.fingerprint
    else:
        from fl_dualpriv.question_world import QuestionWorld  # late: a run of images needs none of it

        assert isinstance(world, QuestionWorld)
        classes, template, max_tokens = (), world.words(config.prompt), world.max_tokens
        fingerprint = world.backbone.fingerprint
    return UseFacts(
        kind=kind,
        classes=classes,
        template=template,
        max_tokens=max_tokens,
        backbone=_backbone_facts(config, world.backbone, fingerprint),
        pruner=_pruner_facts(pruner),
    )


def _backbone_facts(config: RunConfig, backbone: ImageEncoder, fingerprint: str) -> BackboneFacts:
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
        fingerprint=fingerprint,
        image_side=backbone.feature_key,
    )


def _label(name: str) -> str:
    """The last part of a path, in plain letters."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".")


def _pruner_facts(pruner: object) -> PrunerFacts | None:
    if pruner is None:
        return None
    return PrunerFacts(**{field.name: getattr(pruner, field.name) for field in fields(PrunerFacts)})


def metadata_of_global(config: RunConfig, world: World, run_token: str) -> dict[str, str]:
    """Metadata of the global prompt in a run's folder."""
    use = use_facts(config, world)
    return {
        "method": config.method,
        "backbone": config.backbone.name,
        "randomness": config.privacy.randomness,
        "run-token": run_token,
        "use": json.dumps(None if use is None else asdict(use)),
    }


def keep_node_run(folder: Path, config: RunConfig, world: World, run_token: str, client: int, *, scored: bool) -> None:
    """Write ``node-run.json`` into the folder of a deployed node's client, in the first round of a run.

    A process of a node answers one message: reading a line costs less than a fingerprint of all weights in each round.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((folder / NODE_RUN_FILE).read_text(encoding="utf-8"))["run_token"] == run_token:
            return
    plan, parts, use = record_level_plan(config), METHODS[config.method], use_facts(config, world)
    rows = record_level_releases(plan, shared=parts.shared, scored=scored) if plan is not None else []
    kept = NodeRun(
        run_token=run_token,
        client=client,
        method=config.method,
        rounds=config.rounds,
        population=config.population,
        version=__version__,
        randomness=config.privacy.randomness,
        split=config.evaluation.split,
        releases=[asdict(row) for row in rows],
        claims_client_level=client_level_plan(config) is not None,
        use=None if use is None else asdict(use),
        backbone=config.backbone.name,
        pretrained=config.backbone.pretrained,
    )
    write_json(folder / NODE_RUN_FILE, asdict(kept))


def keep_scored(folder: Path, prompt: Tensor, score: Score, run_token: str, server_round: int) -> None:
    """Keep a personal prompt as it was scored, with its counts: the last global prompt comes with the last score."""
    metadata = {"run-token": run_token, "server-round": str(server_round)}
    for kind in ("local", "neighbour"):
        correct, total = getattr(score, f"{kind}_correct"), getattr(score, f"{kind}_total")
        metadata[kind] = f"{correct}/{total}"
    write_tensors(folder / SCORED_FILE, {"prompt": prompt}, metadata)

"""From a configuration to the objects a process needs: data, partition, frozen backbone, text side. Once a process."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.backbones.open_clip import OpenClipBackbone, load_backbone
from fl_dualpriv.client import ClientData
from fl_dualpriv.config import RunConfig
from fl_dualpriv.data.datasets import DataSplits, ImageDataset, load_data
from fl_dualpriv.data.folder import BadImageError
from fl_dualpriv.data.partition import held_classes, partition
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.methods import METHODS
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey, gaussian_noise
from fl_dualpriv.privacy.plan import ClientLevelPlan, RecordLevelPlan, noise_multiplier_for
from fl_dualpriv.prompts.learner import PromptedText

_CHUNK = 128  # images through the tower at once: memory only


@dataclass(frozen=True, kw_only=True)
class World:
    """What all clients of a process share, and lazily each client's features.

    Attributes:
        backbone: One frozen copy.
        text: Class features from prompts.
        data: Train, val and test images.
        partitions: Record indices per client.
        refuses_bad_records: Without DP a record that cannot be used stops the run; under DP it must not.
    """

    backbone: OpenClipBackbone
    text: PromptedText
    data: DataSplits
    partitions: list[np.ndarray]
    refuses_bad_records: bool
    _features: dict[int | str, ClientData] = field(default_factory=dict)

    def client_data(self, partition_id: int) -> ClientData:
        """A client's records as features; computed once a process."""
        if partition_id not in self._features:
            indices = self.partitions[partition_id]
            self._features[partition_id] = self._encode(self.data.train, indices)
        return self._features[partition_id]

    def held_out(self, split: str) -> ClientData:
        """The ``val`` or ``test`` images as features; computed once a process."""
        if split not in self._features:
            images = self.data.val if split == "val" else self.data.test
            self._features[split] = self._encode(images, np.arange(len(images)))
        return self._features[split]

    def _encode(self, images: ImageDataset, indices: np.ndarray) -> ClientData:
        device = self.backbone.device
        chunks = [encode_images(self.backbone, images, part) for part in _chunks(indices)]
        features = torch.cat(chunks) if chunks else torch.zeros(0, self.backbone.embed_dim, device=device)
        bad = indices[~torch.isfinite(features).all(dim=1).cpu().numpy()]
        if self.refuses_bad_records and len(bad):
            raise ConfigError(
                f"{len(bad)} images give non-finite features (the first: number {bad[0]} of class "
                f"{images.class_names[images.labels[bad[0]]]!r}); remove or repair them"
            )
        return ClientData(
            features=features,
            labels=torch.from_numpy(images.labels[indices]).to(device),
            held_classes=torch.from_numpy(held_classes(images.labels, indices)).to(device),
        )


def _chunks(indices: np.ndarray) -> list[np.ndarray]:
    return [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]


def encode_images(backbone: OpenClipBackbone, images: ImageDataset, indices: np.ndarray) -> Tensor:
    """Unit-norm features of some images, (len(indices), embed_dim); an unreadable image becomes a row of NaN.

    NaN, because under DP a bad record must neither stop the run nor change a count; `clip_rows` makes it zero.
    """
    readable, tensors = [], []
    for position, index in enumerate(indices):
        try:
            tensors.append(backbone.preprocess(images.image(int(index))))
            readable.append(position)
        except BadImageError:
            continue
    features = torch.full((len(indices), backbone.embed_dim), float("nan"), device=backbone.device)
    if tensors:
        features[torch.tensor(readable, device=backbone.device)] = backbone.image_features(
            torch.stack(tensors).to(backbone.device)
        )
    return features


def build_world(config: RunConfig) -> World:
    """Load and check everything the run needs; cached for the configuration's data, model and prompt sections.

    Raises:
        ConfigError: Data, model, prompt or partition do not work as configured; see the message.
        PrivacyError: The configured δ says nothing about data of this size.
    """
    private = config.privacy.record.mechanism != "none" or config.privacy.client.mechanism != "none"
    world = _build_world(config, "keep" if private else "raise")
    largest = max(len(indices) for indices in world.partitions)
    if config.privacy.record.mechanism == "gaussian" and config.privacy.record.delta * largest >= 1:
        raise PrivacyError(
            f"privacy.record.delta = {config.privacy.record.delta:g} with {largest} records at one client; δ must be "
            f"below 1/{largest} to say anything: set it to {1 / (10 * largest):.1g} or less"
        )
    return world


@functools.lru_cache(maxsize=2)
def _build_world(config: RunConfig, on_bad_image: str) -> World:
    if torch.get_num_threads() != 1 and config.resources.device in ("auto", "cpu"):
        torch.set_num_threads(1)  # threads of many clients on few cores only wait for each other
    data = load_data(
        config.data.ref,
        config.data.path,
        config.data.classes,
        config.data.val_fraction,
        config.data.test_fraction,
        config.seed,
        "raise" if on_bad_image == "raise" else "keep",
    )
    parts = partition(
        data.train.labels, config.data.partition, config.population, config.data.dirichlet_alpha, config.seed
    )
    pruning = config.pruning
    backbone = load_backbone(
        config.backbone.name,
        config.backbone.pretrained,
        config.resources.device,
        pruning.visual_keep_ratio,
        pruning.visual_layer,
    )
    if config.prompt.rank > min(config.prompt.n_ctx, backbone.ctx_dim):
        raise ConfigError(
            f"prompt.rank = {config.prompt.rank}; a prompt of {config.prompt.n_ctx} x {backbone.ctx_dim} has rank "
            f"at most {min(config.prompt.n_ctx, backbone.ctx_dim)}"
        )
    text = PromptedText(backbone, data.class_names, data.template)
    text.check_length(config.prompt.n_ctx)
    if config.prompt.init == "template":
        text.template_context(config.prompt.n_ctx)  # raises if the template has another length
    refuses = on_bad_image == "raise"
    return World(backbone=backbone, text=text, data=data, partitions=parts, refuses_bad_records=refuses)


def initial_prompt(config: RunConfig, world: World) -> Tensor:
    """p_G before round 1, (n_ctx, ctx_dim) float32: the template's words, or N(0, 0.02²) (CoOp's random start)."""
    if config.prompt.init == "template":
        return world.text.template_context(config.prompt.n_ctx).cpu()
    source = KeyedRandom(StreamKey(seed=config.seed, purpose="initial-prompt"))
    return gaussian_noise(source, (config.prompt.n_ctx, world.backbone.ctx_dim), 0.02).float()


def record_level_plan(config: RunConfig) -> RecordLevelPlan | None:
    """The record-level plan of the run, calibrated for all local steps; None without one or for the nominal method."""
    record, parts = config.privacy.record, METHODS[config.method]
    if record.mechanism == "none" or parts.published_procedure or not parts.trains:
        return None
    releases = config.rounds * config.train.local_steps
    return RecordLevelPlan(
        clip_norm=record.clip_norm,
        noise_multiplier=noise_multiplier_for(
            record.calibrate_to,
            record.epsilon,
            record.noise_multiplier,
            record.delta,
            config.train.sampling_rate,
            releases,
        ),
        sampling_rate=config.train.sampling_rate,
        releases=releases,
        delta=record.delta,
        trusts_server=record.trusts_server,
        personal=parts.personal,
    )


def client_level_plan(config: RunConfig) -> ClientLevelPlan | None:
    """The client-level plan of the run, calibrated for all rounds; None without one."""
    client = config.privacy.client
    if client.mechanism == "none":
        return None
    return ClientLevelPlan(
        clip_norm=client.clip_norm,
        noise_multiplier=noise_multiplier_for(
            client.calibrate_to,
            client.epsilon,
            client.noise_multiplier,
            client.delta,
            client.expected_cohort / config.population,
            config.rounds,
        ),
        population=config.population,
        expected_cohort=client.expected_cohort,
        rounds=config.rounds,
        delta=client.delta,
    )


def run_folder(output_dir: str, run_id: int) -> Path:
    """Where a run writes: ``output.dir``, or a folder of its own under the user's home."""
    return Path(output_dir) if output_dir else Path.home() / ".fl-dualpriv" / "runs" / str(run_id)

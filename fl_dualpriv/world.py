"""From a configuration to the objects a process needs: data, partition, frozen backbone, text side. Once a process."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.backbones.backbone import Backbone, load_backbone
from fl_dualpriv.client import ClientData
from fl_dualpriv.config import BackboneConfig, DataConfig, PromptConfig, RunConfig
from fl_dualpriv.data.datasets import DataSplits, ImageDataset, load_data
from fl_dualpriv.data.feature_cache import cache_root
from fl_dualpriv.data.partition import held_classes, partition
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.image_features import ImageFeatures
from fl_dualpriv.plans import client_level_plan, record_level_plan
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey, gaussian_noise
from fl_dualpriv.prompts.head import LowRankHead
from fl_dualpriv.prompts.learner import PromptedText
from fl_dualpriv.prompts.tower import PromptTower
from fl_dualpriv.pruning.visual_tokens import TokenPruner, VisualTokenPruner


@dataclass(frozen=True, kw_only=True)
class World:
    """What all clients of a process share. Nothing in here grows with the number of clients that asked.

    Attributes:
        backbone: One frozen copy.
        text: Class features from prompts.
        data: Train, val and test images.
        partitions: Record indices per client.
        refuses_bad_records: Without DP a record that cannot be used stops the run; under DP it must not.
        cache_root: Where image features are kept, see `cache_root`; None: in memory only.
        augmentation: ``flip``: each training image is mirrored with chance 1/2, anew each round.
        seed: Of the coins of the augmentation.
    """

    backbone: Backbone
    text: PromptedText
    data: DataSplits
    partitions: list[np.ndarray]
    refuses_bad_records: bool
    cache_root: Path | None
    augmentation: Literal["none", "flip"]
    seed: int
    _held_out: dict[str, ClientData] = field(default_factory=dict)

    @property
    def logit_scale(self) -> float:
        """Factor on the cosine similarity."""
        return self.backbone.logit_scale

    def tower(self, prompt: PromptConfig) -> PromptTower:
        """What maps prompts to class features: the text tower, or a low-rank head on its zero-shot features."""
        return self.head if prompt.learner == "head" else self.text.tower

    @functools.cached_property
    def head(self) -> LowRankHead:
        """The low-rank head over the zero-shot features; its prompts need no text tower."""
        return LowRankHead(self.text.zero_shot_features())

    def prompt_shape(self, prompt: PromptConfig) -> tuple[int, int]:
        """Of a prompt: (n_ctx, ctx_dim), or that of the head's factors."""
        if prompt.learner == "head":
            return self.head.shape(prompt.rank)
        return prompt.n_ctx, self.backbone.ctx_dim

    def num_examples(self, partition_id: int) -> int:
        """n_i, public metadata; reads no image."""
        return len(self.partitions[partition_id])

    def held_classes(self, partition_id: int) -> Tensor:
        """Sorted class ids of a client, public metadata; reads no image."""
        return torch.from_numpy(held_classes(self.data.train.labels, self.partitions[partition_id])).to(
            self.backbone.device
        )

    def client_data(self, partition_id: int, server_round: int = 0) -> ClientData:
        """A client's records as features, gathered anew at each call.

        Guarantee:
            Under augmentation each record has a coin of its own, drawn from (seed, client, round, place of the record)
            and from no data, so that its features are a function of that record and its coin: a map of single records,
            which leaves sensitivity and sampling, and with them the DP guarantee, as they are. Mirroring changes no
            held-out image.

        Args:
            partition_id: Which client.
            server_round: Read by the augmentation alone.

        Raises:
            ConfigError: Without DP, if a record cannot be used; it names the first.
        """
        images, indices = self.data.train, self.partitions[partition_id]
        if self.augmentation == "none":
            rows = self._train_features.rows(indices)
        else:
            key = StreamKey(seed=self.seed, purpose="augment", partition=partition_id, server_round=server_round)
            rows = self._train_features.mirrored_rows(indices, KeyedRandom(key).uniforms(len(indices)) < 0.5)
        return self._client_data(images, indices, rows)

    def held_out(self, split: str) -> ClientData:
        """The ``val`` or ``test`` images as features; computed once a process.

        Raises:
            ConfigError: Without DP, if a record cannot be used; it names the first.
        """
        if split not in self._held_out:
            images = self.data.val if split == "val" else self.data.test
            indices = np.arange(len(images))
            rows = ImageFeatures(self.backbone, images, self.cache_root).rows(indices)
            self._held_out[split] = self._client_data(images, indices, rows)
        return self._held_out[split]

    @functools.cached_property
    def _train_features(self) -> ImageFeatures:
        return ImageFeatures(self.backbone, self.data.train, self.cache_root)

    def _client_data(self, images: ImageDataset, indices: np.ndarray, rows: np.ndarray) -> ClientData:
        # One column tells: a row that cannot be used is NaN as a whole.
        if self.refuses_bad_records and (bad := indices[np.isnan(rows[:, 0])]).size:
            raise ConfigError(
                f"{len(bad)} images cannot be used: unreadable, out of proportion or not finite (the first: "
                f"number {bad[0]} of class {images.class_names[images.labels[bad[0]]]!r}); remove or repair them"
            )
        device = self.backbone.device
        return ClientData(
            features=torch.from_numpy(rows).to(device),
            labels=torch.from_numpy(images.labels[indices]).to(device),
        )


def build_world(config: RunConfig) -> World:
    """Load and check everything the run needs; cached for what it depends on, so that methods share features.

    Raises:
        ConfigError: Data, model, prompt or partition do not work as configured; see the message.
        PrivacyError: A configured δ says nothing about data or populations of this size.
    """
    private = record_level_plan(config) is not None or client_level_plan(config) is not None
    world = _build_world(
        config.data,
        config.backbone,
        None
        if config.pruning.visual_keep_ratio == 1
        else VisualTokenPruner(keep_ratio=config.pruning.visual_keep_ratio, layer=config.pruning.visual_layer),
        config.population,
        config.seed,
        config.resources.device,
        config.resources.feature_cache,
        "keep" if private else "raise",
    )
    _check_prompt(config.prompt, world)
    record, client = config.privacy.record, config.privacy.client
    if record.mechanism == "gaussian":
        _check_delta("record", record.delta, max(len(indices) for indices in world.partitions), "records at one client")
    if client.mechanism == "gaussian":
        _check_delta("client", client.delta, config.population, "clients")
    return world


def _check_delta(level: str, delta: float, units: int, what: str) -> None:
    if delta * units >= 1:
        raise PrivacyError(
            f"privacy.{level}.delta = {delta:g} with {units} {what}; δ must be below 1/{units} to say anything: "
            f"set it to {1 / (10 * units):.1g} or less"
        )


def _check_prompt(prompt: PromptConfig, world: World) -> None:
    if prompt.learner == "head":
        return  # it has no context: any rank has a meaning, and no sequence can be too long
    largest = min(prompt.n_ctx, world.backbone.ctx_dim)
    if prompt.rank > largest:
        raise ConfigError(
            f"prompt.rank = {prompt.rank}; a prompt of {prompt.n_ctx} x {world.backbone.ctx_dim} has rank at most "
            f"{largest}"
        )
    world.text.check_length(prompt.n_ctx)
    if prompt.init == "template":
        world.text.template_context(prompt.n_ctx)  # raises if the template has another length


@functools.lru_cache(maxsize=2)
def _build_world(
    data: DataConfig,
    model: BackboneConfig,
    pruner: TokenPruner | None,
    population: int,
    seed: int,
    device: str,
    feature_cache: str,
    on_bad_image: Literal["keep", "raise"],
) -> World:
    if torch.get_num_threads() != 1 and device in ("auto", "cpu"):
        torch.set_num_threads(1)  # threads of many clients on few cores only wait for each other
    images = load_data(data.source, data.path, data.classes, data.val_fraction, data.test_fraction, seed, on_bad_image)
    parts = partition(images.train.labels, data.partition, population, data.dirichlet_alpha, seed)
    backbone = load_backbone(model.name, model.pretrained, device, pruner, model.precision)
    return World(
        backbone=backbone,
        text=PromptedText(backbone, images.class_names, images.template),
        data=images,
        partitions=parts,
        refuses_bad_records=on_bad_image == "raise",
        cache_root=cache_root(feature_cache),
        augmentation=data.augmentation,
        seed=seed,
    )


def initial_prompt(config: RunConfig, world: World) -> Tensor:
    """p_G before round 1, float32 on the CPU.

    For the context (n_ctx, ctx_dim): the template's words, or N(0, 0.02²) (CoOp's random start). For the head: its own.
    """
    if config.prompt.learner == "head":
        return world.head.initial(config.prompt.rank, config.seed).cpu()
    if config.prompt.init == "template":
        return world.text.template_context(config.prompt.n_ctx).cpu()
    source = KeyedRandom(StreamKey(seed=config.seed, purpose="initial-prompt"))
    return gaussian_noise(source, (config.prompt.n_ctx, world.backbone.ctx_dim), 0.02).float()


def run_folder(output_dir: str, run_id: int) -> Path:
    """Where a run writes: ``output.dir``, or a folder of its own under the user's home."""
    return Path(output_dir) if output_dir else Path.home() / ".fl-dualpriv" / "runs" / str(run_id)

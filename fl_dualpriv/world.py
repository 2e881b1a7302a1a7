"""From a configuration to the objects a process needs: data, partition, frozen backbone, text side. Once a process."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.backbones.open_clip import OpenClipBackbone, load_backbone
from fl_dualpriv.client import ClientData
from fl_dualpriv.config import BackboneConfig, DataConfig, PromptConfig, RunConfig
from fl_dualpriv.data.datasets import DataSplits, ImageDataset, load_data
from fl_dualpriv.data.partition import held_classes, partition
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.plans import client_level_plan, record_level_plan
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey, gaussian_noise
from fl_dualpriv.prompts.learner import PromptedText

_CHUNK = 128  # images through the tower at once: memory only
_MAX_PIXELS = 100_000_000
_MAX_ASPECT = 100


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
                f"{len(bad)} images cannot be used: unreadable, out of proportion or not finite (the first: "
                f"number {bad[0]} of class {images.class_names[images.labels[bad[0]]]!r}); remove or repair them"
            )
        return ClientData(
            features=features,
            labels=torch.from_numpy(images.labels[indices]).to(device),
            held_classes=torch.from_numpy(held_classes(images.labels, indices)).to(device),
        )


def _chunks(indices: np.ndarray) -> list[np.ndarray]:
    return [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]


def encode_images(backbone: OpenClipBackbone, images: ImageDataset, indices: np.ndarray) -> Tensor:
    """Unit-norm features of some images, (len(indices), embed_dim); an unusable image becomes a row of NaN.

    NaN, because under DP a bad record must neither stop the run nor change a count; `clip_rows` makes it zero. Without
    DP the caller refuses such rows by name.
    """
    readable, tensors = [], []
    for position, index in enumerate(indices):
        try:
            image = images.image(int(index))
            if max(image.size) > _MAX_ASPECT * min(image.size) or image.width * image.height > _MAX_PIXELS:
                continue  # resizing its shorter side would need gigabytes
            tensors.append(backbone.preprocess(image))
            readable.append(position)
        except Exception:  # whatever one record makes a decoder raise is that record's zero, never the client's failure
            continue
    features = torch.full((len(indices), backbone.embed_dim), float("nan"), device=backbone.device)
    if tensors:
        features[torch.tensor(readable, device=backbone.device)] = backbone.image_features(
            torch.stack(tensors).to(backbone.device)
        )
    return features


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
        config.pruning.visual_keep_ratio,
        config.pruning.visual_layer,
        config.population,
        config.seed,
        config.resources.device,
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
    keep_ratio: float,
    layer: int,
    population: int,
    seed: int,
    device: str,
    on_bad_image: Literal["keep", "raise"],
) -> World:
    if torch.get_num_threads() != 1 and device in ("auto", "cpu"):
        torch.set_num_threads(1)  # threads of many clients on few cores only wait for each other
    images = load_data(data.source, data.path, data.classes, data.val_fraction, data.test_fraction, seed, on_bad_image)
    parts = partition(images.train.labels, data.partition, population, data.dirichlet_alpha, seed)
    backbone = load_backbone(model.name, model.pretrained, device, keep_ratio, layer)
    return World(
        backbone=backbone,
        text=PromptedText(backbone, images.class_names, images.template),
        data=images,
        partitions=parts,
        refuses_bad_records=on_bad_image == "raise",
    )


def initial_prompt(config: RunConfig, world: World) -> Tensor:
    """p_G before round 1, (n_ctx, ctx_dim) float32: the template's words, or N(0, 0.02²) (CoOp's random start)."""
    if config.prompt.init == "template":
        return world.text.template_context(config.prompt.n_ctx).cpu()
    source = KeyedRandom(StreamKey(seed=config.seed, purpose="initial-prompt"))
    return gaussian_noise(source, (config.prompt.n_ctx, world.backbone.ctx_dim), 0.02).float()


def run_folder(output_dir: str, run_id: int) -> Path:
    """Where a run writes: ``output.dir``, or a folder of its own under the user's home."""
    return Path(output_dir) if output_dir else Path.home() / ".fl-dualpriv" / "runs" / str(run_id)

"""`Task` of image classification with a CLIP-type model: class names are texts, and a prompt stands before them."""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.config.schema import BackboneConfig, DataConfig, PromptConfig, RunConfig
from fl_dualpriv.data.identity import data_identity
from fl_dualpriv.data.images import DataSplits, ImageDataset
from fl_dualpriv.data.load import load_data, reading_of
from fl_dualpriv.data.partition import divide, held_classes
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.features.cache import cache_root
from fl_dualpriv.features.images import ImageFeatures, refuse_unusable
from fl_dualpriv.features.patches import PatchEncoder
from fl_dualpriv.learners.base import ClientData, Objective
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.learners.contrast import PromptContrast
from fl_dualpriv.learners.head import LowRankHead
from fl_dualpriv.learners.row_check import MADE_UP_BLOCKS
from fl_dualpriv.learners.rows import rows_at_once
from fl_dualpriv.metrics import count_logits, counts_at_home
from fl_dualpriv.models.base import Backbone
from fl_dualpriv.models.load import load_backbone
from fl_dualpriv.models.pruning.in_tower import PatchReading
from fl_dualpriv.models.pruning.tokens import TokenPruner
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey
from fl_dualpriv.tasks.base import Counts, group_ids, held_groups, names_of_groups, one_thread
from fl_dualpriv.tasks.candidates import Candidates, answered_rightly, ensemble_features, fitting_candidates
from fl_dualpriv.tasks.class_prior import ClassPriors, class_priors
from fl_dualpriv.tasks.disclosure import may_choose_on_val
from fl_dualpriv.tasks.free_rival import FreeForm, PublicModel, choose_free_form
from fl_dualpriv.tasks.learners import ImageLearner, image_learner
from fl_dualpriv.tasks.pruners import token_pruner
from fl_dualpriv.tasks.use_description import describe_use
from fl_dualpriv.tasks.use_facts import UseFacts
from fl_dualpriv.towers.base import PromptTower


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """`Task` of image classification; groups are classes, or pairs of domain and class.

    Attributes:
        backbone: The frozen model, one copy per process.
        text: Class features from prompts.
        data: Train, val and test images.
        partitions: Record indices per client.
        refuses_bad_records: True if a record that cannot be used stops the run. Under DP it must not.
        cache_root: Folder of the cached image features, see `cache_root`; None if they are only in memory.
        augmentation: ``flip`` mirrors each training image with probability 1/2, drawn again each round.
        seed: Seed of the coins of the augmentation.
        patch_reading: Method of reading patch features; None if no patches are read.
        by_domain: True if each client belongs to one domain of the data.
        priors: Public class priors of the clients; None without them.
    """

    backbone: Backbone
    text: PromptedText
    data: DataSplits
    partitions: list[np.ndarray]
    refuses_bad_records: bool
    cache_root: Path | None
    augmentation: Literal["none", "flip"]
    seed: int
    patch_reading: PatchReading | None
    by_domain: bool
    priors: ClassPriors | None = None
    _held_out: dict[str, ClientData] = field(default_factory=dict)
    _tables: dict[tuple[str, bool], ImageFeatures] = field(default_factory=dict)
    _learners: dict[Hashable, ImageLearner] = field(default_factory=dict)
    _candidates: dict[Hashable, Candidates] = field(default_factory=dict)
    _candidate_features: dict[Hashable, Tensor] = field(default_factory=dict)

    @property
    def logit_scale(self) -> float:
        """Factor on the cosine similarity."""
        return self.backbone.logit_scale

    def tower(self, prompt: PromptConfig) -> PromptTower:
        """Return the tower that maps prompts to class features: the text tower, or a low-rank head.

        Raises:
            ConfigError: If a user's module learns, which has no class features.
        """
        if prompt.learns_a_module:
            raise ConfigError(
                f"prompt.learner = {prompt.learner!r}: a module of your own has no class features, which attacks and "
                'audits need; set it to "context" or "head"'
            )
        return self.head if prompt.learner == "head" else self.text.tower

    @functools.cached_property
    def head(self) -> LowRankHead:
        """Low-rank head over the zero-shot features; its prompts need no text tower."""
        return LowRankHead(self.text.zero_shot_features())

    def learner(self, config: RunConfig) -> ImageLearner:
        """Return the learner of the run; cached, because it is used many times."""
        noise, workspace = config.privacy.record.noise_space, config.resources.workspace_mib
        key = (config.method, config.prompt, config.train.top_m, config.seed, config.fedotp, noise, workspace)
        learner = self._learners.get(key)
        if learner is None:
            head = self.head if config.prompt.learner == "head" else None
            learner = self._learners[key] = image_learner(config, self.backbone, self.text, head)
        return learner

    def prompt_shape(self, config: RunConfig) -> tuple[int, int]:
        """See `Task`."""
        return self.learner(config).shape

    def prompt_segments(self, prompt: PromptConfig) -> tuple[int, ...]:
        """Return no segments; see `Task`."""
        return ()

    def objective(self, config: RunConfig) -> Objective[ClientData]:
        """See `Task`."""
        return self.learner(config).objective

    def regulariser(self, config: RunConfig) -> PromptContrast | None:
        """Return FedPGP's contrastive term, or None without one; see `Task`."""
        if not config.local_method.contrast or config.fedpgp.contrastive_weight == 0:
            return None
        return PromptContrast(
            tower=self.text.tower,
            words=self.text.zero_shot_features(),
            weight=config.fedpgp.contrastive_weight,
            temperature=config.fedpgp.contrastive_temperature,
        )

    @property
    def groups(self) -> np.ndarray:
        """Group of each training image."""
        return self._groups("train")

    def _groups(self, split: str) -> np.ndarray:
        images = self.images(split)
        return group_ids(images.labels, images.domains if self.by_domain else None, len(self.data.class_names))

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the classes, or of pairs of domain and class."""
        return names_of_groups(self.data.class_names, self.domain_names)

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the domains; empty if clients belong to none."""
        return self.data.train.domain_names if self.by_domain else ()

    @property
    def data_identity(self) -> dict[str, str]:
        """See `Task`."""
        return data_identity(self.data, self.partitions) | dict(self.priors.identity if self.priors else {})

    def use_facts(self, config: RunConfig) -> UseFacts | None:
        """See `Task`."""
        return describe_use(
            config,
            self.backbone,
            classes=self.data.class_names,
            template=self.data.template,
            max_tokens=0,
        )

    def images(self, split: str) -> ImageDataset:
        """Return the images of ``train``, ``val`` or ``test``."""
        return {"train": self.data.train, "val": self.data.val, "test": self.data.test}[split]

    def check_any_fits(self) -> None:
        """Accept every data set, because the model can read every image that can be opened; see `Task`."""

    @torch.no_grad()
    def counts(self, prompts: Tensor, config: RunConfig) -> list[Counts]:
        """See `Task`."""
        images, labelled = self.held_out(config.evaluation.split), self._labelled(config.evaluation.split)
        logits = self.learner(config).logits(prompts.to(self.backbone.device), images)
        return [count_logits(prompt_logits, *labelled, len(self.group_names)) for prompt_logits in logits]

    def _labelled(self, split: str) -> tuple[Tensor, Tensor]:
        """Return class and group of each held-out image."""
        groups = torch.tensor(self._groups(split), device=self.backbone.device)
        return self.held_out(split).labels, groups

    @torch.no_grad()
    def prior_counts(
        self, prompts: Tensor, partitions: Sequence[int], held: Tensor, config: RunConfig
    ) -> Counts | None:
        """Score prompts for their clients; at home a client adds its log prior to the logits of the loss. See `Task`.

        Domains have no part in a prior: it is one of classes.
        """
        if self.priors is None:
            return None
        split, learner, alike = config.evaluation.split, self.learner(config), len(partitions) // len(prompts)
        labels, groups = self._labelled(split)
        rows = [
            counts_at_home(learner.logit_scale * logits, labels, groups, own_held, "class-prior", own_priors)
            for logits, own_held, own_priors in zip(
                learner.logits(prompts.to(self.backbone.device), self.held_out(split)),
                held.split(alike),
                self.log_priors[list(partitions)].split(alike),
                strict=True,
            )
        ]
        return torch.cat(rows), torch.bincount(groups, minlength=len(self.group_names)).cpu()

    def zero_shot_counts(self, config: RunConfig) -> Counts:
        """Score the class features of the filled-in template; see `Task`."""
        split = config.evaluation.split
        return count_logits(self._template_logits(split), *self._labelled(split), len(self.group_names))

    def _template_logits(self, split: str) -> Tensor:
        return self.held_out(split).features @ self.text.zero_shot_features().T

    def _free_form(self, config: RunConfig) -> FreeForm:
        """Choose the free rival among the public models: the user's template, and what its candidates give.

        Without validation records the candidates' ensemble is the fixed choice, where there are candidates.
        """
        models = [PublicModel(name="un-tuned", logits=self._template_logits)]
        if config.prompt.has_candidates:
            further = self._candidate_models(config.prompt)
            models = [*models, *further] if may_choose_on_val(config) else [*further, *models]
        validation = (lambda: self._labelled("val")) if may_choose_on_val(config) else None
        # The models' logits are cosines, and the prior is one of the logits of the loss.
        log_prior = None if self.priors is None else self.log_priors / self.logit_scale
        return choose_free_form(
            models, validation, self._held, len(self.data.class_names), config.population, log_prior
        )

    def _candidate_models(self, prompt: PromptConfig) -> list[PublicModel]:
        """Return the ensemble of the candidates, the prompt of their mean context, and each candidate by itself."""
        fitting, each = self._fitting(prompt), self._features_of_candidates(prompt)
        features = {
            "ensemble of the candidates": ensemble_features(each),
            "mean of the candidates": self.text.class_features(fitting.contexts.mean(dim=0)),
            **{repr(template): own for template, own in zip(fitting.templates, each, strict=True)},
        }

        def model(name: str, classes: Tensor) -> PublicModel:
            return PublicModel(name=name, logits=lambda split: self.held_out(split).features @ classes.T)

        return [model(name, classes) for name, classes in features.items()]

    @functools.cached_property
    def _held(self) -> Tensor:
        return held_groups(self)

    def free_rival(self, config: RunConfig) -> str:
        """Return the name of the un-tuned model with its best use of public lists and priors; see `Task`."""
        return self._free_form(config).name

    def free_counts(self, config: RunConfig) -> Counts:
        """Score the chosen form once on the held-out split of the configuration; see `Task`."""
        split, form = config.evaluation.split, self._free_form(config)
        labels, groups = self._labelled(split)
        correct = form.counts(form.model.logits(split), labels, groups, self._held)
        return correct, torch.bincount(groups, minlength=len(self.group_names)).cpu()

    def initial_prompt(self, config: RunConfig) -> Tensor:
        """Return the template's words, a draw from N(0, 0.02²), or the start of another learner; see `Task`."""
        return self.learner(config).initial().cpu()

    def candidates(self, prompt: PromptConfig) -> Tensor:
        """See `Task` and `fitting_candidates`; on the backbone's device."""
        return self._fitting(prompt).contexts

    def _fitting(self, prompt: PromptConfig) -> Candidates:
        key = (prompt.candidates, prompt.n_ctx)
        if key not in self._candidates:
            self._candidates[key] = fitting_candidates(self.text, prompt.candidates, prompt.n_ctx)
        return self._candidates[key]

    def _features_of_candidates(self, prompt: PromptConfig) -> Tensor:
        key = (prompt.candidates, prompt.n_ctx)
        if key not in self._candidate_features:
            contexts = self.candidates(prompt)
            self._candidate_features[key] = torch.stack([self.text.class_features(context) for context in contexts])
        return self._candidate_features[key]

    def answered_rightly(self, data: ClientData, prompt: PromptConfig) -> Tensor:
        """See `Task`; no class prior is applied."""
        return answered_rightly(self._features_of_candidates(prompt), data)

    def context_of(self, learned: Tensor, config: RunConfig) -> Tensor | None:
        """See `Task`."""
        context = self.learner(config).context
        return context(learned).cpu() if context else None

    def num_examples(self, partition_id: int) -> int:
        """Return the client's number of records n_i, public metadata; reads no image."""
        return len(self.partitions[partition_id])

    def held_classes(self, partition_id: int) -> Tensor:
        """Return the sorted class ids of a client, public metadata; reads no image."""
        return torch.from_numpy(held_classes(self.data.train.labels, self.partitions[partition_id])).to(
            self.backbone.device
        )

    def log_prior(self, partition_id: int) -> Tensor | None:
        """Return a client's log prior (n_cls,), a public constant; None without one, or if it is uniform."""
        own = None if self.priors is None else self.priors.of(partition_id)
        return None if own is None else torch.from_numpy(own).to(self.backbone.device)

    @functools.cached_property
    def log_priors(self) -> Tensor:
        """Log priors of all clients, new ones included, (client, n_cls), each up to a constant; a uniform one is zeros.

        With a folder for each node, only a client's own node knows its declared shares. Here the other clients' rows
        are zeros, and no score reads them, because a node scores only clients that `check_clients` accepted.
        """
        table = torch.zeros(len(self.partitions), len(self.data.class_names), device=self.backbone.device)
        for client in range(len(self.partitions)):
            if self.priors is None or self.priors.shares(client) is None:
                continue
            if (own := self.log_prior(client)) is not None:
                table[client] = own
        return table

    def check_clients(self, partitions: Sequence[int]) -> None:
        """Refuse clients whose class shares are not declared; see `Task`."""
        if self.priors is not None:
            self.priors.check(partitions)

    def client_data(self, partition_id: int, server_round: int = 0) -> ClientData:
        """Gather a client's records as features; each call gathers them again.

        Guarantee:
            Under augmentation each record has its own coin, drawn from (seed, client, round, place of the record) and
            from no data. Its features are therefore a function of that record and its coin. Such a map of single
            records changes neither sensitivity nor sampling, and so it does not change the DP guarantee. Mirroring
            changes no held-out image. The log prior is that of `ClassPriors`, the same in every round and with every
            record that is removed or cannot be read.

        Args:
            partition_id: Partition of the client.
            server_round: Number of the round, read only by the augmentation.

        Raises:
            ConfigError: Without DP, if a record cannot be used; the message names the first one.
        """
        indices, mirrored = self.partitions[partition_id], None
        if self.augmentation != "none":
            key = StreamKey(seed=self.seed, purpose="augment", partition=partition_id, server_round=server_round)
            mirrored = KeyedRandom(key).uniforms(len(indices)) < 0.5
        return replace(self._client_data("train", indices, mirrored), log_prior=self.log_prior(partition_id))

    def made_up(self) -> ClientData:
        """Return random unit-norm features, with patches and a prior if the run has them; see `Task`."""
        backbone, generator = self.backbone, torch.Generator().manual_seed(0)
        count = MADE_UP_BLOCKS * rows_at_once(backbone.device) + 1

        def unit(*shape: int) -> Tensor:
            random = torch.randn(*shape, backbone.embed_dim, generator=generator)
            return torch.nn.functional.normalize(random, dim=-1).to(backbone.device)

        prior = torch.linspace(-4.0, 0.0, len(self.data.class_names))
        return ClientData(
            features=unit(count),
            labels=(torch.arange(count) % len(self.data.class_names)).to(backbone.device),
            patches=unit(count, backbone.n_patches) if self.patch_reading else None,
            log_prior=prior.to(backbone.device) if self.priors else None,
        )

    def held_out(self, split: str) -> ClientData:
        """Return the ``val`` or ``test`` images as features; computed once per process.

        Raises:
            ConfigError: Without DP, if a record cannot be used; the message names the first one.
        """
        if split not in self._held_out:
            self._held_out[split] = self._client_data(split, np.arange(len(self.images(split))), None)
        return self._held_out[split]

    def _table(self, split: str, *, patches: bool) -> ImageFeatures:
        table = self._tables.get((split, patches))
        if table is None:
            reading = self.patch_reading if patches else None
            encoder = PatchEncoder(self.backbone, reading) if reading else self.backbone
            table = self._tables[split, patches] = ImageFeatures(encoder, self.images(split), self.cache_root)
        return table

    def _rows(self, split: str, indices: np.ndarray, mirrored: np.ndarray | None, *, patches: bool) -> np.ndarray:
        table = self._table(split, patches=patches)
        return table.rows(indices) if mirrored is None else table.mirrored_rows(indices, mirrored)

    def _client_data(self, split: str, indices: np.ndarray, mirrored: np.ndarray | None) -> ClientData:
        images, rows = self.images(split), self._rows(split, indices, mirrored, patches=False)
        if self.refuses_bad_records:
            refuse_unusable(rows, indices, images)
        device, patches = self.backbone.device, None
        if self.patch_reading:
            flat = torch.from_numpy(self._rows(split, indices, mirrored, patches=True))
            patches = flat.unflatten(1, (self.backbone.n_patches, -1)).to(device)
        return ClientData(
            patches=patches,
            features=torch.from_numpy(rows).to(device),
            labels=torch.from_numpy(images.labels[indices]).to(device),
        )


def build_image_task(config: RunConfig, on_bad_image: Literal["keep", "raise"]) -> ImageTask:
    """Build the task of a run on images; see `build_task`.

    Args:
        config: Configuration of the run.
        on_bad_image: ``raise`` stops the run at a record that cannot be used; under DP it must be ``keep``.

    Raises:
        ConfigError: If data, model, prompt or partition do not work as configured; see the message.
    """
    data, source = config.data, config.data.source
    assert source in ("demo", "shelf", "folder")
    images = load_data(
        *(source, data.path, data.classes, data.val_fraction, data.test_fraction, config.seed),
        reading_of(data, on_bad_image),
    )
    task = _build_task(
        images,
        data,
        config.backbone,
        token_pruner(config, len(images.train)),
        config.population,
        config.evaluation.new_clients,
        config.seed,
        config.resources.device,
        config.resources.feature_cache,
        on_bad_image,
        config.fedotp.patch_reading if config.local_method.reads_patches else None,
    )
    _check_prompt(config, task)
    priors = class_priors(config, images.train.labels, task.partitions, images.class_names)
    return task if priors is None else replace(task, priors=priors)


def _check_prompt(config: RunConfig, task: ImageTask) -> None:
    prompt = config.prompt
    if prompt.learner != "context" or config.local_method.learns in ("linear-probe", "prototypes"):
        return  # there is no context: any rank is valid, and no sequence can be too long
    largest = min(prompt.n_ctx, task.backbone.ctx_dim)
    if prompt.rank > largest:
        raise ConfigError(
            f"prompt.rank = {prompt.rank}; a prompt of {prompt.n_ctx} x {task.backbone.ctx_dim} has rank at most "
            f"{largest}"
        )
    task.text.check_length(prompt.n_ctx)
    if prompt.init == "template":
        # Raises if the template has another length.
        task.text.template_context(prompt.n_ctx, filled=prompt.has_candidates)
    if prompt.has_candidates:
        found = len(task.candidates(prompt))  # raises if one does not fit
        if prompt.init == "select" and found < 2:
            raise ConfigError(
                f'prompt.init = "select", and prompt.candidates has {found} template that fits; give two or more'
            )


@functools.lru_cache(maxsize=2)
def _build_task(
    images: DataSplits,
    data: DataConfig,
    model: BackboneConfig,
    pruner: TokenPruner | None,
    population: int,
    new_clients: int,
    seed: int,
    device: str,
    feature_cache: str,
    on_bad_image: Literal["keep", "raise"],
    patch_reading: PatchReading | None,
) -> ImageTask:
    one_thread(device)
    assert data.partition != "by-image"  # the configuration allows it only for questions
    parts = divide(images.train, data, population, seed, new_clients)
    backbone = load_backbone(model.name, model.pretrained, device, pruner, model.precision)
    if patch_reading is not None:
        _ = backbone.n_patches  # raises before the run starts, not in its first round
    if data.augmentation == "flip" and not backbone.mirrors:
        raise ConfigError(
            f'data.augmentation = "flip": {model.name!r} reads patches of images of any shape, which cannot be '
            'mirrored here; set it to "none"'
        )
    return ImageTask(
        backbone=backbone,
        text=PromptedText(backbone, images.class_names, images.template),
        data=images,
        partitions=parts,
        refuses_bad_records=on_bad_image == "raise",
        cache_root=cache_root(feature_cache),
        augmentation=data.augmentation,
        seed=seed,
        patch_reading=patch_reading,
        by_domain=data.is_by_domain,
    )

"""`Task` of questions about images for a multimodal language model; groups are question types."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.config.schema import BackboneConfig, DataConfig, PromptConfig, RunConfig
from fl_dualpriv.data.identity import data_identity
from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.data.load import load_questions
from fl_dualpriv.data.partition import divide
from fl_dualpriv.data.questions import QuestionSet, QuestionSplits
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.features.cache import cache_root
from fl_dualpriv.features.images import ImageFeatures, refuse_unusable
from fl_dualpriv.learners.answers import BLOCK, AnswerObjective, AnswerRecords, answer_records
from fl_dualpriv.learners.row_check import MADE_UP_BLOCKS
from fl_dualpriv.learners.soft_prompt import SoftPromptObjective
from fl_dualpriv.models.answering import AnsweringModel
from fl_dualpriv.models.load import load_answering_model
from fl_dualpriv.models.pruning.tokens import TokenPruner
from fl_dualpriv.tasks.base import Counts, group_ids, names_of_groups, one_thread, random_prompt
from fl_dualpriv.tasks.pruners import token_pruner
from fl_dualpriv.tasks.use_description import describe_use
from fl_dualpriv.tasks.use_facts import UseFacts

if TYPE_CHECKING:
    from fl_dualpriv.models.lora import LoraModel

_RECENT = 8
"""Number of clients whose records stay in memory from round to round."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QuestionTask:
    """`Task` of questions about images. A record is one question with its answer and its image.

    Groups are question types, or pairs of domain and type.

    Attributes:
        backbone: The frozen model, one copy per process. The features of an image are its visual tokens, pruned.
        data: Train, val and test questions.
        partitions: Record indices per client.
        on_bad_record: ``raise`` stops the run at a record that cannot be used. Under DP it is ``keep``: the record
            stays counted and adds zero.
        cache_root: Folder of the cached visual tokens, see `cache_root`; None if they are only in memory.
        max_tokens: Most tokens of a question and its answer. It is public, so that no client's longest question shows.
        by_domain: True if each client belongs to one domain of the data.
    """

    backbone: AnsweringModel
    data: QuestionSplits
    partitions: list[np.ndarray]
    on_bad_record: Literal["keep", "raise"]
    cache_root: Path | None
    max_tokens: int
    by_domain: bool
    _held_out: dict[str, AnswerRecords] = field(default_factory=dict)
    _recent: dict[int, AnswerRecords] = field(default_factory=dict)
    _features: dict[str, ImageFeatures] = field(default_factory=dict)

    @property
    def groups(self) -> np.ndarray:
        """Group of each training question."""
        return self._groups("train")

    def _groups(self, split: str) -> np.ndarray:
        questions = self._questions(split)
        return group_ids(questions.labels, questions.domains if self.by_domain else None, len(self.data.class_names))

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the question types, or of pairs of domain and type."""
        return names_of_groups(self.data.class_names, self.domain_names)

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the domains; empty if clients belong to none."""
        return self.data.train.domain_names if self.by_domain else ()

    @property
    def data_identity(self) -> dict[str, str]:
        """See `Task`."""
        return data_identity(self.data, self.partitions)

    def free_rival(self, config: RunConfig) -> str:
        """Return the un-tuned model, because no list of a client's answers is public; see `Task`."""
        return "un-tuned"

    def free_counts(self, config: RunConfig) -> Counts:
        """Score the un-tuned model; see `Task`."""
        correct, total = self.zero_shot_counts(config)
        return correct.expand(len(self.partitions), -1), total

    def use_facts(self, config: RunConfig) -> UseFacts | None:
        """See `Task`."""
        return describe_use(
            config,
            self.backbone,
            classes=(),
            template=self.words(config.prompt),
            max_tokens=self.max_tokens,
        )

    def images(self, split: str) -> ImageDataset:
        """Return the images of ``train``, ``val`` or ``test``."""
        return self._questions(split).images

    def _questions(self, split: str) -> QuestionSet:
        return {"train": self.data.train, "val": self.data.val, "test": self.data.test}[split]

    def prompt_shape(self, config: RunConfig) -> tuple[int, int]:
        """Return (n_ctx, ctx_dim), or the shape of the LoRA factors."""
        prompt = config.prompt
        if prompt.learner == "lora":
            return self.lora(prompt).shape
        return prompt.n_ctx, self.backbone.ctx_dim

    def prompt_segments(self, prompt: PromptConfig) -> tuple[int, ...]:
        """Return the numbers of columns of the LoRA factors, or no segments; see `Task`."""
        return self.lora(prompt).segments if prompt.learner == "lora" else ()

    def lora(self, prompt: PromptConfig) -> "LoraModel":
        """Return the language model with LoRA layers.

        Raises:
            ConfigError: If peft is not installed.
        """
        from fl_dualpriv.models.lora import load_lora  # late import: peft is an extra

        return load_lora(self.backbone, prompt.rank)

    def candidates(self, prompt: PromptConfig) -> Tensor:
        """Refuse: candidates are templates for class names, and questions have none. See `Task`."""
        raise ConfigError("prompt.candidates are templates for class names, and questions have none; remove them")

    def answered_rightly(self, data: AnswerRecords, prompt: PromptConfig) -> Tensor:
        """Refuse, as `candidates` does; see `Task`."""
        return self.candidates(prompt)

    def context_of(self, learned: Tensor, config: RunConfig) -> None:
        """Return None, because LoRA factors have no equivalent context prompt; see `Task`."""

    def initial_prompt(self, config: RunConfig) -> Tensor:
        """Return the template's words, a draw from N(0, 0.02²), or LoRA factors of the un-tuned model; see `Task`."""
        if config.prompt.learner == "lora":
            return self.lora(config.prompt).initial(config.seed)
        if config.prompt.init == "template":
            return self._template(config.prompt).cpu()
        return random_prompt(config.prompt.n_ctx, self.backbone.ctx_dim, config.seed)

    def words(self, prompt: PromptConfig) -> str:
        """Return the words that the un-tuned model reads before a question."""
        return prompt.words or self.data.template

    def _template(self, prompt: PromptConfig) -> Tensor:
        return _embedded(self.backbone, self.words(prompt))

    def objective(self, config: RunConfig) -> AnswerObjective:
        """Return the cross-entropy of the answer's tokens as objective; see `Task`."""
        if config.prompt.learner == "lora":
            from fl_dualpriv.learners.lora import LoraObjective

            return LoraObjective(self.lora(config.prompt), self._template(config.prompt))
        return _objective(self.backbone, config.resources.workspace_mib * 2**20)

    def regulariser(self, config: RunConfig) -> None:
        """Return None: the loss on questions has no regulariser; see `Task`."""

    def num_examples(self, partition_id: int) -> int:
        """Return the client's number of records n_i, public metadata; reads no image."""
        return len(self.partitions[partition_id])

    def client_data(self, partition_id: int, server_round: int = 0) -> AnswerRecords:
        """Return a client's records. The records of the last few clients are cached, with the prefixes of their images.

        Raises:
            ConfigError: Without DP, if a record cannot be used; the message names the first one.
        """
        records = self._recent.pop(partition_id, None)
        if records is None:
            records = self._records("train", self.partitions[partition_id])
        self._recent[partition_id] = records
        while len(self._recent) > _RECENT:
            del self._recent[next(iter(self._recent))]
        return records

    def made_up(self) -> AnswerRecords:
        """Return random visual tokens with the end token, which each tokenizer has, as every word; see `Task`."""
        generator, count = torch.Generator().manual_seed(0), MADE_UP_BLOCKS * BLOCK + 1
        return AnswerRecords(
            visual=torch.randn(count, self.backbone.embed_dim, generator=generator),
            image_of=torch.arange(count),
            tokens=torch.full((count, self.max_tokens), self.backbone.end),
            answer_start=torch.full((count,), self.max_tokens // 2),
            length=self.max_tokens - torch.arange(count) % max(1, self.max_tokens // 2),
            labels=torch.zeros(count, dtype=torch.long),
        )

    def check_any_fits(self) -> None:
        """Refuse questions if none fits into ``max_tokens`` with its answer; see `Task`."""
        train, first = self.data.train, ""
        for question, answer in zip(train.questions, train.answers, strict=True):
            if not question:
                continue
            try:
                needed = len(self.backbone.question_tokens(question)) + len(self.backbone.answer_tokens(answer))
            except ConfigError as error:
                first = first or str(error)
                continue
            if needed <= self.max_tokens:
                return
            first = first or f"{question!r} with {answer!r} takes {needed} tokens, data.max-tokens = {self.max_tokens}"
        raise ConfigError(
            f"none of the {len(train)} training questions can be used with backbone.name = {self.backbone.name!r}; the "
            f"first: {first}; raise data.max-tokens or repair the questions"
        )

    def held_out(self, split: str) -> AnswerRecords:
        """Return the ``val`` or ``test`` questions; computed once per process."""
        if split not in self._held_out:
            self._held_out[split] = self._records(split, np.arange(len(self._questions(split))))
        return self._held_out[split]

    def _records(self, split: str, indices: np.ndarray) -> AnswerRecords:
        questions = self._questions(split)
        if split not in self._features:
            self._features[split] = ImageFeatures(self.backbone, questions.images, self.cache_root)
        images, image_of = np.unique(questions.image_of[indices], return_inverse=True)
        visual = self._features[split].rows(images)
        if self.on_bad_record == "raise":
            refuse_unusable(visual, images, questions.images)
        return answer_records(
            self.backbone,
            [questions.questions[i] for i in indices],
            [questions.answers[i] for i in indices],
            image_of,
            questions.labels[indices],
            torch.from_numpy(visual),
            self.max_tokens,
            self.on_bad_record,
        )

    def counts(self, prompts: Tensor, config: RunConfig) -> list[Counts]:
        """Count exact matches; see `Task`."""
        split = config.evaluation.split
        records, objective = self.held_out(split), self.objective(config)
        groups = torch.tensor(self._groups(split))
        return [self._count(objective.correct(prompt, records), groups) for prompt in prompts]

    def prior_counts(self, prompts: Tensor, partitions: Sequence[int], held: Tensor, config: RunConfig) -> None:
        """Return None, because questions have no class prior; see `Task`."""

    def check_clients(self, partitions: Sequence[int]) -> None:
        """Accept all clients, because questions have no class prior; see `Task`."""

    def zero_shot_counts(self, config: RunConfig) -> Counts:
        """Score the model with the template's words before the question; see `Task`."""
        is_lora = config.prompt.learner == "lora"
        nothing = torch.zeros(self.prompt_shape(config)) if is_lora else self._template(config.prompt)
        (counts,) = self.counts(nothing[None], config)
        return counts

    def _count(self, right: Tensor, groups: Tensor) -> Counts:
        n_groups = len(self.group_names)
        return torch.bincount(groups[right], minlength=n_groups), torch.bincount(groups, minlength=n_groups)


@torch.no_grad()
def _embedded(backbone: AnsweringModel, text: str) -> Tensor:
    """Embed the words of a text, (words, ctx_dim)."""
    return backbone.embed_tokens(torch.tensor(backbone.words(text), device=backbone.device))


@functools.lru_cache(maxsize=2)
def _objective(backbone: AnsweringModel, kept_bytes: int) -> SoftPromptObjective:
    """Return the objective of the process; one per process, because it caches prefixes of images."""
    return SoftPromptObjective(backbone, kept_bytes=kept_bytes)


def build_question_task(config: RunConfig, on_bad_record: Literal["keep", "raise"]) -> QuestionTask:
    """Build the task of a run on questions; see `build_task`.

    Args:
        config: Configuration of the run.
        on_bad_record: See `QuestionTask`.

    Raises:
        ConfigError: If data, model, prompt or partition do not work as configured; see the message.
    """
    data, source = config.data, config.data.source
    assert source in ("demo-vqa", "questions")
    questions = load_questions(
        *(source, data.path, data.val_fraction, data.test_fraction, config.seed, on_bad_record), data.is_by_domain
    )
    task = _build_task(
        questions,
        data,
        config.backbone,
        token_pruner(config, len(questions.train)),
        config.population,
        config.evaluation.new_clients,
        config.seed,
        config.resources.device,
        config.resources.feature_cache,
        on_bad_record,
    )
    _check_prompt(config, task)
    return task


def _check_prompt(config: RunConfig, task: QuestionTask) -> None:
    prompt, model = config.prompt, task.backbone
    words = len(model.words(task.words(prompt)))  # raises if they cannot be tokenized
    model.check_length(words if prompt.learner == "lora" else prompt.n_ctx, task.max_tokens)
    if prompt.learner == "lora":
        task.lora(prompt)  # raises if it cannot be built; LoRA reads neither n-ctx nor init
        return
    if prompt.init == "template" and words != prompt.n_ctx:
        raise ConfigError(
            f"prompt.n-ctx = {prompt.n_ctx}, but {task.words(prompt)!r}, the start of the prompts, is {words} tokens "
            f'long; set prompt.n-ctx = {words}, or prompt.init = "random"'
        )
    if prompt.rank > (largest := min(prompt.n_ctx, model.ctx_dim)):
        raise ConfigError(
            f"prompt.rank = {prompt.rank}; a prompt of {prompt.n_ctx} x {model.ctx_dim} has rank at most {largest}"
        )


@functools.lru_cache(maxsize=2)
def _build_task(
    questions: QuestionSplits,
    data: DataConfig,
    model: BackboneConfig,
    pruner: TokenPruner | None,
    population: int,
    new_clients: int,
    seed: int,
    device: str,
    feature_cache: str,
    on_bad_record: Literal["keep", "raise"],
) -> QuestionTask:
    one_thread(device)
    return QuestionTask(
        backbone=load_answering_model(model.name, device, pruner, model.precision),
        data=questions,
        partitions=divide(questions.train, data, population, seed, new_clients),
        on_bad_record=on_bad_record,
        cache_root=cache_root(feature_cache),
        max_tokens=data.max_tokens,
        by_domain=data.is_by_domain,
    )

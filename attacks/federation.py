"""A federation that can be trained many times on chosen records, with the training code of a real run."""

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.client.node import chunks, personalisation, prompts_at_once
from fl_dualpriv.client.personalisation import personal_prompt
from fl_dualpriv.client.published_step import published_updates
from fl_dualpriv.client.round import local_training, published_training
from fl_dualpriv.client.state import PersonalState, fresh_state
from fl_dualpriv.client.step import Participant, cohort_update
from fl_dualpriv.config.plans import client_level_plan, record_level_plan
from fl_dualpriv.config.plugins import load_class, plugin_options
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey
from fl_dualpriv.run.recorder import RunRecorder
from fl_dualpriv.server.build import build_strategy
from fl_dualpriv.server.strategy import RoundReport, RoundStrategy
from fl_dualpriv.tasks.build import image_task


class Federation:
    """The configured federation, without its accuracies, state folders and client ledgers.

    Guarantee:
        `train` on all records gives the prompts of ``fl-dualpriv run --engine local`` with seeded randomness, up to
        float rounding (tests/attacks/test_membership.py). Clients run `cohort_update` or `published_updates` with
        the run's plan. The server is the run's strategy, with its cohort, clip, noise and step. An attack on these
        prompts therefore finds the same as the same attack on the prompts of a run.

    Args:
        config: The run. Keyed streams replace its randomness, with one seed per training. The distributions stay the
            same, and the audit can be repeated.

    Raises:
        ConfigError: If the method trains nothing, or if data augmentation changes the features from round to round.
    """

    def __init__(self, config: RunConfig) -> None:
        self.method = config.local_method
        if not self.method.trains:
            raise ConfigError(f"method = {config.method!r} trains nothing, so there is nothing to attack; give another")
        if config.selects_start:
            raise ConfigError(
                'prompt.init = "select": attacks are made on the steps, and a selected start is a release before them; '
                'set prompt.init = "mean" or "template"'
            )
        if config.data.augmentation != "none":
            raise ConfigError(
                f"data.augmentation = {config.data.augmentation!r}: attacks need the features that were trained on; "
                'set data.augmentation = "none"'
            )
        # One node hosts all clients, because the number of nodes changes no result.
        self.config = replace(config, supernodes=1, privacy=replace(config.privacy, randomness="seeded"))
        self.task = image_task(self.config)
        self.tower = self.task.tower(config.prompt)
        self.objective = self.task.objective(config)
        self.plan, self.client_plan = record_level_plan(config), client_level_plan(config)
        self.start = self.task.initial_prompt(config)

    @property
    def device(self) -> torch.device:
        """Device of prompts and features."""
        return self.task.backbone.device

    def records(self, partition: int) -> ClientData:
        """Return a client's records without unreadable ones, because no attack can ask about those."""
        data = self.task.client_data(partition)
        usable = torch.isfinite(data.features).all(dim=1)
        return replace(data, features=data.features[usable], labels=data.labels[usable])

    def train(self, members: Sequence[ClientData], seed: int) -> Tensor:
        """Run all rounds on these records.

        Args:
            members: Records of each client, at least one per client.
            seed: Seed of batches and noise.

        Returns:
            The prompts that are published at the end: p_G + p_L of each client, (client, n_ctx, ctx_dim).
        """
        training = _Training(self, members, seed)
        grid = LocalGrid(training.client_app(), 1, self.config.to_run_config())
        arrays, nothing = messages.to_arrays(self.start), ConfigRecord()
        with tempfile.TemporaryDirectory() as folder:
            strategy = self._strategy(members, seed, Path(folder))
            for server_round in range(1, self.config.rounds + 1):
                requests = strategy.configure_train(server_round, arrays, nothing, grid)
                aggregated, _ = strategy.aggregate_train(server_round, grid.send_and_receive(requests))
                assert aggregated is not None
                arrays = aggregated
        if strategy.failures:
            raise RuntimeError(f"the training under attack failed: {strategy.last_failure}")
        prompt, rule = messages.from_arrays(arrays).to(self.device), personalisation(self.config)
        if (parts := strategy.personal_parts(prompt)) is not None:
            return prompt + parts.to(self.device)
        return prompt + torch.stack([personal_prompt(s, rule, prompt, self.config.rounds) for s in training.states])

    def _strategy(self, members: Sequence[ClientData], seed: int, folder: Path) -> RoundStrategy:
        config = self.config
        strategy_class = load_class("strategy.ref", config.strategy.ref, RoundStrategy)
        cards = {p: messages.ClientCard(partition=p, num_examples=data.num_examples) for p, data in enumerate(members)}
        return build_strategy(
            strategy_class,
            replace(config, seed=seed),
            self.plan,
            self.client_plan,
            cards,
            dict.fromkeys(cards, 1),
            RunRecorder(folder),
            _say_nothing,
            plugin_options(strategy_class, RoundStrategy, config.to_run_config()),
        )


class _Training:
    """The clients of one training: their records, personal prompts and streams."""

    def __init__(self, federation: Federation, members: Sequence[ClientData], seed: int) -> None:
        self._federation, self._members, self._seed = federation, members, seed
        n_ctx, ctx_dim = federation.start.shape
        fresh = fresh_state(n_ctx, ctx_dim, federation.config.prompt.rank).to(federation.device)
        self.states: list[PersonalState] = [fresh] * len(members)

    def client_app(self) -> ClientApp:
        """Return a ClientApp that trains, and writes no files."""
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            return Message(messages.uploads_content(self._round(messages.read_train(message))), reply_to=message)

        return app

    def _round(self, request: messages.TrainRequest) -> messages.Uploads:
        federation, prompt = self._federation, request.global_prompt.to(self._federation.device)
        # A node divides its clients into groups of this size, too.
        size = prompts_at_once(federation.tower, federation.config.resources.workspace_mib * 2**19, prompt.device)
        uploads: list[Tensor] = []
        if request.personal_parts is not None:
            for partition, part in zip(request.partitions, request.personal_parts, strict=True):
                self.states[partition] = replace(self.states[partition], personal=part.to(prompt.device))
        for group in chunks(sorted(request.partitions), size):
            participants = [self._participant(p, request.server_round) for p in group]
            results = self._updates(prompt, participants, request.server_round)
            for participant, (upload, state) in zip(participants, results, strict=True):
                self.states[participant.partition] = replace(state, server_round=request.server_round)
                uploads.append(upload)
        return messages.Uploads(partitions=tuple(sorted(request.partitions)), values=torch.stack(uploads).cpu())

    def _participant(self, partition: int, server_round: int) -> Participant:
        def random(purpose: str, step: int) -> RandomSource:
            return KeyedRandom(
                StreamKey(seed=self._seed, purpose=purpose, partition=partition, server_round=server_round, step=step)
            )

        return Participant(
            partition=partition, state=self.states[partition], data=self._members[partition], random=random
        )

    def _updates(
        self, prompt: Tensor, participants: list[Participant], server_round: int
    ) -> list[tuple[Tensor, PersonalState]]:
        return client_updates(self._federation, prompt, participants, server_round)


def client_updates(
    federation: Federation, prompt: Tensor, participants: Sequence[Participant], server_round: int
) -> list[tuple[Tensor, PersonalState]]:
    """Run one round of these clients' local steps as a node does; return uploads and new personal states."""
    if federation.method.published_procedure:
        return published_updates(
            global_prompt=prompt,
            participants=participants,
            tower=federation.tower,
            logit_scale=federation.task.logit_scale,
            training=functools.partial(published_training, federation.config),
        )
    plan, steps = federation.plan, federation.config.train.local_steps
    return cohort_update(
        global_prompt=prompt,
        participants=[replace(p, event=plan and plan.event("attack", server_round, steps)) for p in participants],
        objective=federation.objective,
        method=federation.method,
        training=local_training(federation.config),
        plan=federation.plan,
        server_round=server_round,
    )


def _say_nothing(report: RoundReport) -> None:
    """Drop the report, because an attack does not record its rounds."""

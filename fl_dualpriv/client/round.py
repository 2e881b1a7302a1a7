"""One train message: the clients of a node step together, and what fails for one fails for one alone."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.client.node import Failures, Node, chunks, prompts_at_once
from fl_dualpriv.client.optimizers import Optimizer
from fl_dualpriv.client.pruning import UpdatePruning
from fl_dualpriv.client.published_step import PublishedTraining, published_updates
from fl_dualpriv.client.state import PersonalState, check_round, check_single_run, fresh_state, is_same_release
from fl_dualpriv.client.step import LocalTraining, Participant, cohort_update
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.methods.base import METHODS
from fl_dualpriv.methods.published import nominal_sigma
from fl_dualpriv.privacy.filters.choose import spend_budget
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent
from fl_dualpriv.privacy.noise import RandomSource, RandomSources, StreamKey
from fl_dualpriv.privacy.plan import check_terms

_MOST_LOCKS = 256  # a lock is an open file, and a process may have about a thousand


class TrainRound:
    """One round of local steps for each client that a message asks for.

    Guarantee:
        Under record-level DP a client's event of the round stands in its own ledger before its first release is drawn,
        and its ledger is held until its state is kept. An upload leaves only if the state was kept. What the server
        asks for, the plan, the owner's budget and the ledger are checked before that; a refused round touches no data,
        and is noted in the client's folder.
        A server that was cut off asks again. A round whose upload is kept is answered by that upload, which releases
        nothing. With seeded randomness a round that a crash ended before is made as it would have been, see
        `is_same_release`; with randomness of the operating system it is refused: its event is spent.

    Args:
        node: Where the clients are.
        task: What is asked.
    """

    def __init__(self, node: Node, request: messages.TrainRequest) -> None:
        self._node, self._run_context, self._request = node, node.run_context, request
        self._prompt = request.global_prompt.to(self._run_context.task.backbone.device)
        config = self._run_context.config
        self._training = local_training(config, self._run_context.task.prompt_segments(config.prompt))
        self._uploads: dict[int, Tensor] = {}
        self._failed = Failures(private=self._run_context.plan is not None)

    def run(self) -> messages.Uploads:
        """Train everybody; a client that fails takes nobody with it.

        Raises:
            PrivacyError: If the message speaks of clients that are not here.
        """
        run_context = self._run_context
        try:
            partitions = self._node.asked(self._request.partitions)
        except PrivacyError as error:
            if self._node.state_dir is not None:  # else there is no folder of somebody whom it concerns
                self._node.folder(self._node.index).log_refusal(self._request.run_token, "train", str(error))
            raise
        # Half of the workspace for prompts on their way through the tower, half for rows on their way back.
        size = prompts_at_once(
            run_context.objective, run_context.config.resources.workspace_mib * 2**19, self._prompt.device
        )
        if run_context.clients_apart:
            size = 1
        for group in chunks(partitions, min(size, _MOST_LOCKS) if run_context.plan is not None else size):
            self._train(group)
        values = list(self._uploads.values())
        return messages.Uploads(
            partitions=tuple(self._uploads),
            values=torch.stack(values).cpu() if values else torch.zeros(0, *run_context.prompt_shape),
            failed=self._failed,
        )

    def _train(self, group: Sequence[int]) -> None:
        """Let the clients of a group step together; each ledger is written before, and held until its state is kept."""
        ready: list[Participant] = []
        kept: dict[int, Tensor] = {}
        with contextlib.ExitStack() as locks:
            for partition in group:
                try:
                    found = self._prepare(partition, locks)
                    if isinstance(found, Tensor):
                        kept[partition] = found
                    else:
                        ready.append(found)
                except PrivacyError as error:
                    asked = f"train, round {self._request.server_round}"
                    self._node.folder(partition).log_refusal(self._request.run_token, asked, str(error))
                    self._failed.add([partition], error)
                except Exception as error:
                    self._failed.add([partition], error)
            if ready and self._run_context.reproducible:  # sums of the tower may follow who is stacked with whom
                ready = sorted([*ready, *self._once_more(kept)], key=lambda participant: participant.partition)
            self._uploads |= kept
            if ready:
                self._step(ready)

    def _once_more(self, kept: dict[int, Tensor]) -> list[Participant]:
        """Those of a crashed round's clients that had finished it, as they were before; they leave ``kept``."""
        found = []
        for partition in list(kept):
            with contextlib.suppress(Exception):  # what was sent is still there
                state = self._state(partition, previous=True)
                if state.server_round < self._request.server_round:
                    found.append(self._participant(partition, state))
                    del kept[partition]
        return found

    def _step(self, ready: list[Participant]) -> None:
        """Run some clients together; if that fails, each alone, so that one cannot take the others with it.

        Nothing of the first try left this function, so what is released is still what the ledgers say. The events of a
        client that fails stay there.
        """
        try:
            results = self._updates(ready)
        except Exception as error:
            if len(ready) == 1:
                self._failed.add([ready[0].partition], error)
            else:
                for participant in ready:
                    self._step([participant])
            return
        for participant, (upload, state) in zip(ready, results, strict=True):
            self._finish(participant.partition, upload, state)

    def _prepare(self, partition: int, locks: contextlib.ExitStack) -> Participant | Tensor:
        """A client's state, data and random streams, after its own checks and with its ledger written.

        Returns:
            That, or the upload that the client sent in this round when it was asked before.

        Raises:
            PrivacyError: If the client refuses the round.
        """
        run_context, request = self._run_context, self._request
        check_terms(run_context.terms, request.terms)
        if self._node.budget is not None:
            self._node.budget.check_plan(run_context.plan, reproducible=run_context.reproducible)
        if tuple(request.global_prompt.shape) != run_context.prompt_shape:
            raise PrivacyError(
                f"a global prompt of shape {tuple(request.global_prompt.shape)}; this run's is "
                f"{run_context.prompt_shape}"
            )
        if request.global_prompt.dtype != torch.float32:  # before the event: a step in another type would fail after it
            raise PrivacyError(f"a global prompt of type {request.global_prompt.dtype}; it must be torch.float32")
        if run_context.plan is None:
            state = self._state(partition)
            kept = self._kept(partition, state)
            return self._participant(partition, state) if kept is None else kept
        ledger = Ledger(self._node.folder(partition).ledger)
        locks.enter_context(ledger.exclusive())
        state = self._state(partition)
        if (kept := self._kept(partition, state)) is not None:
            return kept
        event = LedgerEvent(
            run=request.run_token,
            unit="record",
            server_round=request.server_round,
            releases=run_context.terms.releases,
            sampling_rate=run_context.plan.sampling_rate,
            noise_multiplier=run_context.plan.noise_multiplier,
        )
        made, budget = ledger.read(), self._node.budget
        if not is_same_release(made, state, event, reproducible=run_context.reproducible):
            check_round(run_context.plan, made, state, event)
            if budget is None:
                check_single_run(run_context.plan, made, event)
                ledger.record(event)
            else:
                spend_budget(ledger, budget, run_context.plan.reserved(request.run_token), event)
        return self._participant(partition, state)

    def _participant(self, partition: int, state: PersonalState) -> Participant:
        """Reads the data: not before the event, even reading is paid for."""
        run_context, server_round = self._run_context, self._request.server_round
        random = functools.partial(_stream, run_context.sources, run_context.config.seed, partition, server_round)
        data = run_context.task.client_data(partition, server_round)
        return Participant(partition=partition, state=state, data=data, random=random)

    def _kept(self, partition: int, state: PersonalState) -> Tensor | None:
        """What the client sent in this round, if it was asked before."""
        request = self._request
        if not self._keeps_state or state.server_round < request.server_round:
            return None
        return self._node.folder(partition).sent(request.server_round, request.global_prompt, request.run_token)

    def _state(self, partition: int, *, previous: bool = False) -> PersonalState:
        if not self._keeps_state:
            return self._nothing
        n_ctx, ctx_dim = self._prompt.shape
        folder, rank = self._node.folder(partition), self._run_context.config.prompt.rank
        shapes = self._training.release_memory_shapes(n_ctx, ctx_dim)
        token, terms = self._request.run_token, str(self._run_context.terms)
        state = folder.load(token, n_ctx, ctx_dim, rank, shapes, previous=previous, terms=terms)
        return state.to(self._prompt.device)

    @property
    def _keeps_state(self) -> bool:
        """Also without a personal prompt or a plan, if something is remembered from round to round."""
        return self._run_context.keeps_state or bool(self._training.release_memory_shapes(*self._prompt.shape))

    @functools.cached_property
    def _nothing(self) -> PersonalState:
        """The state of clients that keep none."""
        n_ctx, ctx_dim = self._prompt.shape
        return fresh_state(n_ctx, ctx_dim, self._run_context.config.prompt.rank).to(self._prompt.device)

    def _finish(self, partition: int, upload: Tensor, state: PersonalState) -> None:
        """Keep upload and state, then let the upload go: a round whose state is lost must not be answered."""
        if self._keeps_state:
            request, folder = self._request, self._node.folder(partition)
            try:
                self._node.keep_run(partition, request.run_token)
                folder.keep_sent(upload, request.global_prompt, request.server_round, request.run_token)
                kept = replace(state, server_round=request.server_round)
                folder.save(kept, self._prompt, request.run_token, str(self._run_context.terms))
            except Exception as error:
                self._failed.add([partition], error)
                return
        self._uploads[partition] = upload

    def _updates(self, ready: list[Participant]) -> list[tuple[Tensor, PersonalState]]:
        """The round of some clients: ours, or the DP-FPL paper's."""
        run_context = self._run_context
        if run_context.parts.published_procedure:
            assert isinstance(run_context.objective, Classification)  # the configuration allows no other
            return published_updates(
                global_prompt=self._prompt,
                participants=ready,
                tower=run_context.objective.tower,
                logit_scale=run_context.objective.logit_scale,
                training=functools.partial(published_training, run_context.config),
            )
        return cohort_update(
            global_prompt=self._prompt,
            participants=ready,
            objective=run_context.objective,
            parts=run_context.parts,
            training=self._training,
            plan=run_context.plan,
            regulariser=run_context.regulariser,
        )


def published_training(config: RunConfig, participant: Participant) -> PublishedTraining:
    """Numbers of the DP-FPL paper's formulas, from the configuration and a client's public number of records."""
    record, steps = config.privacy.record, config.rounds * config.train.local_steps
    return PublishedTraining(
        local_steps=config.train.local_steps,
        batch_size=max(1, round(config.train.sampling_rate * participant.data.num_examples)),
        global_learning_rate=config.train.global_learning_rate,
        local_learning_rate=config.train.local_learning_rate,
        sigma=nominal_sigma(record.epsilon, record.delta, steps) if record.mechanism == "gaussian" else 0.0,
    )


def local_training(config: RunConfig, segments: tuple[int, ...] = ()) -> LocalTraining:
    """Numbers of a local step, from the configuration; ``segments`` as `Task.prompt_segments`."""
    pruning = config.pruning
    return LocalTraining(
        local_steps=config.train.local_steps,
        sampling_rate=config.train.sampling_rate,
        global_learning_rate=config.train.global_learning_rate,
        local_learning_rate=config.train.local_learning_rate,
        pruning=UpdatePruning(
            rule=pruning.update_rule,
            keep_ratio=pruning.update_keep_ratio,
            block=pruning.update_block,
            frozen=pruning.update_frozen,
            warm_up=pruning.update_warm_up,
            exploration=pruning.update_exploration,
            segments=segments,
        ),
        optimizer=Optimizer(name=config.train.optimizer, momentum=config.train.momentum),
        factor_rank=config.prompt.rank if METHODS[config.method].factor_steps else 0,
        prompts=2 if METHODS[config.method].pairs else 1,
    )


def _stream(
    sources: RandomSources, seed: int, partition: int, server_round: int, purpose: str, step: int
) -> RandomSource:
    """A client's stream for one purpose and step, whoever hosts it."""
    return sources(StreamKey(seed=seed, purpose=purpose, partition=partition, server_round=server_round, step=step))

"""One train message: the clients of a node step together, and a failure of one client affects only that client."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.client.node import (
    Failures,
    Node,
    check_part,
    chunks,
    personal_is_given,
    personalisation,
    prompts_at_once,
)
from fl_dualpriv.client.optimizers import Optimizer
from fl_dualpriv.client.pruning import UpdatePruning
from fl_dualpriv.client.published_step import PublishedTraining, published_updates
from fl_dualpriv.client.state import PersonalState, check_round, fresh_state, is_same_release
from fl_dualpriv.client.step import LocalTraining, Participant, cohort_update
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.methods.published import nominal_sigma
from fl_dualpriv.privacy.filters.pay import pay
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent
from fl_dualpriv.privacy.noise import RandomSource, RandomSources, StreamKey
from fl_dualpriv.privacy.plan import RecordLevelPlan, check_terms
from fl_dualpriv.tasks.base import random_prompt

_MOST_LOCKS = 256  # a lock is an open file, and a process may have about a thousand


class TrainRound:
    """One round of local steps for each client that a message asks for.

    Guarantee:
        Under record-level DP a client's event of the round stands in its own ledger before its first release is drawn,
        and its ledger is locked until its state is saved. An upload leaves only if the state was saved. The request of
        the server, the plan, the owner's budget and the ledger are checked before that. A refused round touches no
        data, and is noted in the client's folder.
        A server that was cut off asks again. A round whose upload was saved is answered by that upload, which releases
        nothing. With seeded randomness a round that a crash ended before that is made exactly as it would have been,
        see `is_same_release`. With randomness of the operating system such a round is refused, because its event is
        spent.

    Args:
        node: Node that hosts the clients.
        request: Request of the server.
    """

    def __init__(self, node: Node, request: messages.TrainRequest) -> None:
        self._node, self._run_context, self._request = node, node.run_context, request
        self._prompt = request.global_prompt.to(self._run_context.task.backbone.device)
        config = self._run_context.config
        self._training = local_training(
            config, self._run_context.task.prompt_segments(config.prompt), self._run_context.prompt_shape
        )
        self._uploads: dict[int, Tensor] = {}
        self._failed = Failures(private=self._run_context.plan is not None)

    def run(self) -> messages.Uploads:
        """Train all requested clients; a client that fails does not affect the others.

        Raises:
            PrivacyError: If the message names a client that is not hosted here, or one twice.
        """
        run_context = self._run_context
        try:
            partitions = self._node.asked(self._request.partitions)
        except PrivacyError as error:
            if self._node.state_dir is not None:  # else no client's folder is the right place
                self._node.folder(self._node.index).log_refusal(self._request.run_token, "train", str(error))
            raise
        # Half of the workspace is for the forward pass of prompts, half for the backward pass of rows.
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
        """Let the clients of a group step together; write each ledger first and lock it until the state is saved."""
        ready: list[Participant] = []
        saved_uploads: dict[int, Tensor] = {}
        with contextlib.ExitStack() as locks:
            for partition in group:
                try:
                    participant_or_upload = self._prepare(partition, locks)
                    if isinstance(participant_or_upload, Tensor):
                        saved_uploads[partition] = participant_or_upload
                    else:
                        ready.append(participant_or_upload)
                except PrivacyError as error:
                    asked = f"train, round {self._request.server_round}"
                    self._node.folder(partition).log_refusal(self._request.run_token, asked, str(error))
                    self._failed.add([partition], error)
                except Exception as error:
                    self._failed.add([partition], error)
            if ready and self._run_context.reproducible:  # float sums may depend on the stacked clients
                ready = sorted([*ready, *self._once_more(saved_uploads)], key=lambda participant: participant.partition)
            self._uploads |= saved_uploads
            if ready:
                self._step(ready)

    def _once_more(self, saved_uploads: dict[int, Tensor]) -> list[Participant]:
        """Return clients that had finished a crashed round, in their state before it; drop their ``saved_uploads``."""
        participants = []
        for partition in list(saved_uploads):
            with contextlib.suppress(Exception):  # the saved upload is still there
                state = self._state(partition, previous=True)
                if state.server_round < self._request.server_round:
                    participants.append(self._participant(partition, state))
                    del saved_uploads[partition]
        return participants

    def _step(self, ready: list[Participant]) -> None:
        """Run some clients together. If that fails, run each client separately, so that only the failing ones fail.

        No result of the first attempt left this function, so the releases still match the ledgers. The events of a
        client that fails stay in its ledger.
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
        """Check the request for a client, write its ledger, and collect its state, data and random streams.

        Returns:
            The participant, or the saved upload if the client already answered this round.

        Raises:
            PrivacyError: If the client refuses the round.
        """
        run_context, request = self._run_context, self._request
        check_terms(run_context.terms, request.terms)
        if self._node.budget is not None:
            self._node.budget.check_plan(run_context.plan, reproducible=run_context.reproducible)
        if tuple(request.global_prompt.shape) != run_context.prompt_shape:
            raise PrivacyError(
                f"the request has a global prompt of shape {tuple(request.global_prompt.shape)}; this run's is "
                f"{run_context.prompt_shape}"
            )
        if request.global_prompt.dtype != torch.float32:  # before the event: a step in another type would fail after it
            raise PrivacyError(
                f"the request has a global prompt of type {request.global_prompt.dtype}; it must be torch.float32"
            )
        if partition in self._parts:
            check_part(self._parts[partition])
        if run_context.plan is None:
            state = self._state(partition)
            saved_upload = self._kept(partition, state)
            return self._participant(partition, state) if saved_upload is None else saved_upload
        ledger = Ledger(self._node.folder(partition).ledger)
        locks.enter_context(ledger.exclusive())
        state = self._state(partition)
        if (saved_upload := self._kept(partition, state)) is not None:
            return saved_upload
        event = self._event(run_context.plan)
        made = ledger.read()
        if not is_same_release(made, state, event, reproducible=run_context.reproducible):
            check_round(run_context.plan, made, state, event)
            pay(ledger, run_context.plan, event, self._node.budget)
        return self._participant(partition, state)

    def _event(self, plan: RecordLevelPlan) -> LedgerEvent:
        """Return a client's event of this round."""
        request = self._request
        return plan.event(request.run_token, request.server_round, self._run_context.terms.releases)

    def _participant(self, partition: int, state: PersonalState) -> Participant:
        """Load the data and make the participant, after the ledger event, because even reading data is paid for."""
        run_context, server_round = self._run_context, self._request.server_round
        random = functools.partial(_stream, run_context.sources, run_context.config.seed, partition, server_round)
        if partition in self._parts:  # the client's personal prompt of this round is the one that the server made
            state = replace(state, personal=self._parts[partition].to(self._prompt.device))
        data, plan = run_context.task.client_data(partition, server_round), run_context.plan
        event = None if plan is None else self._event(plan)
        return Participant(partition=partition, state=state, data=data, random=random, event=event)

    def _kept(self, partition: int, state: PersonalState) -> Tensor | None:
        """Return the upload that the client sent in this round if it already answered it, else None."""
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
        """True if a client keeps state, because of a personal prompt, a plan or release memory."""
        return self._run_context.keeps_state or bool(self._training.release_memory_shapes(*self._prompt.shape))

    @functools.cached_property
    def _parts(self) -> dict[int, Tensor]:
        """Personal prompts that the server sent, see `Node.parts_of`, which may refuse them."""
        return self._node.parts_of(self._request)

    @functools.cached_property
    def _nothing(self) -> PersonalState:
        """State of clients that keep none."""
        n_ctx, ctx_dim = self._prompt.shape
        return fresh_state(n_ctx, ctx_dim, self._run_context.config.prompt.rank).to(self._prompt.device)

    def _finish(self, partition: int, upload: Tensor, state: PersonalState) -> None:
        """Save upload and state, then add the upload to the reply: a round whose state is lost must not be answered."""
        if self._keeps_state:
            request, folder = self._request, self._node.folder(partition)
            try:
                self._node.keep_run(partition, request.run_token)
                folder.keep_sent(upload, request.global_prompt, request.server_round, request.run_token)
                finished_state = replace(state, server_round=request.server_round)
                folder.save(finished_state, self._prompt, request.run_token, str(self._run_context.terms))
            except Exception as error:
                self._failed.add([partition], error)
                return
        self._uploads[partition] = upload

    def _updates(self, ready: list[Participant]) -> list[tuple[Tensor, PersonalState]]:
        """Run the round of some clients, by the library's procedure or by the DP-FPL paper's."""
        run_context = self._run_context
        if run_context.method.published_procedure:
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
            method=run_context.method,
            training=self._training,
            plan=run_context.plan,
            regulariser=run_context.regulariser,
            server_round=self._request.server_round,
        )


def published_training(config: RunConfig, participant: Participant) -> PublishedTraining:
    """Return the numbers of the DP-FPL paper's formulas, from the configuration and a client's public record count."""
    record, as_code = config.privacy.record, config.dpfpl_paper.published == "code"
    steps = config.nominal_steps
    rows, cols = participant.state.personal.shape
    return PublishedTraining(
        local_steps=config.train.local_steps,
        batch_size=max(1, round(config.train.sampling_rate * participant.data.num_examples)),
        global_learning_rate=config.train.global_learning_rate,
        local_learning_rate=config.train.local_learning_rate,
        sigma=nominal_sigma(record.epsilon, record.delta, steps) if record.mechanism == "gaussian" else 0.0,
        # Their code gives all clients one random start.
        start=random_prompt(rows, cols, config.seed, "initial-local-prompt") if as_code else None,
    )


def local_training(
    config: RunConfig, segments: tuple[int, ...] = (), shape: tuple[int, int] | None = None
) -> LocalTraining:
    """Return the numbers of a local step, from the configuration.

    Args:
        config: Configuration of the run.
        segments: See `Task.prompt_segments`.
        shape: Shape of a prompt, of which a method's memory is made; None if the run keeps none from round to round.
    """
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
        method_memory=config.local_method.memory_shapes(*shape, config.prompt.rank) if shape else {},
        prompts=2 if config.local_method.pairs else 1,
        personalisation=personalisation(config),
        personal_is_given=personal_is_given(config),
    )


def _stream(
    sources: RandomSources, seed: int, partition: int, server_round: int, purpose: str, step: int
) -> RandomSource:
    """Return a client's stream for one purpose and step; it does not depend on the node that hosts the client."""
    return sources(StreamKey(seed=seed, purpose=purpose, partition=partition, server_round=server_round, step=step))

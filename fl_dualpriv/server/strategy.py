"""The base of every strategy: cohort, clip, combine, noise, step, and the handling of failed clients.

A strategy's author must prove what they override. `server_update` runs after the noise and needs no proof.
`weight` is clamped to [0, 1] and needs no proof. `combine` must come with `sensitivity`. `server.rules` enforces this.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.metrics import Accuracy, Scored, summarise
from fl_dualpriv.privacy.adaptive import AdaptiveClip
from fl_dualpriv.privacy.clipping import ClippedSum, check_exact, client_sum, clip_rows, trusting_sum
from fl_dualpriv.privacy.noise import RandomSource, RandomSources, StreamKey, gaussian_noise, poisson_sample
from fl_dualpriv.privacy.plan import RoundTerms, ServerUnit
from fl_dualpriv.privacy.release import release
from fl_dualpriv.privacy.selection import SelectionTerms
from fl_dualpriv.server.accounting import RoundAccountant, ServerPrivacy
from fl_dualpriv.server.cohort import (
    SELECTION_GROUP,
    Asked,
    by_node,
    collect,
    score_messages,
    select_messages,
    train_messages,
)
from fl_dualpriv.server.collective import Collective, take_memory
from fl_dualpriv.server.noise_memory import CLIP_NORM, check_next, next_noise, without_noise_memory
from fl_dualpriv.server.rules import check_bound, check_class

_log = logging.getLogger("fl_dualpriv")


class ClientFailure(RuntimeError):
    """A client did not deliver, and the run has no rule that tolerates this."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """Update of one client, clipped if the server clips."""

    partition: int
    diff: Tensor


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """Report of one round for the caller."""

    server_round: int
    accuracy: Accuracy | None
    failures: int


@dataclass(kw_only=True)
class RoundStrategy(Strategy):
    """One round: sample → send → clip → combine → noise → step; failed clients count as zero under DP.

    Guarantee:
        With ``privacy`` set, the sum over the cohort moves by at most ``privacy.bound`` when one unit is added or
        removed, for any uploads that clients send or fail to send: a missing, malformed or non-finite upload is zero,
        the noise has std ``noise_multiplier * sensitivity()`` also for an empty cohort, and every divisor is public. In
        integer arithmetic the sum is exact and is divided after the noise: a strategy that overrides `combine` or
        `sensitivity` is refused. With ``privacy.correlated`` the noise of all rounds together has the law of
        `CorrelatedNoise`, on its schedule; with ``privacy.adaptive`` the bound of a round is a function of earlier
        releases, one of which is the noised share of small updates. The cohort is drawn over clients, independently of
        the nodes that host them: the number of nodes changes no result. New clients have no card, so no cohort holds
        one and no train message names one; they are only scored. With ``collective`` the server sends each client its
        own personal prompt, which is made of uploads that the clients noised, see `Collective`.

    Args:
        cards: Partition → public card of each client, 0 … population − 1; all of them joined before round 1.
        hosts: Partition → id of the node that hosts the client.
        masses: Partition → public share of the divisor (1, or the expected batch when uploads are sums over records).
        num_rounds: Number of rounds in the run (to evaluate the last one).
        evaluate_every: Rounds between evaluations; 0 = never.
        prompt_kind: Kind of prompt that clients score.
        run_token: Token of the run; clients drop state of other runs.
        terms: Terms on which clients are asked for the releases of a round, for them to check.
        tolerates_failures: True if a failed client counts as zero (DP). Otherwise it ends the run, because without DP
            nothing hides it.
        privacy: Server-side noise, or None.
        sources: Random streams for cohort and noise.
        seed: Seed of the random streams.
        report: Function that is called once per round.
        plugin_folder: Folder for files of a strategy, which the strategy must create. The files are the operator's and
            are not published, because no proof covers them. None if there is no folder.
        new_hosts: Partition → id of the node that scores a new client; numbered from the population on.
        reports_groups: True if accuracies of single groups are reported.
        collective: Numbers of personal prompts that the server makes from all uploads; None if clients make their own.
    """

    # The author's claim: the units that noise scaled to sensitivity() protects, and the reason why not the others.
    proved_for: ClassVar[tuple[ServerUnit, ...]] = ("client", "record", "nominal")
    unproved_because: ClassVar[str] = ""

    cards: dict[int, messages.ClientCard]
    hosts: dict[int, int]
    masses: dict[int, float]
    num_rounds: int
    evaluate_every: int
    prompt_kind: messages.PromptKind
    run_token: str
    terms: RoundTerms
    tolerates_failures: bool
    privacy: ServerPrivacy | None
    sources: RandomSources
    seed: int
    report: Callable[[RoundReport], None]
    plugin_folder: Path | None = None
    new_hosts: dict[int, int] = field(default_factory=dict)
    reports_groups: bool = False
    collective: Collective | None = None
    failures: int = field(default=0, init=False)
    deliveries: int = field(default=0, init=False)
    rounds_done: int = field(default=0, init=False)
    last_failure: str | None = field(default=None, init=False)
    last_scored: tuple[int, Scored] | None = field(default=None, init=False)
    state: dict[str, Tensor] = field(default_factory=dict, init=False)
    num_examples: dict[int, int] = field(default_factory=dict, init=False)
    _prompt: Tensor = field(default_factory=lambda: torch.zeros(0), init=False)
    _asked: Asked = field(default_factory=dict, init=False)
    _everyone: Asked = field(default_factory=dict, init=False)
    _new_too: Asked = field(default_factory=dict, init=False)
    _round_failures: int = field(default=0, init=False)
    _divisor: float | None = field(default=None, init=False)
    _weights: dict[int, float] = field(default_factory=dict, init=False)
    _books: RoundAccountant | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # Index i of a Poisson draw is client i; Flower's node ids are random, so their order must not matter.
        order = range(len(self.cards))
        if list(self.cards) != list(order) or any(p not in self.hosts for p in order):
            raise ValueError(f"cards of {len(self.cards)} clients; expected one per client, in order, each with a host")
        self.num_examples = {partition: card.num_examples for partition, card in self.cards.items()}
        self._everyone = by_node(order, self.hosts)
        self._new_too = by_node([*order, *self.new_hosts], self.hosts | self.new_hosts)
        if self.privacy is not None and self.collective is not None:
            raise PrivacyError(
                "personal prompts from all uploads need uploads that the clients noised, and here the server adds the "
                'noise; set prompt.personalisation = "published", or switch the noise of the server off'
            )
        if self.privacy is not None:
            check_class(type(self), RoundStrategy, self.privacy.unit, self.privacy.arithmetic)
            self._books = RoundAccountant(self.privacy, self.run_token, rounds=self.num_rounds)
        self.check_options()
        if self.privacy is not None:
            self._check_sums(self.privacy)

    # --- what a strategy may change ------------------------------------------------------------------------------

    def weight(self, num_examples: int) -> float:
        """Return the weight of a client with that many (public) examples.

        The weight is clamped to [0, 1], so that it can only lower the bound. It must be a pure function of its
        argument: it is called once for each number of examples.
        """
        return 1.0

    def combine(self, updates: Sequence[Update]) -> Tensor:
        """Divide the weighted sum of updates by a *public* divisor, (n_ctx, ctx_dim); no updates give zero."""
        total = torch.zeros(self._prompt.shape, dtype=torch.float64)
        for update in updates:
            total += self._clamped_weight(update.partition) * update.diff
        return total / self.divisor()

    def sensitivity(self) -> float:
        """Return how far `combine` can move in L2 norm when one unit is added or removed; public."""
        return self.bound() / self.divisor()

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        """Make the step from the noised update; it is post-processing and needs no proof."""
        return prompt + diff

    def check_options(self) -> None:
        """Refuse bad values of a strategy's own fields with `ConfigError`, before any client is asked."""

    @property
    def prompt(self) -> Tensor:
        """The global prompt after the last finished round."""
        return self._prompt

    # --- fixed ---------------------------------------------------------------------------------------------------

    def personal_parts(self, prompt: Tensor) -> Tensor | None:
        """Return the clients' personal prompts that go with ``prompt``, (client, n_ctx, ctx_dim), or None."""
        return None if self.collective is None else self.collective.parts(self.state, prompt.shape)

    def bound(self) -> float:
        """Return the L2 norm that one unit can add to the sum of uploads; public.

        Raises:
            PrivacyError: If there is no server-side privacy, because then nothing bounds the uploads.
        """
        if self.privacy is None:
            raise PrivacyError("no bound without server-side privacy: nothing bounds the uploads")
        moved = self.state.get(CLIP_NORM) if self.privacy.adaptive else None
        return self.privacy.bound if moved is None else float(moved)

    def divisor(self) -> float:
        """Return the public divisor: cohort rate × Σ weight × mass over the whole population, not only the cohort."""
        if self._divisor is None:  # once: combine() and sensitivity() must see the same number
            total = sum(self._clamped_weight(partition) * mass for partition, mass in self.masses.items())
            if not total > 0:
                raise ConfigError(
                    f"the weights of {type(self).__name__} add up to {total}: at least one client must have a weight "
                    "above 0"
                )
            self._divisor = self._cohort_rate() * total
        return self._divisor

    def _clamped_weight(self, partition: int) -> float:
        examples = self.num_examples[partition]
        if examples not in self._weights:
            self._weights[examples] = min(max(self.weight(examples), 0.0), 1.0)
        return self._weights[examples]

    def _cohort_rate(self) -> float:
        return 1.0 if self.privacy is None else self.privacy.cohort_rate

    def _cohort(self, server_round: int) -> list[int]:
        """Return the clients of a round, in order: by their own coins, or by the schedule of correlated noise."""
        if self.privacy is not None and self.privacy.correlated is not None:
            check_next(self.state, server_round)
            return self.privacy.correlated.schedule.cohort(server_round, len(self.cards)).tolist()
        source = self.sources(StreamKey(seed=self.seed, purpose="cohort", server_round=server_round))
        return poisson_sample(source, len(self.cards), self._cohort_rate()).tolist()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the cohort (Poisson under client-level DP, else all clients) and write one message per node of it.

        Raises:
            BudgetExhausted: If the round would exceed the server's budget. Then no client was sampled or asked.
        """
        self._prompt = messages.from_arrays(arrays)
        if self._books is not None:
            self._books.check(server_round)
        self._round_failures = 0
        self._asked = by_node(self._cohort(server_round), self.hosts)
        parts = self.personal_parts(self._prompt)
        return train_messages(self._asked, arrays, self._prompt, server_round, self.run_token, self.terms, parts)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Clip and combine the uploads, add noise, and make the step."""
        partitions, diffs = self._read_uploads(server_round, replies)
        self.deliveries += len(partitions)
        memory: dict[str, Tensor] = {}
        if self.collective is not None:  # before the strategy's own code, which may change the uploads in place
            memory = self.collective.followed(take_memory(self.state), partitions, diffs)
        moved = self._step(server_round, partitions, diffs)
        self.state |= memory
        if moved.shape != self._prompt.shape:
            expected = tuple(self._prompt.shape)
            raise ValueError(f"{type(self).__name__} made a prompt of shape {tuple(moved.shape)}; expected {expected}")
        self._prompt = moved.to(self._prompt.dtype)
        self.rounds_done = server_round
        return messages.to_arrays(self._prompt), None

    def _step(self, server_round: int, partitions: Sequence[int], diffs: Tensor) -> Tensor:
        """Return the prompt after the round. The ledger is written before the noise is drawn."""
        if self.privacy is None:
            diff = self._combined(partitions, diffs)
        else:
            assert self._books is not None
            if self.privacy.correlated is not None:
                check_next(self.state, server_round)
            self._books.write(server_round)
            source = self.sources(StreamKey(seed=self.seed, purpose="server-noise", server_round=server_round))
            diff = self._noised(partitions, diffs, self.privacy, source)
            if self.privacy.adaptive is not None:  # after the noise, which is scaled to the norm of this round
                self._move_clip_norm(server_round, diffs, self.privacy.adaptive)
        with without_noise_memory(self.state):
            return self.server_update(self._prompt, diff.to(self._prompt.dtype))

    def _combined(self, partitions: Sequence[int], diffs: Tensor) -> Tensor:
        updates = [Update(partition=p, diff=d) for p, d in zip(partitions, diffs.unbind(), strict=True)]
        with without_noise_memory(self.state):
            return self.combine(updates)

    def _noised(self, partitions: Sequence[int], diffs: Tensor, privacy: ServerPrivacy, source: RandomSource) -> Tensor:
        """Clip, combine and noise the uploads: the only place where their sum leaves the private side."""
        if privacy.arithmetic == "integer":  # the plain combine(), with its division after the noise
            clean = self._integer_sum(partitions, diffs, privacy)
            return release(clean, privacy.noise_multiplier, source) / self.divisor()
        diff = self._combined(partitions, self._clip(partitions, diffs, privacy))
        # Noise has the shape of the prompt, not of the result: one noise value for all entries would hide nothing.
        shape, scale = tuple(self._prompt.shape), self.sensitivity()
        if privacy.correlated is None:
            return diff + gaussian_noise(source, shape, privacy.noise_multiplier * scale)
        fresh = gaussian_noise(source, shape, privacy.correlated.sigma(privacy.noise_multiplier))
        return diff + scale * next_noise(privacy.correlated, self.state, self.rounds_done + 1, fresh)

    def _clip(self, partitions: Sequence[int], diffs: Tensor, privacy: ServerPrivacy) -> Tensor:
        """Clip updates to S, or sums over records to what each client's (public) number of records can reach."""
        if privacy.unit == "nominal":
            return diffs
        bound = self.bound()
        if bound == 0:  # a learning rate of zero makes the bound, the upload and the noise zero
            return torch.zeros_like(diffs)
        if privacy.unit == "client":
            return clip_rows(diffs, bound)[0]
        counts = [max(1, self.num_examples[partition]) for partition in partitions]
        units = torch.tensor(counts, dtype=torch.float64).reshape(-1, 1, 1)
        return clip_rows(diffs / units, bound)[0] * units

    def _move_clip_norm(self, server_round: int, diffs: Tensor, adaptive: AdaptiveClip) -> None:
        """Release the share of updates within the clip norm, and move the clip norm for the next round."""
        assert self.privacy is not None
        source = self.sources(StreamKey(seed=self.seed, purpose="bit-noise", server_round=server_round))
        share = adaptive.released_share(diffs, self.bound(), self.privacy.arithmetic, source)
        self.state[CLIP_NORM] = torch.tensor(adaptive.moved(self.bound(), share), dtype=torch.float64)
        _log.info("clip norm after round %d: %.4g", server_round, self.bound())

    def _integer_sum(self, partitions: Sequence[int], diffs: Tensor, privacy: ServerPrivacy) -> ClippedSum:
        """Compute the result of `_clip` and `combine` in integers, before the division."""
        weights = torch.tensor([self._clamped_weight(partition) for partition in partitions], dtype=torch.float64)
        if privacy.unit == "client":
            return client_sum(diffs, weights, self.bound())
        counts = torch.tensor([self.num_examples[partition] for partition in partitions], dtype=torch.float64)
        # Each weight is 0 or 1, see `_check_sums`.
        return trusting_sum(diffs * weights.reshape(-1, 1, 1), counts, self.bound())

    def _check_sums(self, privacy: ServerPrivacy) -> None:
        """Refuse weights, numbers of records and bounds for which the sum or its noise would not be sound."""
        name, integer = type(self).__name__, privacy.arithmetic == "integer"
        if privacy.unit == "record":
            # In floats too: an upload's norm grows with its number of records, and a huge upload would round away the
            # others in the sum.
            check_exact(sum(self.num_examples.values()))
            if integer and any(self._clamped_weight(partition) not in (0.0, 1.0) for partition in self.cards):
                raise PrivacyError(
                    f"{name} weighs clients, and a weighted sum of integers is not an integer: with trusts-server and "
                    'integer arithmetic every weight must be 0 or 1; set strategy.ref = "strategies.dpfpl:DPFPL", or '
                    'privacy.arithmetic = "float"'
                )
        elif integer and privacy.unit == "client":
            check_exact(len(self.cards))
        check_bound(self.bound(), privacy.unit)
        if not (math.isfinite(scale := self.sensitivity()) and scale >= 0):
            raise PrivacyError(f"{name}.sensitivity() = {scale}; it must be finite and >= 0 to scale the noise")

    def selection_messages(self, terms: SelectionTerms) -> list[Message]:
        """Return messages that ask every client to select the start, before round 1."""
        self._asked = self._everyone
        return select_messages(self._asked, self.run_token, terms)

    def read_votes(self, replies: Iterable[Message], candidates: int) -> Tensor:
        """Add up the votes of all clients, (candidate,) float64; a client that fails counts as zero under DP."""
        partitions, votes = self._read_stack(0, replies, (candidates,), SELECTION_GROUP)
        self.deliveries += len(partitions)
        return votes.sum(dim=0)

    def _read_uploads(self, server_round: int, replies: Iterable[Message]) -> tuple[list[int], Tensor]:
        """Return the valid uploads, ordered by partition so that float sums repeat; count the rest as failures."""
        return self._read_stack(server_round, replies, tuple(self._prompt.shape), str(server_round))

    def _read_stack(
        self, server_round: int, replies: Iterable[Message], shape: tuple[int, ...], group: str
    ) -> tuple[list[int], Tensor]:
        collection = collect(self._asked, replies, lambda reply: messages.read_uploads(reply, shape), "upload", group)
        self._fail(server_round, collection.failed)
        partitions = [partition for answer in collection.answers for partition in answer.partitions]
        if not partitions:
            return [], torch.zeros(0, *shape, dtype=torch.float64)
        order = sorted(range(len(partitions)), key=partitions.__getitem__)
        diffs = torch.cat([answer.values for answer in collection.answers])[order]
        partitions = [partitions[i] for i in order]
        finite = torch.isfinite(diffs).flatten(1).all(dim=1)
        if not finite.all():
            if not self.tolerates_failures:
                bad = [p for p, fine in zip(partitions, finite.tolist(), strict=True) if not fine]
                self._fail(server_round, dict.fromkeys(bad, "the upload is not finite"))
            # Zero, but not a counted failure: what a client learned from its data must not move a public count.
            diffs = torch.where(finite.reshape(-1, *[1] * len(shape)), diffs, torch.zeros_like(diffs))
        return partitions, diffs

    def _fail(self, server_round: int, failed: Mapping[int, str]) -> None:
        """Count failed clients, given in the order of partitions; without DP the first one ends the run."""
        if not failed:
            return
        if not self.tolerates_failures:
            partition, reason = next(iter(failed.items()))
            raise ClientFailure(f"client {partition} failed in round {server_round}: {reason}")
        self.failures += len(failed)
        self._round_failures += len(failed)
        alike: dict[str, list[int]] = {}
        for partition, self.last_failure in failed.items():
            alike.setdefault(self.last_failure, []).append(partition)
        for reason, partitions in alike.items():
            some = ", ".join(map(str, partitions[:10])) + (", …" if len(partitions) > 10 else "")
            _log.warning(
                "%d of the clients count as zero in round %d (%s): %s", len(partitions), server_round, some, reason
            )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every client for a score if the round is evaluated."""
        due = self.evaluate_every > 0 and (server_round % self.evaluate_every == 0 or server_round == self.num_rounds)
        if not due:
            self._asked = {}
            return []
        return self.evaluation_messages(server_round, messages.from_arrays(arrays), self.prompt_kind)

    def evaluation_messages(self, server_round: int, prompt: Tensor, kind: messages.PromptKind) -> list[Message]:
        """Return messages that ask every client to score ``prompt``, and new clients unless it is a personal one."""
        self._asked = self._everyone if kind == "personal" else self._new_too
        parts = self.personal_parts(prompt) if kind == "personal" else None
        return score_messages(self._asked, prompt, server_round, self.run_token, kind, parts)

    def read_scores(self, server_round: int, replies: Iterable[Message]) -> Scored | None:
        """Return the accuracies of the clients that answered; None if none did."""
        collection = collect(self._asked, replies, messages.read_scores, "score", str(server_round))
        self._fail(server_round, {p: f"evaluation: {reason}" for p, reason in collection.failed.items()})
        scored = self._summarise(collection.answers)
        self.last_scored = None if scored is None else (server_round, scored)
        return scored

    def read_further_scores(self, what: str, server_round: int, replies: Iterable[Message]) -> Scored | None:
        """Return the accuracies of a rival or of another prompt after the rounds, or None if a client did not answer.

        A missing answer neither counts as a failure nor ends a run, because the run has already ended. The mean over
        other clients than those of the run's own scores would not be comparable.
        """
        collection = collect(self._asked, replies, messages.read_scores, "score", str(server_round))
        if collection.failed:
            _log.warning("%s is not scored: %d clients did not answer", what, len(collection.failed))
            return None
        return self._summarise(collection.answers)

    def _summarise(self, answers: Sequence[messages.Scores]) -> Scored | None:
        tables = [(answer.partitions, answer.values) for answer in answers]
        return summarise(tables, len(self.cards), len(self.new_hosts), by_group=self.reports_groups)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the scores and report the round."""
        scored = self.read_scores(server_round, replies)
        accuracy = None if scored is None else scored.accuracy
        self.report(RoundReport(server_round=server_round, accuracy=accuracy, failures=self._round_failures))
        return None

    def summary(self) -> None:
        """Log nothing, because the server app prints the privacy table."""

"""The base of every strategy: cohort, clip, combine, noise, step, and what happens when a client fails.

A strategy author owns as much of the proof as they override: `server_update` runs after the noise (nothing owed),
`weight` is clamped to [0, 1] (nothing owed), `combine` must come with `sensitivity`.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fl_dualpriv import wire
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.evaluation import Accuracy, mean_accuracy
from fl_dualpriv.privacy.clipping import clip_rows
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent
from fl_dualpriv.privacy.noise import RandomSources, StreamKey, gaussian_noise, poisson_sample

_log = logging.getLogger("fl_dualpriv")

# What a strategy may override under server-side privacy; everything else is part of the mechanism.
_HOOKS = ("weight", "combine", "sensitivity", "server_update", "summary")
_DATACLASS_NAMES = {
    *("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__abstractmethods__", "_abc_impl"),
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__init__", "__repr__", "__eq__", "__hash__"),
}


class ClientFailure(RuntimeError):
    """A client did not deliver, and the run has no rule that makes this harmless."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One client's contribution, clipped if the server clips."""

    partition: int
    diff: Tensor


@dataclass(frozen=True, kw_only=True)
class ServerPrivacy:
    """What the server adds to a round.

    Attributes:
        unit: ``client``: uploads are updates, clipped here to ``bound``, on a Poisson cohort; ``record``: uploads are
            sums of clipped per-record terms, each of norm at most ``bound``, from every client (``trusts-server``);
            ``nominal``: the published procedure, whose bound is only claimed.
        bound: L2 norm that one unit can add to the sum of uploads.
        noise_multiplier: Noise std / sensitivity.
        sampling_rate: Of the unit: cohort rate for clients, batch rate for records (for the ledger).
        ledger_multiplier: Effective multiplier of everything the round releases about one unit (for the ledger).
        ledger: Where each round is written before it happens; None for the nominal procedure.
    """

    unit: Literal["client", "record", "nominal"]
    bound: float
    noise_multiplier: float
    sampling_rate: float
    ledger_multiplier: float
    ledger: Ledger | None


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What a round tells the outside."""

    server_round: int
    accuracy: Accuracy | None
    failures: int


@dataclass(kw_only=True)
class RoundStrategy(Strategy):
    """One round: sample → send → clip → combine → noise → step; failed clients count as zero under DP.

    Guarantee:
        With ``privacy`` set, the sum over the cohort moves by at most ``privacy.bound`` when one unit is added or
        removed, whatever clients send or fail to send: a missing, malformed or non-finite upload is zero, the noise
        has std ``noise_multiplier * sensitivity()`` also for an empty cohort, and every divisor is public.

    Args:
        cards: Node id → public card of each client; all of them joined before round 1.
        masses: Partition → public share of the divisor (1, or the expected batch when uploads are sums over records).
        num_rounds: Rounds in the run (to evaluate the last one).
        evaluate_every: Rounds between evaluations; 0 = never.
        prompt_kind: Which prompt clients score.
        run_token: Marks the run; clients drop state of other runs.
        noise_multiplier: The record-level multiplier that clients are told (0 = none).
        tolerates_failures: A failed client is zero (DP) or ends the run (without DP, where nothing hides it).
        privacy: Server-side noise, or None.
        sources: Random streams for cohort and noise.
        report: Called once a round.
    """

    cards: dict[int, wire.ClientCard]
    masses: dict[int, float]
    num_rounds: int
    evaluate_every: int
    prompt_kind: wire.PromptKind
    run_token: str
    noise_multiplier: float
    tolerates_failures: bool
    privacy: ServerPrivacy | None
    sources: RandomSources
    seed: int
    report: Callable[[RoundReport], None]
    failures: int = field(default=0, init=False)
    deliveries: int = field(default=0, init=False)
    last_failure: str | None = field(default=None, init=False)
    state: dict[str, Tensor] = field(default_factory=dict, init=False)
    num_examples: dict[int, int] = field(default_factory=dict, init=False)
    _prompt: Tensor = field(default_factory=lambda: torch.zeros(0), init=False)
    _expected: set[int] = field(default_factory=set, init=False)
    _round_failures: int = field(default=0, init=False)
    _divisor: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        fixed = set(vars(RoundStrategy)) - set(_HOOKS) - _DATACLASS_NAMES
        changed = sorted(n for n in fixed if getattr(type(self), n, None) is not getattr(RoundStrategy, n))
        if self.privacy is not None and changed:
            raise PrivacyError(
                f"{type(self).__name__} overrides {', '.join(changed)}, which clip, noise or account; under "
                f"server-side privacy a strategy may change {', '.join(_HOOKS)} only"
            )
        self.num_examples = {card.partition: card.num_examples for card in self.cards.values()}
        # A sensitivity() proves the combine() of its own class, not that of a subclass which overrides it again.
        order = type(self).__mro__
        combine, proof = (next(i for i, c in enumerate(order) if n in vars(c)) for n in ("combine", "sensitivity"))
        if self.privacy is not None and combine < proof:
            raise PrivacyError(
                f"{type(self).__name__} overrides combine() but not sensitivity(), so the server's noise cannot be "
                'scaled. Override it, or set privacy.client.mechanism = "none" and privacy.record.trusts-server = false'
            )

    # --- what a strategy may change ------------------------------------------------------------------------------

    def weight(self, num_examples: int) -> float:
        """Weight of a client with that many (public) examples; clamped to [0, 1], so it can only lower the bound.

        A pure function of its argument: the divisor is computed from it once.
        """
        return 1.0

    def combine(self, updates: Sequence[Update]) -> Tensor:
        """Weighted sum over a *public* divisor, (n_ctx, ctx_dim); no updates give zero."""
        total = torch.zeros(self._prompt.shape, dtype=torch.float64)
        for update in updates:
            total += self._clamped_weight(update.partition) * update.diff
        return total / self.divisor()

    def sensitivity(self) -> float:
        """How far `combine` can move in L2 norm when one unit is added or removed."""
        if self.privacy is None:
            raise PrivacyError("sensitivity() without server-side privacy: nothing bounds the uploads")
        return self.privacy.bound / self.divisor()

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        """Make the step; runs after the noise, so it owes nothing (post-processing)."""
        return prompt + diff

    # --- fixed ---------------------------------------------------------------------------------------------------

    def divisor(self) -> float:
        """Public: cohort rate × Σ weight × mass over the whole population, whoever took part."""
        if self._divisor is None:  # once: combine() and sensitivity() must see the same number
            total = sum(self._clamped_weight(partition) * mass for partition, mass in self.masses.items())
            self._divisor = self._cohort_rate() * total
        return self._divisor

    def _clamped_weight(self, partition: int) -> float:
        return min(max(self.weight(self.num_examples[partition]), 0.0), 1.0)

    def _cohort_rate(self) -> float:
        by_client = self.privacy is not None and self.privacy.unit == "client"
        return self.privacy.sampling_rate if self.privacy is not None and by_client else 1.0

    def _nodes(self) -> list[int]:
        """Node ids by partition: Flower's own ids are random, the order of partitions is not."""
        return sorted(self.cards, key=lambda node: self.cards[node].partition)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the cohort (Poisson under client-level DP, else everyone) and write the messages."""
        self._prompt = wire.from_arrays(arrays)
        self._round_failures = 0
        nodes = self._nodes()
        source = self.sources(StreamKey(seed=self.seed, purpose="cohort", server_round=server_round))
        cohort = [nodes[i] for i in poisson_sample(source, len(nodes), self._cohort_rate())]
        self._expected = set(cohort)
        task = wire.TrainTask(
            global_prompt=self._prompt,
            server_round=server_round,
            run_token=self.run_token,
            noise_multiplier=self.noise_multiplier,
        )
        content = wire.train_content(task)
        return [Message(content, node, MessageType.TRAIN, group_id=str(server_round)) for node in cohort]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Clip, combine, noise, step. The ledger is written before the noise is drawn."""
        updates = self._read_updates(server_round, list(replies))
        self.deliveries += len(updates)
        if self.privacy is not None:
            updates = [self._clip(update, self.privacy) for update in updates]
        diff = self.combine(updates)
        if self.privacy is not None:
            self._write_ledger(server_round)
            source = self.sources(StreamKey(seed=self.seed, purpose="server-noise", server_round=server_round))
            std = self.privacy.noise_multiplier * self.sensitivity()
            diff = diff + gaussian_noise(source, tuple(diff.shape), std)
        self._prompt = self.server_update(self._prompt, diff.to(self._prompt.dtype))
        return wire.to_arrays(self._prompt), None

    def _clip(self, update: Update, privacy: ServerPrivacy) -> Update:
        """Clip an update to S, or a sum over records to what that client's (public) number of records can reach."""
        if privacy.unit == "nominal":
            return update
        units = 1 if privacy.unit == "client" else max(1, self.num_examples[update.partition])
        # A learning rate of zero makes the bound, the upload and the noise zero.
        bound = max(privacy.bound * units, torch.finfo(torch.float64).tiny)
        clipped, _ = clip_rows(update.diff[None], bound)
        return Update(partition=update.partition, diff=clipped[0])

    def _write_ledger(self, server_round: int) -> None:
        if self.privacy is not None and self.privacy.ledger is not None:
            self.privacy.ledger.record(
                LedgerEvent(
                    run=self.run_token,
                    unit=self.privacy.unit,
                    server_round=server_round,
                    step=0,
                    sampling_rate=self.privacy.sampling_rate,
                    noise_multiplier=self.privacy.ledger_multiplier,
                )
            )

    def _read_updates(self, server_round: int, replies: list[Message]) -> list[Update]:
        """Good uploads, ordered by partition so that float sums repeat; the rest are failures."""
        updates, answered = [], set()
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in self._expected or node in answered:
                continue  # nobody asked, or asked once: a second copy must not count twice
            answered.add(node)
            partition = self.cards[node].partition
            if reply.has_error():
                self._fail(server_round, partition, wire.failure_reason(reply))
                continue
            try:
                diff = wire.read_upload(reply, tuple(self._prompt.shape))
            except Exception as error:  # bytes from outside: whatever cannot be read is a failure of its sender
                self._fail(server_round, partition, f"unreadable upload: {type(error).__name__}: {error}")
                continue
            if not torch.isfinite(diff).all():
                if self.tolerates_failures:
                    # Zero, but not a counted failure: what a client learned from its data must not move a public count.
                    diff = torch.zeros_like(diff)
                else:
                    self._fail(server_round, partition, "the upload is not finite")
                    continue
            updates.append(Update(partition=partition, diff=diff))
        for node in sorted(self._expected - answered):
            self._fail(server_round, self.cards[node].partition, "no reply in time")
        return sorted(updates, key=lambda update: update.partition)

    def _fail(self, server_round: int, partition: int, reason: str | None) -> None:
        if not self.tolerates_failures:
            raise ClientFailure(f"client {partition} failed in round {server_round}: {reason}")
        self.failures += 1
        self._round_failures += 1
        self.last_failure = reason
        _log.warning("client %d counts as zero in round %d: %s", partition, server_round, reason)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every client for a score in the rounds that are scored."""
        due = self.evaluate_every > 0 and (server_round % self.evaluate_every == 0 or server_round == self.num_rounds)
        if not due:
            self._expected = set()
            return []
        return self.evaluation_messages(server_round, wire.from_arrays(arrays), self.prompt_kind)

    def evaluation_messages(self, server_round: int, prompt: Tensor, kind: wire.PromptKind) -> list[Message]:
        """Messages that make every client score ``prompt``."""
        self._expected = set(self._nodes())
        task = wire.EvaluateTask(global_prompt=prompt, server_round=server_round, run_token=self.run_token, prompt=kind)
        content = wire.evaluate_content(task)
        return [Message(content, node, MessageType.EVALUATE, group_id=str(server_round)) for node in self._nodes()]

    def read_scores(self, server_round: int, replies: Iterable[Message]) -> Accuracy | None:
        """Mean accuracy of the clients that answered; None if none did."""
        answers = {reply.metadata.src_node_id: reply for reply in replies}
        scores = []
        for node in sorted(self._expected, key=lambda node: self.cards[node].partition):
            reply = answers.get(node)
            if reply is None or reply.has_error():
                reason = "no reply in time" if reply is None else wire.failure_reason(reply)
                self._fail(server_round, self.cards[node].partition, f"evaluation: {reason}")
                continue
            try:
                scores.append(wire.read_score(reply))
            except Exception as error:  # see _read_updates
                self._fail(server_round, self.cards[node].partition, f"unreadable score: {error}")
        return mean_accuracy(scores) if scores else None

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the scores and report the round."""
        accuracy = self.read_scores(server_round, replies)
        self.report(RoundReport(server_round=server_round, accuracy=accuracy, failures=self._round_failures))
        return None

    def summary(self) -> None:
        """Nothing to log: the server app prints the privacy table."""

"""The rounds of a run, from any start round; Flower's own loop (`Strategy.start`) counts from 1 and saves no state.

The server's checkpoint is written after each aggregation, before the result goes anywhere.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.metrics import Accuracy
from fl_dualpriv.privacy.plan import Release
from fl_dualpriv.run.checkpoint import Checkpoint, CheckpointFolder, Progress
from fl_dualpriv.server.strategy import ClientFailure, RoundStrategy

_log = logging.getLogger("fl_dualpriv")


class Rounds:
    """The rounds of one run.

    Args:
        strategy: Strategy that sends, aggregates, scores and reports.
        checkpoints: Folder of the checkpoints from which the run resumes.
        stop_at_dead_actor: End the run when an actor of the simulation has died, also under DP.

    Guarantee:
        A run that such a stop ended and that was resumed releases no more than a run without the stop. The round of the
        stop is made again. A client answers with its saved upload, or for the first time. A client that died between
        paying and sending makes the same release if it is seeded, else none in that round. An observer of the machine
        can see that the run stopped, and no ε covers this, because a record may be the reason why an actor died. The
        stop is therefore off by default; without it, a dead actor's clients count as zero.
    """

    def __init__(self, strategy: RoundStrategy, checkpoints: CheckpointFolder, *, stop_at_dead_actor: bool) -> None:
        self.strategy, self._checkpoints, self._stops = strategy, checkpoints, stop_at_dead_actor
        self._warned = False

    @property
    def lost(self) -> int:
        """Number of rounds in the server's ledger that are not done: a crash lost them, and their ε is spent.

        A damaged line counts as one, because it may be such a round.
        """
        privacy = self.strategy.privacy
        damaged = 0 if privacy is None or privacy.ledger is None else privacy.ledger.read().damaged
        return max(0, self._events() + damaged - self.strategy.rounds_done)

    def epsilon(self, delta: float) -> float:
        """Compute the ε of all events in the server's ledger."""
        privacy = self.strategy.privacy
        assert privacy is not None
        assert privacy.ledger is not None
        return privacy.ledger.read().epsilon(delta)

    def charged(self, releases: Sequence[Release]) -> list[Release]:
        """Return the releases; under client-level DP their ε is at least the ledger's, which includes lost rounds."""
        if not self.lost:
            return list(releases)
        note = f"{self.lost} more in the ledger, lost in crashes"
        return [
            replace(r, epsilon=max(r.epsilon, self.epsilon(r.delta)), note=f"{r.note}; {note}")
            if r.unit == "client"
            else r
            for r in releases
        ]

    def begin(self, prompt: Tensor) -> Tensor:
        """Save the start before any client is asked under this run's token, and return it."""
        self.keep(prompt)
        return prompt

    def check_delivered(self) -> None:
        """Refuse a run in which every call of a client failed.

        Raises:
            ClientFailure: If all failed, so that the prompts are noise at best. The message has the last reason.
        """
        strategy = self.strategy
        if strategy.deliveries == 0 and strategy.failures > 0:
            raise ClientFailure(
                f"all {strategy.failures} calls of clients failed; the prompts are noise at best. "
                f"Last reason: {strategy.last_failure}"
            )

    def resume(self, checkpoint: Checkpoint, lines: Sequence[dict[str, Any]]) -> None:
        """Restore the state of the strategy from a checkpoint.

        Args:
            checkpoint: Checkpoint whose run token the strategy has.
            lines: `RunRecorder.progress`, as `RunRecorder.resume` left it.

        Raises:
            ConfigError: If the server's ledger lost events of this run, because later rounds would be under-counted.
        """
        strategy, progress = self.strategy, checkpoint.progress
        if (events := self._events()) < progress.events:
            raise ConfigError(
                f"the server's ledger holds {events} events of this run and its checkpoint says {progress.events}: a "
                "ledger that lost lines under-counts what was released. Put it back, or start a new run in another "
                "folder"
            )
        strategy.rounds_done, strategy.deliveries = progress.rounds_done, progress.deliveries
        strategy.last_failure, strategy.state = progress.last_failure, checkpoint.state
        told = [line for line in lines if line["round"] == progress.rounds_done]
        strategy.failures = sum(line["failures"] for line in lines) if told else progress.failures

    def run(self, grid: Grid, prompt: Tensor, reported: int, timeout: float) -> Tensor:
        """Train, checkpoint, score and report every round that is left.

        Args:
            grid: Grid that carries messages.
            prompt: Prompt p_G after the rounds that are done.
            reported: Number of the last round that was reported.
            timeout: Seconds to wait for replies.

        Returns:
            p_G after the last round.

        Raises:
            BudgetExhausted: If a round would exceed the budget; the strategy has the prompt of the rounds before.
            ClientFailure: If an actor died and the run must then stop.
        """
        strategy, config = self.strategy, ConfigRecord()
        arrays = messages.to_arrays(prompt)
        for server_round in range(reported + 1, strategy.num_rounds + 1):
            if server_round > strategy.rounds_done:
                asked = strategy.configure_train(server_round, arrays, config, grid)
                moved, _ = strategy.aggregate_train(server_round, self.replies(grid, asked, timeout))
                arrays = arrays if moved is None else moved
                self.keep(messages.from_arrays(arrays))
            asked = strategy.configure_evaluate(server_round, arrays, config, grid)
            strategy.aggregate_evaluate(server_round, self.replies(grid, asked, timeout))
        return messages.from_arrays(arrays)

    def replies(self, grid: Grid, asked: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Yield the replies; warn once about a dead actor if the run continues without it."""
        for reply in grid.send_and_receive(asked, timeout=timeout):
            dead = self.strategy.tolerates_failures and messages.dead_actor(reply) is not None
            if dead and self._stops:
                raise ClientFailure(f'dead-actors = "stop": {messages.failure_reason(reply)}')
            if dead and not self._warned:
                self._warned = True
                _log.warning(
                    "a dead actor stays dead: from now on many clients count as zero in each round, and their privacy "
                    "is spent for nothing. End the run (Ctrl-C) and continue with `fl-dualpriv run --resume`; "
                    'dead-actors = "stop" ends the run automatically, before the round counts; if memory was short, '
                    "raise resources.cpus-per-client: fewer actors need less memory"
                )
            yield reply

    def keep(self, prompt: Tensor) -> None:
        """Write the checkpoint of the current state."""
        strategy = self.strategy
        progress = Progress(
            run_token=strategy.run_token,
            rounds_done=strategy.rounds_done,
            events=self._events(),
            deliveries=strategy.deliveries,
            failures=strategy.failures,
            last_failure=strategy.last_failure,
        )
        self._checkpoints.write(Checkpoint(progress=progress, prompt=prompt, state=strategy.state))

    def _events(self) -> int:
        """Count the events of this run in the server's ledger."""
        privacy, token = self.strategy.privacy, self.strategy.run_token
        if privacy is None or privacy.ledger is None:
            return 0
        return sum(event.run == token for event in privacy.ledger.read().events)


def score_now(
    strategy: RoundStrategy, grid: Grid, prompt: Tensor, kind: messages.PromptKind, timeout: float
) -> Accuracy | None:
    """Score one prompt before the rounds."""
    requests = strategy.evaluation_messages(0, prompt, kind)
    scored = strategy.read_scores(0, grid.send_and_receive(requests, timeout=timeout))
    return None if scored is None else scored.accuracy

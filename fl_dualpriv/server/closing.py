"""Scores after the last round: the free rival, the shared prompt without any personal part, and single clients."""

from dataclasses import dataclass

from flwr.serverapp import Grid
from torch import Tensor

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.messages import PromptKind
from fl_dualpriv.metrics import Scored
from fl_dualpriv.server.strategy import RoundStrategy


@dataclass(frozen=True, kw_only=True)
class ClosingScores:
    """Scores of a run that has ended; None without scores, or if a client did not answer.

    Attributes:
        free: Of the best rival that costs no ε.
        final: Of the prompts of the last scored round.
        general: Of the shared prompt without any personal part. None for a method that shares no prompt.
    """

    free: Scored | None = None
    final: Scored | None = None
    general: Scored | None = None


def closing_scores(
    strategy: RoundStrategy, grid: Grid, prompt: Tensor, config: RunConfig, timeout: float
) -> ClosingScores:
    """Ask for the scores that the rounds do not give.

    Args:
        strategy: Strategy of the run.
        grid: Grid that carries messages.
        prompt: Prompt p_G after the last round.
        config: Configuration of the run.
        timeout: Seconds to wait for replies.
    """
    if not strategy.evaluate_every:
        return ClosingScores()

    def score(kind: PromptKind, what: str, server_round: int = 0) -> Scored | None:
        requests = strategy.evaluation_messages(server_round, prompt, kind)
        return strategy.read_further_scores(what, server_round, grid.send_and_receive(requests, timeout=timeout))

    method, last = config.local_method, strategy.last_scored
    first_round = 1 if method.trains else 0
    if last is not None and last[0] >= first_round:
        final = last[1]
    elif config.output.resume:  # the run had scored its last round before it was cut off
        # A node keeps its scored prompt with the number of the round, which must stay that of the last one.
        kind = strategy.prompt_kind if method.trains else "zero-shot"
        final = score(kind, "the last round", strategy.rounds_done)
    else:
        final = None
    general = None
    if method.trains and method.shared:
        # A round of a method without personal parts has already scored the shared prompt, for all clients.
        general = final if strategy.prompt_kind == "global" else score("global", "the shared prompt")
    return ClosingScores(free=score("free", "the free rival"), final=final, general=general)

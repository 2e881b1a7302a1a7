"""The selection of the start before round 1, at the server: it asks all clients once and adds up their votes."""

import logging

import torch
from flwr.serverapp import Grid
from torch import Tensor

from fl_dualpriv.privacy.selection import SelectionTerms, largest_entry
from fl_dualpriv.server.rounds import Rounds

_SELECTED = "selected-start"
_log = logging.getLogger("fl_dualpriv")


def select_start(
    rounds: Rounds, grid: Grid, prompt: Tensor, contexts: Tensor, terms: SelectionTerms, timeout: float
) -> Tensor:
    """Let the clients select the start, and write the checkpoint; a resumed run that has a start keeps it.

    Guarantee:
        The result is a function of the clients' noised votes and of public numbers: post-processing of the releases
        that their ledgers hold. A client that fails, or whose votes are not finite, counts as zero under DP. The server
        needs no trust: it sees no votes without noise.

    Args:
        rounds: The rounds of the run, of which none is done.
        grid: Grid that carries messages.
        prompt: p_G before the selection, (n_ctx, ctx_dim).
        contexts: Candidates, (candidate, n_ctx, ctx_dim).
        terms: Terms of the selection.
        timeout: Seconds to wait for replies.

    Returns:
        The candidate with the largest sum of votes, of equal ones the first; or ``prompt`` where each client chooses
        its own start.

    Raises:
        ClientFailure: If a client failed and there is no DP.
    """
    strategy = rounds.strategy
    if _SELECTED in strategy.state or strategy.rounds_done:
        return prompt
    federated = terms.form == "federated"
    replies = rounds.replies(grid, strategy.selection_messages(terms), timeout)
    votes = strategy.read_votes(replies, terms.candidates if federated else 0)
    chosen = largest_entry(votes) if federated else -1
    strategy.state[_SELECTED] = torch.tensor(chosen)
    start = contexts[chosen].cpu().clone() if federated else prompt
    rounds.keep(start)
    if federated:
        _log.info("the start is candidate %d of %d", chosen + 1, terms.candidates)
    return start

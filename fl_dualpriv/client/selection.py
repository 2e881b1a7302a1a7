"""One select message: each requested client selects the start of its prompt, once in a run and before round 1."""

import contextlib
from dataclasses import replace

import torch
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.client.node import Failures, Node
from fl_dualpriv.client.state import check_selection, fresh_state, is_same_selection
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.filters.pay import admit
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import RandomSource, StreamKey
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.release import release
from fl_dualpriv.privacy.selection import SelectionTerms, check_selection_terms, choose, largest_entry, vote_sum

_NO_PROMPT = torch.zeros(0)  # votes depend on no prompt of the server


class SelectionRound:
    """The selection of the start by each client that a message asks for.

    Guarantee:
        Under record-level DP the event of the selection stands in a client's own ledger before its draw, and its ledger
        is locked until the result is saved. The noised sum of the client's votes leaves (`vote_sum`). Where the client
        chooses its own start (`choose`) nothing leaves, and the choice is in its personal prompt. The request, the
        plan, the owner's budget and the ledger are checked before that. A refused request touches no data.
        A selection is made once in a run. Asked again, the client answers with the saved result, which releases
        nothing. If a crash ended a selection before it was saved, it is made again with seeded randomness only, bit by
        bit. With randomness of the operating system it is refused, because its event is spent.

    Args:
        node: Node that hosts the clients.
        request: Request of the server.
    """

    def __init__(self, node: Node, request: messages.SelectRequest) -> None:
        self._node, self._run_context, self._request = node, node.run_context, request
        self._failed = Failures(private=self._run_context.plan is not None)

    def run(self) -> messages.Uploads:
        """Let all requested clients select; a client that fails does not affect the others.

        Returns:
            The votes of each client, (client, K), or (client, 0) where clients choose for themselves.

        Raises:
            PrivacyError: If this run selects no start, or the message names a client that is not hosted here, or twice.
        """
        terms, token = self._run_context.selection_terms, self._request.run_token
        try:
            if terms is None:
                raise PrivacyError('the start of this run is not selected (prompt.init = "select"); it is refused')
            partitions = self._node.asked(self._request.partitions)
        except PrivacyError as error:
            if self._node.state_dir is not None:
                self._node.folder(self._node.index).log_refusal(token, "select", str(error))
            raise
        votes: dict[int, Tensor] = {}
        for partition in partitions:
            try:
                votes[partition] = self._selected(partition, terms)
            except PrivacyError as error:
                self._node.folder(partition).log_refusal(token, "select", str(error))
                self._failed.add([partition], error)
            except Exception as error:
                self._failed.add([partition], error)
        width = terms.candidates if terms.form == "federated" else 0
        values = torch.stack(list(votes.values())) if votes else torch.zeros(0, width, dtype=torch.float64)
        return messages.Uploads(partitions=tuple(votes), values=values, failed=self._failed)

    def _selected(self, partition: int, terms: SelectionTerms) -> Tensor:
        """Select for one client, or return the saved result.

        Raises:
            PrivacyError: If the client refuses.
        """
        run_context, request = self._run_context, self._request
        check_selection_terms(terms, request.terms)
        if self._node.budget is not None:
            self._node.budget.check_plan(run_context.plan, reproducible=run_context.reproducible)
        with contextlib.ExitStack() as locks:
            if run_context.plan is not None:
                locks.enter_context(Ledger(self._node.folder(partition).ledger).exclusive())
            saved = self._saved(partition, terms)
            if saved is not None:
                return saved
            if run_context.plan is not None:
                self._pay(partition, run_context.plan)
            return self._release(partition, terms)

    def _saved(self, partition: int, terms: SelectionTerms) -> Tensor | None:
        """Return the result of an earlier selection of this run, or None if none was saved."""
        folder, token = self._node.folder(partition), self._request.run_token
        if terms.form == "federated":
            return folder.sent(0, _NO_PROMPT, token) if terms.private else None
        return torch.zeros(0, dtype=torch.float64) if folder.has_state(token) else None

    def _pay(self, partition: int, plan: RecordLevelPlan) -> None:
        """Write the event of the selection into the client's ledger, unless it repeats a draw that is paid for."""
        run_context, token = self._run_context, self._request.run_token
        assert plan.selection is not None
        folder, config = self._node.folder(partition), run_context.config
        n_ctx, ctx_dim = run_context.prompt_shape
        ledger, event = Ledger(folder.ledger), plan.selection.event(token)
        state = folder.load(token, n_ctx, ctx_dim, config.prompt.rank, terms=str(run_context.terms))
        made = ledger.read()
        if is_same_selection(made, state, event, reproducible=run_context.reproducible):
            return
        check_selection(made, state, event)
        admit(ledger, plan, event, self._node.budget)

    def _release(self, partition: int, terms: SelectionTerms) -> Tensor:
        """Count the client's votes, draw, and save the result before it leaves. The event was written."""
        run_context, folder = self._run_context, self._node.folder(partition)
        prompt, token = run_context.config.prompt, self._request.run_token
        right = run_context.task.answered_rightly(run_context.task.client_data(partition), prompt)
        source = self._source(partition)
        if terms.form == "federated":
            votes = release(vote_sum(right, terms.arithmetic), terms.noise_multiplier, source)
            if terms.private:
                self._node.keep_run(partition, token)
                folder.keep_sent(votes, _NO_PROMPT, 0, token)
            return votes
        counts = right.sum(dim=0)
        chosen = choose(counts, terms.pure_epsilon, source) if terms.private else largest_entry(counts)
        contexts = run_context.task.candidates(prompt)
        start = contexts.mean(dim=0)  # p_G before round 1
        state = replace(fresh_state(*run_context.prompt_shape, prompt.rank), personal=(contexts[chosen] - start).cpu())
        self._node.keep_run(partition, token)
        folder.save(state, start.cpu(), token, str(run_context.terms))
        return torch.zeros(0, dtype=torch.float64)

    def _source(self, partition: int) -> RandomSource:
        key = StreamKey(seed=self._run_context.config.seed, purpose="selection", partition=partition)
        return self._run_context.sources(key)

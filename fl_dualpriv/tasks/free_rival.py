"""Choice of the free rival: the best use of public knowledge without learning. No ε buys what it gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_dualpriv.metrics import ScoreTable, Use, counts_at_home, mean

_WORDS: dict[Use, str] = {"plain": "", "class-prior": ", own class prior", "class-list": ", own class list"}


@dataclass(frozen=True, kw_only=True)
class PublicModel:
    """A model that no private record formed.

    Attributes:
        name: Name for the tables of results.
        logits: Function from ``val`` or ``test`` to the logits (record, n_cls) on that split. It is called for a split
            only if the choice or the score needs it.
    """

    name: str
    logits: Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class FreeForm:
    """A public model with a use of each client's public class list or class prior.

    Attributes:
        model: The model.
        use: Use of the list or of the prior, see `counts_at_home`.
        log_prior: Log prior of each client, (client, n_cls), in units of the logits; only ``class-prior`` reads it.
    """

    model: PublicModel
    use: Use
    log_prior: Tensor | None = None

    @property
    def name(self) -> str:
        """Name for the tables of results."""
        return self.model.name + _WORDS[self.use]

    def counts(self, logits: Tensor, labels: Tensor, groups: Tensor, held: Tensor) -> Tensor:
        """Count the correct records of the first clients, as many as ``held`` has rows; see `counts_at_home`."""
        log_prior = None if self.log_prior is None else self.log_prior[: len(held)]
        return counts_at_home(logits, labels, groups, held, self.use, log_prior)


def choose_free_form(
    models: Sequence[PublicModel],
    validation: Callable[[], tuple[Tensor, Tensor]] | None,
    held: Tensor,
    n_cls: int,
    population: int,
    log_prior: Tensor | None = None,
) -> FreeForm:
    """Choose the form with the best mean local accuracy on validation records; on a tie the first one.

    The forms are every model × its uses of public knowledge. ``class-list`` is never below ``plain``
    (see `counts_at_home`), so ``plain`` is offered only where every list is complete and both are equal. A prior that
    is even on a client's list only lowers or raises answers that the list excludes, so ``class-list`` is never below
    it either: ``class-prior`` is offered only if some prior prefers one class of a list to another. No held-out record
    of the scored split takes part in the choice, and a single form needs no validation record either.

    Guarantee:
        Without ``validation`` the choice is a function of the configuration: the first model with its list. The
        caller passes none where validation records are private. The choice is then no release.

    Args:
        models: The models, the fixed choice first.
        validation: Function that returns class and group of each validation record, both (record,). None if validation
            records must not decide.
        held: True where a client holds a group, (client, group) bool; new clients come last and do not decide.
        n_cls: Number of classes.
        population: Number of clients that decide.
        log_prior: Public log prior of each client, (client, n_cls), in units of the logits; None offers no
            ``class-prior``.
    """
    lists = held.unflatten(1, (-1, n_cls)).any(dim=1)
    uses: list[Use] = ["plain" if bool(lists.all()) else "class-list"]
    if log_prior is not None and _prefers(log_prior.cpu(), lists):
        uses.append("class-prior")
    forms = [FreeForm(model=model, use=use, log_prior=log_prior) for model in models for use in uses]
    if validation is None or len(forms) == 1:
        return forms[0]
    (labels, groups), held = validation(), held[:population]
    total = torch.bincount(groups, minlength=held.shape[1]).cpu()
    scores = []
    for form in forms:
        correct = form.counts(form.model.logits("val"), labels, groups, held)
        scores.append(mean(ScoreTable.of(correct, total, held).local()) or 0.0)
    return forms[scores.index(max(scores))]


def _prefers(log_prior: Tensor, lists: Tensor) -> bool:
    """Return True if the prior of some client, (client, n_cls), differs among the classes of its list."""
    lowest = log_prior.masked_fill(~lists, torch.inf).amin(dim=1)
    highest = log_prior.masked_fill(~lists, -torch.inf).amax(dim=1)
    return bool((lowest < highest).any())

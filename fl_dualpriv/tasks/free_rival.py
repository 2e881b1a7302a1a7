"""Choice of the free rival: the best use of public knowledge without learning. No ε buys what it gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_dualpriv.metrics import ScoreTable, Use, counts_at_home, mean

LogPrior = Callable[[Tensor], Tensor]
"""Map from a class list, (n_cls,) bool, to log π, (n_cls,), in units of the logits."""
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
    """A public model with a use of each client's public class list.

    Attributes:
        model: The model.
        use: Use of the list, see `counts_at_home`.
        log_prior: Log prior of a list; only ``class-prior`` reads it.
    """

    model: PublicModel
    use: Use
    log_prior: LogPrior | None = None

    @property
    def name(self) -> str:
        """Name for the tables of results."""
        return self.model.name + _WORDS[self.use]

    def counts(self, logits: Tensor, labels: Tensor, groups: Tensor, held: Tensor) -> Tensor:
        """Count the correct records of each client; see `counts_at_home`."""
        return counts_at_home(logits, labels, groups, held, self.use, self.log_prior)


def choose_free_form(
    models: Sequence[PublicModel],
    validation: Callable[[], tuple[Tensor, Tensor]] | None,
    held: Tensor,
    n_cls: int,
    population: int,
    log_prior: LogPrior | None = None,
) -> FreeForm:
    """Choose the form with the best mean local accuracy on validation records; on a tie the first one.

    The forms are every model × its uses of the class list. ``class-list`` is never below ``plain``
    (see `counts_at_home`), so ``plain`` is offered only where every list is complete and both are equal. No held-out
    record of the scored split takes part in the choice, and a single form needs no validation record either.

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
        log_prior: Log prior of a class list; None does not offer ``class-prior``.
    """
    is_complete = bool(held.unflatten(1, (-1, n_cls)).any(dim=1).all())
    uses: list[Use] = ["plain" if is_complete else "class-list"]
    if log_prior is not None:
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

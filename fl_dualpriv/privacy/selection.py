"""The release that selects the start of the prompts from public candidates, before round 1.

*Federated*: each client releases its noised votes, and the largest entry of their sum is everyone's start. *Client*:
each client chooses its own start by the exponential mechanism; the choice shows only in its prompt and its uploads.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import SampledGaussians, mixed_epsilon, multiplier_of_pure
from fl_dualpriv.privacy.clipping import Arithmetic, ClippedSum, check_exact
from fl_dualpriv.privacy.ledger import LedgerEvent
from fl_dualpriv.privacy.noise import RandomSource

Form = Literal["federated", "client"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Terms of the selection of one client.

    Attributes:
        form: ``federated``: Gaussian noise on votes. ``client``: a choice by the exponential mechanism.
        noise_multiplier: Noise of the votes over their sensitivity. For a choice the multiplier of the Gaussian release
            that dominates it, see `multiplier_of_pure`.
        pure_epsilon: ε of a choice; 0 for votes.
    """

    form: Form
    noise_multiplier: float
    pure_epsilon: float = 0.0

    @property
    def charges(self) -> tuple[SampledGaussians, ...]:
        """The Gaussian release, which reads every record once; none for a choice."""
        return () if self.pure_epsilon else (SampledGaussians(1.0, self.noise_multiplier, 1),)

    @property
    def pure(self) -> tuple[float, ...]:
        """ε of the choice; none for votes."""
        return (self.pure_epsilon,) if self.pure_epsilon else ()

    def epsilon(self, delta: float) -> float:
        """Return ε of the selection by itself."""
        return mixed_epsilon(self.charges, self.pure, delta)

    def event(self, run_token: str) -> LedgerEvent:
        """Return the event of the selection, which stands in the client's ledger before its draw."""
        return LedgerEvent(
            run=run_token,
            unit="record",
            server_round=0,
            releases=1,
            sampling_rate=1.0,
            noise_multiplier=self.noise_multiplier,
            kind="exponential" if self.pure_epsilon else "gaussian",
            pure_epsilon=self.pure_epsilon,
        )


def choice(pure_epsilon: float) -> Selection:
    """Return the terms of a choice by the exponential mechanism at this ε."""
    return Selection(form="client", noise_multiplier=multiplier_of_pure(pure_epsilon), pure_epsilon=pure_epsilon)


@dataclass(frozen=True, kw_only=True)
class SelectionTerms:
    """Terms on which a server asks a client for the selection, in the symbols of `Selection`.

    Attributes:
        form: Form of the selection.
        private: True if votes are noised and choices are random. Without record-level DP they are exact.
        noise_multiplier: Noise of the votes over their sensitivity; 0 for exact ones.
        pure_epsilon: ε of a choice; 0 for votes and for exact choices.
        arithmetic: Arithmetic of votes and noise.
        candidates: Number of candidates K.
    """

    form: Form
    private: bool
    noise_multiplier: float
    pure_epsilon: float
    arithmetic: Arithmetic
    candidates: int


def selection_terms(form: Form, selection: Selection | None, arithmetic: Arithmetic, candidates: int) -> SelectionTerms:
    """Return the terms of a selection; without record-level DP ``selection`` is None, and the arithmetic is float."""
    return SelectionTerms(
        form=form,
        private=selection is not None,
        noise_multiplier=selection.noise_multiplier if selection else 0.0,
        pure_epsilon=selection.pure_epsilon if selection else 0.0,
        arithmetic=arithmetic if selection else "float",
        candidates=candidates,
    )


def check_selection_terms(client_terms: SelectionTerms, offered: SelectionTerms) -> None:
    """Refuse a server that asks for a selection on weaker terms than this client's own configuration promises.

    Guarantee:
        After this check the client follows ``client_terms``, not ``offered``, as after `check_terms`.

    Raises:
        PrivacyError: If the terms differ, less noise and a larger ε included. The message lists all problems.
    """
    problems = []
    if offered.form != client_terms.form:
        problems.append(f"form {offered.form!r:.40}, here {client_terms.form!r}")
    if offered.private != client_terms.private:
        problems.append(f"private = {offered.private}, here {client_terms.private}")
    if not offered.noise_multiplier >= client_terms.noise_multiplier:
        problems.append(
            f"noise multiplier {offered.noise_multiplier:g}, here at least {client_terms.noise_multiplier:g}"
        )
    if not offered.pure_epsilon <= client_terms.pure_epsilon:
        problems.append(f"ε = {offered.pure_epsilon:g} of the choice, here at most {client_terms.pure_epsilon:g}")
    if offered.arithmetic != client_terms.arithmetic:
        problems.append(f"arithmetic {offered.arithmetic!r:.40}, here {client_terms.arithmetic!r}")
    if offered.candidates != client_terms.candidates:
        problems.append(f"{offered.candidates} candidates, here {client_terms.candidates}")
    if problems:
        raise PrivacyError(
            "the server asks for another selection of the start than this client's plan has: "
            + "; ".join(problems)
            + "; it is refused"
        )


def vote_sensitivity(candidates: int) -> float:
    """Return the sensitivity of the votes on K candidates: √K/2.

    Guarantee:
        A record's row is b − mean(b) for b in {0, 1}^K. With s ones its squared norm is s − s²/K = s(K − s)/K ≤ K/4.
    """
    return math.sqrt(candidates) / 2


def vote_sum(right: Tensor, arithmetic: Arithmetic) -> ClippedSum:
    """Add up the votes of a client's records on all candidates.

    Guarantee:
        The value is a sum of one row per record, b − mean(b), a function of that record only. Adding or removing a
        record moves it by at most `vote_sensitivity`. A record that answers all candidates rightly, or none, and one
        that cannot be read, adds zero. Subtracting a row's own mean changes no difference between candidates, and so no
        largest entry, and it halves the sensitivity of b itself, √K. Each row is a vector of integers in units of 1/K,
        so both arithmetics add up exactly; with ``integer`` the noise is whole numbers of that unit, see
        `rounded_gaussian`.

    Args:
        right: True where a record is answered rightly with a candidate, (record, candidate) bool.
        arithmetic: Arithmetic of sum and noise.

    Raises:
        ValueError: If there are 2**32 records or more.
    """
    records, candidates = right.shape
    check_exact(records)
    votes = right.to(torch.float64)
    total = (candidates * votes - votes.sum(dim=1, keepdim=True)).sum(dim=0)
    sensitivity = vote_sensitivity(candidates)
    if arithmetic == "float":
        return ClippedSum(value=total / candidates, sensitivity=sensitivity)
    return ClippedSum(value=total, sensitivity=candidates * sensitivity, grid=1 / candidates)


def choose(counts: Tensor, pure_epsilon: float, source: RandomSource) -> int:
    """Choose a candidate k with probability ∝ exp(ε · counts[k]): the exponential mechanism for one-sided counts.

    Guarantee:
        This is ε-DP for one added or removed record, if a record adds 0 or 1 to each count. Adding one multiplies each
        weight by a factor from 1 to e^ε, and so their sum. The probability of each k, a quotient of the two, changes by
        a factor from e^−ε to e^ε. Scores that can also fall would need ε/2 in the exponent. Probabilities are rounded
        to float64 and drawn with one uniform of 52 bits: a strict reader adds K · 2**-51 to δ, as for `gaussian_noise`.

    Args:
        counts: Number of rightly answered records with each candidate, (candidate,).
        pure_epsilon: ε > 0.
        source: Random source of the choice; nothing else uses it.

    Returns:
        Index of the candidate.

    Reference:
        McSherry and Talwar 2007; Dwork and Roth 2014, section 3.4, for monotonic scores.
    """
    exponents = pure_epsilon * (counts - counts.max()).to(torch.float64)
    weights = torch.cumsum(torch.exp(exponents), dim=0)
    point = float(source.uniforms(1)[0]) * float(weights[-1])
    return min(int(torch.searchsorted(weights, point, right=True)), len(counts) - 1)


def largest_entry(votes: Tensor) -> int:
    """Return the index of the largest entry, of equal ones the lowest."""
    return int(votes.cpu().numpy().argmax())

"""Frozen plans that couple sampling, clipping, noise and accounting, one per level, and the table of releases.

The set of mechanisms is closed on purpose: a new one is a reviewed change here, with a proof and a test.
"""

from dataclasses import dataclass, replace
from typing import Literal

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import (
    COARSE_GRID,
    FINE_GRID,
    NEIGHBORING_RELATION,
    composed_epsilon,
    epsilon,
    gathered,
    mixed_epsilon,
)
from fl_dualpriv.privacy.adaptive import AdaptiveClip
from fl_dualpriv.privacy.calibration import calibrate_noise_multiplier
from fl_dualpriv.privacy.clipping import Arithmetic, Clip, ClipRule
from fl_dualpriv.privacy.correlated import CorrelatedNoise
from fl_dualpriv.privacy.ledger import LedgerEvent, ReservedPlan
from fl_dualpriv.privacy.limits import check_clip_norm
from fl_dualpriv.privacy.selection import Selection

ServerUnit = Literal["client", "record", "nominal"]
"""Unit whose data the noise of the server protects; the noise of ``nominal`` proves nothing."""


@dataclass(frozen=True, kw_only=True)
class RoundTerms:
    """Terms on which a server asks a client for its releases of one round, in the symbols of `RecordLevelPlan`.

    Attributes:
        mechanism: Mechanism of the releases; with ``none`` the client sends its raw update.
        trusts_server: True if the client sends the clean clipped sum.
        clip_norm: C; 0 without a mechanism.
        noise_multiplier: z; 0 without a mechanism.
        sampling_rate: q of a local step.
        releases: Number of local steps of the round.
        arithmetic: Arithmetic of clipped sums and noise; ``float`` without a mechanism.
    """

    mechanism: Literal["none", "gaussian"]
    trusts_server: bool
    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    releases: int
    arithmetic: Arithmetic = "float"


def round_terms(plan: "RecordLevelPlan | None", sampling_rate: float, releases: int) -> RoundTerms:
    """Return the terms of a round under a plan, or without record-level privacy."""
    return RoundTerms(
        mechanism="none" if plan is None else "gaussian",
        trusts_server=plan is not None and plan.trusts_server,
        clip_norm=plan.clip_norm if plan else 0.0,
        noise_multiplier=plan.noise_multiplier if plan else 0.0,
        sampling_rate=sampling_rate,
        releases=releases,
        arithmetic=plan.arithmetic if plan else "float",
    )


def check_terms(client_terms: RoundTerms, offered: RoundTerms) -> None:
    """Refuse a server that asks for more than this client's own configuration promises to release.

    Guarantee:
        After this check the client follows ``client_terms``, not ``offered``. So both sides account for a round that
        passes at least as strictly as they promised.

    Raises:
        PrivacyError: If ``offered`` asks for more than ``client_terms`` allow (less noise included), or for another
            mechanism or arithmetic. The message lists all problems.
    """
    problems = []
    if offered.mechanism != client_terms.mechanism:
        problems.append(f"mechanism {offered.mechanism!r:.40}, here {client_terms.mechanism!r}")
    if offered.trusts_server and not client_terms.trusts_server:
        problems.append("an upload without noise (trusts-server), here never")
    if not offered.clip_norm <= client_terms.clip_norm:
        problems.append(f"clip norm {offered.clip_norm:g}, here at most {client_terms.clip_norm:g}")
    if not offered.noise_multiplier >= client_terms.noise_multiplier:
        problems.append(
            f"noise multiplier {offered.noise_multiplier:g}, here at least {client_terms.noise_multiplier:g}"
        )
    if not offered.sampling_rate <= client_terms.sampling_rate:
        problems.append(f"sampling rate {offered.sampling_rate:g}, here at most {client_terms.sampling_rate:g}")
    if not offered.releases <= client_terms.releases:
        problems.append(f"{offered.releases} local steps, here at most {client_terms.releases}")
    if offered.arithmetic != client_terms.arithmetic:  # the other arithmetic has other units, and floats leak more
        problems.append(f"arithmetic {offered.arithmetic!r:.40}, here {client_terms.arithmetic!r}")
    if problems:
        raise PrivacyError(
            "the server asks for more than this client's plan allows: " + "; ".join(problems) + "; the round is refused"
        )


@dataclass(frozen=True, kw_only=True)
class RecordLevelPlan:
    """Plan for every local step of one client: a Poisson batch, one clip, one Gaussian release.

    Attributes:
        clip_norm: C, bound on one record's gradient with respect to the effective prompt; 1e-30 to 1e30.
        noise_multiplier: z, effective multiplier of everything released in one step.
        sampling_rate: q, the probability that a record joins a batch.
        releases: Number of local steps over the whole run.
        delta: δ at which ε is stated.
        trusts_server: True if the server sees the clean clipped sum and noises the global prompt itself.
        personal: True if the client also moves a personal prompt, from its own noised copy of the same sum.
        arithmetic: Arithmetic of clipped sums and noise; the ε is the same (see `rounded_gaussian`).
        selection: Release that selects the start, before the first step; None if the start is public. Each ε of the
            plan includes it.
        clipping: Rule that clips a row to C; both rules have the same sensitivity, see `Clip`.

    Raises:
        ValueError: If ``clip_norm`` is out of range.
    """

    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    releases: int
    delta: float
    trusts_server: bool
    personal: bool
    arithmetic: Arithmetic = "float"
    selection: Selection | None = None
    clipping: ClipRule = "flat"

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)

    @property
    def clip(self) -> Clip:
        """Clip norm and rule."""
        return Clip(self.clip_norm, self.clipping)

    def event(self, run_token: str, server_round: int, releases: int) -> LedgerEvent:
        """Return the event of some steps, which stands in the client's ledger before the first of them."""
        return LedgerEvent(
            run=run_token,
            unit="record",
            server_round=server_round,
            releases=releases,
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
        )

    @property
    def local_noise_multiplier(self) -> float:
        """Multiplier of the noise that the client adds.

        With a trusted server a step yields two noised views of one clipped sum, the client's and the server's. Each has
        multiplier √2·z, so that (z_L⁻² + z_G⁻²)^(−1/2) = z (see `accounting.joint_noise_multiplier`).
        """
        return 2**0.5 * self.noise_multiplier if self.trusts_server else self.noise_multiplier

    @property
    def server_noise_multiplier(self) -> float:
        """Multiplier of the noise that a trusted server adds to the sum over clients; 0 if it is not trusted.

        A client's gradients also depend on its personal prompt, so z_G by itself does *not* cover even the global
        prompts. Only the joint view composes, and its ε is printed for every release.
        """
        if not self.trusts_server:
            return 0.0
        return 2**0.5 * self.noise_multiplier if self.personal else self.noise_multiplier

    def reserved(self, run_token: str) -> ReservedPlan:
        """Return the plan as a line of the ledger, for a filter that charges it before the first release."""
        return ReservedPlan(
            run=run_token,
            releases=self.releases,
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            selection_multiplier=self.selection.noise_multiplier if self.selection else 0.0,
            selection_epsilon=self.selection.pure_epsilon if self.selection else 0.0,
        )

    def spent(self, releases: int, grid: float = COARSE_GRID) -> float:
        """Return an upper bound on ε after ``releases`` steps, with the selection of the start."""
        if self.selection is not None:
            plan = replace(self.reserved(""), releases=releases)
            return mixed_epsilon(plan.charges(), plan.pure, self.delta, grid)
        return epsilon(self.sampling_rate, self.noise_multiplier, releases, self.delta, grid)

    def epsilon(self) -> float:
        """Return ε of the whole run."""
        return self.spent(self.releases, FINE_GRID)


@dataclass(frozen=True, kw_only=True)
class ClientLevelPlan:
    """Plan for every round at the server: a Poisson cohort, one clip per update, one Gaussian release on the sum.

    With ``correlated`` noise cohorts follow a fixed schedule, and all rounds are one Gaussian release together.

    Attributes:
        clip_norm: S, bound on one client's update, 1e-30 to 1e30; with ``adaptive`` the bound of the first round.
        noise_multiplier: z of everything that a round releases, or with ``correlated`` noise the whole run.
        population: Number of clients, which is public.
        expected_cohort: q·population, which is public. It is the divisor of the sum, independent of the clients that
            really take part.
        rounds: Number of releases over the whole run.
        delta: δ at which ε is stated.
        arithmetic: Arithmetic of the sum over the cohort and its noise; the ε is the same (see `rounded_gaussian`).
        adaptive: Rule by which S follows a quantile of the norms, which is released with the sum. None if S is fixed.
        correlated: Noise over all planned rounds of the run, for any number of rounds that are made. None for
            independent noise.
    """

    clip_norm: float
    noise_multiplier: float
    population: int
    expected_cohort: float
    rounds: int
    delta: float
    arithmetic: Arithmetic = "float"
    adaptive: AdaptiveClip | None = None
    correlated: CorrelatedNoise | None = None

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)

    @property
    def sampling_rate(self) -> float:
        """q, the probability that a client joins a round; 1 with correlated noise, which has no amplification."""
        return 1.0 if self.correlated else self.expected_cohort / self.population

    @property
    def sum_noise_multiplier(self) -> float:
        """Noise on a round's sum, divided by S; for ``correlated`` noise see `CorrelatedNoise.sigma`.

        With ``adaptive`` it is larger than z, because z covers the noised share of small updates too.
        """
        return self.adaptive.update_noise_multiplier(self.noise_multiplier) if self.adaptive else self.noise_multiplier

    def spent(self, rounds: int, grid: float = COARSE_GRID) -> float:
        """Return an upper bound on ε after ``rounds`` rounds."""
        if self.correlated is not None:
            # Grouped as in a ledger of these rounds, whose ε must not exceed this ε by a rounding error.
            charges = gathered(self.correlated.charges(self.noise_multiplier, rounds))
            return composed_epsilon(charges, self.delta, grid)
        return epsilon(self.sampling_rate, self.noise_multiplier, rounds, self.delta, grid)

    def epsilon(self) -> float:
        """Return ε of the whole run."""
        return self.spent(self.rounds, FINE_GRID)


def noise_multiplier_for(
    calibrate_to: str, target_epsilon: float, noise_multiplier: float, delta: float, sampling_rate: float, releases: int
) -> float:
    """Return the given multiplier, or one calibrated so that the whole run spends at most ``target_epsilon``."""
    if calibrate_to == "noise-multiplier":
        return noise_multiplier
    return calibrate_noise_multiplier(target_epsilon, delta, sampling_rate, releases)


def plan_for(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    releases: int,
    clip_norm: float,
    clipping: ClipRule = "flat",
    arithmetic: Arithmetic = "float",
) -> RecordLevelPlan:
    """Make the plan of a loop of private steps that together spend at most ε.

    Args:
        epsilon: Target ε.
        delta: δ.
        sampling_rate: q of each Poisson batch.
        releases: Number of steps.
        clip_norm: C.
        clipping: Clipping rule, see `Clip`.
        arithmetic: Arithmetic of sums and noise.

    Raises:
        PrivacyError: If no noise multiplier is enough.

    Example:
        >>> plan = plan_for(epsilon=2.0, delta=1e-5, sampling_rate=0.1, releases=100, clip_norm=1.0)
        >>> 1.98 <= plan.epsilon() <= 2.0
        True
    """
    return RecordLevelPlan(
        clip_norm=clip_norm,
        noise_multiplier=calibrate_noise_multiplier(epsilon, delta, sampling_rate, releases),
        sampling_rate=sampling_rate,
        releases=releases,
        delta=delta,
        trusts_server=False,
        personal=True,
        arithmetic=arithmetic,
        clipping=clipping,
    )


SELECTED_ROW = "selected start"


@dataclass(frozen=True, kw_only=True)
class Release:
    """One kind of release and its guarantee. An ε never stands without its unit, relation, sampling and count.

    Attributes:
        release: Name of the release.
        unit: Unit whose presence is hidden, ``record`` (of one client) or ``client``.
        relation: Neighbouring relation.
        sampling: Description of the sampling of the unit.
        releases: Number of Gaussian releases composed.
        epsilon: ε at ``delta``.
        delta: δ.
        trusts: Party that is trusted to see more than this release.
        guarantee: ``theorem`` or ``nominal`` (the DP-FPL paper's formula, which is no bound).
        note: Reason for the cost of this release.
    """

    release: str
    unit: str
    relation: str
    sampling: str
    releases: int
    epsilon: float
    delta: float
    trusts: str
    guarantee: str = "theorem"
    note: str = ""


def record_level_releases(
    plan: RecordLevelPlan, *, shared: bool, scored: bool, collective: bool = False
) -> list[Release]:
    """List the releases of one client under record-level DP; all are post-processing of the same steps.

    With ``collective`` the personal prompts of all clients are functions of all clients' uploads. A record's part in
    them passes through its own client's steps only, so its ε stays that of this client's plan.

    The ε of each row is the joint one, with the selection of the start. Only the row of the selection shows its own.
    """
    selection = plan.selection

    def row(release: str, note: str) -> Release:
        steps = f"Poisson, q = {plan.sampling_rate:g} per step" if plan.releases else ""
        once = "each record once for the start" if selection else ""
        return Release(
            release=release,
            unit="record",
            relation=NEIGHBORING_RELATION,
            sampling="; ".join(part for part in (steps, once) if part),
            releases=plan.releases + (selection is not None),
            epsilon=plan.epsilon(),
            delta=plan.delta,
            trusts="server" if plan.trusts_server else "nobody",
            note=note,
        )

    rows = []
    if selection is not None:
        by_itself = "the choice of the start by itself; all other rows include it"
        start = replace(row(SELECTED_ROW, by_itself), sampling="none: each record once", releases=1)
        rows.append(replace(start, epsilon=selection.epsilon(plan.delta)))
    if shared and not plan.trusts_server:
        rows.append(row("client upload", "all uploads of one client together"))
    if shared:
        rows.append(row("global prompt", "all rounds together; post-processing of the noised sums"))
    if plan.personal:
        together = "jointly with every global prompt"
        if collective:
            together += "; a function of all clients' uploads, so jointly with all clients' personal prompts"
        rows.append(row("published personal prompt", together))
    if scored:
        rows.append(row("reported metrics", "scores of these prompts on held-out public data"))
    return rows


def client_level_releases(plan: ClientLevelPlan, *, scored: bool) -> list[Release]:
    """List the releases under client-level DP: global prompts and their scores. It does not cover personal prompts."""
    relation, releases = NEIGHBORING_RELATION, plan.rounds
    sampling = f"Poisson cohort, q = {plan.sampling_rate:g} per round"
    together = "all rounds together"
    if plan.adaptive is not None:
        together += ", with the noised shares of small updates that move the clip norm"
    if plan.correlated is not None:
        schedule = plan.correlated.schedule
        relation += " (zero-out)"  # the places of a removed client in the schedule stay, and are empty
        sampling, releases = f"none: every {schedule.separation}. round, at most {schedule.most_rounds} times", 1
        together += ": one Gaussian release, of correlated noise"

    def row(release: str, note: str) -> Release:
        return Release(
            release=release,
            unit="client",
            relation=relation,
            sampling=sampling,
            releases=releases,
            epsilon=plan.epsilon(),
            delta=plan.delta,
            trusts="server",
            note=note,
        )

    rows = [row("global prompt", together)]
    if scored:
        rows.append(row("reported metrics", "scores of the global prompt on held-out public data"))
    return rows


def client_level_notes(plan: ClientLevelPlan) -> list[str]:
    """List the notes for a reader about a moving clip norm, or about noise that spans the run."""
    notes = []
    if plan.adaptive is not None:
        notes.append(
            f"adaptive clipping: the clip norm follows the {plan.adaptive.target_quantile:g} quantile of the updates' "
            f"norms; sums have noise multiplier {plan.sum_noise_multiplier:.4g}, counts "
            f"{plan.adaptive.bit_noise_multiplier:.4g}, together {plan.noise_multiplier:.4g}"
        )
    if plan.correlated is not None:
        noise, schedule = plan.correlated, plan.correlated.schedule
        notes.append(
            f"correlated noise ({noise.describe()}): no client is sampled; each takes part in every "
            f"{schedule.separation}. of {schedule.rounds} rounds, at most {schedule.most_rounds} times, in turns that "
            f"anyone may know; the whole run is one Gaussian release of noise multiplier {plan.noise_multiplier:.4g}"
        )
    return notes


def nominal_releases(nominal_epsilon: float, delta: float, releases: int) -> list[Release]:
    """List the claims of the DP-FPL paper. They are no guarantee: batch clipping bounds no record's influence."""
    names = ("global prompt", "published personal prompt", "reported metrics")
    return [
        Release(
            release=name,
            unit="record",
            relation="replace-one (batch clip)",
            sampling="shuffled batches, no amplification",
            releases=releases,
            epsilon=nominal_epsilon,
            delta=delta,
            trusts="server",
            guarantee="nominal",
            note="arXiv:2501.13904, σ = √(T ln 1/δ)/ε; u, v and p_G each spend the whole ε",
        )
        for name in names
    ]

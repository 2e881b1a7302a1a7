"""Frozen plans that couple sampling, clipping, noise and accounting, one per level, and the table of what is released.

The mechanism is closed on purpose: a new one is a reviewed change here, with a proof and a test.
"""

from dataclasses import dataclass

from fl_dualpriv.privacy.accounting import (
    COARSE_GRID,
    FINE_GRID,
    NEIGHBORING_RELATION,
    calibrate_noise_multiplier,
    epsilon,
)


@dataclass(frozen=True, kw_only=True)
class RecordLevelPlan:
    """Every local step of one client: Poisson batch, one clip, one Gaussian release.

    Attributes:
        clip_norm: C, bound on one record's gradient with respect to the effective prompt.
        noise_multiplier: z, effective multiplier of everything released in one step.
        sampling_rate: q, the probability that a record joins a batch.
        releases: Local steps over the whole run.
        delta: δ at which ε is stated.
        trusts_server: The server sees the clean clipped sum and noises the global prompt itself.
        personal: The client also moves a personal prompt, from its own noised copy of the same sum.
    """

    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    releases: int
    delta: float
    trusts_server: bool
    personal: bool

    @property
    def local_noise_multiplier(self) -> float:
        """Multiplier of the noise that the client adds.

        With a trusted server a step makes two views of one clipped sum, the client's and the server's. Each gets √2·z,
        so that (z_L⁻² + z_G⁻²)^(−1/2) = z (see `accounting.joint_noise_multiplier`).
        """
        return 2**0.5 * self.noise_multiplier if self.trusts_server else self.noise_multiplier

    @property
    def server_noise_multiplier(self) -> float:
        """Multiplier of the noise that a trusted server adds to the sum over clients; 0 if it is not trusted.

        A client's gradients also depend on its personal prompt, so the global prompts alone are *not* covered by z_G
        on its own: only the joint view composes, and its ε is what is printed for every release.
        """
        if not self.trusts_server:
            return 0.0
        return 2**0.5 * self.noise_multiplier if self.personal else self.noise_multiplier

    def spent(self, releases: int, grid: float = COARSE_GRID) -> float:
        """ε after that many steps (an upper bound)."""
        return epsilon(self.sampling_rate, self.noise_multiplier, releases, self.delta, grid)

    def epsilon(self) -> float:
        """ε of the whole run."""
        return self.spent(self.releases, FINE_GRID)


@dataclass(frozen=True, kw_only=True)
class ClientLevelPlan:
    """Every round at the server: Poisson cohort, one clip per update, one Gaussian release on the sum.

    Attributes:
        clip_norm: S, bound on one client's update.
        noise_multiplier: z; noise of std z·S goes on the sum.
        population: Number of clients, public.
        expected_cohort: q·population, public; the divisor, whoever really takes part.
        rounds: Releases over the whole run.
        delta: δ at which ε is stated.
    """

    clip_norm: float
    noise_multiplier: float
    population: int
    expected_cohort: float
    rounds: int
    delta: float

    @property
    def sampling_rate(self) -> float:
        """q, the probability that a client joins a round."""
        return self.expected_cohort / self.population

    def spent(self, rounds: int, grid: float = COARSE_GRID) -> float:
        """ε after that many rounds (an upper bound)."""
        return epsilon(self.sampling_rate, self.noise_multiplier, rounds, self.delta, grid)

    def epsilon(self) -> float:
        """ε of the whole run."""
        return self.spent(self.rounds, FINE_GRID)


def noise_multiplier_for(
    calibrate_to: str, target_epsilon: float, noise_multiplier: float, delta: float, sampling_rate: float, releases: int
) -> float:
    """The multiplier a plan uses: given, or calibrated so that the whole run spends at most ``target_epsilon``."""
    if calibrate_to == "noise-multiplier":
        return noise_multiplier
    return calibrate_noise_multiplier(target_epsilon, delta, sampling_rate, releases)


@dataclass(frozen=True, kw_only=True)
class Release:
    """One thing that leaves, and what it reveals. Never an ε without unit, relation, sampling and count beside it.

    Attributes:
        release: What leaves.
        unit: Whose presence is hidden: ``record`` (of one client) or ``client``.
        relation: Neighbouring relation.
        sampling: How the unit is sampled.
        releases: Number of Gaussian releases composed.
        epsilon: ε at ``delta``.
        delta: δ.
        trusts: Who is trusted to see more than this release.
        guarantee: ``theorem`` or ``nominal`` (a published formula that is not a bound).
        note: Why this release costs what it costs.
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


def record_level_releases(plan: RecordLevelPlan, *, shared: bool, scored: bool) -> list[Release]:
    """What leaves under record-level DP, for one client; everything is post-processing of the same steps."""

    def row(release: str, note: str) -> Release:
        return Release(
            release=release,
            unit="record",
            relation=NEIGHBORING_RELATION,
            sampling=f"Poisson, q = {plan.sampling_rate:g} per step",
            releases=plan.releases,
            epsilon=plan.epsilon(),
            delta=plan.delta,
            trusts="server" if plan.trusts_server else "nobody",
            note=note,
        )

    rows = []
    if shared and not plan.trusts_server:
        rows.append(row("client upload", "all uploads of one client together"))
    if shared:
        rows.append(row("global prompt", "all rounds together; post-processing of the noised sums"))
    if plan.personal:
        rows.append(row("published personal prompt", "jointly with every global prompt"))
    if scored:
        rows.append(row("reported metrics", "scores of these prompts on held-out public data"))
    return rows


def client_level_releases(plan: ClientLevelPlan, *, scored: bool) -> list[Release]:
    """What leaves under client-level DP: the global prompts, and scores of them. Personal prompts are not covered."""

    def row(release: str, note: str) -> Release:
        return Release(
            release=release,
            unit="client",
            relation=NEIGHBORING_RELATION,
            sampling=f"Poisson cohort, q = {plan.sampling_rate:g} per round",
            releases=plan.rounds,
            epsilon=plan.epsilon(),
            delta=plan.delta,
            trusts="server",
            note=note,
        )

    rows = [row("global prompt", "all rounds together")]
    if scored:
        rows.append(row("reported metrics", "scores of the global prompt on held-out public data"))
    return rows


def nominal_releases(nominal_epsilon: float, delta: float, releases: int) -> list[Release]:
    """The claim of the published DP-FPL procedure. Batch clipping bounds no record's influence: not a guarantee."""
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

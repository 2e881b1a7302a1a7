"""The owner's lifetime budget: all that may ever be released about one record of the owner's data, and on which terms.

A plan (`privacy.plan`) is the promise of a run; in Flower the user who submits the run writes it. A budget belongs to
the owner: it lies beside the data, and no message or run configuration can change it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fl_dualpriv.errors import PrivacyError

if TYPE_CHECKING:  # a SuperNode reads a budget and needs neither torch nor an accountant
    from fl_dualpriv.privacy.plan import RecordLevelPlan

FilterName = Literal["reserve", "renyi", "worst-terms"]


@dataclass(frozen=True, kw_only=True)
class FilterChoice:
    """The rule that admits releases to a ledger for its whole life, and its public numbers; see `privacy.filters`.

    Attributes:
        name: Name of the rule. ``reserve``: the whole plan of each run is charged before its first release. ``renyi``:
            the releases' Rényi divergences at one fixed order add up. ``worst-terms``: each release is charged at the
            owner's largest q and smallest z.
        expected_runs: ``reserve``: the number of runs among which δ is divided, and the largest number of admitted
            runs.
        composition: ``reserve``: the way in which plans add up, ``sum`` or ``advanced``. The latter needs
            ``delta_prime``.
        delta_prime: ``advanced``: the part of δ that the composition itself costs; 0 with ``sum``.
        max_run_epsilon: ``reserve``: the largest cost of the plan of one run, and the charge of a damaged line. None:
            one run may take all that is left, and a damaged line closes the ledger.
        max_round_releases: Largest number of releases of one round, which is one line of the ledger. A damaged line is
            charged as that many releases, at the owner's worst terms.
        expected_sampling_rate: ``renyi``: q of the runs that the owner expects, from which the order follows. None: the
            largest q that is allowed.
        expected_noise_multiplier: ``renyi``: z of these runs. None: the smallest z that is allowed.
        max_correlated_releases: ``worst-terms``: the number of rounds of correlated noise that are charged beforehand;
            more are refused.
        min_correlated_noise_multiplier: ``worst-terms``: the smallest multiplier of such a round; 0 if there is none.
    """

    name: FilterName = "reserve"
    expected_runs: int = 10
    composition: Literal["sum", "advanced"] = "sum"
    delta_prime: float = 0.0
    max_run_epsilon: float | None = None
    max_round_releases: int = 100
    expected_sampling_rate: float | None = None
    expected_noise_multiplier: float | None = None
    max_correlated_releases: int = 0
    min_correlated_noise_multiplier: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits for one client's data at the record level.

    Attributes:
        epsilon: Bound on ε of everything that is ever released, over all runs and servers, > 0. It holds for any terms
            that a server chooses after seeing earlier releases.
        delta: δ at which ``epsilon`` is stated, in (0, 1).
        max_sampling_rate: Largest q of a step.
        min_noise_multiplier: Smallest z of a step, and of the selection of a start. A choice by the exponential
            mechanism has the z of the Gaussian release that dominates it.
        max_clip_norm: Largest C of a step.
        trusts_server: True if a clean clipped sum may go to the server.
        scores: True if accuracies on the held-out images may leave. Set it only if those images are public.
        seeded_noise: True if noise may come from a seed that others know. Such noise protects no record; it is for
            tests.
        integer_arithmetic: True if sums and noise must be exact integers. Otherwise a run chooses, and may take floats.
        filter: The rule that enforces ``epsilon``; it is fixed when the ledger begins.
    """

    epsilon: float
    delta: float
    max_sampling_rate: float
    min_noise_multiplier: float
    max_clip_norm: float
    trusts_server: bool
    scores: bool
    seeded_noise: bool
    integer_arithmetic: bool = False
    filter: FilterChoice = FilterChoice()

    def check_plan(self, plan: "RecordLevelPlan | None", *, reproducible: bool) -> None:
        """Refuse a run whose steps do not satisfy the owner's terms.

        Args:
            plan: Plan in the run's configuration. None if the run would train without record-level privacy.
            reproducible: True if the noise of the run comes from a seed.

        Raises:
            PrivacyError: If a term is not allowed. The message lists all problems.
        """
        if plan is None:
            raise PrivacyError(
                "the run trains without record-level differential privacy; the owner of this node releases nothing "
                'without it: set privacy.record.mechanism = "gaussian" and a method that supports it'
            )
        problems = []
        if not plan.sampling_rate <= self.max_sampling_rate:
            problems.append(f"sampling rate {plan.sampling_rate:g}, at most {self.max_sampling_rate:g}")
        if not plan.noise_multiplier >= self.min_noise_multiplier:
            problems.append(f"noise multiplier {plan.noise_multiplier:g}, at least {self.min_noise_multiplier:g}")
        if plan.selection is not None and not plan.selection.noise_multiplier >= self.min_noise_multiplier:
            problems.append(
                f"a selection of the start at noise multiplier {plan.selection.noise_multiplier:.4g}"
                f"{' (of its dominating Gaussian)' if plan.selection.pure_epsilon else ''}, at least "
                f"{self.min_noise_multiplier:g}"
            )
        if not plan.clip_norm <= self.max_clip_norm:
            problems.append(f"clip norm {plan.clip_norm:g}, at most {self.max_clip_norm:g}")
        if plan.trusts_server and not self.trusts_server:
            problems.append("an upload without noise (trusts-server), never")
        if self.integer_arithmetic and plan.arithmetic != "integer":
            problems.append(f'privacy.arithmetic = "{plan.arithmetic}", only "integer"')
        if reproducible and not self.seeded_noise:
            problems.append('noise from a seed (privacy.randomness = "seeded"), never')
        if problems:
            raise PrivacyError(
                "the run breaks the limits of the owner of this node: " + "; ".join(problems) + "; it is refused"
            )

"""Privacy plans of both levels, derived from a configuration."""

import math
from typing import TypeVar

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.adaptive import AdaptiveClip
from fl_dualpriv.privacy.calibration import calibrate_beside, calibrate_noise_multiplier
from fl_dualpriv.privacy.correlated import (
    BandedNoise,
    CorrelatedNoise,
    RoundRobin,
    TreeNoise,
    best_bands,
    separation_for,
)
from fl_dualpriv.privacy.limits import LARGEST_DRAWN_MULTIPLIER
from fl_dualpriv.privacy.plan import ClientLevelPlan, RecordLevelPlan, ServerUnit, noise_multiplier_for
from fl_dualpriv.privacy.selection import Selection, SelectionTerms, choice, selection_terms

_MOST_BANDS = 64  # unless configured: the server remembers about as many arrays of the prompt's size

Plan = TypeVar("Plan", RecordLevelPlan, ClientLevelPlan)


def noised_unit(config: RunConfig) -> ServerUnit | None:
    """Return the unit that the server's noise protects; None if the server adds none. It needs no calibration."""
    record, method = config.privacy.record, config.local_method
    if config.privacy.client.mechanism != "none":
        return "client"
    if record.mechanism == "none" or not method.trains:
        return None
    if method.published_procedure:
        return "nominal"
    return "record" if record.trusts_server else None


def record_level_plan(config: RunConfig) -> RecordLevelPlan | None:
    """Return the record-level plan, calibrated for all local steps; None without one or for the nominal method."""
    record, method = config.privacy.record, config.local_method
    if record.mechanism == "none" or method.published_procedure or not (method.trains or config.selects_start):
        return None
    releases = config.rounds * config.train.local_steps if method.trains else 0
    rate, selection = config.train.sampling_rate, start_selection(config)
    if selection is None:
        noise_multiplier = noise_multiplier_for(
            record.calibrate_to, record.epsilon, record.noise_multiplier, record.delta, rate, releases
        )
    elif not releases:
        noise_multiplier = selection.noise_multiplier
    elif record.calibrate_to == "noise-multiplier":
        noise_multiplier = record.noise_multiplier
    else:
        noise_multiplier = calibrate_beside(
            record.epsilon, record.delta, rate, releases, selection.charges, selection.pure
        )
    plan = RecordLevelPlan(
        clip_norm=record.clip_norm,
        noise_multiplier=noise_multiplier,
        sampling_rate=rate,
        releases=releases,
        delta=record.delta,
        trusts_server=record.trusts_server,
        personal=method.personal or config.chooses_start_by_client,
        arithmetic=config.privacy.arithmetic,
        selection=selection,
        clipping=record.clipping,
    )
    return _bounded(plan, plan.releases, "privacy.record")


def start_selection(config: RunConfig) -> Selection | None:
    """Return the terms of the release that selects the start; None if the start is public, or nothing is noised.

    By itself the selection spends ``selection-share`` of ``privacy.record.epsilon``, or all of it if no step follows.
    """
    record = config.privacy.record
    if not config.selects_start or record.mechanism == "none":
        return None
    share = record.selection_share if config.local_method.trains else 1.0
    if config.chooses_start_by_client:
        return choice(share * record.epsilon)
    noise_multiplier = calibrate_noise_multiplier(share * record.epsilon, record.delta, 1.0, 1)
    return Selection(form="federated", noise_multiplier=noise_multiplier)


def start_selection_terms(config: RunConfig, plan: RecordLevelPlan | None, candidates: int) -> SelectionTerms:
    """Return the terms on which clients are asked to select a start from a number of candidates."""
    selection = plan.selection if plan else None
    return selection_terms(config.prompt.select, selection, config.privacy.arithmetic, candidates)


def client_level_plan(config: RunConfig) -> ClientLevelPlan | None:
    """Return the client-level plan of the run, calibrated for all rounds; None without one."""
    client = config.privacy.client
    if client.mechanism == "none":
        return None
    correlated = correlated_noise(config)
    # With correlated noise all rounds are one release that includes every client.
    rate, releases = (1.0, 1) if correlated else (client.expected_cohort / config.population, config.rounds)
    plan = ClientLevelPlan(
        clip_norm=client.clip_norm,
        noise_multiplier=noise_multiplier_for(
            client.calibrate_to, client.epsilon, client.noise_multiplier, client.delta, rate, releases
        ),
        population=config.population,
        expected_cohort=client.expected_cohort,
        rounds=config.rounds,
        delta=client.delta,
        arithmetic=config.privacy.arithmetic,
        adaptive=adaptive_clip(config),
        correlated=correlated,
    )
    try:
        _ = plan.sum_noise_multiplier
    except ValueError as error:
        least = plan.noise_multiplier / 2 / client.expected_cohort
        raise PrivacyError(
            f"privacy.client.bit-noise-share = {client.bit_noise_share:g}: {error}; raise it above {least:.3g}"
        ) from error
    drawn = max(plan.sum_noise_multiplier, plan.adaptive.bit_noise_multiplier if plan.adaptive else 0.0)
    if drawn > LARGEST_DRAWN_MULTIPLIER:
        raise PrivacyError(
            f"privacy.client.bit-noise-share = {client.bit_noise_share:g}: noise of {drawn:.3g} times the sensitivity; "
            f"at most {LARGEST_DRAWN_MULTIPLIER:.3g} can be drawn exactly. 0.05 is usual: a twentieth of the cohort"
        )
    return _bounded(plan, plan.rounds, "privacy.client")


def adaptive_clip(config: RunConfig) -> AdaptiveClip | None:
    """Return the rule that moves the clip norm of client updates; None if the clip norm is fixed."""
    client = config.privacy.client
    if client.clipping == "fixed":
        return None
    return AdaptiveClip(
        start=client.clip_norm,
        target_quantile=client.target_quantile,
        learning_rate=client.clip_learning_rate,
        bit_noise=client.bit_noise_share * client.expected_cohort,
        expected_cohort=client.expected_cohort,
    )


def correlated_noise(config: RunConfig) -> CorrelatedNoise | None:
    """Return the correlated noise of the run with the schedule that it needs; None if the noise is independent."""
    client = config.privacy.client
    if client.mechanism not in ("tree", "banded"):
        return None
    separation = separation_for(config.population, client.expected_cohort)
    schedule = RoundRobin(rounds=config.rounds, separation=separation)
    if client.mechanism == "tree":
        return TreeNoise(schedule=schedule)
    return BandedNoise(schedule=schedule, bands=client.bands or best_bands(schedule, _MOST_BANDS))


def _bounded(plan: Plan, releases: int, section: str) -> Plan:
    """Refuse a plan without a finite ε: below the accountant's resolution in δ, ε is infinite."""
    if not (math.isfinite(plan.epsilon()) and math.isfinite(plan.spent(releases))):
        raise PrivacyError(
            f"{section}.delta = {plan.delta:g} with noise multiplier {plan.noise_multiplier:g} over {releases} "
            "releases: no finite ε can be shown; raise delta or the noise"
        )
    return plan

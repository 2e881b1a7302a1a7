"""All releases of a run, per level, and the notes that a reader needs beside the privacy table."""

import math

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.privacy.plan import (
    ClientLevelPlan,
    RecordLevelPlan,
    Release,
    client_level_notes,
    client_level_releases,
    nominal_releases,
    record_level_releases,
)


def list_releases(
    config: RunConfig, record: RecordLevelPlan | None, client: ClientLevelPlan | None, *, scored: bool
) -> list[Release]:
    """List all releases of the run, per level; empty without differential privacy."""
    method = config.local_method
    releases = []
    if record is not None:
        is_collective = config.prompt.personalisation == "collective"
        releases += record_level_releases(record, shared=method.shared, scored=scored, collective=is_collective)
    if client is not None:
        # Scores of personal prompts are functions of un-noised client data, unless the record level covers them.
        releases += client_level_releases(client, scored=scored and (record is None or not method.personal))
    nominal = config.privacy.record
    if method.published_procedure and nominal.mechanism == "gaussian":
        releases += nominal_releases(nominal.epsilon, nominal.delta, config.nominal_steps)
    return releases


def notes(
    config: RunConfig, record: RecordLevelPlan | None, client: ClientLevelPlan | None, *, scored: bool
) -> list[str]:
    """List the notes that a reader needs beside the privacy table."""
    method = config.local_method
    lines = []
    if config.privacy.randomness == "seeded" and (record or client):
        lines.append("reproducible noise: do not publish (privacy.randomness = seeded)")
    if record and record.trusts_server:
        lines.append("trusts-server: the server sees each client's clean clipped sums")
    if record and record.selection:
        by = "each client's own choice" if record.selection.pure_epsilon else "a vote of all clients"
        rest = f"; the steps get the rest of ε = {record.epsilon():.4g}" if record.releases else ""
        lines.append(
            f"selected start, by {by}: ε = {record.selection.epsilon(record.delta):.4g} by itself, before round 1{rest}"
        )
    if client:
        lines.append("client level: the server sees each client's update; personal prompts are not covered")
        lines += client_level_notes(client)
    if client and not record and method.personal:
        lines.append("scores are of the global prompt: scores of personal prompts would not be covered")
    if client and record and method.personal:
        lines.append("scores are of personal prompts: covered at record level, not at client level")
    if method.published_procedure and config.privacy.record.mechanism == "gaussian":
        is_code = config.dpfpl_paper.published == "code"
        formulas = "formulas of the authors' code" if is_code else "the paper's formulas, not the authors' code"
        lines.append(f"dpfpl-paper: {formulas}; ε is nominal, not a guarantee")
    if record and config.train.top_m:
        lines.append(f"top-m = {config.train.top_m}: each record back-propagates its largest residuals only, a bias")
    if record and config.privacy.record.noise_space == "feature":
        lines.append("noise-space = feature: gradients of the class features are clipped and noised, not the prompt's")
    if config.train.class_prior != "none" and method.trains:
        lines.append(prior_note(config.train.class_prior))
    if (record or client) and config.privacy.arithmetic == "integer":
        lines.append("arithmetic = integer: exact sums, integer noise; low-order bits tell nothing about the data")
    if not scored:
        lines.append(
            "no scores: the held-out images are private (evaluation.held-out-data); give a test/ folder, or declare "
            'them with evaluation.held-out-data = "public"'
        )
    if not config.claims_privacy and (method.trains or config.selects_start):
        lines.append("no differential privacy")
    return lines


def prior_note(kind: str) -> str:
    """Say for readers of accuracies, and for users of a prompt, that a run has a class prior."""
    return (
        f"class-prior = {kind}: balanced softmax; local, general and new-client accuracies of trained prompts are with "
        "the client's class prior, which is added to the logits at home and is no part of a prompt"
    )


def may_repeat(config: RunConfig) -> bool:
    """Return True if a round whose result was seen may be repeated, as the same release or as a further one.

    Correlated noise is one release of all rounds, so one round must not have a second draw of noise. Clients that trust
    the server send the same sums again. A second noise on these sums is a further look at the same sample, which costs
    more than the further sample that the ledger would charge. A repeated round with independent client-level noise
    draws a new cohort.
    """
    privacy = config.privacy
    independent = privacy.client.mechanism in ("none", "gaussian") and not privacy.record.trusts_server
    return privacy.randomness == "seeded" or independent


def round_of_epsilon(server_round: int, rounds: int) -> int:
    """Return the round whose ε is shown as spent: this round, or in a long run a later one with an ε no smaller.

    Each ε costs about a tenth of a second of CPU, more than a round of a small prompt, so a run computes at most 25.
    """
    stride = math.ceil(rounds / 25)
    return min(math.ceil(server_round / stride) * stride, rounds)

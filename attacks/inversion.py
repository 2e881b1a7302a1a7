"""Gradient inversion by a curious server on one client's upload, which the client's real code computes.

The attack takes place in round 1, where the server knows the client's whole effective prompt, because p_L is still
zero. One local step on a few records is the most favourable upload for the server. A round of several steps is a sum of
such uploads at prompts that the server does not see, and in later rounds p_L is hidden as well.
"""

import math
import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attacks.federation import Federation
from attacks.membership import claimed
from attacks.reconstruction import Reconstruction, Sent, jacobian, prior_of, reconstruct
from fl_dualpriv.client.published_step import published_updates
from fl_dualpriv.client.round import local_training, published_training
from fl_dualpriv.client.state import fresh_state
from fl_dualpriv.client.step import Participant, cohort_update
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.methods.published import CLIP
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey


@dataclass(frozen=True, kw_only=True)
class InversionResult:
    """Scores of the reconstructions, beside those of a guess without the upload.

    Attributes:
        epsilon_claimed: The proved ε of one record at ``delta``; ``nominal`` for the DP-FPL paper's ε; ``none`` if
            there is no claim.
        delta: δ of the claim; 0 without a claim.
        inversion_score: Mean cosine of true and reconstructed features after best matching, over all uploads.
        baseline_score: Mean cosine of true features and the average image feature.
        advantage_low: Lower end of the 95 % interval of score − baseline, over uploads.
        advantage_high: Upper end of that interval.
        label_accuracy: Share of records whose label was reconstructed.
        label_chance: Share of labels that a random guess gets right.
        records: Number of records in one upload.
        uploads: Number of attacked uploads.
        score_by_upload: Score of each upload, which shows the spread.
    """

    epsilon_claimed: float | Literal["nominal", "none"]
    delta: float
    inversion_score: float
    baseline_score: float
    advantage_low: float
    advantage_high: float
    label_accuracy: float
    label_chance: float
    records: int
    uploads: int
    score_by_upload: tuple[float, ...]

    @property
    def recovered(self) -> float:
        """Share of the squared distance to the truth that the upload removes: 0 = nothing, 1 = all of it."""
        return 1 - (1 - self.inversion_score) / (1 - self.baseline_score)


def audit_inversion(config: RunConfig, seed: int, *, records: int = 1, uploads: int = 10) -> InversionResult:
    """Let clients upload one local step on a few of their records each, and reconstruct the records.

    Args:
        config: The run to audit: its method, tower, clip and noise.
        seed: Seed of the choice of records, the noise and the search.
        records: Records per upload, at least 1. The clip, and the noise on the sum, are those of the run.
        uploads: Number of attacks, at least 2, on the clients in turn.

    Raises:
        ConfigError: If nothing is uploaded, if records or images are missing, or if the upload cannot be modelled.
    """
    federation = Federation(config)
    _check(federation, records, uploads)
    rng = np.random.default_rng([seed, zlib.crc32(b"inversion")])
    clients = [federation.records(p) for p in range(min(config.population, uploads))]
    if (fewest := min(data.num_examples for data in clients)) < records:
        raise ConfigError(f"records = {records}, but a client has {fewest} only; give fewer")
    # Public images similar to the clients' images give the server its prior.
    public = federation.task.held_out("val").features
    prior = prior_of(public[torch.isfinite(public).all(dim=1)])
    prompt = federation.start.to(federation.device)
    features = federation.tower(prompt[None])
    matrix, classes = jacobian(features), features.values[0]
    scores, baselines, right = [], [], 0
    for number in range(uploads):
        data = clients[number % len(clients)]
        picked = torch.from_numpy(np.sort(rng.permutation(data.num_examples)[:records])).to(federation.device)
        batch = replace(data, features=data.features[picked], labels=data.labels[picked])
        upload = _upload(federation, prompt, batch, zlib.crc32(f"inversion/{seed}/{number}".encode()))
        sent = _sent(federation, upload, matrix, classes, batch)
        reconstruction = reconstruct(sent, prior, zlib.crc32(f"start/{seed}/{number}".encode()))
        score, same = _compare(reconstruction, batch)
        scores.append(score)
        baselines.append(float((batch.features @ prior.guess).mean()))
        right += same
    gains = np.subtract(scores, baselines)
    reach = float(stats.t.ppf(0.975, uploads - 1)) * float(gains.std(ddof=1)) / math.sqrt(uploads)
    epsilon, delta = claimed(federation)
    return InversionResult(
        epsilon_claimed=epsilon,
        delta=delta,
        inversion_score=float(np.mean(scores)),
        baseline_score=float(np.mean(baselines)),
        advantage_low=float(gains.mean()) - reach,
        advantage_high=float(gains.mean()) + reach,
        label_accuracy=right / (uploads * records),
        label_chance=1 / len(classes),
        records=records,
        uploads=uploads,
        score_by_upload=tuple(scores),
    )


def _check(federation: Federation, records: int, uploads: int) -> None:
    config = federation.config
    if records < 1 or uploads < 2:
        raise ConfigError(f"records = {records}, uploads = {uploads}; give at least 1 and 2")
    if not federation.method.shared or config.train.global_learning_rate == 0:
        raise ConfigError(
            f"method = {config.method!r} with train.global-learning-rate = {config.train.global_learning_rate:g} "
            "uploads nothing, so there is nothing to invert"
        )
    if config.privacy.record.mechanism != "none" and config.privacy.record.noise_space == "feature":
        raise ConfigError('privacy.record.noise-space = "feature" cannot be inverted here; set "prompt"')
    if config.train.top_m and not federation.method.published_procedure and federation.plan is not None:
        raise ConfigError(f"train.top-m = {config.train.top_m} cannot be inverted here; set train.top-m = 0")


def _upload(federation: Federation, prompt: Tensor, batch: ClientData, seed: int) -> Tensor:
    """Return a client's upload after one step with all these records in the batch."""
    config = federation.config

    def random(purpose: str, step: int) -> RandomSource:
        return KeyedRandom(StreamKey(seed=seed, purpose=purpose, step=step))

    n_ctx, ctx_dim = prompt.shape
    state = fresh_state(n_ctx, ctx_dim, config.prompt.rank).to(federation.device)
    participant = Participant(partition=0, state=state, data=batch, random=random)
    if federation.method.published_procedure:
        numbers = replace(published_training(config, participant), local_steps=1, batch_size=batch.num_examples)
        results = published_updates(
            global_prompt=prompt,
            participants=[participant],
            tower=federation.tower,
            logit_scale=federation.task.logit_scale,
            training=lambda _: numbers,
        )
    else:
        results = cohort_update(
            global_prompt=prompt,
            participants=[replace(participant, event=federation.plan and federation.plan.event("attack", 1, 1))],
            objective=federation.objective,
            method=federation.method,
            training=replace(local_training(config), local_steps=1, sampling_rate=1.0),
            plan=federation.plan,
        )
    return results[0][0]


def _sent(federation: Federation, upload: Tensor, matrix: Tensor, classes: Tensor, batch: ClientData) -> Sent:
    """Undo the public parts of an upload: learning rate, divisor and pruned context tokens."""
    plan, flat = federation.plan, upload.flatten().to(classes.dtype)
    total = -flat / federation.config.train.global_learning_rate
    trusting = plan is not None and plan.trusts_server
    if not trusting:  # a client that trusts the server uploads the sum, other clients the mean
        total = total * batch.num_examples
    # A token with an update of exactly zero was pruned, because noise and gradients are never exactly zero.
    seen = (upload != 0).any(dim=1, keepdim=True).expand_as(upload).flatten()
    return Sent(
        total=total,
        seen=seen.to(classes.dtype),
        jacobian=matrix,
        classes=classes,
        logit_scale=federation.task.logit_scale,
        clip_norm=math.inf if plan is None else plan.clip_norm,
        batch_clip=CLIP if federation.method.published_procedure else math.inf,
        noise_std=0.0 if plan is None or trusting else plan.local_noise_multiplier * plan.clip_norm,
        records=batch.num_examples,
        log_prior=batch.log_prior,
    )


def _compare(reconstruction: Reconstruction, batch: ClientData) -> tuple[float, int]:
    """Return the mean cosine under the best matching, and the number of matched records with the right label."""
    cosines = (batch.features @ reconstruction.features.T).cpu().numpy()
    true, guessed = linear_sum_assignment(cosines, maximize=True)
    same = (batch.labels.cpu().numpy()[true] == reconstruction.labels.cpu().numpy()[guessed]).sum()
    return float(cosines[true, guessed].mean()), int(same)

"""Membership inference on published personal prompts: was this record of this client trained on?

Members and non-members come from one distribution: before each training a fair coin decides for every record of every
client whether the client trains on it. No client trains on the other records. The same federation is trained many times
with fresh coins, batches and noise. Each training is attacked once, and all others then serve as the attacker's shadow
trainings. The attacker therefore knows the configuration, the data, the start, and all coins except those of the
training under attack.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from attacks.federation import Federation
from attacks.roc import Roc, auc_ceiling, roc
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.base import ClientData

_FEWEST_RECORDS = 16  # a client then has no member with probability 2^-16; an audit makes hundreds of such draws
_FEWEST_TRAININGS = 8


@dataclass(frozen=True, kw_only=True)
class MembershipResult:
    """Results of two attacks, beside the claim of the run.

    Attributes:
        epsilon_claimed: The proved ε of one record at ``delta``; ``nominal`` for the DP-FPL paper's ε; ``none`` if
            there is no claim.
        delta: δ of the claim; 0 without a claim.
        auc_ceiling: Largest AUC of any attack if the claim is true; 1 without a proof.
        loss_threshold: The attack that calls records with a small loss members.
        lira: The likelihood-ratio attack with shadow trainings.
        trainings: Number of trainings; each is attacked once and is a shadow training for all others.
        auc_by_training: AUC of the stronger attack on each training, which shows the spread.
    """

    epsilon_claimed: float | Literal["nominal", "none"]
    delta: float
    auc_ceiling: float
    loss_threshold: Roc
    lira: Roc
    trainings: int
    auc_by_training: tuple[float, ...]

    @property
    def stronger(self) -> Roc:
        """The attack with the larger AUC, because an audit must report its best attack."""
        return max(self.loss_threshold, self.lira, key=lambda curve: curve.auc)

    @property
    def mia_auc(self) -> float:
        """AUC of the stronger attack."""
        return self.stronger.auc

    @property
    def tpr_at_1_fpr(self) -> float:
        """The larger true-positive rate at a false-positive rate of 1 %."""
        return max(self.loss_threshold.tpr_at_1_fpr, self.lira.tpr_at_1_fpr)


def audit_membership(config: RunConfig, seed: int, *, trainings: int = 8, records: int | None = 64) -> MembershipResult:
    """Train the federation many times on random halves of its records, and attack each published prompt.

    Args:
        config: The run to audit: its method, rounds, noise and data.
        seed: Seed of coins, batches and noise.
        trainings: Number of trainings, at least 8; more trainings give a better likelihood ratio. The defaults take
            one to two minutes of one core on the demo.
        records: Most records per client. A random choice of this size is made before the coins; None keeps all.

    Raises:
        ConfigError: If a client has too few records for the coins, the run cannot be attacked, or a training diverges.
    """
    if trainings < _FEWEST_TRAININGS:
        raise ConfigError(f"trainings = {trainings}; the likelihood ratio needs at least {_FEWEST_TRAININGS}")
    federation = Federation(config)
    rng = np.random.default_rng([seed, zlib.crc32(b"membership")])
    clients = [_some(federation.records(p), records, rng) for p in range(config.population)]
    fewest = min(data.num_examples for data in clients)
    if fewest < _FEWEST_RECORDS:
        raise ConfigError(
            f"a client has {fewest} records to toss coins for; at least {_FEWEST_RECORDS} are needed: lower "
            "population, or raise records"
        )
    owner = np.repeat(np.arange(len(clients)), [data.num_examples for data in clients])
    is_member = rng.random((trainings, len(owner))) < 0.5
    evidence = np.stack(
        [
            confidence(federation, clients, federation.train(_chosen(clients, owner, coins), _seed(seed, number)))
            for number, coins in enumerate(is_member)
        ]
    )
    if not np.isfinite(evidence).all():
        raise ConfigError("a training under attack diverged: its losses are not finite; lower the learning rates")
    return _result(federation, evidence, is_member)


def confidence(federation: Federation, clients: list[ClientData], prompts: Tensor) -> np.ndarray:
    """Return φ = log p_y/(1 − p_y) of every record under the published prompt of its client, (record,), float64.

    φ is a monotone function of the loss log(1 + e^−φ), and over trainings it is closer to Gaussian than the loss or
    p_y.

    Args:
        federation: Source of tower and temperature.
        clients: Records of each client.
        prompts: One prompt per client, (client, n_ctx, ctx_dim).

    Reference:
        Carlini et al. 2022, arXiv:2112.03570, section V-C.
    """
    confidences = []
    for data, classes in zip(clients, federation.tower.values(prompts), strict=True):
        logits = federation.task.logit_scale * (data.features @ classes.T).to(torch.float64)
        if data.log_prior is not None:  # public, and a part of the loss
            logits = logits + data.log_prior
        true = logits.gather(1, data.labels[:, None])
        others = logits.scatter(1, data.labels[:, None], -torch.inf)
        confidences.append((true[:, 0] - torch.logsumexp(others, dim=1)).cpu())
    return torch.cat(confidences).numpy()


def likelihood_ratios(evidence: np.ndarray, is_member: np.ndarray) -> np.ndarray:
    """Return log N(φ; in) − log N(φ; out) of each record in each training, fitted on all *other* trainings.

    A record's two normal distributions have separate means and one variance, pooled over both. With tens of trainings
    separate variances are too noisy (the authors pool too, over records, below 64 shadows). A record without two
    trainings of each kind among the others is NaN; that depends only on their coins, not on the coin to be guessed.

    Args:
        evidence: φ, (training, record).
        is_member: Coins, (training, record) bool.

    Returns:
        The log ratios, (training, record).

    Reference:
        Carlini et al. 2022, arXiv:2112.03570, Algorithm 1 (online attack).
    """
    inside = is_member.astype(np.float64)
    # Leave-one-out sums: the sum over all trainings minus the training's own term.
    count_in, sum_in, square_in = (_without_own(inside * power) for power in (1.0, evidence, evidence**2))
    outside = 1 - inside
    count_out, sum_out, square_out = (_without_own(outside * power) for power in (1.0, evidence, evidence**2))
    enough = (count_in >= 2) & (count_out >= 2)
    n_in, n_out = np.maximum(count_in, 1), np.maximum(count_out, 1)
    mean_in, mean_out = sum_in / n_in, sum_out / n_out
    spread = square_in - n_in * mean_in**2 + square_out - n_out * mean_out**2
    variance = np.maximum(spread, 1e-12) / np.maximum(count_in + count_out - 2, 1)
    ratio = ((evidence - mean_out) ** 2 - (evidence - mean_in) ** 2) / (2 * variance)
    return np.where(enough, ratio, np.nan)


def _without_own(terms: np.ndarray) -> np.ndarray:
    return terms.sum(axis=0, keepdims=True) - terms


def _result(federation: Federation, evidence: np.ndarray, is_member: np.ndarray) -> MembershipResult:
    ratios = likelihood_ratios(evidence, is_member)
    training = np.broadcast_to(np.arange(len(evidence))[:, None], evidence.shape)
    loss = roc(evidence.ravel(), is_member.ravel(), training.ravel())
    known = np.isfinite(ratios)
    lira = roc(ratios[known], is_member[known], training[known])
    best, usable = (ratios, known) if lira.auc >= loss.auc else (evidence, np.ones_like(known))
    epsilon, delta = claimed(federation)
    return MembershipResult(
        epsilon_claimed=epsilon,
        delta=delta,
        auc_ceiling=auc_ceiling(epsilon, delta) if isinstance(epsilon, float) else 1.0,
        loss_threshold=loss,
        lira=lira,
        trainings=len(evidence),
        auc_by_training=tuple(_area_by_training(best, is_member, usable)),
    )


def _area_by_training(scores: np.ndarray, is_member: np.ndarray, usable: np.ndarray) -> Iterator[float]:
    for row, coins, use in zip(scores, is_member, usable, strict=True):
        yield roc(row[use], coins[use], np.zeros(int(use.sum()), dtype=np.int64)).auc


def claimed(federation: Federation) -> tuple[float | Literal["nominal", "none"], float]:
    """Return the claim of the run about one record of a published prompt: ε and its δ.

    A client-level ε covers a client's records too, but it does not cover personal prompts.
    """
    record = federation.config.privacy.record
    if federation.plan is not None:
        return federation.plan.epsilon(), federation.plan.delta
    if federation.client_plan is not None and not federation.method.personal:
        return federation.client_plan.epsilon(), federation.client_plan.delta
    if federation.method.published_procedure and record.mechanism == "gaussian":
        return "nominal", record.delta
    return "none", 0.0


def _seed(seed: int, training: int) -> int:
    """Return a separate seed for each training of each audit."""
    return zlib.crc32(f"membership/{seed}/{training}".encode())


def _some(data: ClientData, records: int | None, rng: np.random.Generator) -> ClientData:
    if records is None or data.num_examples <= records:
        return data
    picked = torch.from_numpy(np.sort(rng.permutation(data.num_examples)[:records]))
    return _rows(data, picked)


def _chosen(clients: list[ClientData], owner: np.ndarray, coins: np.ndarray) -> list[ClientData]:
    """Return each client's members."""
    chosen = [_rows(data, torch.from_numpy(np.flatnonzero(coins[owner == p]))) for p, data in enumerate(clients)]
    if any(data.num_examples == 0 for data in chosen):
        raise ConfigError("the coins left a client without a record; use another seed or more records")
    return chosen


def _rows(data: ClientData, picked: Tensor) -> ClientData:
    picked = picked.to(data.features.device)
    return replace(data, features=data.features[picked], labels=data.labels[picked])

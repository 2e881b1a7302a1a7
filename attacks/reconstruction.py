"""Maximum a posteriori reconstruction of the records behind one upload, with all that a curious server knows.

The server knows the prompt that it sent, the tower, the classes, the clip, the noise scale and the number of records.
A record (x, y) adds clip(Jᵀ vec(s·(softmax(s·W x) − e_y) xᵀ)) to the sum, where J is the Jacobian of the class
features W at that prompt. So the attack needs no further pass through the tower: it searches for records whose sum is
the observed one. If the noise is much larger than the sum, the prior decides, and the answer is the average image,
which the server knew before.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.towers.base import ClassFeatures

_MOST_BYTES = 2**30
_MOST_STARTS, _LEADERS = 128, 6
_RACE_STEPS, _STEPS = 30, 200
_RATE = 0.1
_BLUR = 0.3  # relative to the root mean square of the observed sum
_SURE = 4.0  # logit of a guessed label: 35 % among 100 classes, so that it can still change
_SHRINKAGE = 0.05
_LEAST_NOISE = 1e-3  # per coordinate, relative to the root mean square of the observed sum; covers rounding and search


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Prior distribution of an image feature: normalise(mean + root·z), with z standard normal.

    Attributes:
        mean: Mean feature, (embed_dim,).
        root: Cholesky factor of the covariance, (embed_dim, embed_dim), lower triangular.
    """

    mean: Tensor
    root: Tensor

    @property
    def guess(self) -> Tensor:
        """The unit vector that is on average closest to an unseen feature, (embed_dim,)."""
        return self.mean / self.mean.norm()

    def features(self, z: Tensor) -> Tensor:
        """Return the unit-norm features of latents z, (…, embed_dim)."""
        return torch.nn.functional.normalize(self.mean + z @ self.root.T, dim=-1)


def prior_of(features: Tensor) -> Prior:
    """Fit mean and covariance; a part of the covariance's trace is spread evenly over all directions.

    Args:
        features: Features of images similar to the client's, (image, embed_dim), at least 2.
    """
    features = features.to(torch.float64)
    covariance = torch.cov(features.T)
    size = len(covariance)
    even = torch.eye(size, dtype=covariance.dtype, device=covariance.device) * covariance.trace() / size
    root = torch.linalg.cholesky((1 - _SHRINKAGE) * covariance + _SHRINKAGE * even)
    return Prior(mean=features.mean(dim=0).float(), root=root.float())


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Inputs of the server's attack, in the flattened coordinates of the prompt.

    Attributes:
        total: The sum over records, (coordinate,), with the client's noise if there is any.
        seen: Coordinates that were sent, (coordinate,), 1 or 0; the others were pruned after the clip.
        jacobian: Jacobian of the class features, (n_cls, embed_dim, coordinate).
        classes: Class features, (n_cls, embed_dim).
        logit_scale: The inverse temperature s.
        clip_norm: Bound on the norm of one record's term; inf without a clip per record.
        batch_clip: Bound on the norm of the mean instead; inf without a clip of the mean.
        noise_std: Standard deviation of the noise in each coordinate of ``total``.
        records: Number of records.
        log_prior: Public log prior of the client, (n_cls,), which its loss adds to the logits; None adds nothing.
    """

    total: Tensor
    seen: Tensor
    jacobian: Tensor
    classes: Tensor
    logit_scale: float
    clip_norm: float
    batch_clip: float
    noise_std: float
    records: int
    log_prior: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The server's guess: unit-norm features (record, embed_dim) and class ids (record,)."""

    features: Tensor
    labels: Tensor


def jacobian(features: ClassFeatures) -> Tensor:
    """Compute the Jacobian of one prompt's class features with the tower's backward pass.

    Returns:
        The Jacobian, (n_cls, embed_dim, n_ctx · ctx_dim).

    Raises:
        ConfigError: If it would take more than 1 GiB, because the attack is made for small towers.
    """
    n_cls, embed_dim = features.values.shape[1:]
    size = 4 * n_cls * embed_dim * math.prod(features.prompt_shape)
    if size > _MOST_BYTES:
        raise ConfigError(
            f"the Jacobian of {n_cls} classes takes {size / 2**30:.1f} GiB, at most 1 GiB is allowed; attack with "
            "fewer classes or a smaller prompt.n-ctx"
        )
    unit = torch.eye(embed_dim, device=features.values.device)[None, :, None, :]
    classes = [torch.full((1, embed_dim, 1), k, device=unit.device) for k in range(n_cls)]
    return torch.stack([features.vjp_some(unit, k)[0].flatten(1) for k in classes])


def reconstruct(sent: Sent, prior: Prior, seed: int) -> Reconstruction:
    """Search for the most probable records.

    Many starts, each with a different guess of the labels, run for a few steps. The best of them continue with labels
    as points of the simplex, and then with labels fixed at its corners. With one record and few classes every label is
    the guess of some start.

    Args:
        sent: Inputs of the attack.
        prior: Prior of image features.
        seed: Seed of the starts.

    Reference:
        Zhu, Liu and Han 2019, arXiv:1906.08935 (labels as variables); Geiping et al. 2020, arXiv:2003.14053.
    """
    generator = torch.Generator().manual_seed(seed)
    n_cls, embed_dim = sent.classes.shape
    starts = min(max(n_cls, _LEADERS), _MOST_STARTS)
    labels = torch.stack(
        [torch.randperm(max(n_cls, starts), generator=generator)[:starts] for _ in range(sent.records)]
    )
    labels = (labels.T % n_cls).to(sent.total.device)
    z = (0.3 * torch.randn(starts, sent.records, embed_dim, generator=generator)).to(sent.total)
    y = _SURE * torch.nn.functional.one_hot(labels, n_cls).to(z)
    z, y, loss = _descend(sent, prior, z, y, steps=_RACE_STEPS, wide=True)
    leaders = loss.argsort()[:_LEADERS]
    z, y, _ = _descend(sent, prior, z[leaders], y[leaders], steps=_STEPS, wide=True)
    guessed = y.argmax(dim=-1)
    z, _, loss = _descend(sent, prior, z, _SURE * torch.nn.functional.one_hot(guessed, n_cls).to(z), steps=_STEPS)
    best = int(loss.argmin())
    return Reconstruction(features=prior.features(z[best]), labels=guessed[best])


def _descend(
    sent: Sent, prior: Prior, z: Tensor, y: Tensor, *, steps: int, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Adam on the negative log posterior of each start; return latents, labels and the loss of each start.

    Without noise the posterior is a narrow peak. A ``wide`` search blurs it at first, optimises labels as well, and
    narrows it again. Otherwise each label is fixed at the largest entry of ``y``.
    """
    z, y = z.clone().requires_grad_(True), y.clone().requires_grad_(wide)
    optimiser = torch.optim.Adam([z, y] if wide else [z], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    fixed = torch.nn.functional.one_hot(y.argmax(dim=-1), y.shape[-1]).to(z)
    size = float(sent.total.square().mean().sqrt())
    last = max(sent.noise_std, _LEAST_NOISE * size)
    first = max(last, _BLUR * size) if wide else last
    loss = z.new_zeros(len(z))
    for step in range(steps):
        std = last * (first / last) ** max(0.0, 1 - 1.5 * step / steps)
        shares = torch.softmax(y, dim=-1) if wide else fixed
        loss = _misfit(sent, prior.features(z), shares) / (2 * std**2) + z.square().sum(dim=(1, 2)) / 2
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        schedule.step()
    return z.detach(), y.detach(), loss.detach()


def _misfit(sent: Sent, x: Tensor, shares: Tensor) -> Tensor:
    """Compute the squared distance between the sum of records (start, record, …) and the observed sum, per start."""
    logits = sent.logit_scale * x @ sent.classes.T
    residual = torch.softmax(logits if sent.log_prior is None else logits + sent.log_prior, dim=-1) - shares
    cotangent = sent.logit_scale * residual[..., None] * x[..., None, :]
    terms = cotangent.flatten(-2) @ sent.jacobian.flatten(0, 1)
    if math.isfinite(sent.clip_norm):
        terms = terms * (sent.clip_norm / terms.norm(dim=-1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0)
    total = terms.sum(dim=1)
    if math.isfinite(sent.batch_clip):
        allowed = sent.batch_clip * sent.records
        total = total * (allowed / total.norm(dim=-1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0)
    return ((total - sent.total) * sent.seen).square().sum(dim=-1)

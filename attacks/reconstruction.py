"""From one upload back to the records behind it: maximum a posteriori, with everything a curious server knows.

The server knows the prompt it sent, the tower, the classes, the clip, the noise's scale and how many records there are.
A record (x, y) adds clip(Jᵀ vec(s·(softmax(s·W x) − e_y) xᵀ)) to the sum, with J the Jacobian of the class features W
at that prompt, so the attack needs no further pass through the tower: it is the search for records whose sum is the one
seen. Where noise drowns the sum, the prior decides, and the answer is the average image: what the server knew before.
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
_BLUR = 0.3  # of the root mean square of the sum seen
_SURE = 4.0  # logit of a guessed label: 35 % among 100 classes, so that it can still change
_SHRINKAGE = 0.05
_LEAST_NOISE = 1e-3  # of the sum seen, per coordinate in units of its root mean square: rounding, and a finite search


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What an image feature looks like before anything is seen: normalise(mean + root·z), z standard normal.

    Attributes:
        mean: (embed_dim,).
        root: Of the covariance, (embed_dim, embed_dim), lower triangular.
    """

    mean: Tensor
    root: Tensor

    @property
    def guess(self) -> Tensor:
        """The unit vector that is closest to an unseen feature on average, (embed_dim,)."""
        return self.mean / self.mean.norm()

    def features(self, z: Tensor) -> Tensor:
        """Unit-norm features of latent (…, embed_dim)."""
        return torch.nn.functional.normalize(self.mean + z @ self.root.T, dim=-1)


def prior_of(features: Tensor) -> Prior:
    """Fit mean and covariance, with a part of its trace spread over all directions.

    Args:
        features: Of images like the client's, (image, embed_dim), at least 2.
    """
    features = features.to(torch.float64)
    covariance = torch.cov(features.T)
    size = len(covariance)
    even = torch.eye(size, dtype=covariance.dtype, device=covariance.device) * covariance.trace() / size
    root = torch.linalg.cholesky((1 - _SHRINKAGE) * covariance + _SHRINKAGE * even)
    return Prior(mean=features.mean(dim=0).float(), root=root.float())


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What the server can work with, in the coordinates of the prompt, flattened.

    Attributes:
        total: The sum over records, (coordinate,); with noise if the client added any.
        seen: Coordinates that were sent; the others were pruned away, after the clip. (coordinate,) bool.
        jacobian: Of the class features, (n_cls, embed_dim, coordinate).
        classes: Class features, (n_cls, embed_dim).
        logit_scale: s.
        clip_norm: Bound on one record's term; inf without one.
        batch_clip: Bound on the mean instead; inf without one.
        noise_std: Of each coordinate of ``total``.
        records: How many.
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


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What the server believes: unit-norm features (record, embed_dim) and class ids (record,)."""

    features: Tensor
    labels: Tensor


def jacobian(features: ClassFeatures) -> Tensor:
    """Jacobian of one prompt's class features, (n_cls, embed_dim, n_ctx · ctx_dim), from the tower's own backward pass.

    Raises:
        ConfigError: If it does not fit into memory; the attack is for small towers.
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

    Many starts, each with another guess of the labels, race for a short while; the leaders go on with labels as points
    of the simplex, and then with labels fixed at their corners. With one record and few classes every label starts.

    Args:
        sent: What was seen.
        prior: Of image features.
        seed: Of the starts.

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
    """Adam on the negative log posterior of each start; returns latents, labels and how good each start is.

    Without noise the posterior is a needle: a ``wide`` search blurs it first, moves labels too, and narrows it again.
    Else labels are fixed, each at the largest of ``y``.
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
    """Squared distance of the sum of records (start, record, …) from the one seen, per start."""
    residual = torch.softmax(sent.logit_scale * x @ sent.classes.T, dim=-1) - shares
    cotangent = sent.logit_scale * residual[..., None] * x[..., None, :]
    terms = cotangent.flatten(-2) @ sent.jacobian.flatten(0, 1)
    if math.isfinite(sent.clip_norm):
        terms = terms * (sent.clip_norm / terms.norm(dim=-1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0)
    total = terms.sum(dim=1)
    if math.isfinite(sent.batch_clip):
        allowed = sent.batch_clip * sent.records
        total = total * (allowed / total.norm(dim=-1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0)
    return ((total - sent.total) * sent.seen).square().sum(dim=-1)

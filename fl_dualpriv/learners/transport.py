"""Unbalanced optimal transport between the patches of an image and the prompts of a class, as FedOTP solves it."""

import torch
from torch import Tensor


@torch.no_grad()
def transport_plan(similarity: Tensor, mass: float, regularisation: float, iterations: int) -> Tensor:
    """Compute the plan T >= 0 that maximises ⟨T, S⟩ + λ·entropy(T) with T 1 <= 1/M and Tᵀ1 = γ/N.

    Every prompt places its share of the mass γ, and no patch takes more than 1/M. With γ < 1, patches that match no
    prompt stay empty. The iteration is Dykstra's: it scales columns to their sums, then rows that exceed their bounds
    down to them. The mass that columns lack after the last iteration goes to rows with room, so that both constraints
    hold exactly.

    Guarantee:
        A problem's plan depends only on that problem: the number of iterations is fixed, and no convergence test
        looks at all problems. Columns have their sums and rows keep their bounds, up to rounding, after any number of
        iterations (tests/fl_dualpriv/learners/test_transport.py). The plan is a constant to the gradient, as
        published.

    Args:
        similarity: Cosines S, (…, M patches, N prompts). The cost is 1 − S, whose constant changes nothing.
        mass: Mass γ in (0, 1].
        regularisation: Entropy weight λ, in units of a cosine. From 0.01 on, no exponential leaves the range of
            float64, in which the plan is computed.
        iterations: Number of iterations, at least 1.

    Reference:
        Li et al. 2024 (FedOTP), arXiv:2403.00041, sec. 3; Benamou et al. 2015, arXiv:1412.5154 (partial transport by
        alternating projections); Altschuler et al. 2017, arXiv:1705.09634, Algorithm 2 (the last step).
    """
    patches, prompts = similarity.shape[-2:]
    bound, share = 1 / patches, mass / prompts
    # Problems are the last dimension in memory: sums over few prompts and patches are then additions of long rows.
    exact = similarity.reshape(-1, patches, prompts).permute(1, 2, 0).double().contiguous()
    kernel = torch.exp((exact - exact.amax(dim=0, keepdim=True)) / regularisation)  # column scaling undoes the shift
    rows = torch.ones_like(kernel[:, :1])
    columns = torch.ones_like(kernel[:1])
    for _ in range(iterations):
        columns = share / (kernel * rows).sum(dim=0, keepdim=True)
        rows = (bound / (kernel * columns).sum(dim=1, keepdim=True)).clamp_(max=1.0)
    plan = rows * kernel * columns
    plan = plan * (share / plan.sum(dim=0, keepdim=True)).clamp(max=1.0)
    room = (bound - plan.sum(dim=1, keepdim=True)).clamp(min=0.0)
    lacking = share - plan.sum(dim=0, keepdim=True)
    plan = plan + room * lacking / room.sum(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return plan.permute(2, 0, 1).reshape(similarity.shape).to(similarity.dtype)

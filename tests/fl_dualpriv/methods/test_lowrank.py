"""Carriers are orthonormal and converge; the tangent projection is an orthogonal projection of the known rank."""

import pytest
import torch

from fl_dualpriv.client.state import fresh_state
from fl_dualpriv.methods.lowrank import cut_to_rank, subspace_bases, tangent_projection

N, D = 6, 20


def matrix(seed: int, rank: int = N) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(N, rank, generator=g) @ torch.randn(rank, D, generator=g)).double()


@pytest.mark.parametrize("k", [1, 2, 6])
def test_subspace_bases_are_orthonormal(k: int) -> None:
    u, v = subspace_bases(matrix(0), fresh_state(N, D, k).row_basis.double())
    assert torch.allclose(u.T @ u, torch.eye(k).double(), atol=1e-12)
    assert torch.allclose(v @ v.T, torch.eye(k).double(), atol=1e-12)


def test_warm_started_iterations_find_the_leading_subspaces() -> None:
    left, _ = torch.linalg.qr(matrix(1)[:, :N])
    right, _ = torch.linalg.qr(matrix(2).T)
    spectrum = torch.tensor([8.0, 4.0, 1.0, 0.5, 0.2, 0.1]).double()
    p = left @ torch.diag(spectrum) @ right.T[:N]
    v = fresh_state(N, D, 2).row_basis.double()
    for _ in range(20):
        u, v = subspace_bases(p, v)
    # The gap is 4:1, squared per iteration: 16^-20 is rounding.
    assert torch.allclose(u @ u.T, left[:, :2] @ left[:, :2].T, atol=1e-9)
    assert torch.linalg.matrix_norm(p - cut_to_rank(p, u)) == pytest.approx(float(spectrum[2:].norm()), rel=1e-9)


def test_tangent_projection_is_orthogonal_with_rank_k_n_plus_d_minus_k() -> None:
    k = 2
    u, v = subspace_bases(matrix(3), fresh_state(N, D, k).row_basis.double())
    basis = torch.eye(N * D).double().reshape(N * D, N, D)
    images = torch.stack([tangent_projection(b, u, v) for b in basis]).reshape(N * D, N * D)
    assert torch.allclose(images, images.T, atol=1e-12)  # symmetric
    assert torch.allclose(images @ images, images, atol=1e-12)  # idempotent
    assert float(images.trace()) == pytest.approx(k * (N + D - k))


def test_projection_is_equation_4_of_the_paper() -> None:
    g = matrix(4)
    u, v = subspace_bases(matrix(5), fresh_state(N, D, 2).row_basis.double())
    grad_u, grad_v = g @ v.T, u.T @ g
    assert torch.allclose(tangent_projection(g, u, v), grad_u @ v + u @ grad_v - u @ u.T @ grad_u @ v, atol=1e-12)


def test_low_rank_matrices_lie_in_their_own_tangent_space() -> None:
    p = matrix(6, rank=2)
    v = fresh_state(N, D, 2).row_basis.double()
    for _ in range(3):
        u, v = subspace_bases(p, v)
    assert torch.allclose(tangent_projection(p, u, v), p, atol=1e-9)
    assert torch.allclose(cut_to_rank(p, u), p, atol=1e-9)

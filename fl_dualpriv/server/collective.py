"""Collective personal prompts: the deviations of all clients, shrunk together by their singular values at the server.

An upload U_i of client i is the move of its copy of p_G, −η_G·Σ_s G̃_{i,s}. Its noise has a public variance on each
entry. The server adds up what each client's uploads say beyond the mean of all uploads. With β = ``memory``, each round
does

    S_i ← β·S_i + (U_i − mean_j U_j)        ν_i ← β²·ν_i + s·(η_G·z·C/(q·n_i))²

for the clients that answered, and S_i ← β·S_i, ν_i ← β²·ν_i for the others. The rows M_i = S_i/√ν_i of the matrix M
then have white noise of variance 1. Clients of one group share a direction, so the signal in M has a rank of about the
number of groups. `shrink_singular_values` drops the directions that noise hides. It finds that rank by itself, and each
client's part is estimated with the help of all others. With row i of the shrunk matrix times √ν_i as R_i,

    p_L,i = (η_L/η_G)·R_i

Without record-level privacy R_i is S_i. Source: the spectral shrinker is Gavish and Donoho's (2017, arXiv:1405.7511);
rows of equal noise after weighting are the usual reduction of heteroscedastic noise to white noise.

ν_i is the noise that the client added itself. The mean takes a share 1/N of it away and brings Σ_j ν_j/N² of all
clients, so for clients of very unequal sizes the noise is not exactly white. Pruned updates have less noise than ν_i.
Only the quality of the shrinkage rests on this, and no guarantee.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_dualpriv.methods.shrinkage import shrink_singular_values

_SUMS, _NOISE, _PARTS = "mechanism.deviations", "mechanism.deviation-noise", "mechanism.personal-parts"

Memory = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Collective:
    """Numbers of collective personal prompts; all are public.

    Guarantee:
        The memory and the parts of all clients are functions of the clients' uploads, of the set of clients that
        answered and of public numbers. So under record-level privacy they are post-processing: two data sets with the
        same uploads give the same parts. A record of client i is protected by client i's own releases, at the ε of its
        plan, also against someone who sees the parts of all clients. Proof: `followed` and `parts` have no other
        argument, and hold for the empty memory. The noise is not measured on data, does not depend on the size of a
        batch, and its divisor q·n_i does not depend on how many clients answered. The uploads must carry the clients'
        noise: without a record-level plan nothing is protected here, and the configuration refuses a trusted server
        and client-level noise.

    Attributes:
        memory: β, the decay of the sums in each round, in [0, 1]; 1 forgets nothing.
        rate_ratio: η_L/η_G.
        noise_variances: Variance of the noise on each entry of one upload of each client, (client,) float64; zeros
            without record-level privacy.
    """

    memory: float
    rate_ratio: float
    noise_variances: Tensor

    def followed(self, memory: Memory, partitions: Sequence[int], uploads: Tensor) -> dict[str, Tensor]:
        """Return the memory after a round, with the parts that belong to it.

        Args:
            memory: Memory after the round before; empty before the first round. Other names are ignored.
            partitions: Clients that answered, each once.
            uploads: Finite uploads of these clients, in this order, (client, n_ctx, ctx_dim) float64.
        """
        clients, shape = len(self.noise_variances), uploads.shape[1:]
        sums = self.memory * memory.get(_SUMS, torch.zeros(clients, *shape, dtype=torch.float64))
        noise = self.memory**2 * memory.get(_NOISE, torch.zeros(clients, dtype=torch.float64))
        if partitions:
            answered = torch.tensor(list(partitions))
            sums[answered] += uploads - uploads.mean(dim=0)
            noise[answered] += self.noise_variances[answered]
        sums = _finite_rows(sums)  # a client may send any number: a sum that overflows starts again
        return {_SUMS: sums, _NOISE: noise, _PARTS: self._shrunk(sums, noise)}

    def parts(self, memory: Memory, shape: Sequence[int]) -> Tensor:
        """Return p_L of each client, (client, n_ctx, ctx_dim) float32; zeros before the first round.

        Args:
            memory: Result of `followed`, or an empty memory.
            shape: Shape of a prompt, (n_ctx, ctx_dim).
        """
        start = memory.get(_PARTS)
        return torch.zeros(len(self.noise_variances), *shape) if start is None else start

    def _shrunk(self, sums: Tensor, noise: Tensor) -> Tensor:
        rows = sums.flatten(1)
        if bool((self.noise_variances > 0).any()):
            std = noise.sqrt()[:, None]
            # A client without any upload has no noise and no row. A sum that decayed away may leave a noise of zero.
            white = torch.where(std > 0, rows / torch.where(std > 0, std, 1.0), 0.0)
            try:
                rows = std * shrink_singular_values(_finite_rows(white), torch.ones(()))
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                # No convergence on absurd numbers: the shared prompt stays, and no run ends.
                rows = torch.zeros_like(rows)
        return _finite_rows((self.rate_ratio * rows).to(torch.float32)).reshape(sums.shape)


def take_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the memory out of a strategy's state, so that a strategy's own code neither reads nor replaces it."""
    return {name: state.pop(name) for name in (_SUMS, _NOISE, _PARTS) if name in state}


def _finite_rows(rows: Tensor) -> Tensor:
    """Return the rows with zeros in place of each row that is not finite."""
    finite = torch.isfinite(rows).flatten(1).all(dim=1)
    return torch.where(finite.reshape(-1, *[1] * (rows.dim() - 1)), rows, 0.0)

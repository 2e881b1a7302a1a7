"""FedPGP's contrastive term (Cui et al. 2024, arXiv:2405.09771, sec. 3).

It pulls p_G towards CLIP's handcrafted text and pushes p_G + u·v away. With class features z_G of the global prompt,
z_P of the personalised prompt p_G + u·v and z_C of the handcrafted text, (z_G, z_C) is the positive and (z_G, z_P) the
negative pair of each class:

    L = L_ce(p_G + u·v) + μ L_con,
    L_con = mean over classes of −log( exp(⟨z_G, z_C⟩/τ) / (exp(⟨z_G, z_C⟩/τ) + exp(⟨z_G, z_P⟩/τ)) )

L_con reads only prompts and no record, and prompts are functions of earlier releases. Its gradient is therefore added
after the noise and costs no ε. The gradient that is clipped and noised is ∂L_ce/∂(p_G + u·v); the gradients of p_G, u
and v are linear images of it. u and v take separate gradient steps, and there is no residual. As in LoRA, u starts at
zero, so that every client starts at p_G (the authors draw both at random).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_dualpriv.towers.base import PromptTower


def contrastive_loss(shared: Tensor, personal: Tensor, words: Tensor, temperature: float) -> Tensor:
    """Compute L_con of each prompt, (prompt,), from unit-norm class features.

    Args:
        shared: z_G, (prompt, n_cls, embed_dim).
        personal: z_P, (prompt, n_cls, embed_dim).
        words: z_C, (n_cls, embed_dim).
        temperature: τ > 0.
    """
    pairs = torch.stack([(shared * words).sum(dim=-1), (shared * personal).sum(dim=-1)], dim=-1)
    return -torch.log_softmax(pairs / temperature, dim=-1)[..., 0].mean(dim=-1)


@dataclass(frozen=True, kw_only=True)
class PromptContrast:
    """`Regulariser` μ L_con.

    Attributes:
        tower: Tower that maps prompts to class features.
        words: Class features z_C of the handcrafted text, (n_cls, embed_dim).
        weight: Weight μ.
        temperature: Temperature τ.
    """

    tower: PromptTower
    words: Tensor
    weight: float
    temperature: float

    def gradients(self, shared: Tensor, effective: Tensor) -> tuple[Tensor, Tensor]:
        """See `Regulariser`."""
        passes = self.tower(shared), self.tower(effective)
        with torch.enable_grad():
            near, away = (one.values.clone().requires_grad_(True) for one in passes)
            loss = self.weight * contrastive_loss(near, away, self.words, self.temperature).sum()
            cotangents = torch.autograd.grad(loss, (near, away))
        first, second = (one.vjp(c[:, None])[:, 0] for one, c in zip(passes, cotangents, strict=True))
        return first, second

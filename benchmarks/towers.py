"""Text towers of real sizes with random weights: the usual CoOp-style step, and ours on the same weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.flops import TowerShape
from fl_dualpriv.learners.rows import Batches, summed_gradient
from fl_dualpriv.models.open_clip import open_clip
from fl_dualpriv.models.text.open_clip_text import OpenClipText
from fl_dualpriv.towers.shared_prefix import SharedPrefixTower

VIT_B_16: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
VIT_L_14: dict[str, Any] = {
    "embed_dim": 768,
    "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}
TOY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}
"""The configurations ViT-B-16 and ViT-L-14 of open_clip, and a small one for self-checks."""
N_CTX, N_SUFFIX = 16, 5


class CoOpText(nn.Module):
    """Class features of CoOp (Zhou et al. 2022): open_clip's transformer runs over whole rows of tokens.

    Args:
        model: An open_clip model.
        sos: Embedding of the start token, (1, ctx_dim).
        suffix: Embeddings behind the context, (n_cls, n_suffix, ctx_dim); the rest of the row is padding.
        ends: Row index of each class's end of text, (n_cls,).
        length: Tokens of a row.
    """

    def __init__(self, model: Any, sos: Tensor, suffix: Tensor, ends: Tensor, length: int) -> None:
        super().__init__()
        tower: Any = getattr(model, "text", model)
        # A tuple hides the tower from Module, because its parameters are frozen and Opacus must not see them.
        self._tower, self.length = (tower,), length
        self._sos, self._suffix, self._ends = sos, suffix, ends

    def forward(self, context: Tensor) -> Tensor:
        """Return the unit-norm class features (n_cls, embed_dim) of a context (n_ctx, ctx_dim)."""
        (tower,) = self._tower
        n_cls, n_suffix, width = self._suffix.shape
        prefix = torch.cat([self._sos, context]).expand(n_cls, -1, -1)
        padding = context.new_zeros(n_cls, self.length - prefix.shape[1] - n_suffix, width)
        x = torch.cat([prefix, self._suffix, padding], dim=1) + tower.positional_embedding[: self.length]
        x = tower.transformer(x, attn_mask=tower.attn_mask[: self.length, : self.length])
        x = tower.ln_final(x)[torch.arange(n_cls, device=x.device), self._ends]
        projection = tower.text_projection
        x = projection(x) if isinstance(projection, nn.Module) else x @ projection
        return nn.functional.normalize(x, dim=-1)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One tower, one set of class names of random tokens, and a batch of cached image features for each client."""

    model: Any
    shape: TowerShape
    coop: CoOpText
    short: CoOpText
    """``coop`` with rows that end at the end of text, so without padding."""
    ours: SharedPrefixTower
    prompts: Tensor
    """One prompt per client, (client, n_ctx, ctx_dim)."""
    images: Tensor
    """Image features of unit norm, (client, batch, embed_dim)."""
    labels: Tensor
    """Class ids, (client, batch)."""
    scale: float


def make_model(config: dict[str, Any], device: str = "cpu") -> Any:
    """Make a frozen open_clip model with seeded random weights."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    return model.eval().requires_grad_(False).to(device)


def make_setting(
    model: Any,
    *,
    n_cls: int,
    clients: int,
    batch: int,
    n_ctx: int = N_CTX,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
) -> Setting:
    """Draw names, prompts, features and labels for a model; equal seeds give equal settings."""
    text = OpenClipText(model)
    if text.stack is None:
        raise ValueError(f"the model has no shared-prefix tower: {text.plain_reason}")
    device = text.token_embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, text.token_embedding.num_embeddings, (n_cls, N_SUFFIX), generator=generator)
    suffix = text.token_embedding(ids.to(device))
    sos = text.token_embedding(torch.zeros(1, dtype=torch.long, device=device))
    last = 1 + n_ctx + N_SUFFIX - 1
    ends = torch.full((n_cls,), last, device=device)
    images = torch.randn(clients, batch, text.embed_dim, generator=generator)
    return Setting(
        model=model,
        shape=TowerShape(
            layers=len(text.stack.blocks),
            width=text.ctx_dim,
            embed_dim=text.embed_dim,
            n_ctx=n_ctx,
            n_cls=n_cls,
            n_suffix=N_SUFFIX,
        ),
        coop=CoOpText(model, sos, suffix, ends, text.context_length),
        short=CoOpText(model, sos, suffix, ends, last + 1),
        ours=SharedPrefixTower(
            text.stack.to_precision(precision), sos, suffix, torch.full((n_cls,), N_SUFFIX, device=device)
        ),
        prompts=(0.02 * torch.randn(clients, n_ctx, text.ctx_dim, generator=generator)).to(device),
        images=nn.functional.normalize(images, dim=-1).to(device),
        labels=torch.randint(0, n_cls, (clients, batch), generator=generator).to(device),
        scale=100.0,
    )


def coop_gradient(coop: nn.Module, context: Tensor, images: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Compute the usual step: the gradient of a batch's mean cross-entropy with respect to the context."""
    context = context.detach().requires_grad_(True)
    loss = nn.functional.cross_entropy(scale * images @ coop(context).T, labels)
    (gradient,) = torch.autograd.grad(loss, context)
    return gradient


def batches(setting: Setting, clients: slice) -> Batches:
    """Return the clients' batches in the form that our engine takes."""
    return Batches.of(*zip(setting.images[clients], setting.labels[clients], strict=True))


def our_gradients(setting: Setting, clients: slice) -> Tensor:
    """Compute the same gradients of several clients at once with our engine, (client, n_ctx, ctx_dim)."""
    taken = batches(setting, clients)
    features = setting.ours(setting.prompts[clients])
    return summed_gradient(features, taken, setting.scale) / taken.counts[0]

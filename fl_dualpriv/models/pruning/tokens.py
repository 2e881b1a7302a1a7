"""Which visual tokens of an image stay: the seam `TokenPruner` and the pruner of Dual-Priv (arXiv:2506.07077).

As published (Mechanism 1) tokens are pruned behind the encoder, for a language model that reads patches:
``published.py``. A classifier reads one token, so there they are pruned between two blocks of the image tower, in the
form of EViT (arXiv:2202.07800): ``in_tower.py``. One pruner serves both.

What survives is decided inside one image from public frozen weights. It is a map applied to each example by itself, so
it costs no privacy; it must therefore never look across the batch.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.pruning.fusion import attention_weights, cluster_weights, fusion_noise, mix
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey

OFF = "set pruning.visual-keep-ratio = 1"


class TokenPruner(Protocol):
    """Shortens the patch sequence of each image by itself.

    It is given patches alone: CLS, registers and prompt tokens are put back in front by the caller, and cannot be lost.
    A pruner is hashable, and its ``repr`` says everything that changes a result: it is part of the key of cached
    features.

    Guarantee owed by an implementation: row i of the result depends on row i of the arguments alone, and the number of
    tokens that stay on the number of patches alone.
    """

    @property
    def layer(self) -> int:
        """Index of the hidden state that is pruned, see `depth_of`; attention and keys are those of its last block."""
        ...

    def n_tokens(self, n_patches: int) -> int:
        """Tokens that an image of ``n_patches`` patches has afterwards; ConfigError if it cannot be pruned so."""
        ...

    def keeps_all(self, n_patches: int) -> bool:
        """Whether ``n_patches`` patches stay as they are."""
        ...

    def __call__(self, patches: Tensor, attention: Tensor, keys: Tensor, images: Tensor) -> Tensor:
        """Prune.

        Args:
            patches: (n, patch, dim).
            attention: What each patch is paid, (n, patch); float32, without gradient.
            keys: Averaged over heads, (n, patch, head_dim); without gradient.
            images: The preprocessed images, (n, 3, height, width).

        Returns:
            (n, ``n_tokens(patch)``, dim).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class VisualTokenPruner:
    """Keep K dominant patches in their order, fuse the others into k contextual tokens behind them.

    Args:
        layer: Index of the hidden state that is pruned, as transformers counts: l >= 1 after l blocks, -1 after all,
            -2 after all but the last.
        keep_ratio: Share of patches kept, in (0, 1]: K = ``ceil(keep_ratio * n_patches)``. Either this or ``dominant``.
        dominant: K itself, >= 1. K at or above the number of patches keeps all, and then there is nothing to fuse.
        contextual: k, >= 0; 0 drops what is not kept.
        merge: ``average`` or ``sum`` of clusters, see `cluster_weights`; ``attention``: one attention-weighted token.
        score: What ranks patches. ``random``: one fixed permutation for all images, a function of seed and number of
            patches; the control. It changes which patches stay, and nothing else.
        fusion_noise_std: Of the paper's "heuristic" noise on fused tokens, in units of the tokens; 0 switches it off.
            It has NO ε. An image is noised once and alike in training and in tests, since its features are cached.
        seed: Of the random control and of the fusion noise.

    Raises:
        ConfigError: If an argument is out of range.
    """

    layer: int
    keep_ratio: float | None = None
    dominant: int | None = None
    contextual: int = 1
    merge: Literal["average", "sum", "attention"] = "attention"
    score: Literal["attention", "random"] = "attention"
    fusion_noise_std: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.keep_ratio is None) == (self.dominant is None):
            raise ConfigError("visual token pruning takes one of keep_ratio and dominant, the number of patches kept")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"pruning.visual-keep-ratio = {self.keep_ratio}: must be in (0, 1]; 1 keeps every patch")
        if self.dominant is not None and self.dominant < 1:
            raise ConfigError(f"visual token pruning: dominant = {self.dominant}; at least one patch must stay")
        if self.layer == 0:
            raise ConfigError(
                "pruning.visual-layer = 0: no block has been there to attend to anything; choose 1 or more, or count "
                "from the end: -2 is after all blocks but the last"
            )
        if self.contextual < 0:
            raise ConfigError(f"pruning.visual-fused = {self.contextual}: must be at least 0; 0 drops what is not kept")
        for key, value, allowed in (
            ("merge", self.merge, ("average", "sum", "attention")),
            ("score", self.score, ("attention", "random")),
        ):
            if value not in allowed:
                raise ConfigError(f"pruning.visual-{key} = {value!r}; allowed: {', '.join(allowed)}")
        if self.merge == "attention" and self.contextual > 1:
            raise ConfigError(
                f'pruning.visual-merge = "attention" makes one token, pruning.visual-fused = {self.contextual}; set '
                'pruning.visual-fused to 0 or 1, or pruning.visual-merge to "average" or "sum"'
            )
        if not (math.isfinite(self.fusion_noise_std) and self.fusion_noise_std >= 0):
            raise ConfigError(f"standard deviation of the fusion noise = {self.fusion_noise_std}: must be >= 0, finite")
        if self.fusion_noise_std and not self.contextual:
            raise ConfigError(
                "pruning.visual-fusion-noise has no effect without fused tokens (pruning.visual-fused = 0); set it to "
                '"off"'
            )

    def n_kept(self, n_patches: int) -> int:
        """K, 1 to ``n_patches``."""
        if self.dominant is not None:
            return min(self.dominant, n_patches)
        assert self.keep_ratio is not None
        # 0.07 * 100 is 7.000000000000001 in floating point and must stay 7.
        return max(1, math.ceil(round(self.keep_ratio * n_patches, 9)))

    def n_tokens(self, n_patches: int) -> int:
        """See `TokenPruner`: K + k, or all patches if K covers them.

        Raises:
            ConfigError: If fewer than k patches are left to fuse, but not none.
        """
        n_kept = self.n_kept(n_patches)
        left = n_patches - n_kept
        if not left:
            return n_patches
        if self.contextual > left:
            raise ConfigError(
                f"pruning.visual-fused = {self.contextual}: of n = {n_patches} patches K = {n_kept} are kept and "
                f"{left} left, too few for k = {self.contextual} fused tokens; choose a k of 0 to {left}, or keep "
                f"fewer, or {OFF}"
            )
        return n_kept + self.contextual

    def keeps_all(self, n_patches: int) -> bool:
        """See `TokenPruner`."""
        return self.n_kept(n_patches) >= n_patches

    def __call__(self, patches: Tensor, attention: Tensor, keys: Tensor, images: Tensor) -> Tensor:
        """See `TokenPruner`: the kept patches in their original order, then the fused tokens.

        Equal scores keep the earlier patch. The choice and the weights carry no gradient.
        """
        n_patches, dim = patches.shape[1:]
        n_tokens, n_kept = self.n_tokens(n_patches), self.n_kept(n_patches)
        if n_kept >= n_patches:
            return patches
        attention, keys = attention.detach(), keys.detach()
        ranking = self._scores(attention).argsort(dim=1, descending=True, stable=True)
        kept, rest = ranking[:, :n_kept].sort(dim=1).values, ranking[:, n_kept:].sort(dim=1).values

        def take(values: Tensor, index: Tensor) -> Tensor:
            return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

        if n_tokens == n_kept:
            return take(patches, kept)
        with torch.autocast(patches.device.type, enabled=False):  # bfloat16 would round the similarities
            if self.merge == "attention":
                weights = attention_weights(attention.gather(1, rest))
            else:
                weights = cluster_weights(take(keys, rest), self.contextual, self.merge)
            fused = mix(weights, take(patches, rest))
        if self.fusion_noise_std:
            fused = fused + fusion_noise(images, (self.contextual, dim), self.fusion_noise_std, self.seed).to(fused)
        return torch.cat([take(patches, kept), fused], dim=1)

    def _scores(self, attention: Tensor) -> Tensor:
        if self.score == "attention":
            return attention
        source = KeyedRandom(StreamKey(seed=self.seed, purpose="random-tokens"))
        return torch.from_numpy(source.uniforms(attention.shape[1])).to(attention.device).expand_as(attention)


def depth_of(layer: int, n_blocks: int, *, behind: int) -> int:
    """Number of blocks in front of a hidden state.

    Args:
        layer: As transformers counts hidden states: l >= 1 after l blocks, -1 after all of them, -2 after all but one.
        n_blocks: Of the image tower.
        behind: Number of blocks that must follow.

    Raises:
        ConfigError: If there is no such state, or fewer than ``behind`` blocks follow it.
    """
    depth, largest = layer if layer > 0 else n_blocks + 1 + layer, n_blocks - behind
    if 1 <= depth <= largest:
        return depth
    needs = ", and at least one must follow" if behind else ""
    choose = f"choose 1 to {largest} (or -{n_blocks} to -{1 + behind}), or {OFF}" if largest >= 1 else OFF
    blocks = f"{n_blocks} block{'s' * (n_blocks > 1)}"
    raise ConfigError(f"pruning.visual-layer = {layer}: this image tower has {blocks}{needs}; {choose}")

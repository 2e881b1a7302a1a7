"""Selection of an image's visual tokens: the protocol `TokenPruner` and the pruner of Dual-Priv (arXiv:2506.07077).

As published (Mechanism 1), tokens are pruned after the encoder, for a language model that reads patches:
``published.py``. A classifier reads one token, so its tokens are pruned between two blocks of the image tower, in the
form of EViT (arXiv:2202.07800): ``in_tower.py``. The same pruner serves both.

The pruner chooses the tokens of one image from that image and public frozen weights. It is a map applied to each
example separately, so it costs no privacy. For the same reason it must never look at other images of the batch.
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
    """A callable that shortens the patch sequence of each image separately.

    It gets only the patches. The caller keeps CLS, registers and prompt tokens and puts them back before the patches,
    so they cannot be lost. A pruner is hashable. Its ``repr`` must name everything that changes a result, because it is
    part of the key of cached features.

    Guarantee that an implementation must give: row i of the result depends only on row i of the arguments, and the
    number of tokens that stay depends only on the number of patches.
    """

    @property
    def layer(self) -> int:
        """Index of the hidden state that is pruned, see `depth_of`; attention and keys are those of its last block."""
        ...

    def n_tokens(self, n_patches: int) -> int:
        """Return the number of tokens after pruning ``n_patches`` patches; ConfigError if that is impossible."""
        ...

    def keeps_all(self, n_patches: int) -> bool:
        """True if ``n_patches`` patches stay unchanged."""
        ...

    def __call__(self, patches: Tensor, attention: Tensor, keys: Tensor, images: Tensor) -> Tensor:
        """Prune the patches.

        Args:
            patches: Patch tokens, (n, patch, dim).
            attention: Attention that each patch receives, (n, patch); float32, without gradient.
            keys: Keys of the patches averaged over heads, (n, patch, head_dim); without gradient.
            images: The preprocessed images, (n, 3, height, width).

        Returns:
            Tokens (n, ``n_tokens(patch)``, dim).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class VisualTokenPruner:
    """Pruner that keeps K dominant patches in their order and appends k contextual tokens fused from the others.

    Args:
        layer: Index of the hidden state that is pruned, as transformers counts: l >= 1 after l blocks, -1 after all,
            -2 after all but the last.
        keep_ratio: Share of patches kept, in (0, 1]: K = ``ceil(keep_ratio * n_patches)``. Either this or ``dominant``.
        dominant: K itself, >= 1. If K is at or above the number of patches, all are kept and there is nothing to fuse.
        contextual: k, >= 0; 0 drops the patches that are not kept.
        merge: ``average`` or ``sum`` of clusters, see `cluster_weights`; ``attention``: one attention-weighted token.
        score: Ranking of the patches. ``attention`` ranks by attention. ``random`` is the control: one fixed
            permutation for all images, a function of seed and number of patches. It changes only which patches stay.
        fusion_noise_std: Standard deviation of the paper's "heuristic" noise on fused tokens, in units of the tokens;
            0 switches it off. The noise has NO ε. An image gets the same noise in training and in tests, because its
            features are cached.
        seed: Seed of the random control and of the fusion noise.

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
            raise ConfigError(
                "visual token pruning takes exactly one of keep_ratio and dominant, the number of patches kept"
            )
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"pruning.visual-keep-ratio = {self.keep_ratio}: must be in (0, 1]; 1 keeps every patch")
        if self.dominant is not None and self.dominant < 1:
            raise ConfigError(f"visual token pruning: dominant = {self.dominant}; at least one patch must stay")
        if self.layer == 0:
            raise ConfigError(
                "pruning.visual-layer = 0: before the first block there is no attention; choose 1 or more, or count "
                "from the end: -2 is after all blocks but the last"
            )
        if self.contextual < 0:
            raise ConfigError(
                f"pruning.visual-fused = {self.contextual}: must be at least 0; 0 drops the patches that are not kept"
            )
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
        """Return K, 1 to ``n_patches``."""
        if self.dominant is not None:
            return min(self.dominant, n_patches)
        assert self.keep_ratio is not None
        # 0.07 * 100 is 7.000000000000001 in floating point and must stay 7.
        return max(1, math.ceil(round(self.keep_ratio * n_patches, 9)))

    def n_tokens(self, n_patches: int) -> int:
        """Return the number of tokens after pruning: K + k, or all patches if K covers them; see `TokenPruner`.

        Raises:
            ConfigError: If at least one patch but fewer than k patches are left to fuse.
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
        """True if K covers all patches; see `TokenPruner`."""
        return self.n_kept(n_patches) >= n_patches

    def __call__(self, patches: Tensor, attention: Tensor, keys: Tensor, images: Tensor) -> Tensor:
        """Return the kept patches in their original order, then the fused tokens; see `TokenPruner`.

        Of patches with equal scores the earlier one is kept. The choice and the weights carry no gradient.
        """
        n_patches, dim = patches.shape[1:]
        n_tokens, n_kept = self.n_tokens(n_patches), self.n_kept(n_patches)
        if n_kept >= n_patches:
            return patches
        attention, keys = attention.detach(), keys.detach()
        ranking = self._scores(attention).argsort(dim=1, descending=True, stable=True)
        top_indices, rest = ranking[:, :n_kept].sort(dim=1).values, ranking[:, n_kept:].sort(dim=1).values

        def take(values: Tensor, index: Tensor) -> Tensor:
            return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

        if n_tokens == n_kept:
            return take(patches, top_indices)
        with torch.autocast(patches.device.type, enabled=False):  # bfloat16 would round the similarities
            if self.merge == "attention":
                weights = attention_weights(attention.gather(1, rest))
            else:
                weights = cluster_weights(take(keys, rest), self.contextual, self.merge)
            fused = mix(weights, take(patches, rest))
        if self.fusion_noise_std:
            fused = fused + fusion_noise(images, (self.contextual, dim), self.fusion_noise_std, self.seed).to(fused)
        return torch.cat([take(patches, top_indices), fused], dim=1)

    def _scores(self, attention: Tensor) -> Tensor:
        if self.score == "attention":
            return attention
        source = KeyedRandom(StreamKey(seed=self.seed, purpose="random-tokens"))
        return torch.from_numpy(source.uniforms(attention.shape[1])).to(attention.device).expand_as(attention)


def depth_of(layer: int, n_blocks: int, *, behind: int) -> int:
    """Return the number of blocks before a hidden state.

    Args:
        layer: Index of the hidden state, as transformers counts: l >= 1 after l blocks, -1 after all of them, -2 after
            all but one.
        n_blocks: Number of blocks of the image tower.
        behind: Number of blocks that must follow the hidden state.

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

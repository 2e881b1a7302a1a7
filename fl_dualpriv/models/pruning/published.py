"""Visual tokens pruned as in the paper: after the image tower of a LLaVA-type model, before its projector."""

import torch
from torch import Tensor, nn

from fl_dualpriv.models.pruning.tokens import TokenPruner, depth_of
from fl_dualpriv.models.pruning.towers import ImageTower, vision_tower


def n_visual_tokens(vision_model: nn.Module, pruner: TokenPruner) -> int:
    """Return the number of tokens that `pruned_hidden` returns for an image.

    Raises:
        ConfigError: If the tower cannot be read, lacks the layer, or has too few patches for the pruner.
    """
    return pruner.n_tokens(_read(vision_model, pruner)[0].n_patches)


@torch.no_grad()
def pruned_hidden(vision_model: nn.Module, pixel_values: Tensor, pruner: TokenPruner) -> Tensor:
    """Compute the patches of a hidden state, pruned and fused; no block after that state runs.

    A LLaVA-type model reads the hidden state that it was trained on (``vision_feature_layer``). ``pruner.layer`` should
    be that state. In CLIP, a patch's score is the attention from CLS. In SigLIP, it is the mean attention from all
    patches.

    Guarantee:
        Per image: no value of one image enters another's tokens, if the pruner keeps the guarantee of `TokenPruner`.
        This is a map of single records with public weights, so it costs no privacy and gives none: fusion noise, if the
        pruner adds it, has NO ε. If nothing is pruned, the result is exactly ``hidden_states[layer]`` of the model
        without CLS.

    Args:
        vision_model: ``CLIPVisionModel`` or ``SiglipVisionModel`` of transformers, in any precision.
        pixel_values: Preprocessed images, (n, 3, height, width).
        pruner: Pruner of the patches; it also names the hidden state.

    Returns:
        Tokens (n, K + k, width) in the tower's type; no gradient.

    Raises:
        ConfigError: If the tower cannot be read, lacks the layer, or has too few patches for the pruner.

    Reference:
        Dual-Priv (arXiv:2506.07077), Mechanism 1, steps 1-8; the paper's V' starts with v_cls, which LLaVA drops.
    """
    tower, depth = _read(vision_model, pruner)
    if pruner.keeps_all(tower.n_patches):
        return tower.hidden(pixel_values, depth)[:, tower.n_prefix :]
    return tower.pruned(pixel_values, depth, pruner)[:, tower.n_prefix :]


def _read(vision_model: nn.Module, pruner: TokenPruner) -> tuple[ImageTower, int]:
    tower = vision_tower(vision_model)
    return tower, depth_of(pruner.layer, len(tower.blocks), behind=0)

"""Build the visual token pruner of a configuration."""

from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner


def token_pruner(config: RunConfig, records: int) -> VisualTokenPruner | None:
    """Build the pruner of a run, or return None if every patch stays.

    Args:
        config: Configuration of the run.
        records: Number of training records of all clients together; public. The expected batch of an average client
            scales the fusion noise if that noise must match the noise on the *mean* gradient.
    """
    pruning = config.pruning
    if pruning.visual_keep_ratio == 1:
        return None
    return VisualTokenPruner(
        layer=pruning.visual_layer,
        keep_ratio=pruning.visual_keep_ratio,
        contextual=pruning.visual_fused,
        merge=pruning.visual_merge,
        score=pruning.visual_score,
        fusion_noise_std=_fusion_noise_std(config, records),
        seed=config.seed,
    )


def _fusion_noise_std(config: RunConfig, records: int) -> float:
    """Return the std of the fusion noise for one reading of the paper (arXiv:2506.07077).

    The paper says "the variance of the DP noise in Mechanism 2". No reading of this sentence has an ε.
    """
    pruning, plan = config.pruning, record_level_plan(config)
    if pruning.visual_fusion_noise == "off":
        return 0.0
    if pruning.visual_fusion_noise == "absolute" or plan is None:
        return pruning.visual_fusion_std
    on_the_sum = pruning.visual_fusion_std * plan.noise_multiplier * plan.clip_norm
    if pruning.visual_fusion_noise == "sum":
        return on_the_sum
    clients = config.population + config.evaluation.new_clients
    return on_the_sum / (config.train.sampling_rate * records / clients)

"""Read from a configuration what may leave, before any plan is calculated. No torch, no accountant."""

from pathlib import Path

from fl_dualpriv.config.schema import DataConfig, EvaluationConfig, RunConfig
from fl_dualpriv.data.folder import given_splits
from fl_dualpriv.data.load import given_question_splits
from fl_dualpriv.methods.base import METHODS


def keeps_bad_records(config: RunConfig) -> bool:
    """True if a record that cannot be used stays a record and adds zero: so it is where a plan protects the data.

    Equal to having a plan (`config.plans.record_level_plan`, `config.plans.client_level_plan`), at no cost.
    """
    record, parts = config.privacy.record, METHODS[config.method]
    has_record_plan = record.mechanism != "none" and parts.trains and not parts.published_procedure
    return has_record_plan or config.privacy.client.mechanism != "none"


def may_score(config: RunConfig) -> bool:
    """Whether accuracies on the held-out images may leave: under DP only if those images are public."""
    return not config.claims_privacy or held_out_is_public(config.data, config.evaluation)


def held_out_is_public(data: DataConfig, evaluation: EvaluationConfig) -> bool:
    """``evaluation.held-out-data``; ``auto``: the demo's images and a split with a folder of its own are public.

    Held-out images that are cut out of somebody's training folder are private like the rest of it.
    """
    if evaluation.held_out_data == "auto":
        return held_out_is_given(data, evaluation)
    return evaluation.held_out_data == "public"


def held_out_is_given(data: DataConfig, evaluation: EvaluationConfig) -> bool:
    """Whether the scored split is a demo's or has a folder or file of its own: no cut out of training data."""
    return evaluation.split in own_splits(data)


def own_splits(data: DataConfig) -> frozenset[str]:
    """The splits among train, val and test that are given, and not cut out of another one."""
    if data.source in ("demo", "demo-vqa"):
        return frozenset({"train", "val", "test"})
    if data.source == "folder":
        return given_splits(Path(data.path).expanduser())
    return given_question_splits(data.path)


def delta_problems(config: RunConfig, largest: int) -> list[str]:
    """Problem lines about each δ that says nothing about populations or data of this size.

    Args:
        config: The run.
        largest: Records of the client that has the most.
    """
    record, client = config.privacy.record, config.privacy.client
    levels = []
    if record.mechanism == "gaussian":
        levels.append(("record", record.delta, largest, "records at one client"))
    if client.mechanism != "none":
        levels.append(("client", client.delta, config.population, "clients"))
    return [
        f"privacy.{level}.delta = {delta:g} with {units} {what}; δ must be below 1/{units} to say anything: "
        f"set it to {1 / (10 * units):.1g} or less"
        for level, delta, units, what in levels
        if delta * units >= 1
    ]

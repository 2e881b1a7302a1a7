"""Decide from a configuration which results may leave, before any plan is calculated. No torch, no accountant."""

from fl_dualpriv.config.schema import DataConfig, EvaluationConfig, RunConfig
from fl_dualpriv.data.load import given_image_splits, given_question_splits


def keeps_bad_records(config: RunConfig) -> bool:
    """Return True if an unusable record stays counted and adds zero, which is the case if a plan protects the data.

    The result is True exactly if the run has a plan (`config.plans.record_level_plan`,
    `config.plans.client_level_plan`), but no plan is calculated.
    """
    record, method = config.privacy.record, config.local_method
    releases = method.trains or config.selects_start
    has_record_plan = record.mechanism != "none" and releases and not method.published_procedure
    return has_record_plan or config.privacy.client.mechanism != "none"


def may_score(config: RunConfig) -> bool:
    """Return True if accuracies on the held-out images may leave: under DP only if those images are public."""
    return not config.claims_privacy or held_out_is_public(config.data, config.evaluation)


def held_out_is_public(data: DataConfig, evaluation: EvaluationConfig) -> bool:
    """Return True if the held-out images are public, by ``evaluation.held-out-data``.

    With ``auto``, the demo's images are public, and so is a split with a separate folder. Held-out images that are cut
    out of a training folder are as private as the rest of it.
    """
    if evaluation.held_out_data == "auto":
        return held_out_is_given(data, evaluation)
    return evaluation.held_out_data == "public"


def may_choose_on_val(config: RunConfig) -> bool:
    """Return True if a choice between public models may depend on the validation records.

    Under DP a choice on private validation records would be a release that no ledger counts. Where each node has its
    own folder, the nodes' choices could differ, and a result names one.
    """
    if config.data.partition == "by-node":
        return False
    if not config.claims_privacy or config.evaluation.held_out_data == "public":
        return True
    return config.evaluation.held_out_data == "auto" and "val" in own_splits(config.data)


def held_out_is_given(data: DataConfig, evaluation: EvaluationConfig) -> bool:
    """Return True if the scored split is a demo's or has a separate folder or file, not a cut of training data."""
    return evaluation.split in own_splits(data)


def own_splits(data: DataConfig) -> frozenset[str]:
    """Return the splits among train, val and test that are given, and not cut out of another one."""
    if data.is_embedded:
        return frozenset({"train", "val", "test"})
    if data.source == "folder":
        return given_image_splits(data.path)
    return given_question_splits(data.path)


def delta_problems(config: RunConfig, largest: int) -> list[str]:
    """Return a problem line for each δ that is too large to be meaningful for populations or data of this size.

    Args:
        config: Configuration of the run.
        largest: Number of records of the client that has the most.
    """
    record, client = config.privacy.record, config.privacy.client
    levels = []
    if record.mechanism == "gaussian":
        levels.append(("record", record.delta, largest, "records at one client"))
    if client.mechanism != "none":
        levels.append(("client", client.delta, config.population, "clients"))
    return [
        f"privacy.{level}.delta = {delta:g} with {units} {what}; δ must be below 1/{units} to be meaningful: "
        f"set it to {1 / (10 * units):.1g} or less"
        for level, delta, units, what in levels
        if delta * units >= 1
    ]

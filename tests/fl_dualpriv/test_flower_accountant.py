"""Our accountant under Flower's protocol: PLD numbers, a file that survives, and Flower's own wrapper on top."""

from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyAccountant,
    PrivacyConfig,
    SamplingMethod,
)

from fl_dualpriv.flower_accountant import LedgerAccountant
from fl_dualpriv.local_engine import LocalGrid


def config(sampling: SamplingMethod, **changes: Any) -> PrivacyConfig:
    fields: dict[str, Any] = {
        "target_delta": 1e-5,
        "population_size": 100,
        "neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "sampling_method": sampling,
        "max_epsilon": None,
    }
    return PrivacyConfig(**(fields | changes))


@pytest.mark.parametrize(("sampling", "rate"), [(SamplingMethod.POISSON, 0.05), (SamplingMethod.NO_AMPLIFICATION, 1.0)])
def test_the_numbers_are_dp_accountings(tmp_path: Path, sampling: SamplingMethod, rate: float) -> None:
    accountant: PrivacyAccountant = LedgerAccountant(config(sampling), tmp_path / "ledger.jsonl")
    accountant.compose(GaussianPrivacyEvent(2.0, 5, 100), count=10)
    accountant.compose(GaussianPrivacyEvent(3.0, 5, 100))
    reference = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for z, count in ((2.0, 10), (3.0, 1)):
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(z))
        reference.compose(event, count)
    assert accountant.get_epsilon(1e-5) == pytest.approx(reference.get_epsilon(1e-5), abs=1e-6)
    # Unsampled Gaussians are put together first, which is exact: the reference's grid rounds 2.5e-9 higher.
    assert accountant.get_delta(0.5) == pytest.approx(reference.get_delta(0.5), abs=1e-8)
    spent = accountant.get_privacy_spent()
    assert (spent.num_releases, spent.delta, spent.epsilon) == (11, 1e-5, accountant.get_epsilon(1e-5))


def test_a_new_process_finds_what_was_spent_and_a_lost_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = LedgerAccountant(config(SamplingMethod.POISSON), path)
    first.compose(GaussianPrivacyEvent(2.0, 5, 100), count=3)
    state = first.state_dict()
    second = LedgerAccountant(config(SamplingMethod.POISSON), path)
    second.load_state_dict(state)
    assert second.get_epsilon(1e-5) == first.get_epsilon(1e-5) > 0
    path.unlink()
    with pytest.raises(ValueError, match="it was replaced"):
        second.load_state_dict(state)


def test_would_exceed_looks_ahead_and_writes_nothing(tmp_path: Path) -> None:
    accountant = LedgerAccountant(config(SamplingMethod.NO_AMPLIFICATION, max_epsilon=3.0), tmp_path / "l.jsonl")
    event = GaussianPrivacyEvent(2.0, 5, 100)
    # one Gaussian of multiplier 2 at 1e-5: ε = 1.99; two are one of 2/√2: ε = 2.93; three: 3.7
    assert not accountant.would_exceed(event)
    assert not accountant.would_exceed(event, count=2)
    assert accountant.would_exceed(event, count=3)
    assert accountant.num_releases == 0
    with pytest.raises(ValueError, match="nothing to exceed"):
        LedgerAccountant(config(SamplingMethod.POISSON), tmp_path / "l.jsonl").would_exceed(event)


def test_what_it_has_no_bound_for_is_refused(tmp_path: Path) -> None:
    replace_one = config(SamplingMethod.WITHOUT_REPLACEMENT, neighboring_relation=NeighboringRelation.REPLACE_ONE)
    with pytest.raises(ValueError, match="add-or-remove-one"):
        LedgerAccountant(replace_one, tmp_path / "l.jsonl")
    with pytest.raises(ValueError, match="a population of 50"):
        LedgerAccountant(config(SamplingMethod.POISSON), tmp_path / "l.jsonl").compose(GaussianPrivacyEvent(1.0, 5, 50))


client = ClientApp()


@client.train()
def _train(message: Message, context: Context) -> Message:
    content: Any = message.content
    moved = content["arrays"]["w"].numpy() + 1.0
    reply = {"arrays": ArrayRecord({"w": Array(moved)}), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict({**reply}), reply_to=message)


def test_flowers_wrapper_runs_on_our_books(tmp_path: Path) -> None:
    accountant = LedgerAccountant(config(SamplingMethod.NO_AMPLIFICATION, population_size=4), tmp_path / "ledger.jsonl")
    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=4, min_train_nodes=4),
        noise_multiplier=2.0,
        clipping_norm=1.0,
        num_sampled_clients=4,
        accountant=accountant,
    )
    grid = LocalGrid(client, 4, {})
    result = strategy.start(
        grid,
        ArrayRecord({"w": Array(np.zeros(3, dtype=np.float32))}),
        num_rounds=3,
        train_config=ConfigRecord(),
    )
    assert result.arrays is not None
    assert accountant.num_releases == 3
    events = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert len(events) == 3
    # Three Gaussians of multiplier 2 are one of 2/√3, every client in each.
    reference = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    reference.compose(dp_accounting.GaussianDpEvent(2.0), 3)
    assert accountant.get_epsilon(1e-5) == pytest.approx(reference.get_epsilon(1e-5), abs=1e-3)

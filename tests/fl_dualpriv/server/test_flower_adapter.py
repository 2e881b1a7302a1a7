"""Strategies of Flower's under our rounds: what they get, what is taken, what they keep, and when they are refused."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid, strategy
from torch import Tensor

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.server.flower_adapter import FlowerStrategy, adapt
from tests.strategies.rounds import client_level, make, play, record_level

START = torch.tensor([[1.0, 2.0, 3.0]])


def under(cls: type[strategy.Strategy], flat: dict[str, Any] | None = None, **settings: Any) -> Any:
    found, arguments = adapt(cls, flat or {})
    return make(found, **{**settings, **arguments})


def uploads(*rows: Iterable[float]) -> list[Tensor | None]:
    return [torch.tensor([list(row)], dtype=torch.float64) for row in rows]


def test_fedavg_weighs_the_clients_prompts_by_their_examples():
    moved = play(under(strategy.FedAvg, sizes=(1, 3)), uploads((4, 0, 0), (0, 8, 0)), 1, START)
    # (1 * 4 + 3 * 0) / 4 and (1 * 0 + 3 * 8) / 4, on top of the start
    torch.testing.assert_close(moved, START.double() + torch.tensor([[1.0, 6, 0]]).double())


def test_a_median_is_of_those_that_answered():
    strategy_ = under(strategy.FedMedian, sizes=(1,) * 4)
    moved = play(strategy_, [*uploads((1, 1, 1), (3, 3, 3), (9, 9, -9)), None], 1, START)
    torch.testing.assert_close(moved, START.double() + torch.tensor([[3.0, 3, 1]]).double())
    assert (strategy_.failures, strategy_.deliveries) == (1, 3)


def test_fedavgm_remembers_between_rounds():
    flat = {"plugin.flower.server-momentum": 0.5, "plugin.flower.server-learning-rate": 1.0}
    one = under(strategy.FedAvgM, flat, sizes=(1, 1))
    first = play(one, uploads((2, 0, 0), (0, 0, 0)), 1, START)
    second = play(one, uploads((0, 0, 0), (0, 0, 0)), 2, first.float())
    assert float(first[0, 0]) == pytest.approx(2)  # 1 + 1
    assert float(second[0, 0]) == pytest.approx(2.5)  # + 0.5 * 1


def test_nobody_answers_and_nothing_moves():
    assert torch.equal(play(under(strategy.FedAdam), [None] * 4, 1, START), START.double())


def test_few_clients_never_make_it_wait():
    """Flower waits for two nodes by default, for ever."""
    assert under(strategy.FedAvg).arguments["min_available_nodes"] == 1
    moved = play(under(strategy.FedAvg, sizes=(5,)), uploads((1, 1, 1)), 1, START)
    torch.testing.assert_close(moved, START.double() + 1)


def test_too_few_clients_for_a_rule_end_the_run():
    one = under(strategy.Bulyan, {"plugin.flower.num-malicious-nodes": 1}, sizes=(1,) * 4)
    with pytest.raises(ConfigError, match="Bulyan makes no aggregate of 4 uploads"):
        play(one, uploads(*[(1, 1, 1)] * 4), 1, START)


@pytest.mark.parametrize("privacy", [client_level(), record_level()], ids=["client", "record"])
def test_noise_of_the_server_is_refused_with_the_reason(privacy: Any):
    with pytest.raises(PrivacyError, match=r"FedMedian cannot run with noise of the server.*do not bound"):
        under(strategy.FedMedian, privacy=privacy)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FedProx", "proximal term"),
        ("QFedAvg", "training losses"),
        ("FedXgbBagging", "trees"),
        ("FedXgbCyclic", "trees"),
        ("DifferentialPrivacyServerSideFixedClipping", "privacy.client.mechanism"),
        ("DifferentialPrivacyClientSideAdaptiveClipping", "privacy.client.mechanism"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(name: str, reason: str):
    with pytest.raises(ConfigError, match=f"{name}, which cannot run here: .*{reason}"):
        adapt(getattr(strategy, name), {})


def test_every_strategy_of_flowers_runs_or_is_refused():
    accepted = set()
    for name in set(strategy.__all__) - {"Strategy", "Result"}:
        try:
            accepted.add(adapt(getattr(strategy, name), {})[0].__name__)
        except ConfigError:
            continue  # the reasons are above
    rules = {"FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"}
    assert accepted == rules | {"FedAvgM", "FedAdam", "FedAdagrad", "FedYogi"}


def test_options_are_its_own_arguments():
    _, arguments = adapt(strategy.FedAdam, {"plugin.flower.eta": 1, "plugin.fedadam.tau": 9.0})
    assert arguments["arguments"]["eta"] == 1.0
    assert "tau" not in arguments["arguments"]  # the table of our FedAdam
    for flat, message in [
        ({"plugin.flower.ita": 0.1}, "FedAdam has no such option; it has eta"),
        ({"plugin.flower.fraction-train": 0.5}, "no such option"),  # cohorts are ours
        ({"plugin.flower.eta": "high"}, "expected float"),
    ]:
        with pytest.raises(ConfigError, match=message):
            adapt(strategy.FedAdam, flat)


def test_options_that_it_refuses_are_told():
    with pytest.raises(ConfigError, match=r"FedTrimmedAvg refuses its options: .*beta"):
        under(strategy.FedTrimmedAvg, {"plugin.flower.beta": 0.7})


class Needy(strategy.FedAvg):
    def __init__(self, secret: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def test_an_argument_without_default_is_asked_for():
    with pytest.raises(ConfigError, match=r"no default for plugin.flower.secret"):
        adapt(Needy, {})
    assert adapt(Needy, {"plugin.flower.secret": "x"})[1]["arguments"]["secret"] == "x"


class Keeper(strategy.FedAvg):
    """A user's own Flower strategy, with memory of every kind that a checkpoint holds."""

    def __init__(self, min_available_nodes: int = 2, min_train_nodes: int = 2) -> None:
        super().__init__(min_available_nodes=min_available_nodes, min_train_nodes=min_train_nodes)
        self.rounds, self.mean, self.tables, self.record = 0, 0.0, [], None
        self.seen: Any = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.record = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        (value,) = arrays.to_numpy_ndarrays()
        self.rounds += 1
        self.mean += float(value.mean())
        self.tables = [*self.tables, value.copy()]
        return ArrayRecord({"global-prompt": Array(value + self.rounds + self.mean + sum(self.tables))}), metrics


def test_a_resumed_run_goes_on_with_its_memory():
    straight, resumed = (under(Keeper) for _ in range(2))
    rng = np.random.default_rng(0)
    sent = [[torch.from_numpy(row) for row in rng.standard_normal((4, 1, 3))] for _ in range(3)]
    prompt = START
    for r in (1, 2):
        prompt = play(straight, sent[r - 1], r, prompt).float()
    resumed.state = {name: tensor.clone() for name, tensor in straight.state.items()}
    assert {name.split("/")[1] for name in resumed.state} == {"number", "list", "record"}
    assert torch.equal(play(resumed, sent[2], 3, prompt), play(straight, sent[2], 3, prompt))


def test_memory_that_no_checkpoint_holds_is_refused():
    class Odd(Keeper):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            self.seen = {server_round}
            return super().aggregate_train(server_round, replies)

    with pytest.raises(ConfigError, match="Odd remembers seen, a set"):
        play(under(Odd), uploads(*[(1, 1, 1)] * 4), 1, START)


def test_it_sends_no_messages_of_its_own():
    class Chatty(Keeper):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
            return grid.send_and_receive([])

    with pytest.raises(ConfigError, match="sends messages itself"):
        play(under(Chatty), uploads(*[(1, 1, 1)] * 4), 1, START)


def test_the_adapter_bears_the_name_of_what_it_adapts():
    found, _ = adapt(strategy.FedMedian, {})
    assert found.__name__ == "FedMedian"
    assert issubclass(found, FlowerStrategy)

"""kill -9, or a power cut, at any line of a server's round: its event is on disk before its noise is drawn."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.privacy.accounting import epsilon
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.server import strategy as server
from fl_dualpriv.server.accounting import BudgetExhausted, ServerPrivacy
from strategies.dpfpl import DPFPL
from tests.made_strategy import made_strategy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to learn what was synced")
Notes = list[dict[str, Any]]


class Server:
    """Three rounds of a server over four clients, crashed and started again over the same ledger.

    Args:
        root: Holds its ledger.
        unit: Client level, or record level with a trusted server.
        arithmetic: Of its sums.
    """

    RATE, MULTIPLIER, DELTA = 0.5, 4.0, 1e-3

    def __init__(self, root: Path, unit: Any, arithmetic: Any) -> None:
        root.mkdir()
        self.root, self._unit, self._arithmetic = root, unit, arithmetic
        self.ledger = Ledger(root / "runs" / "1" / "ledger.jsonl")
        self.two_rounds = epsilon(self.RATE, self.MULTIPLIER, 2, self.DELTA)

    def play(self, note: Callable[[str, int], None]) -> None:
        """Three rounds, of which the budget has room for two."""
        privacy = ServerPrivacy(
            unit=self._unit,
            bound=1.0,
            noise_multiplier=self.MULTIPLIER,
            sampling_rate=self.RATE,
            ledger_multiplier=self.MULTIPLIER,
            ledger=self.ledger,
            max_epsilon=self.two_rounds,
            delta=self.DELTA,
            arithmetic=self._arithmetic,
        )
        strategy = made_strategy(DPFPL, privacy, sizes=[10] * 4)
        arrays = messages.to_arrays(torch.zeros(2, 3))
        for server_round in (1, 2, 3):
            note("doing", server_round)
            try:
                asked = strategy.configure_train(server_round, arrays, ConfigRecord(), grid=None)  # type: ignore[arg-type]
            except BudgetExhausted:
                return
            answers = [Message(_upload(messages.read_train(m).partitions), reply_to=m) for m in asked]
            found, _ = strategy.aggregate_train(server_round, answers)
            assert found is not None
            arrays = found
            note("released", server_round)


def _upload(partitions: tuple[int, ...]) -> Any:
    values: Tensor = torch.ones(len(partitions), 2, 3)
    return messages.uploads_content(messages.Uploads(partitions=partitions, values=values))


@pytest.mark.parametrize(("unit", "arithmetic"), [("client", "float"), ("record", "integer")])
@pytest.mark.parametrize(
    ("cut", "late"), [("killed", False), ("power cut", False), ("killed", True)], ids=["killed", "power cut", "broken"]
)
def test_a_crashed_server_has_its_event_before_its_noise(
    tmp_path: Path,
    in_a_process: Callable[..., Notes],
    lose_power: Callable[..., None],
    unit: str,
    arithmetic: str,
    cut: str,
    late: bool,
) -> None:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        """The event is written when the round is over."""
        step, write = DPFPL.server_update, server.RoundAccountant.write
        waiting: list[Any] = []

        def then_write(self: Any, *arguments: Any) -> Tensor:
            moved = step(self, *arguments)
            write(*waiting.pop())
            return moved

        patch.setattr(server.RoundAccountant, "write", lambda *arguments: waiting.append(arguments))
        patch.setattr(DPFPL, "server_update", then_write)

    def play(tracer: Any) -> None:
        def note(what: str, server_round: int) -> None:
            tracer.doing = ("t", server_round)
            if what == "released":
                tracer.note(released=tracer.doing)
            tracer.point()

        tried.play(note)

    Server(tmp_path / "warm", unit, arithmetic).play(
        lambda what, server_round: None
    )  # the accountant keeps its numbers
    tried = Server(tmp_path / "0", unit, arithmetic)
    points = in_a_process(tmp_path / "0.notes", tried.root, play, lines=True)[-1]["points"]
    assert [event.server_round for event in tried.ledger.read().events] == [1, 2]
    caught = 0
    for k in sorted(random.Random(0).sample(range(1, points + 1), 7)):
        tried = Server(tmp_path / str(k), unit, arithmetic)
        notes = in_a_process(tmp_path / f"{k}.notes", tried.root, play, k, True, mutate if late else None)
        if cut == "power cut":
            lose_power(tried.root, notes, keep_prompts=False)
        drawn = {note["drawn"][1] for note in notes if "drawn" in note}
        caught += not drawn <= {event.server_round for event in tried.ledger.read().events}
        made: list[int] = []
        tried.play(lambda what, server_round: made.append(server_round) if what == "released" else None)  # noqa: B023
        if not late:
            assert len(drawn) + len(made) <= 2
            assert tried.ledger.read().epsilon(tried.DELTA) <= tried.two_rounds
    assert bool(caught) == late

"""What must hold of personal prompts that the server makes of all uploads, checked on strategy, clients and nodes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MessageType
from torch import Tensor

import fl_dualpriv.client.step
import fl_dualpriv.privacy.step
from clients.app import app
from fl_dualpriv import messages
from fl_dualpriv.client.state import fresh_state
from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.run.checkpoint import Checkpoint, CheckpointFolder, Progress
from fl_dualpriv.server import build
from fl_dualpriv.server.collective import Collective
from strategies.dpfpl import DPFPL
from tests.guarantees import step_checks
from tests.guarantees.run_checks import APP_DIR, PROMPT, TERMS, Federation, upload_of
from tests.guarantees.step_checks import CLIP, CTX_DIM, MULTIPLIER, N_CTX, START, as_a_client_draws, records
from tests.made_strategy import made_strategy, training_messages

NODES = (71, 12, 71, 12)
"""Two nodes host two clients each, in turns."""
SIZES = (30, 40, 50, 60)
RATE, STEPS, ROUNDS = 0.3, 2, 3
SHAPE = (N_CTX, CTX_DIM)
CHANGES: dict[str, Any] = {"prompt.personalisation": "collective"}


def rule_of(changes: dict[str, Any], sizes: tuple[int, ...] = SIZES) -> Collective:
    """The rule of a run with the rates of the local steps here, as the server makes it."""
    base: dict[str, Any] = {
        "train.local-steps": STEPS,
        "train.sampling-rate": RATE,
        "train.global-learning-rate": 1.0,
        "train.local-learning-rate": 1.0,
        "privacy.record.calibrate-to": "noise-multiplier",
        "privacy.record.noise-multiplier": MULTIPLIER,
        "privacy.record.clip-norm": CLIP,
    }
    config = RunConfig.from_run_config(app_defaults(APP_DIR) | base | CHANGES | changes)
    cards = {p: messages.ClientCard(partition=p, num_examples=n) for p, n in enumerate(sizes)}
    rule = build.collective_parts(config, record_level_plan(config), cards)
    assert rule is not None
    return rule


def strategy_of(rule: Collective) -> Any:
    return made_strategy(DPFPL, None, sizes=SIZES, nodes=NODES, prompt_kind="personal", collective=rule)


Answer = Callable[[messages.TrainRequest], Tensor]


def one_round(strategy: Any, server_round: int, start: Tensor, answer: Answer) -> Tensor:
    """The prompt after a round whose nodes answer like this."""
    replies = []
    for asked in training_messages(strategy, server_round, start):
        request = messages.read_train(asked)
        uploads = messages.Uploads(partitions=request.partitions, values=answer(request))
        replies.append(Message(messages.uploads_content(uploads), reply_to=asked))
    arrays, _ = strategy.aggregate_train(server_round, replies)
    return messages.from_arrays(arrays)


# --- what the parts are made of ---------------------------------------------------------------------------------------


def all_parts(seed: int) -> list[Tensor]:
    """Parts and prompts of some rounds of clients with these records and coins, and one sequence of releases."""
    strategy, prompt, found = strategy_of(rule_of({})), START, list[Tensor]()
    g = torch.Generator().manual_seed(9)
    released = iter((30 * torch.randn(len(SIZES) * STEPS * ROUNDS, *SHAPE, generator=g)).double().unbind())

    def answer(request: messages.TrainRequest) -> Tensor:
        assert request.personal_parts is not None
        results = step_checks.local_round(
            [records(seed + 10 * p, SIZES[p]) for p in request.partitions],
            as_a_client_draws(request.server_round, seed),
            method="dpfpl",
            rate=RATE,
            steps=STEPS,
            start=request.global_prompt,
            states=[replace(fresh_state(*SHAPE, 2), personal=part) for part in request.personal_parts],
            personal_is_given=True,
        )
        saved = torch.stack([state.personal for _, state in results])
        assert torch.equal(saved, request.personal_parts), "a client's steps move the part that the server made"
        return torch.stack([upload for upload, _ in results])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fl_dualpriv.privacy.step, "release", lambda clean, plan, source: next(released))
        for server_round in range(1, ROUNDS + 1):
            prompt = one_round(strategy, server_round, prompt, answer)
            found += [prompt, strategy.personal_parts(prompt), *strategy.state.values()]
    return found


def parts_see_the_releases_alone() -> None:
    """Two unrelated data sets, other coins, one sequence of releases: the same parts, and one memory of the server."""
    one, two = all_parts(1), all_parts(2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), "data pass by the releases"
    assert bool(one[-1].any()), "the parts are zero"


# --- the stated noise -------------------------------------------------------------------------------------------------


def the_stated_noise_is_the_public_one() -> None:
    """The variance of each client's sum does not depend on who else answered, and counts every step."""
    rule, memory = rule_of({"prompt.personal-memory": 0.5}), dict[str, Tensor]()
    expected = [0.0] * len(SIZES)
    for answered in ((0, 1, 2, 3), (0,), (3, 1), ()):
        uploads = torch.zeros(len(answered), *SHAPE, dtype=torch.float64)
        memory = rule.followed(memory, answered, uploads)
        for p, size in enumerate(SIZES):
            own = STEPS * (MULTIPLIER * CLIP / (RATE * size)) ** 2 if p in answered else 0.0
            expected[p] = 0.25 * expected[p] + own
        stated = memory["mechanism.deviation-noise"].tolist()
        assert stated == pytest.approx(expected, rel=1e-9), f"a noise of {stated} is stated, not {expected}"


def a_sum_has_the_noise_it_states() -> None:
    """Clients with the same records and one full batch: their sums differ by nothing but noise."""
    clients = step_checks.CLIENTS
    results = step_checks.local_round(
        [records(1)] * clients, as_a_client_draws(), method="dpfpl", personal_is_given=True
    )
    rule = rule_of({"train.local-steps": 1, "train.sampling-rate": 1.0}, (40,) * clients)
    memory = rule.followed({}, range(clients), torch.stack([upload for upload, _ in results]).double())
    variance = float(memory["mechanism.deviation-noise"][0])
    step_checks.has_the_scale(memory["mechanism.deviations"].flatten(1).numpy(), variance**0.5)


# --- whose part it is -------------------------------------------------------------------------------------------------


def _own(partition: int) -> Tensor:
    return torch.full(SHAPE, float(partition + 1), dtype=torch.float64)


def each_client_is_sent_its_own_part() -> None:
    """Uploads 1, 2, 3, 4 with mean 2.5, on nodes that host the clients 0 and 2, and 1 and 3."""
    strategy = strategy_of(rule_of({"privacy.record.mechanism": "none"}))
    prompt = one_round(strategy, 1, torch.zeros(SHAPE), lambda asked: torch.stack([_own(p) for p in asked.partitions]))
    requests: list[messages.TrainRequest | messages.EvaluateRequest] = [
        *(messages.read_train(m) for m in training_messages(strategy, 2, prompt)),
        *(messages.read_evaluate(m) for m in strategy.evaluation_messages(1, prompt, "personal")),
    ]
    assert sorted(p for request in requests for p in request.partitions) == [0, 0, 1, 1, 2, 2, 3, 3]
    for request in requests:
        expected = torch.stack([_own(p) - 2.5 for p in request.partitions]).float()
        sent = request.personal_parts
        assert sent is not None
        assert torch.equal(sent, expected), f"the clients {request.partitions} were sent the parts of others"
    for kind in ("zero-shot", "free", "global"):
        others = strategy.evaluation_messages(1, prompt, kind)
        assert all(messages.read_evaluate(m).personal_parts is None for m in others)


def _ask(grid: LocalGrid, partitions: tuple[int, ...], parts: Tensor | None, server_round: int = 1) -> Message:
    request = messages.TrainRequest(
        partitions=partitions,
        global_prompt=PROMPT,
        server_round=server_round,
        run_token="t",
        terms=TERMS,
        personal_parts=parts,
    )
    (reply,) = grid.send_and_receive([Message(messages.train_content(request), 1, MessageType.TRAIN)])
    return reply


def each_client_keeps_its_own_part(federation: Federation) -> None:
    """One node hosts both clients, and the server names them in another order."""
    grid = LocalGrid(app, 1, federation.config({**CHANGES, "supernodes": 1}))
    parts = torch.stack([torch.full_like(PROMPT, 0.02), torch.full_like(PROMPT, 0.01)])
    reply = _ask(grid, (1, 0), parts)
    assert messages.read_uploads(reply, tuple(PROMPT.shape)).failed == {}
    for p in (0, 1):
        kept, _ = read_tensors(federation.folder / "clients" / f"client-{p:03d}" / "prompt.safetensors")
        assert torch.equal(kept["personal"], parts[1 - p]), f"client {p} has the part of another client"


# --- what a client refuses --------------------------------------------------------------------------------------------


def other_parts_are_refused(federation: Federation) -> None:
    """Before the event: the ledger stays empty."""
    grid = federation.nodes(**CHANGES)
    part, endless = torch.zeros(1, *PROMPT.shape), torch.zeros(1, *PROMPT.shape)
    endless[0, 0, 0] = torch.inf
    wrong = {
        "none": None,
        "two for one client": torch.cat([part, part]),
        "none for one client": part[:0],
        "no stack": part[0],
        "another shape": torch.zeros(1, PROMPT.shape[0] + 1, PROMPT.shape[1]),
        "double": part.double(),
        "infinite": endless,
        "not a number": endless * 0,
    }
    for name, parts in wrong.items():
        assert upload_of(_ask(grid, (0,), parts)) is None, f"an upload left for a part that is {name}"
        assert federation.ledger.read().releases() == 0, f"a part that is {name} was paid for"
    for partitions in ((0, 0), (1,), (0, 1)):  # one twice, or not hosted here
        assert _ask(grid, partitions, torch.cat([part] * len(partitions))).has_error()
    refusals = (federation.folder / "clients" / "client-000" / "refusals.jsonl").read_text()
    assert refusals.count('"reason"') == len(wrong)
    assert upload_of(_ask(grid, (0,), part)) is not None


def a_part_is_refused_where_the_server_makes_none(federation: Federation) -> None:
    grid = federation.nodes()
    assert upload_of(_ask(grid, (0,), torch.zeros(1, *PROMPT.shape))) is None, "a client took a part of the server"
    assert federation.ledger.read().releases() == 0
    assert upload_of(_ask(grid, (0,), None)) is not None


# --- a server that was cut off ----------------------------------------------------------------------------------------


def _uploads(server_round: int) -> Answer:
    g = torch.Generator().manual_seed(server_round)
    values = torch.randn(len(SIZES), *SHAPE, generator=g, dtype=torch.float64)
    return lambda asked: values[list(asked.partitions)]


def the_checkpoint_holds_the_memory(folder: Path) -> None:
    """The parts after three rounds, whether or not the server was cut off after two."""
    rule = rule_of({"privacy.record.noise-multiplier": 0.5})
    whole, prompt = strategy_of(rule), START
    for server_round in (1, 2):
        prompt = one_round(whole, server_round, prompt, _uploads(server_round))
    progress = Progress(run_token="token", rounds_done=2, events=0, deliveries=8, failures=0, last_failure=None)
    checkpoints = CheckpointFolder(folder, {}, list(SIZES), {})
    checkpoints.write(Checkpoint(progress=progress, prompt=prompt, state=whole.state))
    checkpoint = checkpoints.read(may_go_back=True)
    assert checkpoint is not None
    resumed = strategy_of(rule)
    resumed.state = checkpoint.state
    assert torch.equal(resumed.personal_parts(checkpoint.prompt), whole.personal_parts(prompt)), "other parts are sent"
    ends = [one_round(s, 3, p, _uploads(3)) for s, p in ((whole, prompt), (resumed, checkpoint.prompt))]
    parts = [s.personal_parts(end) for s, end in zip((whole, resumed), ends, strict=True)]
    assert bool(parts[0].any())
    assert torch.equal(parts[0], parts[1]), "a resumed server makes other parts"

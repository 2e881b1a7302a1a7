"""Records at their worst, at the record level: a bad one is exactly a zero, and noise, divisor and ledger do not move.

Noise comes from a keyed source, so that it can be drawn again here and taken off: what is left is the clipped sum.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from torch import Tensor

import fl_dualpriv.privacy.step
from fl_dualpriv import messages
from fl_dualpriv.client.node import RunContext
from fl_dualpriv.client.state import fresh_state
from fl_dualpriv.client.step import LocalTraining, Participant, cohort_update
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.privacy.clipping import GRID_STEPS
from fl_dualpriv.privacy.integer import rounded_gaussian
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey, gaussian_noise
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.towers.plain import FunctionTower

N_CTX, CTX_DIM, N_CLS, EMBED, RECORDS = 4, 6, 3, 5, 11
SCALE, CLIP, MULTIPLIER = 10.0, 0.8, 1.3
GENERATOR = torch.Generator().manual_seed(0)
MAP = torch.randn(N_CLS * EMBED, N_CTX * CTX_DIM, generator=GENERATOR, dtype=torch.float64) / 5
START = torch.randn(N_CTX, CTX_DIM, generator=GENERATOR, dtype=torch.float64)
FEATURES = torch.nn.functional.normalize(torch.randn(RECORDS, EMBED, generator=GENERATOR, dtype=torch.float64), dim=1)
LABELS = torch.arange(RECORDS) % N_CLS
HALF_MAX = float(torch.finfo(torch.float16).max)

Arithmetic = Literal["float", "integer"]
Space = Literal["prompt", "feature"]
BOTH = pytest.mark.parametrize("arithmetic", ["float", "integer"])
SPACES = pytest.mark.parametrize("space", ["prompt", "feature"])


def features_of(prompt: Tensor) -> Tensor:
    """Class features in the precision of the prompt: float64 here, so that nothing is lost on the way."""
    return torch.nn.functional.normalize((MAP.to(prompt.dtype) @ prompt.reshape(-1)).reshape(N_CLS, EMBED), dim=-1)


def keyed(purpose: str, step: int, seed: int = 5) -> RandomSource:
    return KeyedRandom(StreamKey(seed=seed, purpose=purpose, step=step))


def noise_of(shape: tuple[int, ...], arithmetic: Arithmetic, source: RandomSource) -> Tensor:
    """Full noise of a step: N(0, z²C²), or rounded to the grid C/2**20."""
    if arithmetic == "float":
        return gaussian_noise(source, shape, MULTIPLIER * CLIP)
    return rounded_gaussian(source, shape, MULTIPLIER * GRID_STEPS) * (CLIP / GRID_STEPS)


def released(
    monkeypatch: pytest.MonkeyPatch,
    data: ClientData,
    arithmetic: Arithmetic = "float",
    space: Space = "prompt",
    rate: float = 1.0,
    start: Tensor = START,
    random: Callable[[str, int], RandomSource] = keyed,
) -> tuple[Tensor, Tensor]:
    """One step of the real round: what its one release gave, and the move of the prompts times the public divisor."""
    seen: list[Tensor] = []
    release = fl_dualpriv.privacy.step.release

    def looking(*arguments: Any) -> Tensor:
        seen.append(release(*arguments))
        return seen[-1].clone()

    plan = RecordLevelPlan(
        clip_norm=CLIP,
        noise_multiplier=MULTIPLIER,
        sampling_rate=rate,
        releases=1,
        delta=1e-5,
        trusts_server=False,
        personal=True,
        arithmetic=arithmetic,
    )
    training = LocalTraining(
        local_steps=1,
        sampling_rate=rate,
        global_learning_rate=1.0,
        local_learning_rate=1.0,
    )
    with monkeypatch.context() as patch:
        patch.setattr(fl_dualpriv.privacy.step, "release", looking)
        ((upload, state),) = cohort_update(
            global_prompt=start,
            participants=[
                Participant(
                    partition=0,
                    state=fresh_state(N_CTX, CTX_DIM, 2),
                    data=data,
                    random=random,
                    event=plan.event("run", 1, 1),
                )
            ],
            objective=Classification(
                tower=FunctionTower(features_of), logit_scale=SCALE, top_m=0, noise_space=space, workspace_bytes=2**20
            ),
            method=METHODS["full"],
            training=training,
            plan=plan,
        )
    (one,) = seen  # one release a step, whatever the data are
    assert torch.isfinite(one).all()
    torch.testing.assert_close(upload, state.personal, atol=1e-6, rtol=1e-6)  # the start was added and taken off
    return one, -state.personal * (rate * data.num_examples)


def clean_sum(monkeypatch: pytest.MonkeyPatch, data: ClientData, arithmetic: Arithmetic, space: Space) -> Tensor:
    """The release less the noise that must be on it."""
    one, uploaded = released(monkeypatch, data, arithmetic, space)
    if space == "prompt":  # what leaves is the release: noise and divisor are seen in the upload itself
        torch.testing.assert_close(uploaded, one, atol=1e-12, rtol=1e-12)
    return one - noise_of(tuple(one.shape), arithmetic, keyed("noise", 0))


def with_record(value: Tensor | float, dtype: torch.dtype = torch.float64) -> ClientData:
    """The records, of which number 4 has these features."""
    features = FEATURES.to(dtype)
    features[4] = torch.as_tensor(value, dtype=dtype)
    return ClientData(features=features, labels=LABELS)


def without_record() -> ClientData:
    keep = torch.arange(RECORDS) != 4
    return ClientData(features=FEATURES[keep], labels=LABELS[keep])


def one_entry(value: float) -> Tensor:
    row = FEATURES[4].clone()
    row[2] = value
    return row


# --- what counts for nothing ------------------------------------------------------------------------------------------

NOTHING = {
    "unreadable": torch.full((EMBED,), math.nan),
    "one nan": one_entry(math.nan),
    "inf": one_entry(math.inf),
    "minus inf": one_entry(-math.inf),
    "both infinities": torch.tensor([math.inf, -math.inf, 0.0, 0.0, 0.0]),
    "fp16 overflow": torch.full((EMBED,), 2 * HALF_MAX).to(torch.float16),
    "zero gradient": torch.zeros(EMBED),
}


@BOTH
@SPACES
@pytest.mark.parametrize("name", NOTHING)
def test_a_bad_record_is_exactly_a_zero_and_the_noise_stays(
    monkeypatch: pytest.MonkeyPatch, name: str, arithmetic: Arithmetic, space: Space
) -> None:
    bad = clean_sum(monkeypatch, with_record(NOTHING[name]), arithmetic, space)
    rest = clean_sum(monkeypatch, without_record(), arithmetic, space)
    # Sums of the same ten rows, in another order where the blocks differ; in integers that is nothing.
    torch.testing.assert_close(bad, rest, atol=1e-12 if arithmetic == "float" else CLIP / GRID_STEPS / 4, rtol=0)
    assert float(rest.norm()) > 1  # ten records: something is there


@BOTH
@SPACES
@pytest.mark.parametrize("name", NOTHING)
def test_a_client_of_bad_records_alone_sends_noise(
    monkeypatch: pytest.MonkeyPatch, name: str, arithmetic: Arithmetic, space: Space
) -> None:
    features = NOTHING[name].to(torch.float64).expand(RECORDS, -1).clone()
    clean = clean_sum(monkeypatch, ClientData(features=features, labels=LABELS), arithmetic, space)
    # Zero gradients and "one nan" rows are zeros, whatever the label says.
    torch.testing.assert_close(clean, torch.zeros_like(clean), atol=1e-12, rtol=0)


# --- what counts, and no more than a record may -----------------------------------------------------------------------


@BOTH
@SPACES
@pytest.mark.parametrize("value", [1e30, 1e154, 1e200, 1e308, 3.4e38, -1.7e308, 1e-45, 5e-324, 1e-310, -0.0], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["one entry", "whole row"])
def test_a_huge_or_tiny_record_moves_the_sum_by_at_most_the_clip_norm(
    monkeypatch: pytest.MonkeyPatch, value: float, whole: bool, arithmetic: Arithmetic, space: Space
) -> None:
    row = torch.full((EMBED,), value, dtype=torch.float64) if whole else one_entry(value)
    moved = clean_sum(monkeypatch, with_record(row), arithmetic, space) - clean_sum(
        monkeypatch, without_record(), arithmetic, space
    )
    assert float(moved.norm()) <= CLIP * (1 + 1e-12) + 1e-12
    if whole and abs(value) < 1e-30:
        assert float(moved.norm()) < 1e-12  # it is nearly nothing, and is not blown up to the clip norm


@BOTH
@pytest.mark.parametrize("value", [3.4e38, 1e38, 1e-45, 1e-40], ids=str)
def test_float32_records_at_the_ends_of_their_range_touch_nobody(
    monkeypatch: pytest.MonkeyPatch, value: float, arithmetic: Arithmetic
) -> None:
    """As the image tower gives them; 10 times 3.4e38 overflows in the logits, and the record becomes a zero."""
    start = START.float()
    data = with_record(torch.full((EMBED,), value), torch.float32)
    rest = replace(without_record(), features=without_record().features.float())
    (one, _), (other, _) = (released(monkeypatch, d, arithmetic, start=start) for d in (data, rest))
    moved = float((one - other).norm())
    assert moved <= CLIP + 1e-5  # float32 rows of the others
    if value != 1e38:
        assert moved < 1e-5


# --- few records, or none ---------------------------------------------------------------------------------------------


@BOTH
@SPACES
def test_an_empty_batch_releases_the_noise_alone(
    monkeypatch: pytest.MonkeyPatch, arithmetic: Arithmetic, space: Space
) -> None:
    data = ClientData(features=FEATURES, labels=LABELS)
    one, uploaded = released(monkeypatch, data, arithmetic, space, rate=1e-12)
    assert torch.equal(one, noise_of(tuple(one.shape), arithmetic, keyed("noise", 0)))
    if space == "prompt":  # the divisor is 11e-12 all the same
        torch.testing.assert_close(uploaded, one, atol=0, rtol=1e-9)


@BOTH
@pytest.mark.parametrize("records", [1, 2])
@pytest.mark.parametrize("rate", [0.15, 0.5, 1.0])
def test_a_client_with_fewer_records_than_a_batch_has_full_noise_and_its_public_divisor(
    monkeypatch: pytest.MonkeyPatch, records: int, rate: float, arithmetic: Arithmetic
) -> None:
    """The expected batch may be less than one record; who is in it does not change the divisor."""
    data = ClientData(features=FEATURES[:records], labels=LABELS[:records])
    sizes = set()
    for seed in range(12):
        one, uploaded = released(monkeypatch, data, arithmetic, rate=rate, random=functools.partial(keyed, seed=seed))
        torch.testing.assert_close(uploaded, one, atol=1e-9, rtol=1e-9)
        clean = one - noise_of(tuple(one.shape), arithmetic, keyed("noise", 0, seed))
        sizes.add(round(float(clean.norm()), 6))
        assert float(clean.norm()) <= records * CLIP + 1e-9
    assert (0.0 in sizes) == (rate < 1)  # empty batches were among them


@BOTH
@pytest.mark.parametrize("case", ["all unreadable", "empty batch", "one record"])
def test_noise_has_full_scale_over_many_draws(
    monkeypatch: pytest.MonkeyPatch, case: str, arithmetic: Arithmetic
) -> None:
    """As above, but from what is drawn and not from what should be."""
    data = ClientData(features=FEATURES[:1], labels=LABELS[:1])
    if case == "all unreadable":
        data = ClientData(features=torch.full_like(FEATURES, math.nan), labels=LABELS)
    rate = 1.0 if case == "all unreadable" else 1e-12
    draws = torch.stack(
        [
            released(monkeypatch, data, arithmetic, rate=rate, random=functools.partial(keyed, seed=seed))[1]
            for seed in range(100)
        ]
    )
    # 100 · 24 draws: the standard error of the deviation is 1/sqrt(4800) = 1.44 %, 5 of them
    assert float(draws.std()) == pytest.approx(MULTIPLIER * CLIP, rel=0.072)


# --- a node with real images ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float", "integer"])
def run_context(request: pytest.FixtureRequest, make_run_context: Callable[..., RunContext]) -> RunContext:
    return make_run_context(
        {"privacy.arithmetic": request.param, "privacy.randomness": "seeded", "train.local-steps": 1}
    )


@pytest.mark.parametrize("name", ["unreadable", "inf", "zero gradient"])
def test_a_bad_record_among_real_ones_changes_no_count_and_no_line_of_the_ledger(
    run_context: RunContext, tiny_node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own = run_context.task.client_data(0)
    bad = replace(own, features=own.features.clone())
    bad.features[: own.num_examples // 2] = {"unreadable": math.nan, "inf": math.inf, "zero gradient": 0.0}[name]
    found, lines = [], []
    for data in (own, bad):
        monkeypatch.setattr(type(run_context.task), "client_data", lambda *_, data=data: data)
        node = tiny_node(run_context=run_context, folder=tmp_path / str(len(found)))
        found.append(node.train(1))
        lines.append(Ledger(node.folder / "ledger.jsonl").read())
    assert lines[0] == lines[1]
    assert lines[0].releases() == 1
    assert [(f.partitions, f.failed) for f in found] == [((0,), {})] * 2
    assert all(torch.isfinite(f.values).all() for f in found)
    # The noise is the same: what is left is half of a batch, of norm at most 24 · 1 over the expected batch, times 0.5.
    assert run_context.plan is not None
    divisor = run_context.plan.sampling_rate * own.num_examples
    assert 0 < float((found[0].values - found[1].values).norm()) <= 0.5 * own.num_examples / divisor


PROMPTS = {
    "nan": torch.full((4, 32), math.nan),
    "inf": torch.full((4, 32), math.inf),
    "float32 max": torch.full((4, 32), torch.finfo(torch.float32).max),
    "subnormal": torch.full((4, 32), 1e-45),
    "float64": torch.zeros(4, 32, dtype=torch.float64),
    "float16": torch.zeros(4, 32, dtype=torch.float16),
    "integers": torch.zeros(4, 32, dtype=torch.int64),
    "flat": torch.zeros(128),
    "none": torch.zeros(0, 32),
}
"""What a server may send for a global prompt."""


@pytest.mark.parametrize("name", PROMPTS)
def test_no_global_prompt_makes_a_release_without_an_event_or_noise(
    run_context: RunContext, tiny_node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    draws: list[Tensor] = []
    release = fl_dualpriv.privacy.step.release

    def looking(*arguments: Any) -> Tensor:
        draws.append(release(*arguments))
        return draws[-1]

    monkeypatch.setattr(fl_dualpriv.privacy.step, "release", looking)
    node = tiny_node(run_context=run_context, folder=tmp_path)
    found = node.train(1, prompt=PROMPTS[name])
    made = Ledger(tmp_path / "ledger.jsonl").read().releases()
    assert len(draws) <= made
    assert len(found.partitions) <= made
    assert len(found.partitions) + len(found.failed) == 1
    if name in ("flat", "none", "float64", "float16", "integers"):
        assert (found.partitions, made) == ((), 0)
    else:
        assert (found.partitions, made, len(draws)) == ((0,), 1, 1)
        assert torch.isfinite(draws[0]).all()


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"prompt": torch.zeros(4, 32)},
        {"global-prompt": torch.zeros(4, 32), "personal": torch.zeros(4, 32)},
    ],
    ids=["missing", "another name", "one more"],
)
def test_a_message_with_missing_or_extra_tensors_is_not_read(
    run_context: RunContext, flower_task: None, arrays: dict[str, Tensor]
) -> None:
    task = messages.TrainRequest(
        partitions=(0,), global_prompt=torch.zeros(4, 32), server_round=1, run_token="t", terms=run_context.terms
    )
    content = messages.train_content(task)
    record = ArrayRecord({name: Array(value.numpy()) for name, value in arrays.items()})
    message = Message(RecordDict({**content, "arrays": record}), 1, MessageType.TRAIN)
    with pytest.raises(ValueError, match="expected only 'global-prompt'"):
        messages.read_train(message)

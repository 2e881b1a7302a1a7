"""Clients that step together get the numbers that each gets alone, bit by bit, whoever steps beside it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.pruning import KEEP_ALL
from fl_dualpriv.client.state import PersonalState, fresh_state
from fl_dualpriv.client.step import LocalTraining, Participant, cohort_update
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.learners.head import LowRankHead
from fl_dualpriv.learners.row_check import checked_objective
from fl_dualpriv.models.open_clip import load_backbone
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.towers.base import PromptTower

NAMES = ("cat", "red fire truck", "dog", "the great wall of china", "tree")
SIZES = (17, 3, 40, 1, 24)
TRAINED = [name for name, parts in METHODS.items() if parts.trains and not parts.published_procedure]
PLANS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "private": {},
    "feature": {},
    "trusting": {"trusts_server": True},
}


@pytest.fixture(scope="module")
def text(tiny_clip_dir: Path) -> PromptedText:
    return PromptedText(load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", None, "fp32"), NAMES, "a photo of a {}")


def participant(partition: int, start: Tensor) -> Participant:
    """A client with its own records, personal prompt and streams."""
    g = torch.Generator().manual_seed(partition)
    size = SIZES[partition]
    features = torch.nn.functional.normalize(torch.randn(size, 32, generator=g), dim=1)
    if size > 20:
        features[4] = float("nan")  # a bad record
    labels = torch.randint(0, len(NAMES), (size,), generator=g)

    def random(purpose: str, step: int) -> RandomSource:
        return KeyedRandom(StreamKey(seed=0, purpose=purpose, partition=partition, step=step))

    fresh = fresh_state(*start.shape, 2)
    personal = fresh.personal + 0.05 * torch.randn(start.shape, generator=g) * (partition % 2)
    return Participant(
        partition=partition,
        state=PersonalState(personal=personal, row_basis=fresh.row_basis, server_round=3),
        data=ClientData(features=features, labels=labels),
        random=random,
    )


def update(
    tower: PromptTower, start: Tensor, method: str, level: str, members: tuple[int, ...], workspace: int, top_m: int
) -> dict[int, list[Tensor]]:
    steps = 1 if level == "trusting" else 3
    changes = PLANS[level]
    plan = None
    if changes is not None:
        plan = RecordLevelPlan(
            **{
                "clip_norm": 0.5,
                "noise_multiplier": 1.0,
                "sampling_rate": 0.3,
                "releases": steps,
                "delta": 1e-4,
                "trusts_server": False,
                "personal": METHODS[method].personal,
            }
            | changes
        )
    g = torch.Generator().manual_seed(9)
    objective, path = checked_objective(
        Classification(
            tower=tower,
            logit_scale=20.0,
            top_m=top_m,
            noise_space="feature" if level == "feature" else "prompt",
            workspace_bytes=workspace,
        ),
        made_up,
        torch.stack([METHODS[method].effective(start, own) for own in torch.randn(3, *start.shape, generator=g)]),
        private=plan is not None,
    )
    found: dict[int, list[Tensor]] = {}
    for group in [(p,) for p in members] if "clients" in path else [members]:  # as a run does
        results = cohort_update(
            global_prompt=start,
            participants=[replace(participant(p, start), event=plan and plan.event("run", 4, steps)) for p in group],
            objective=objective,
            method=METHODS[method],
            training=LocalTraining(
                local_steps=steps,
                sampling_rate=0.3,
                global_learning_rate=0.7,
                local_learning_rate=0.9,
                pruning=replace(KEEP_ALL, keep_ratio=0.5),
            ),
            plan=plan,
        )
        found |= {p: [upload, s.personal, s.row_basis] for p, (upload, s) in zip(group, results, strict=True)}
    return found


def made_up() -> ClientData:
    g = torch.Generator().manual_seed(100)
    features = torch.nn.functional.normalize(torch.randn(25, 32, generator=g), dim=1)
    return ClientData(features=features, labels=torch.randint(0, len(NAMES), (25,), generator=g))


def largest_difference(one: dict[int, list[Tensor]], other: dict[int, list[Tensor]]) -> float:
    """Relative to the largest entry of each tensor."""
    pairs = [pair for p in one for pair in zip(one[p], other[p], strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


_QUICK = {("trusting", "dpfpl"), ("trusting", "promptfl")}  # the other methods trust the server by the same code
_CASES = [
    pytest.param(method, level, marks=[pytest.mark.slow] * (level == "trusting" and (level, method) not in _QUICK))
    for method in TRAINED
    for level in PLANS
]


@pytest.mark.parametrize(("method", "level"), _CASES)
def test_a_cohort_equals_its_clients_one_by_one(text: PromptedText, method: str, level: str) -> None:
    if level == "trusting" and not METHODS[method].shared:
        pytest.skip("refused: nothing is shared")
    start = text.template_context(4)
    together = update(text.tower, start, method, level, (2, 0, 4, 1, 3), 2**30, 0)
    for p in range(5):
        alone = update(text.tower, start, method, level, (p,), 2**30, 0)
        assert largest_difference({p: together[p]}, alone) == 0
    assert any(bool(t.any()) for t in together[0][:2])


def test_a_small_workspace_and_another_order_change_nothing(text: PromptedText) -> None:
    start = text.template_context(4)
    one = update(text.tower, start, "dpfpl", "private", (0, 1, 2, 3, 4), 2**30, 0)
    other = update(text.tower, start, "dpfpl", "private", (4, 2, 0, 3, 1), 1, 0)
    assert largest_difference({p: one[p] for p in range(5)}, {p: other[p] for p in range(5)}) == 0


def test_top_m_steps_together_too(text: PromptedText) -> None:
    start = text.template_context(4)
    together = update(text.tower, start, "dpfpl", "private", (0, 1, 2), 2**30, 2)
    exact = update(text.tower, start, "dpfpl", "private", (0, 1, 2), 2**30, 0)
    for p in range(3):
        assert largest_difference({p: together[p]}, update(text.tower, start, "dpfpl", "private", (p,), 1, 2)) == 0
    assert largest_difference(together, exact) > 1e-3  # it is another gradient


def test_the_plain_tower_gives_the_same_rounds(text: PromptedText) -> None:
    start = text.template_context(4)
    fast = update(text.tower, start, "dpfpl", "private", (0, 1, 2), 2**30, 0)
    slow = update(text.plain_tower, start, "dpfpl", "private", (0, 1, 2), 2**30, 0)
    assert largest_difference(fast, slow) <= 1e-4  # three steps, each within 1e-5


@pytest.mark.parametrize("level", ["none", "private", "feature"])
def test_the_head_steps_together(text: PromptedText, level: str) -> None:
    head = LowRankHead(text.zero_shot_features())
    start = head.initial(3, 0)
    together = update(head, start, "promptfl", level, (2, 0, 1), 2**30, 0)
    for p in (2, 0, 1):
        alone = update(head, start, "promptfl", level, (p,), 2**30, 0)
        assert largest_difference({p: [together[p][0]]}, {p: [alone[p][0]]}) == 0

"""Rows of any module, by Opacus: equal to a loop over records, refused where records mix; and README's plain loop."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.learners.module import ModuleLearner, cross_entropy
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey
from fl_dualpriv.privacy.plan import plan_for
from fl_dualpriv.privacy.step import Payment, clipped_sums, private_step
from fl_dualpriv.testing import check_learner

ROOT = Path(__file__).parents[3]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Private steps without Flower")[1].split("\n## ")[0]
(LOOP,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
X = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(11) % 3


class Adapter(nn.Module):
    """CLIP-Adapter (Gao et al. 2021, arXiv:2110.04544): a residual bottleneck on frozen features, then cosines."""

    def __init__(self, classes: Tensor, share: float = 0.2) -> None:
        super().__init__()
        width = classes.shape[1]
        self.down, self.up = nn.Linear(width, 2), nn.Linear(2, width)
        self.register_buffer("classes", classes)
        self.share = share

    def forward(self, features: Tensor) -> Tensor:
        adapted = self.up(torch.relu(self.down(features) + 1))
        mixed = nn.functional.normalize(self.share * adapted + (1 - self.share) * features, dim=-1)
        return 10.0 * mixed @ self.classes.T


def seeded(make: type[nn.Module] | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if make is None:
            return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
        return make(nn.functional.normalize(torch.randn(3, 6), dim=1))


@pytest.mark.parametrize("make", [None, Adapter], ids=["mlp", "adapter"])
def test_rows_equal_a_loop_over_records(make: type[nn.Module] | None) -> None:
    module = seeded(make)
    learner = ModuleLearner(module, block=4)
    rows = torch.cat([own[: block.count] for block in learner.rows(X, Y).blocks() for own in block.rows])
    for i in range(len(X)):
        loss = nn.functional.cross_entropy(module(X[i : i + 1]), Y[i : i + 1])
        parts = torch.autograd.grad(loss, learner.parameters)
        torch.testing.assert_close(rows[i], torch.cat([p.flatten() for p in parts]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [None, Adapter], ids=["mlp", "adapter"])
def test_modules_keep_the_contract(make: type[nn.Module] | None) -> None:
    check_learner(seeded(make), X, Y)


def test_one_record_moves_a_clipped_sum_by_c_and_an_empty_batch_is_zero() -> None:
    learner, clip = ModuleLearner(seeded(), block=4), 0.05
    (whole,) = clipped_sums(learner.rows(X, Y), clip)
    moves = []
    for gone in range(len(X)):
        kept = [i for i in range(len(X)) if i != gone]
        moves.append(float((whole.value - clipped_sums(learner.rows(X[kept], Y[kept]), clip)[0].value).norm()))
    assert 0.99 * clip <= max(moves) <= clip * (1 + 1e-9)
    assert not clipped_sums(learner.rows(X[:0], Y[:0]), clip)[0].value.any()


def test_vectors_go_in_and_out() -> None:
    learner = ModuleLearner(seeded())
    before = learner.vector()
    step = torch.linspace(-1, 1, learner.size)
    learner.move(step)
    torch.testing.assert_close(learner.vector(), before + step)


def test_parameters_that_need_no_gradient_stay() -> None:
    module = seeded()
    assert isinstance(module, nn.Sequential)
    module[0].requires_grad_(False)
    learner = ModuleLearner(module)
    assert learner.size == 5 + 5 + 15 + 3
    assert next(iter(learner.rows(X, Y).blocks())).rows.shape[2] == learner.size


# --- what mixes records -----------------------------------------------------------------------------------------------


class Centred(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(dim=0))


class Remembers(nn.Module):
    """Keeps a running mean in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach()[0]
        return self.linear(x - self.mean)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + torch.rand(1))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Centred, "the rows of other records change a record"),
        (Noisy, "something draws or remembers"),
    ],
)
def test_a_forward_that_mixes_is_caught(module: type[nn.Module], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_learner(module(), X, Y)


class Offset(nn.Module):
    """A buffer beside a parameter, which Opacus has no rows for."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(5))
        self.register_buffer("mask", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mask * self.offset


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(5), "BatchNorm cannot support training with differential privacy"),
        (nn.Dropout(0.1), "1: Dropout draws or remembers"),
        (Offset(), "1: Offset has buffers beside its own parameters; move the buffers to another module"),
    ],
)
def test_layers_that_mix_are_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModuleLearner(nn.Sequential(nn.Linear(6, 5), layer, nn.Linear(5, 3)))


def test_a_module_that_remembers_is_refused_at_its_first_rows() -> None:
    with pytest.raises(ConfigError, match="changes a buffer in its forward pass"):
        list(ModuleLearner(Remembers()).rows(X, Y).blocks())


def test_a_frozen_module_and_a_mean_loss_are_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter that needs a gradient"):
        ModuleLearner(nn.Linear(6, 3).requires_grad_(False))
    learner = ModuleLearner(nn.Linear(6, 3), nn.functional.cross_entropy)
    with pytest.raises(ConfigError, match=r"the loss has shape \(\) for"):
        list(learner.rows(X, Y).blocks())


# --- the plain loop ---------------------------------------------------------------------------------------------------


def test_the_readmes_loop_runs_and_is_paid_before_its_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(LOOP[LOOP.index("x = ") :].splitlines()) <= 25
    exec(compile(LOOP, "README", "exec"), {})
    epsilon, right = re.findall(r"ε = ([\d.]+), right (\d+)%", capsys.readouterr().out)[0]
    assert 1.98 <= float(epsilon) <= 2.0
    assert int(right) > 60
    ledger = Ledger(tmp_path / "ledger.jsonl").read()
    assert ledger.steps("my run") == 60
    with pytest.raises(PrivacyError, match="the plan accounts for 60"):  # the same data, once more
        exec(compile(LOOP, "README", "exec"), {})


def test_more_steps_than_paid_for_raise() -> None:
    plan = plan_for(epsilon=8.0, delta=1e-5, sampling_rate=0.5, releases=2, clip_norm=1.0)
    payment, learner = Payment(plan, plan.event("r", 1, 2)), ModuleLearner(nn.Linear(6, 3), cross_entropy)
    for step in range(2):
        private_step(plan, [payment], learner.rows(X, Y), [KeyedRandom(StreamKey(seed=0, purpose="noise", step=step))])
    with pytest.raises(PrivacyError, match="write another event"):
        private_step(plan, [payment], learner.rows(X, Y), [KeyedRandom(StreamKey(seed=0, purpose="noise"))])

"""The visual prompt of docs/own-module.md: short, private by the contract, and trained by its own loop."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fl_dualpriv.learners.module import ModuleLearner
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.testing import check_learner

PAGE = (Path(__file__).parents[2] / "docs" / "own-module.md").read_text(encoding="utf-8")
MODULE, LOOP = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
CLASSES = ["cat", "dog", "tree"]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loop of the page, beside the module of the page."""
    (tmp_path / "visual_prompt.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    space: dict[str, Any] = {"__name__": "loop"}
    exec(compile(LOOP, "loop.py", "exec"), space)
    yield space["train"]
    __import__("sys").modules.pop("visual_prompt", None)


@pytest.fixture(scope="module")
def clip(tiny_clip_dir: Path) -> Any:
    from fl_dualpriv.models.open_clip import open_clip

    return open_clip.create_model(f"local-dir:{tiny_clip_dir}").eval()


def prompted(clip: Any) -> nn.Module:
    space: dict[str, Any] = {"__name__": "visual_prompt"}
    exec(compile(MODULE, "visual_prompt.py", "exec"), space)
    tokens = torch.randint(1, 40, (3, clip.context_length), generator=torch.Generator().manual_seed(1))
    return space["VisualPrompt"](clip, tokens)


def images(clip: Any, count: int) -> tuple[Tensor, Tensor]:
    side = clip.visual.image_size[0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2)), torch.arange(count) % 3


def test_each_is_at_most_sixty_lines() -> None:
    assert len(MODULE.splitlines()) <= 60
    assert len(LOOP.splitlines()) <= 25


def test_only_the_frame_is_trained_and_records_do_not_mix(clip: Any) -> None:
    module, (x, y) = prompted(clip), images(clip, 7)
    check_learner(module, x, y)
    learner = ModuleLearner(prompted(clip), block=4)
    side = x.shape[-1]
    assert learner.size == 3 * side * side
    rows = torch.cat([block.rows[0, : block.count] for block in learner.rows(x, y).blocks()])
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(learner.module(x[i : i + 1]), y[i : i + 1])
        (row,) = torch.autograd.grad(loss, learner.parameters)
        # Two orders of summation in float32 over a tower of a few thousand products.
        torch.testing.assert_close(rows[i], row.flatten(), rtol=1e-3, atol=1e-5 * float(row.abs().max()))
    inner = rows.view(-1, 3, side, side)[:, :, 2:-2, 2:-2]
    assert not inner.any()
    assert rows.any(dim=1).all()


def test_the_pages_loop_trains_it_and_pays_first(train: Any, tiny_clip_dir: Path, clip: Any, tmp_path: Path) -> None:
    x, y = images(clip, 30)
    module = train(f"local-dir:{tiny_clip_dir}", CLASSES, x, y, tmp_path / "ledger.jsonl", steps=4)
    assert module.frame.pixels[:, :2].any()
    with pytest.raises(TypeError):
        train(f"local-dir:{tiny_clip_dir}", CLASSES, x, y)
    (event,) = Ledger(tmp_path / "ledger.jsonl").read().events
    assert event.releases == 4


def test_frozen_batch_norms_use_their_stored_statistics(clip: Any) -> None:
    class Behind(nn.Module):
        """A frozen batch norm behind a trainable layer."""

        def __init__(self, trainable: bool) -> None:
            super().__init__()
            self.map, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3).requires_grad_(trainable)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.map(x))

    from fl_dualpriv.errors import ConfigError

    x, y = torch.randn(6, 4), torch.arange(6) % 3
    learner = ModuleLearner(Behind(trainable=False), block=3)
    check_learner(Behind(trainable=False), x, y)
    learner.module.train()  # its statistics would be those of a batch
    with pytest.raises(ConfigError, match="buffer"):
        list(learner.rows(x, y).blocks())
    with pytest.raises(ConfigError, match="norm: BatchNorm1d"):
        ModuleLearner(Behind(trainable=True))

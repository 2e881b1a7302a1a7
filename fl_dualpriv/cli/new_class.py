"""``fl-dualpriv new-strategy``, ``new-method`` and ``new-learner``: write a working class and its test."""

import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fl_dualpriv.cli.console import Output
from fl_dualpriv.errors import ConfigError

_STRATEGY = '''"""{title}: say in one line what it does, and where it is published."""

from dataclasses import dataclass

from torch import Tensor

from fl_dualpriv.server.strategy import RoundStrategy


@dataclass(kw_only=True)
class {title}(RoundStrategy):
    """Example strategy. The methods that you override decide what you must prove.

    `server_update` runs after the noise, so it needs no proof. `weight` is clamped to [0, 1], so it needs no proof.
    `combine` sees uploads before the noise. Override `sensitivity` with it, or a run with noise of the server refuses
    to start.
    """

    server_learning_rate: float = 1.0  # set by --set plugin.{table}.server-learning-rate=0.5

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        """Step along the clients' mean move. Put tensors that later rounds need into self.state."""
        return prompt + self.server_learning_rate * diff
'''

_TEST = '''"""{title} keeps the contract of strategies, and its learning rate scales the step."""

import torch

from fl_dualpriv.testing import check_strategy, make_strategy
from {module} import {title}


def test_it_keeps_the_contract() -> None:
    check_strategy({title})
    check_strategy({title}, server_learning_rate=0.5)


def test_the_learning_rate_scales_the_step() -> None:
    # Put numbers here that you have computed by hand.
    strategy = make_strategy({title}, server_learning_rate=0.5)
    moved = strategy.server_update(torch.ones(1, 2), torch.full((1, 2), 4.0))
    assert torch.equal(moved, torch.full((1, 2), 3.0))  # 1 + 0.5 * 4
'''


_METHOD = '''"""{title}: say in one line what it does, and where it is published."""

from dataclasses import dataclass, replace

from fl_dualpriv.methods.base import PromptState, Rates, Released
from fl_dualpriv.methods.dpfpl import DPFPL


@dataclass(frozen=True, kw_only=True)
class {title}(DPFPL):
    """Example method: DP-FPL whose personal part moves a share of its step.

    A method sees noised sums and no records, so it owes no proof. The rules of the configuration are those of the class
    that it derives from.
    """

    share: float = 1.0  # set by --set plugin.{table}.share=0.5

    def move_personal(self, state: PromptState, released: Released, rates: Rates) -> PromptState:
        """Move p_L by a share of DP-FPL's step. Tensors to remember go into state.memory, see `memory_shapes`."""
        return super().move_personal(state, released, replace(rates, personal=self.share * rates.personal))
'''

_METHOD_TEST = '''"""{title} keeps the contract of methods, and its share scales the step."""

import torch

from fl_dualpriv.methods.base import PromptState, Rates, Released
from fl_dualpriv.testing import check_method
from {module} import {title}


def test_it_keeps_the_contract() -> None:
    check_method({title})
    check_method({title}, share=0.5)


def test_the_share_scales_the_step() -> None:
    # Put numbers here that you have computed by hand. A rank of two spans the whole 2 x 2 prompt.
    zeros, step = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    state = PromptState(own_global=zeros, personal=zeros, row_basis=torch.eye(2)[None])
    moved = {title}(share=0.5).move(state, Released(direction=step, of_global=step), Rates(shared=1.0, personal=1.0))
    torch.testing.assert_close(moved.personal, -0.5 * step)
    torch.testing.assert_close(moved.own_global, -step)
'''


_LEARNER = '''"""{title}: say in one line what it does, and where it is published."""

from torch import Tensor, nn


class {title}(nn.Module):
    """Example learner: a linear map of the image features, which starts as the identity.

    You owe that a record's output depends on that record only: no mean over the batch, no memory, no random draws.
    """

    def __init__(self, class_features: Tensor, scale: float = 100.0) -> None:
        """Make the module from the class features (class, embed_dim); scale is set by --set plugin.{table}.scale=50."""
        super().__init__()
        self.map, self.scale = nn.Linear(class_features.shape[1], class_features.shape[1]), scale
        nn.init.eye_(self.map.weight)
        nn.init.zeros_(self.map.bias)
        self.register_buffer("class_features", class_features)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (record, class) from image features (record, embed_dim)."""
        mapped = nn.functional.normalize(self.map(features), dim=-1)
        return self.scale * mapped @ self.class_features.T
'''

_LEARNER_TEST = '''"""{title} keeps the contract of learners, and starts at the un-tuned model."""

import torch

from fl_dualpriv.testing import check_learner
from {module} import {title}

CLASSES = torch.eye(3, 5)
FEATURES = torch.nn.functional.normalize(torch.linspace(-1, 1, 40).reshape(8, 5).sin(), dim=1)


def test_it_keeps_the_contract() -> None:
    check_learner({title}(CLASSES, scale=5.0), FEATURES, torch.arange(8) % 3)


def test_it_starts_at_the_cosines() -> None:
    torch.testing.assert_close({title}(CLASSES, scale=2.0)(FEATURES), 2.0 * FEATURES @ CLASSES.T)
'''


@dataclass(frozen=True)
class Kind:
    """What a command writes: texts of the class and of its test, their folder in a checkout, and the key of a run."""

    text: str
    test: str
    folder: str
    key: str


STRATEGIES = Kind(_STRATEGY, _TEST, "strategies", "strategy.ref")
METHODS = Kind(_METHOD, _METHOD_TEST, "clients", "method")
LEARNERS = Kind(_LEARNER, _LEARNER_TEST, "clients", "prompt.learner")


def new_strategy(
    name: Annotated[
        str, typer.Argument(help="Name of the module in lower case, such as my_mean; its class is MyMean.")
    ],
) -> None:
    """Write NAME.py and test_NAME.py into the working directory; in a checkout, into strategies/ and tests/strategies/.

    No file is overwritten.
    """
    _write(name, STRATEGIES)


def new_method(
    name: Annotated[
        str, typer.Argument(help="Name of the module in lower case, such as my_step; its class is MyStep.")
    ],
) -> None:
    """Write NAME.py and test_NAME.py into the working directory; in a checkout, into clients/ and tests/clients/.

    No file is overwritten.
    """
    _write(name, METHODS)


def new_learner(
    name: Annotated[str, typer.Argument(help="Name of the module in lower case, such as my_map; its class is MyMap.")],
) -> None:
    """Write NAME.py and test_NAME.py into the working directory; in a checkout, into clients/ and tests/clients/.

    No file is overwritten.
    """
    _write(name, LEARNERS)


def _write(name: str, kind: Kind) -> None:
    console, errors = Output(), Output(stderr=True)
    try:
        module, files = write_class(name, Path.cwd(), kind)
    except ConfigError as error:
        errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error
    for file in files:
        console.print(f"wrote {file}", soft_wrap=True, highlight=False)
    console.print(f"test it: python -m pytest {files[1]}", soft_wrap=True, highlight=False)
    console.print(
        f"run it:  fl-dualpriv run CONFIG --set {kind.key}={module}:{title_of(name)}", soft_wrap=True, highlight=False
    )


def title_of(name: str) -> str:
    """Return the class name for a module name: ``my_mean`` → ``MyMean``."""
    return "".join(part.capitalize() for part in name.split("_"))


def write_class(name: str, folder: Path, kind: Kind) -> tuple[str, list[Path]]:
    """Write a class and its test.

    Args:
        name: Name of the module.
        folder: Folder for the files. In a checkout of the app they go into its own folders.
        kind: Kind of the class.

    Returns:
        The module's dotted name, and the two files.

    Raises:
        ConfigError: If the name is not a valid module name, or a file exists already or cannot be written. No file is
            left then.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} is not a valid module name: use a-z, 0-9 and single _, such as my_mean")
    checkout = (folder / "simulations" / "server_app.py").is_file() and (folder / kind.folder).is_dir()
    module = f"{kind.folder}.{name}" if checkout else name
    places = (folder / kind.folder, folder / "tests" / kind.folder) if checkout else (folder, folder)
    files = [places[0] / f"{name}.py", places[1] / f"test_{name}.py"]
    if there := [file for file in files if file.exists()]:
        raise ConfigError(f"{there[0]} exists already and is not overwritten: choose another name")
    title, begun = title_of(name), []
    try:
        for file, text in zip(files, (kind.text, kind.test), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as stream:
                begun.append(file)
                stream.write(text.format(title=title, table=title.lower(), module=module))
    except OSError as error:
        for file in begun:
            file.unlink(missing_ok=True)
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}; go to another folder") from error
    return module, files

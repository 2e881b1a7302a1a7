"""``fl-dualpriv new-strategy``: write a working strategy and its test as a starting point."""

import keyword
import re
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


def new_strategy(
    name: Annotated[
        str, typer.Argument(help="Name of the module in lower case, such as my_mean; its class is MyMean.")
    ],
) -> None:
    """Write NAME.py and test_NAME.py into the working directory; in a checkout, into strategies/ and tests/strategies/.

    No file is overwritten.
    """
    console, errors = Output(), Output(stderr=True)
    try:
        module, files = write_strategy(name, Path.cwd())
    except ConfigError as error:
        errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error
    for file in files:
        console.print(f"wrote {file}", soft_wrap=True, highlight=False)
    console.print(f"test it: python -m pytest {files[1]}", soft_wrap=True, highlight=False)
    console.print(
        f"run it:  fl-dualpriv run CONFIG --set strategy.ref={module}:{title_of(name)}", soft_wrap=True, highlight=False
    )


def title_of(name: str) -> str:
    """Return the class name for a module name: ``my_mean`` → ``MyMean``."""
    return "".join(part.capitalize() for part in name.split("_"))


def write_strategy(name: str, folder: Path) -> tuple[str, list[Path]]:
    """Write a strategy and its test.

    Args:
        name: Name of the module.
        folder: Folder for the files. In a checkout of the app they go into its folders for strategies and tests.

    Returns:
        The module's dotted name, and the two files.

    Raises:
        ConfigError: If the name is not a valid module name, or a file exists already or cannot be written. No file is
            left then.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} is not a valid module name: use a-z, 0-9 and single _, such as my_mean")
    checkout = (folder / "simulations" / "server_app.py").is_file() and (folder / "strategies").is_dir()
    module = f"strategies.{name}" if checkout else name
    places = (folder / "strategies", folder / "tests" / "strategies") if checkout else (folder, folder)
    files = [places[0] / f"{name}.py", places[1] / f"test_{name}.py"]
    if there := [file for file in files if file.exists()]:
        raise ConfigError(f"{there[0]} exists already and is not overwritten: choose another name")
    title, begun = title_of(name), []
    try:
        for file, text in zip(files, (_STRATEGY, _TEST), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as stream:
                begun.append(file)
                stream.write(text.format(title=title, table=title.lower(), module=module))
    except OSError as error:
        for file in begun:
            file.unlink(missing_ok=True)
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}; go to another folder") from error
    return module, files

"""``fl-dualpriv predict``: apply a published prompt to images, with the model that it was trained on.

It imports quickly, as `cli.main` does.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fl_dualpriv.cli.console import Output, write_line
from fl_dualpriv.errors import ConfigError, PrivacyError

if TYPE_CHECKING:
    from fl_dualpriv.publish.use import Prediction

_TOP = 3


def predict(
    prompt: Annotated[Path, typer.Argument(metavar="PROMPT", help="A file that `fl-dualpriv export` wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER...", help="Images, and folders of them.")],
    question: Annotated[str | None, typer.Option(help="About every image; for prompts that answer questions.")] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Number of classes per image. Default: 3, and in JSON all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image, one per line.")] = False,
    backbone: Annotated[
        str | None, typer.Option(help="The model, as backbone.name of a run. Default: the model that PROMPT names.")
    ] = None,
    pretrained: Annotated[str, typer.Option(help="Weights of --backbone.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Print the likeliest classes of each image, or the answer to a question about it.

    An image that cannot be used gets an error and does not stop the others. Exit status: 0, 1 if there are such images,
    2 if PROMPT is refused.
    """
    errors = Output(stderr=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, as in a run
    from fl_dualpriv.publish.use import load_prompt  # late: torch takes seconds

    try:
        loaded = load_prompt(prompt, backbone, pretrained, device)
        for line in (*loaded.facts.lines, *loaded.facts.notes):
            errors.print(f"note: {escape(shown(line))}", soft_wrap=True, highlight=False)
        is_whole = True
        for prediction in loaded.predictions(images, question):
            is_whole = is_whole and not prediction.error
            if as_json:
                write_line(json.dumps(_entry(prediction, top)))
            elif prediction.error:
                _complain(errors, f"{prediction.image}: {prediction.error}")
            else:
                write_line(shown(f"{prediction.image}: {_words(prediction, top or _TOP)}"))
    except (ConfigError, PrivacyError) as error:
        _complain(errors, str(error))
        raise typer.Exit(2) from None
    if not is_whole:
        raise typer.Exit(1)


def _complain(errors: Output, message: str) -> None:
    errors.print(f"[bold red]error:[/bold red] {escape(shown(message))}", soft_wrap=True, highlight=False)


def _words(prediction: "Prediction", top: int) -> str:
    if not prediction.probabilities:
        return prediction.label
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in list(prediction.probabilities.items())[:top])


def _entry(prediction: "Prediction", top: int | None) -> dict[str, Any]:
    if prediction.error:
        return {"image": prediction.image, "error": prediction.error}
    entry: dict[str, Any] = {"image": prediction.image, "label": prediction.label}
    if prediction.probabilities:
        entry["probabilities"] = dict(list(prediction.probabilities.items())[:top])
    return entry


def shown(text: str) -> str:
    """Escape the characters that could act on a terminal, because names in a prompt's file are not trusted."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)

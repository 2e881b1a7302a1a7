"""Write the model card of a published prompt in Markdown. It depends only on the facts: same facts, same card.

Names of classes, templates and models come from folders and files of other users, so none of them may become a heading,
a link or HTML. They are written as JSON inside code, and the characters that could end the code are escaped.
"""

import json
from collections.abc import Sequence

from fl_dualpriv.publish.card import PublishedFacts, ScoreFacts

_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&`|"}
_KINDS = {
    "context": "words before the class name in a text; the class token stands at the end",
    "head": "low-rank factors over the zero-shot class features; no text tower is run",
    "linear-probe": "weights and a bias for each class, on frozen image features",
    "prototypes": "a direction for each class, on frozen image features",
    "soft-prompt": "learned words before a question about an image",
    "lora": "LoRA factors beside the query and value layers of the language model",
}


def model_card(facts: PublishedFacts, file: str, shape: tuple[int, ...]) -> str:
    """Return the model card.

    Args:
        facts: Facts of the prompt.
        file: Name of the prompt's file.
        shape: Shape of the prompt.
    """
    use, source, backbone = facts.use, facts.source, facts.use.backbone
    question = ' --question "..."' if use.asks_questions else ""
    lines = [
        f"# {source.whose.capitalize()}, {source.method}",
        "",
        "## What it reveals",
        "",
        *(f"- {line}" for line in facts.lines),
        *(f"- {_code(note)}" for note in facts.notes),
        "",
        "## How to use it",
        "",
        f"    fl-dualpriv predict {file.translate(_ESCAPES)} IMAGE...{question}",
        "",
        "| | |",
        "|---|---|",
        f"| prompt | {' x '.join(map(str, shape))} numbers, float32: {_KINDS[use.kind]} |",
        f"| backbone | {_code(backbone.name)} {_code(backbone.pretrained) if backbone.pretrained else ''} |",
        f"| weights | fingerprint `{backbone.fingerprint}`, {backbone.precision} |",
        f"| image side | `{backbone.image_side}`: weights, image tower, preparation of images, pruning |",
        f"| visual tokens | {'all' if use.pruner is None else f'pruned, {_code(str(use.pruner))}'} |",
        f"| {'words of the un-tuned model' if use.asks_questions else 'template'} | {_code(use.template)} |",
        *([f"| tokens of a question and its answer | at most {use.max_tokens} |"] if use.asks_questions else []),
        "",
        "## Where it comes from",
        "",
        f"{source.rounds} rounds of {source.method} with {source.population} clients, fl-dualpriv "
        f"{_code(source.version)}.",
        *_scores(source.scores),
    ]
    if use.classes:
        lines += ["", f"## Classes, in order ({len(use.classes)})", "", *_json_block(use.classes)]
    return "\n".join(lines) + "\n"


def _scores(scores: ScoreFacts | None) -> list[str]:
    if scores is None:
        return ["The run did not score this prompt."]
    return [
        "",
        f"Accuracy of the run ({scores.of}, {scores.split} split):",
        "",
        "| | local | neighbour |",
        "|---|---|---|",
        f"| zero-shot | {_percent(scores.zero_shot_local)} | {_percent(scores.zero_shot_neighbour)} |",
        *_rival(scores),
        f"| final | {_percent(scores.local)} | {_percent(scores.neighbour)} |",
    ]


def _rival(scores: ScoreFacts) -> list[str]:
    """Return the row of the free rival, because a gain over the un-tuned model may be public knowledge only."""
    if not scores.rival:
        return []
    return [
        f"| free rival: {_code(scores.rival)} | {_percent(scores.free_local)} | {_percent(scores.free_neighbour)} |"
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _code(text: str) -> str:
    """Return a text as Markdown code that no character of the text can end."""
    return f"`{_escaped(text)[1:-1]}`" if text else ""


def _escaped(value: str) -> str:
    text = json.dumps(value, ensure_ascii=False).translate(_ESCAPES)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _json_block(names: Sequence[str]) -> list[str]:
    return ["```json", "[", *(f"  {_escaped(n)}{',' * (i < len(names) - 1)}" for i, n in enumerate(names)), "]", "```"]

"""Find class names and templates that a model cannot read, before it is loaded. No torch."""

from collections.abc import Sequence

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.data.folder import Layout
from fl_dualpriv.methods.base import METHODS
from fl_dualpriv.tasks.clip_words import TextRules, text_rules

_NAMED_CLASSES = 10


def word_problems(config: RunConfig, layout: Layout) -> list[str]:
    """Return one line for each problem of the model's text side that can be found without loading the model.

    Args:
        config: Configuration of the run.
        layout: Class folders, names and template of the run.
    """
    rules, template = text_rules(config.backbone.name), layout.template
    if rules is None or not isinstance(template, str) or template.count("{}") != 1:
        return []
    before, after = template.split("{}")
    problems, lacking = [], rules.unknown(f"{before} {after}")
    if lacking:
        problems.append(
            f"the template {template!r} has words that {_model(config)} does not know: {_quoted(lacking)}; give one in "
            'data.classes, for example {"template": "a sketch of a {}"}'
        )
    problems += _class_problems(config, rules, layout.names, after, set(lacking))
    if not lacking and _reads_template(config):
        words = rules.count(before.strip())
        fills = config.prompt.candidates.strip() != "" and 0 < words <= config.prompt.n_ctx
        if config.prompt.init == "template" and words != config.prompt.n_ctx and not fills:
            problems.append(
                f"prompt.n-ctx = {config.prompt.n_ctx}, but the template {template!r} has {words} tokens before the "
                f'class name; set prompt.n-ctx = {words}, or prompt.init = "random"'
            )
    return problems


def _class_problems(
    config: RunConfig, rules: TextRules, names: dict[str, str], after: str, lacking: set[str]
) -> list[str]:
    unknown: dict[str, list[str]] = {}
    long: list[str] = []
    room = rules.context_length - 2 - config.prompt.n_ctx if _reads_template(config) else rules.context_length
    for folder, name in names.items():
        text = (name + after).strip()
        if words := [word for word in rules.unknown(text) if word not in lacking]:
            unknown[folder] = words
        elif (tokens := rules.count(text)) > room:
            long.append(f"{name!r} ({folder}/) takes {tokens}")
    problems = []
    if unknown:
        shown = "; ".join(f"{_quoted(words)} ({folder}/)" for folder, words in list(unknown.items())[:_NAMED_CLASSES])
        more = f"; and {len(unknown) - _NAMED_CLASSES} more classes" if len(unknown) > _NAMED_CLASSES else ""
        problems.append(
            f"class names have words that {_model(config)} does not know: {shown}{more}; give other names in "
            "data.classes, or another model with backbone.name"
        )
    if long:
        problems.append(
            f"class names are too long: {', '.join(long[:_NAMED_CLASSES])} tokens, and with prompt.n-ctx = "
            f"{config.prompt.n_ctx} there is room for {room}; give shorter names in data.classes"
        )
    return problems


def _reads_template(config: RunConfig) -> bool:
    """True if the run has a context in front of the class names."""
    return config.prompt.learner != "head" and METHODS[config.method].learns not in ("linear-probe", "prototypes")


def _model(config: RunConfig) -> str:
    return f"backbone.name = {config.backbone.name!r}"


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(words)))

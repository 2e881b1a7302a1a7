"""Survey of the data of a run before it starts: a summary, and all problems at once. No torch, no model.

It is for the operator of a simulation, who owns all of the data and reads the lines on a console or in a log. No file
of results contains them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.data.folder import bad_images
from fl_dualpriv.data.images import DataSplits, ImageDataset
from fl_dualpriv.data.layout import Layout, Reading
from fl_dualpriv.data.load import load_data, load_questions, read_images, reading_of
from fl_dualpriv.data.partition import divide
from fl_dualpriv.data.questions import QuestionSet, QuestionSplits
from fl_dualpriv.data.usable import SECONDS, Usable, look, skipped_files, without_usable
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.tasks.class_prior import class_share_problems
from fl_dualpriv.tasks.clip_words import TextRules, text_rules
from fl_dualpriv.tasks.disclosure import delta_problems, held_out_is_given, keeps_bad_records, may_score

_NAMED_CLASSES, _NAMED_WORDS = 5, 10


def survey(config: RunConfig, *, seconds: float = SECONDS) -> list[str]:
    """Describe the data that a run would load, in lines for its operator.

    Guarantee:
        No part of the survey leaves the machine. It decides whether a run starts: a decision about participation, which
        docs/privacy.md §2 does not protect. In a run that has started nothing depends on it.

    Args:
        config: Configuration of the run.
        seconds: Time limit in seconds for reading records; reading continues until one usable record was found.

    Returns:
        The lines.

    Raises:
        ConfigError: If there is a problem of data, class names, template or division among clients. The message lists
            all of them.
        PrivacyError: If the only problem is a δ that is too large to be meaningful for data of this size.
    """
    lines = _questions(config, seconds) if config.data.asks_questions else _images(config, seconds)
    return [_writable(line) for line in lines]


def announce(config: RunConfig, folder: Path) -> None:
    """Refuse data that no run can use, and print the survey for the operator of a simulation.

    Args:
        config: Configuration of the run.
        folder: Folder of the results. If it has a ``run.json``, the command line started the run and has already
            printed the survey.

    Raises:
        ConfigError: See `survey`.
        PrivacyError: See `survey`.
    """
    if (folder / "run.json").exists():
        survey(config, seconds=0.0)
        return
    for line in survey(config):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _images(config: RunConfig, seconds: float) -> list[str]:
    data = config.data
    if data.source in ("demo", "shelf"):
        demo = load_data(data.source, "", "", data.val_fraction, data.test_fraction, config.seed, Reading())
        parts, problems = _divided(config, demo.train)
        problems += class_share_problems(config, demo.class_names)
        _raise("the demo's images cannot be used:", problems, _delta_problems(config, parts))
        what = f"{len(demo.train)} training images of {len(demo.class_names)} classes, the demo's"
        return [
            *_record_lines(config, what, demo.train, None, parts),
            *_held_out_lines(config, len(_scored(config, demo)), "images", None),
        ]
    on_bad = "keep" if keeps_bad_records(config) else "raise"
    layout = read_images(
        *(data.path, data.classes, data.val_fraction, data.test_fraction, config.seed), reading_of(data, on_bad)
    )
    splits = layout.splits
    problems = [*layout.problems, *word_problems(config, layout)]
    parts, usable_records, held_out = [], None, None
    if not keeps_bad_records(config):
        problems += bad_images(splits.values())
    problems += class_share_problems(config, list(layout.names.values()))
    if not layout.problems:  # else a split may be missing
        parts, undivided = _divided(config, splits["train"])
        problems += undivided
        usable_records = look(splits["train"], "training images", seconds)
        held_out = look(splits[config.evaluation.split], f"{config.evaluation.split} images", seconds)
        if keeps_bad_records(config):
            problems += usable_records.refusal() + (held_out.refusal() if may_score(config) else [])
    _raise(f"the images in {data.path} cannot be used:", problems, _delta_problems(config, parts))
    assert held_out is not None
    what = f"{len(splits['train'])} training images of {len(layout.names)} classes"
    return [
        *_record_lines(config, what, splits["train"], usable_records, parts),
        *(_skipped_lines(Path(data.path).expanduser(), by_domain=data.is_by_domain) if layout.is_folder else []),
        *_held_out_lines(config, held_out.total, "images", held_out),
    ]


def _questions(config: RunConfig, seconds: float) -> list[str]:
    data = config.data
    assert data.source in ("demo-vqa", "questions")
    on_bad = "keep" if keeps_bad_records(config) else "raise"
    questions = load_questions(
        *(data.source, data.path, data.val_fraction, data.test_fraction, config.seed, on_bad), data.is_by_domain
    )
    train, scored = questions.train, _scored(config, questions)
    parts, problems = _divided(config, train)
    usable_records, held_out = None, None
    if data.source == "questions":
        usable_records = look(train, "training questions", seconds)
        held_out = look(scored, f"{config.evaluation.split} questions", seconds)
        refused = usable_records.refusal() + (held_out.refusal() if may_score(config) else [])
        if on_bad == "raise" and not refused:
            for part in (usable_records, held_out):
                if not part.are_all:
                    refused += [f"{part.what}: {part.says()}; repair or remove them", *part.lines()]
        problems += refused
    _raise(f"the questions in {data.path} cannot be used:", problems, _delta_problems(config, parts))
    types = [name for name in questions.class_names if name]
    of_types = f" of {len(types)} types" if types else ""
    what = f"{len(train)} training questions{of_types} about {len(train.images)} images"
    return [
        *_record_lines(config, what, train, usable_records, parts),
        *_held_out_lines(config, len(scored), "questions", held_out),
    ]


def _raise(head: str, problems: list[str], deltas: list[str]) -> None:
    if problems:
        raise ConfigError(_writable("\n  ".join([head, *problems, *deltas])))
    if deltas:
        raise PrivacyError("\n  ".join(deltas))


def _writable(text: str) -> str:
    """Escape what UTF-8 cannot encode, because file names may hold bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _scored(config: RunConfig, data: DataSplits | QuestionSplits) -> ImageDataset | QuestionSet:
    return data.val if config.evaluation.split == "val" else data.test


def _divided(config: RunConfig, train: ImageDataset | QuestionSet) -> tuple[list[np.ndarray], list[str]]:
    """Return the record indices per client, divided as the tasks divide them, and the reasons if that is impossible."""
    try:
        return divide(train, config.data, config.population, config.seed, config.evaluation.new_clients), []
    except ConfigError as error:
        return [], [str(error)]


def _delta_problems(config: RunConfig, parts: Sequence[np.ndarray]) -> list[str]:
    return delta_problems(config, max(map(len, parts))) if len(parts) else []


def _record_lines(
    config: RunConfig,
    what: str,
    train: ImageDataset | QuestionSet,
    usable_records: Usable | None,
    parts: Sequence[np.ndarray],
) -> list[str]:
    sizes, new = [len(part) for part in parts], config.evaluation.new_clients
    held_out = f", {new} of them take part in no round" if new else ""
    count = f": {usable_records.says()}" if usable_records is not None else ""
    lines = [
        f"data: {what}{count}",
        *([f"  {line}" for line in usable_records.lines()] if usable_records is not None else []),
        *(_domain_lines(train) if config.data.is_by_domain else []),
        f"clients: {len(parts)}{held_out}; records per client: minimum {min(sizes)}, median {np.median(sizes):g}, "
        f"maximum {max(sizes)}",
    ]
    if (left := len(train) - sum(sizes)) > 0:
        lines.append(f"{left} training records belong to no client, because data.partitioner leaves them out")
    if usable_records is not None and (none := without_usable(parts, usable_records)):
        lines.append(f"warning: {none} of {len(parts)} clients have no usable record; their prompts will be noise")
    return lines


def _domain_lines(train: ImageDataset | QuestionSet) -> list[str]:
    """Name the domains, and the classes that a domain lacks."""
    assert train.domains is not None
    sizes = np.bincount(train.domains, minlength=len(train.domain_names))
    named = ", ".join(f"{name} ({size})" for name, size in zip(train.domain_names, sizes.tolist(), strict=True))
    lines = [f"domains, with training records: {named}"]
    for domain, name in enumerate(train.domain_names):
        present = set(train.labels[train.domains == domain].tolist())
        if lacking := [text for label, text in enumerate(train.class_names) if label not in present]:
            more = f" and {len(lacking) - _NAMED_CLASSES} more" if len(lacking) > _NAMED_CLASSES else ""
            shown = ", ".join(map(repr, lacking[:_NAMED_CLASSES]))
            lines.append(f"domain {name!r} has no training record of {shown}{more}: its clients do not hold these")
    return lines


def _skipped_lines(path: Path, *, by_domain: bool) -> list[str]:
    skipped = skipped_files(path, by_domain=by_domain)
    outside = skipped.pop("outside", 0)
    lines = []
    if skipped:
        endings = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in skipped.most_common())
        lines.append(f"skipped because of their ending: {endings}")
    if outside:
        lines.append(f"skipped because they lie in no class folder: {outside} images")
    return lines


def _held_out_lines(config: RunConfig, count: int, plural: str, usable_records: Usable | None) -> list[str]:
    split, data = config.evaluation.split, config.data
    note = f": {usable_records.says()}" if usable_records is not None and not usable_records.are_all else ""
    line = f"held out: {count} {split} {plural}{note}"
    if not config.claims_privacy:
        return [f"{line}; their scores are shown"]
    if may_score(config):
        return [f"{line}, public; their scores may leave"]
    if held_out_is_given(data, config.evaluation):
        why = 'evaluation.held-out-data = "private"'
    else:
        why = "they are cut out of the training data, and are as private as those"
    separate_set = f"a separate {split}/ folder" if data.source == "folder" else f"a separate {split} set"
    return [
        f"{line}, private",
        f"warning: nothing will be scored: {why}. Give {separate_set} whose scores may be public, or set "
        'evaluation.held-out-data = "public" if these scores may be public',
    ]


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
        fills = config.prompt.has_candidates and 0 < words <= config.prompt.n_ctx
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
        shown = "; ".join(f"{_quoted(words)} ({folder}/)" for folder, words in list(unknown.items())[:_NAMED_WORDS])
        more = f"; and {len(unknown) - _NAMED_WORDS} more classes" if len(unknown) > _NAMED_WORDS else ""
        problems.append(
            f"class names have words that {_model(config)} does not know: {shown}{more}; give other names in "
            "data.classes, or another model with backbone.name"
        )
    if long:
        problems.append(
            f"class names are too long: {', '.join(long[:_NAMED_WORDS])} tokens, and with prompt.n-ctx = "
            f"{config.prompt.n_ctx} there is room for {room}; give shorter names in data.classes"
        )
    return problems


def _reads_template(config: RunConfig) -> bool:
    """True if the run has a context in front of the class names."""
    return config.prompt.learner == "context" and config.local_method.learns not in ("linear-probe", "prototypes")


def _model(config: RunConfig) -> str:
    return f"backbone.name = {config.backbone.name!r}"


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(words)))

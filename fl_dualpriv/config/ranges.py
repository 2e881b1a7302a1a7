"""Check of a flat run config: types, choices and ranges, then the rules of ``rules.py``.

Nothing here raises.

Every message is one line: key, value, what is allowed, what to do. The check collects all problems. It skips a rule if
a key that the rule reads has a problem by itself.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from fl_dualpriv.config.candidates import CANDIDATES_KEY, PUBLISHED_SETS, are_candidates
from fl_dualpriv.config.class_prior_rules import CLASS_PRIOR_RULES
from fl_dualpriv.config.client_level_rules import CLIENT_LEVEL_RULES
from fl_dualpriv.config.method_rules import METHOD_RULES
from fl_dualpriv.config.methods import METHODS, find_method
from fl_dualpriv.config.plugins import CLASS_PATHS
from fl_dualpriv.config.rules import CROSS_RULES, CrossRule, Values
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.privacy.limits import (
    LARGEST_CLIP_NORM,
    LARGEST_EPSILON,
    LARGEST_NOISE_MULTIPLIER,
    MOST_RELEASES,
    SMALLEST_CLIP_NORM,
    SMALLEST_DELTA,
    SMALLEST_EPSILON,
    SMALLEST_NOISE_MULTIPLIER,
    SMALLEST_SAMPLING_RATE,
    is_clip_norm,
)

ConfigValue = bool | int | float | str

_IGNORED_PREFIX = "plugin."
_PATH_KEYS = (
    *CLASS_PATHS,
    *("data.path", "data.classes", "data.class-shares", CANDIDATES_KEY, "output.dir", "resources.feature-cache"),
)


class Range(NamedTuple):
    """Allowed values of one key, with the words for a message."""

    accepts: Callable[[Any], bool]
    allowed: str
    advice: str


def _is_class_ref(text: str) -> bool:
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _is_options(text: str) -> bool:
    try:
        options = json.loads(text or "{}")
    except ValueError:
        return False
    return isinstance(options, dict) and all(
        key.startswith(_IGNORED_PREFIX) and isinstance(value, bool | int | float | str)
        for key, value in options.items()
    )


def _whole(least: int, most: int, advice: str) -> Range:
    return Range(lambda x: least <= x <= most, f"a whole number from {least} to {most}", advice)


def _number(least: float, most: float, advice: str) -> Range:
    return Range(lambda x: least <= x <= most, f"from {least:g} to {most:g}", advice)


_MOST_CLIENTS = 100_000
_SECONDS = _number(0.001, 1e7, "give seconds")
_RATE = _number(0, 1e6, "0 freezes this part of the prompt")
_FRACTION = Range(lambda x: 0 < x < 1, "between 0 and 1, both excluded", "give a share of train/, for example 0.2")
_KEEP = Range(lambda x: 0 < x <= 1, "in (0, 1]", "1 switches this pruning off")
_DELTA = Range(
    lambda x: SMALLEST_DELTA <= x < 1,
    f"at least {SMALLEST_DELTA:g} and less than 1",
    "give at most 1 / (10 x number of units protected)",
)
_NOISE = _number(
    SMALLEST_EPSILON,
    LARGEST_EPSILON,
    'an ε above 10 promises little; to train without noise set mechanism = "none" in this section',
)
_MULTIPLIER = Range(
    lambda x: SMALLEST_NOISE_MULTIPLIER <= x <= LARGEST_NOISE_MULTIPLIER,
    f"from {SMALLEST_NOISE_MULTIPLIER:g} to {LARGEST_NOISE_MULTIPLIER:g}",
    'it is the noise over the clip norm; to train without noise set mechanism = "none" in this section',
)
_CLIP = Range(
    is_clip_norm,
    f"from {SMALLEST_CLIP_NORM:g} to {LARGEST_CLIP_NORM:g}",
    "it bounds the norm of one contribution, and rounding breaks it outside of this range; 1.0 is a usual start",
)
_FOLDER = Range(
    lambda x: x == "" or Path(x).is_absolute(), "empty or an absolute path", "give the folder of the module"
)
_OPTIONS = Range(_is_options, 'a JSON object of "plugin.CLASS.FIELD" keys', "fl-dualpriv run writes it for you")
# torch, numpy and Flower's messages carry signed 64-bit integers.
_SEED = Range(lambda x: 0 <= x < 2**63, "a whole number from 0 to 2**63 - 1", "0 will do")

_NAMES = {"method": tuple(METHODS), "prompt.learner": ("context", "head", "lora")}
"""Our names of keys that also take ``module:Class``."""

RENAMED = {("fedotp.patch-reading", "alone"): "isolated"}
"""New value by (key, old value). The check refuses an old value and names the new one."""

RANGES: dict[str, Range] = {
    "rounds": _whole(1, MOST_RELEASES, 'for no training at all set method = "zero-shot"'),
    "population": _whole(1, _MOST_CLIENTS, "give the number of clients"),
    "supernodes": _whole(0, _MOST_CLIENTS, "0 gives every client a separate node"),
    "seed": _SEED,
    "join-timeout": _SECONDS,
    "reply-timeout": _SECONDS,
    "method": Range(
        lambda x: x in _NAMES["method"] or _is_class_ref(x),
        "the name of a method or module:Class",
        'for example "dpfpl"',
    ),
    "method-path": _FOLDER,
    "method-options": _OPTIONS,
    "strategy.ref": Range(_is_class_ref, "module:Class", 'for example "strategies.dpfpl:DPFPL"'),
    "strategy.path": _FOLDER,
    "strategy.options": _OPTIONS,
    "train.local-steps": _whole(1, MOST_RELEASES, 'for no training at all set method = "zero-shot"'),
    "train.sampling-rate": Range(
        lambda x: SMALLEST_SAMPLING_RATE <= x <= 1,
        f"from {SMALLEST_SAMPLING_RATE:g} to 1",
        "it is the probability that a record joins a batch",
    ),
    "train.global-learning-rate": _RATE,
    "train.local-learning-rate": _RATE,
    "train.top-m": Range(
        lambda x: x == 0 or 2 <= x <= 10**6,
        "0 or a whole number from 2 to 1000000",
        "0 is exact; a single class has nothing to balance it",
    ),
    "prompt.learner": Range(
        lambda x: x in _NAMES["prompt.learner"] or _is_class_ref(x),
        "context, head, lora or module:Class",
        'for example "context"',
    ),
    "prompt.learner-path": _FOLDER,
    "prompt.learner-options": _OPTIONS,
    "prompt.n-ctx": _whole(1, 1000, "4 is usual"),
    "prompt.rank": _whole(1, 1000, 'for no factorisation set method = "full"'),
    "prompt.personal-memory": _number(0, 1, "1 forgets nothing of a client's releases"),
    CANDIDATES_KEY: Range(
        are_candidates,
        f"empty, different templates with one {{}} each, an absolute path, or one of {', '.join(PUBLISHED_SETS)}",
        'for example "a photo of a {} | a drawing of a {}"; in TOML also a list of strings',
    ),
    "pruning.visual-keep-ratio": _KEEP,
    "pruning.visual-layer": Range(
        lambda x: 1 <= x <= 1000 or -1000 <= x <= -2,
        "a whole number from 1 to 1000 or from -1000 to -2",
        "-2 is after all blocks but the last",
    ),
    "pruning.visual-fused": _whole(0, 10_000, "0 drops the pruned tokens"),
    "pruning.visual-fusion-std": _number(0, 1e6, "it gives no privacy; the paper's text says 1"),
    "pruning.update-keep-ratio": _KEEP,
    "pruning.update-warm-up": _whole(1, MOST_RELEASES, "a mask needs an earlier release"),
    "pruning.update-exploration": Range(lambda x: 0 <= x <= 1, "in [0, 1]", "0 never tries a pruned block again"),
    "train.momentum": Range(lambda x: 0 <= x < 1, "in [0, 1)", "0.9 is usual"),
    "train.class-prior-outside": _number(1e-9, 0.5, "0.01 is usual; at 0 some records would have no finite loss"),
    "data.max-tokens": _whole(2, 100_000, "give a public number with room for a long question and its answer"),
    "fedpgp.contrastive-weight": _number(0, 1e6, "0 switches the contrastive term off"),
    "fedpgp.contrastive-temperature": _number(1e-6, 1e6, "0.5 is usual"),
    "fedotp.mass": Range(lambda x: 0 < x <= 1, "in (0, 1]", "1 uses every patch"),
    "fedotp.regularisation": _number(0.01, 1e6, "0.1 is usual; below this exponentials overflow"),
    "fedotp.iterations": _whole(1, 10_000, "100 is usual"),
    "privacy.record.epsilon": _NOISE,
    "privacy.record.noise-multiplier": _MULTIPLIER,
    "privacy.record.delta": _DELTA,
    "privacy.record.clip-norm": _CLIP,
    "privacy.record.selection-share": _number(0.001, 0.999, "0.25 leaves most of epsilon to the steps"),
    "privacy.client.epsilon": _NOISE,
    "privacy.client.noise-multiplier": _MULTIPLIER,
    "privacy.client.max-epsilon": _number(0, 1e6, "0 is what the run's own rounds spend"),
    "privacy.client.delta": _DELTA,
    "privacy.client.clip-norm": _CLIP,
    "privacy.client.expected-cohort": _number(1e-9, _MOST_CLIENTS, "give the expected number of clients in a round"),
    "privacy.client.bands": _whole(0, 4096, "0 takes the best number"),
    "privacy.client.target-quantile": Range(lambda x: 0 < x < 1, "between 0 and 1, both excluded", "0.5 is the median"),
    "privacy.client.clip-learning-rate": _number(1e-6, 1e3, "0.2 is usual"),
    "privacy.client.bit-noise-share": Range(
        lambda x: 1e-6 <= x <= 1e3, "from 1e-6 to 1000", "0.05 is usual: a twentieth of the cohort"
    ),
    "data.dirichlet-alpha": _number(1e-3, 1e6, "0.1 is very uneven, 100 nearly even"),
    "data.val-fraction": _FRACTION,
    "data.test-fraction": _FRACTION,
    "backbone.name": Range(
        lambda x: x.strip() not in ("", "local-dir:", "hf:"),
        '"demo", "shelf", an open_clip model name, local-dir:PATH or hf:NAME',
        "name one",
    ),
    "evaluation.every": _whole(1, MOST_RELEASES, "for the last round only, give the number of rounds"),
    "evaluation.new-clients": _whole(0, _MOST_CLIENTS, "0 holds no client out"),
    "resources.device": Range(
        lambda x: re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", x) is not None, "auto, cpu, cuda or cuda:N", "auto will do"
    ),
    "resources.cpus-per-client": _whole(1, 1024, "1 will do"),
    "resources.gpus-per-client": _number(0, 1024, "0 for CPU, a fraction to share a GPU"),
    "resources.workspace-mib": _whole(16, 2**20, "512 is usual"),
    "resources.ray-address": Range(
        lambda x: re.fullmatch(r"|auto|[^\s:/]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}", x) is not None,
        'empty, "auto" or HOST:PORT',
        "write the address that `ray start --head` printed, without ray://",
    ),
    "resources.feature-cache": Range(
        lambda x: x in ("", "off") or Path(x).is_absolute(),
        'empty, "off" or an absolute path',
        "write the path from the root",
    ),
    "output.track": Range(
        lambda x: re.fullmatch(r"|tensorboard|mlflow|[A-Za-z_][\w.]*:[A-Za-z_]\w*", x) is not None,
        "empty, tensorboard, mlflow or module:Class",
        "leave it empty to track nothing",
    ),
    "output.dir": Range(
        lambda x: x == "" or Path(x).is_absolute(), "empty or an absolute path", "write the path from the root"
    ),
}


def check(types: Mapping[str, Any], flat: Mapping[str, ConfigValue]) -> tuple[dict[str, ConfigValue], list[str]]:
    """Check a flat config against the types of its keys and against the rules of this module.

    Args:
        types: Every known key and its annotation: ``bool``, ``int``, ``float``, ``str`` or a ``Literal`` of strings.
        flat: The config; keys under ``plugin.`` are ignored.

    Returns:
        The usable values, converted to their types, and the problems, one line each, empty if there are none.
    """
    problems = [
        _unknown(key, flat[key], types) for key in flat if key not in types and not key.startswith(_IGNORED_PREFIX)
    ]
    values: dict[str, ConfigValue] = {}
    for key, hint in types.items():
        if key not in flat:
            problems.append(f"{key} is missing: add it, {_describe(hint)}")
            continue
        value, fault = _convert(key, flat[key], hint)
        if fault is None and key in RANGES and not RANGES[key].accepts(value):
            fault = f"must be {RANGES[key].allowed}; {RANGES[key].advice}"
        if fault is None:
            values[key] = value
        else:
            problems.append(f"{key} = {_show(flat[key])}: {fault}")
    judged, of_method = _as_judged(values)
    problems += of_method
    problems += [
        f"{rule.keys[0]} = {_show(values[rule.keys[0]])}: {rule.need}{_context(rule, values)}; {rule.advice}"
        for rule in (*CROSS_RULES, *CLIENT_LEVEL_RULES, *METHOD_RULES, *CLASS_PRIOR_RULES)
        if all(key in judged for key in rule.keys) and not rule.holds(judged)
    ]
    return values, problems


def _as_judged(values: Mapping[str, ConfigValue]) -> tuple[dict[str, ConfigValue], list[str]]:
    """Return the values as the rules read them, and the problems of a user's method.

    A user's method has the name of the shipped one whose rules hold for it, and a user's learner is a ``module``.
    Without a usable method the rules that read it are not judged.
    """
    judged, reference = dict(values), str(values.get("method", ""))
    if ":" in str(values.get("prompt.learner", "")):
        judged["prompt.learner"] = "module"
    if ":" not in reference or not {"method-path", "method-options"} <= values.keys():
        return judged, []
    try:
        method = find_method(reference, str(values["method-path"]), str(values["method-options"]))
    except ConfigError as error:
        del judged["method"]
        return judged, [str(error)]
    return judged | {"method": method.name}, []


def _convert(key: str, value: object, hint: Any) -> tuple[Any, str | None]:
    """Return the value in its own type, and its fault or None."""
    if key in _NAMES and not (isinstance(value, str) and ":" in value):
        hint = Literal[_NAMES[key]]  # a name that is nearly one of ours gets the usual advice
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if new := RENAMED.get((key, str(value))):
            return value, f'has a new name; write "{new}"'
        near = difflib.get_close_matches(str(value).lower().replace("_", "-"), choices, n=1)
        guess = f'; did you mean "{near[0]}"?' if near else "; choose one"
        return value, None if value in choices else f"must be {_describe(hint)}{guess}"
    # bool is a subclass of int, but true is not a count.
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        return value, f"must be {_describe(hint)}; {_ADVICE[hint]}"
    if key in _PATH_KEYS:
        return _expand(str(value)), None
    return value, None


def _finite(value: float) -> tuple[float, str | None]:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return number, None if math.isfinite(number) else "must be a finite number; nan and inf are not allowed"


def _expand(path: str) -> str:
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # no such user: the code that reads the path reports the original path
        return path


_NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_ADVICE = {
    bool: "write true or false without quotes",
    int: "write digits without a point or quotes",
    float: "write a number without quotes",
    str: "put it in quotes",
}


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    return _NOUNS[hint]


def _show(value: object) -> str:
    """Format a value as TOML writes it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)


def _context(rule: CrossRule, values: Values) -> str:
    others = ", ".join(f"{key} = {_show(values[key])}" for key in rule.keys[1:])
    return f" (here {others})"


def _unknown(key: str, value: object, known: Mapping[str, Any]) -> str:
    """Name the likely key: the same spelling with hyphens, the same last part in another section, or a near miss."""
    hyphened = key.replace("_", "-")
    inside = [name for name in known if name.startswith(f"{hyphened}.")]
    if inside:
        return f"{key} = {_show(value)}: this is a section; set one of its keys: {', '.join(inside)}"
    leaf = hyphened.rpartition(".")[2]
    guesses = [hyphened] if hyphened in known else [name for name in known if name.rpartition(".")[2] == leaf]
    guesses = guesses or difflib.get_close_matches(hyphened, known, n=1)
    advice = f"did you mean {' or '.join(guesses)}?" if guesses else "remove it, or see pyproject.toml for the keys"
    return f"{key} = {_show(value)}: unknown key; {advice}"

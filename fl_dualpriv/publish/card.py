"""Facts of a published prompt: its use, its origin, and what it reveals. This module does not import torch.

The facts are one JSON text with fixed fields, the only metadata of the file. A reader does not trust the text: it
checks every field, guesses no value, and uses no name in it as a path.
"""

import dataclasses
import json
import re
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.run.tables import epsilon_text
from fl_dualpriv.tasks.use_facts import UseFacts

FORMAT = 2
"""Format version of the file. A reader refuses every other version."""

T = TypeVar("T")

_MOST_LETTERS = 1000
_LARGEST = 1e300
_HUB_NAME = re.compile(r"(?!.*\.\.)[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """Privacy guarantee of a published prompt at one level.

    The fields are those of `privacy.plan.Release`. ``note`` says what the ε covers.
    """

    unit: Literal["record", "client"]
    relation: str
    sampling: str
    releases: int
    epsilon: float
    delta: float
    trusts: str
    note: str


@dataclass(frozen=True, kw_only=True)
class ScoreFacts:
    """Accuracies that the run reports, each in [0, 1] or None.

    ``of`` names the prompts that were scored. ``rival`` names the best model that costs no ε, see `choose_free_form`.
    It is empty if the accuracies are of a node, which does not score the rival.
    """

    of: str
    split: str
    rival: str
    zero_shot_local: float | None
    zero_shot_neighbour: float | None
    free_local: float | None
    free_neighbour: float | None
    local: float | None
    neighbour: float | None


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """Origin of a prompt.

    Attributes:
        client: Client that owns the personal prompt. None means the global prompt.
        method: Method of the run.
        rounds: Number of rounds of the run.
        population: Number of clients of the run.
        randomness: ``os`` or ``seeded``. If ``seeded``, anyone who knows the seed can remove the noise.
        version: Version of fl-dualpriv.
        scores: Accuracies of this prompt. None if the run did not score it.
    """

    client: int | None
    method: str
    rounds: int
    population: int
    randomness: Literal["os", "seeded"]
    version: str
    scores: ScoreFacts | None

    @property
    def whose(self) -> str:
        """Name of the prompt in words."""
        return "global prompt" if self.client is None else f"personal prompt of client {self.client}"


@dataclass(frozen=True, kw_only=True)
class PublishedFacts:
    """All facts of a published prompt.

    Attributes:
        use: Facts that a reader needs to use the prompt.
        source: Origin of the prompt.
        guarantees: One guarantee for each level; empty if and only if ``not_private``.
        not_private: True if the prompt was published knowingly without differential privacy.
        notes: Further facts that a user of the prompt must know.
    """

    use: UseFacts
    source: SourceFacts
    guarantees: tuple[Guarantee, ...]
    not_private: bool
    notes: tuple[str, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """Guarantee in words, one line per level, or the statement that there is none."""
        if self.not_private:
            return ("no differential privacy: the prompt may reveal the data that it was trained on",)
        return tuple(guarantee_line(guarantee) for guarantee in self.guarantees)

    @property
    def is_reproducible(self) -> bool:
        """True if a seed can reproduce the noise. The guarantee then fails against anyone who knows the seed."""
        return bool(self.guarantees) and self.source.randomness == "seeded"

    def check(self) -> None:
        """Refuse a prompt without its guarantee.

        Raises:
            PrivacyError: If the statement of what the prompt reveals is missing, contradictory or has invalid numbers.
        """
        if self.not_private == bool(self.guarantees):
            raise PrivacyError(
                "it holds no guarantee line: neither an ε with unit, relation, sampling and count, nor that it has no "
                "differential privacy"
                if not self.guarantees
                else "it holds a guarantee and also says that it has none"
            )
        for guarantee in self.guarantees:
            if not (guarantee.epsilon > 0 and 0 < guarantee.delta < 1 and guarantee.releases > 0):
                raise PrivacyError(
                    f"its guarantee line says ε = {guarantee.epsilon:g} at δ = {guarantee.delta:g} for "
                    f"{guarantee.releases} releases, which is not a guarantee"
                )

    def to_json(self) -> str:
        """Return JSON: the same facts give the same text, in ASCII, so that no character can act on a terminal."""
        return json.dumps({"format": FORMAT} | asdict(self), sort_keys=True, allow_nan=False)


def guarantee_line(guarantee: Guarantee) -> str:
    """Return the guarantee as one line, which never gives an ε without unit, relation, sampling and count."""
    unit = {"record": "one record of a client", "client": "all data of a client"}[guarantee.unit]
    count = f"{guarantee.releases} release{'s' * (guarantee.releases > 1)}"
    return (
        f"{guarantee.unit} level: ε = {epsilon_text(guarantee.epsilon)} at δ = {guarantee.delta:g} for {unit} "
        f"({guarantee.relation}; {guarantee.sampling}; {count}; trusts {guarantee.trusts}; {guarantee.note})"
    )


def parse_facts(text: str) -> PublishedFacts:
    """Read what `to_json` wrote.

    Raises:
        ConfigError: If the text has another form.
        PrivacyError: If the guarantee is missing.
    """
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"its description is not JSON: {type(error).__name__}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ConfigError(f"its description is not of format {FORMAT}, the one that this version reads")
    # This check comes first: if the guarantee was cut out, the message must say so, not that a field is missing.
    if not content.get("guarantees") and content.get("not_private") is not True:
        raise PrivacyError("it holds no guarantee line: nothing says what it reveals about the data behind it")
    facts = _parse(PublishedFacts, content, "")
    facts.check()
    _check_use(facts.use)
    return facts


def parse_use(content: Any) -> UseFacts:
    """Read the `UseFacts` that a run wrote into its files with ``asdict``.

    Raises:
        ConfigError: If the content has another form.
    """
    use = _parse(UseFacts, content, "")
    _check_use(use)
    return use


def _check_use(use: UseFacts) -> None:
    """Refuse facts with which a reader would not use the prompt as intended.

    Raises:
        ConfigError: If a fact is missing, invalid, or does not fit the others.
    """
    if use.asks_questions == bool(use.classes) or use.asks_questions != bool(use.max_tokens):
        raise ConfigError(f"a prompt of kind {use.kind!r} {'without' if not use.classes else 'with'} classes")
    if len(use.classes) == 1 or len(set(use.classes)) != len(use.classes) or not all(map(str.strip, use.classes)):
        raise ConfigError("its class names are fewer than two, empty or not all different")
    if not use.asks_questions and (use.template.count("{}") != 1 or set("{}") & set(use.template.replace("{}", "", 1))):
        raise ConfigError(f"its template {use.template!r:.80} must have exactly one {{}} for the class name")
    name = use.backbone.name.removeprefix("hf:").removeprefix("local-dir:")
    if not _HUB_NAME.fullmatch(name) or not re.fullmatch(r"[\w.-]*", use.backbone.pretrained, re.ASCII):
        raise ConfigError("its backbone is named by a path or with unusual characters; such a name is not used")
    if not all(re.fullmatch("[0-9a-f]{16}", key) for key in (use.backbone.fingerprint, use.backbone.image_side)):
        raise ConfigError("its backbone has no fingerprint of 16 hex digits")
    if not use.backbone.is_local and (
        use.backbone.name.startswith("local-dir:") or use.backbone.pretrained.endswith((".pt", ".pth", ".safetensors"))
    ):
        raise ConfigError("its backbone is a local file or folder, but it does not say so")


def _parse(kind: type[T], value: Any, where: str) -> T:
    """Build a dataclass from JSON. Every field must have its type, and no other field is allowed."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"its description lacks {where or 'everything'}")
    hints = get_type_hints(kind)
    if value.keys() != hints.keys():
        wrong = sorted(str(key)[:40] for key in value.keys() ^ hints.keys())
        raise ConfigError(f"its description has missing or unknown fields in {where or 'it'}: {', '.join(wrong[:5])}")
    return kind(**{name: _value(hint, value[name], f"{where}.{name}".strip(".")) for name, hint in hints.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _parse(hint, value, where)
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _value(options[0], value, where)
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_value(options[0], item, where) for item in value)
    elif origin is Literal:
        if isinstance(value, str) and value in options:
            return value
    elif hint is float:
        if type(value) in (int, float) and abs(value) < _LARGEST:  # no NaN, no infinity, no huge integer
            return float(value)
    elif hint is str:
        if isinstance(value, str) and len(value) <= _MOST_LETTERS:
            return value
    elif type(value) is hint:  # bool and int; JSON's true is not a number
        return value
    raise ConfigError(f"its description says {where} = {value!r:.80}, which is not allowed")

"""The run configuration: frozen dataclasses that mirror ``[tool.flwr.app.config]`` of ``pyproject.toml`` key by key.

There are no defaults here: ``pyproject.toml`` is the only list of keys and defaults, and a test compares the two. Keys
are kebab-case and dotted in messages and in TOML, snake_case in Python; only this file converts them. Ranges and
cross-field rules are in ``ranges.py``. Imports the standard library only.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast, get_type_hints

from fl_dualpriv.config.candidates import CANDIDATES_KEY
from fl_dualpriv.config.class_prior_rules import default_prior
from fl_dualpriv.config.methods import DPFPLPaperConfig, FedOTPConfig, FedPGPConfig, find_method
from fl_dualpriv.config.ranges import ConfigValue, check
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.methods.base import Method
from fl_dualpriv.methods.published import noised_steps

T = TypeVar("T")
Mechanism = Literal["none", "gaussian"]
CentralMechanism = Literal["none", "gaussian", "tree", "banded"]
CalibrateTo = Literal["epsilon", "noise-multiplier"]


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Server strategy of the run, ``ref`` as ``module:Class``; ``path`` is the folder on the server with its module.

    ``options`` is a JSON object of ``plugin.`` keys that the app's ``pyproject.toml`` does not list.
    """

    ref: str
    path: str
    options: str


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Local training; ``sampling_rate`` is the Poisson rate q, and ``top_m`` = 0 gives exact gradients.

    ``class_prior`` is the kind of public class shares in the loss, see ``tasks/class_prior.py``. A `RunConfig` holds
    the kind that "auto" stands for, see `default_prior`. ``class_prior_outside`` is the share of all classes together
    that such a prior does not name.
    """

    local_steps: int
    sampling_rate: float
    global_learning_rate: float
    local_learning_rate: float
    top_m: int
    optimizer: Literal["sgd", "momentum", "adam", "adam-corrected"]
    momentum: float
    class_prior: Literal["auto", "none", "list", "declared", "exact"]
    class_prior_outside: float


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Kind, shape and start of the prompt; ``rank <= ctx_dim`` is checked once the backbone is known.

    ``words`` are the template of questions: the text that the un-tuned model reads, and a possible start of a prompt.
    ``personalisation`` is the rule of p_L; ``personal_memory`` is β of the noise-aware ones, per release or, for
    ``collective``, per round.
    ``candidates`` are public templates, see ``config/candidates.py``. With ``init = "select"`` the release ``select``
    chooses one of them, see ``privacy/selection.py``.
    """

    learner: str
    learner_path: str
    learner_options: str
    n_ctx: int
    rank: int
    init: Literal["template", "mean", "select", "random", "zeros"]
    candidates: str
    select: Literal["federated", "client"]
    words: str
    personalisation: Literal["published", "scalar", "singular", "collective"]
    personal_memory: float

    @property
    def learns_a_module(self) -> bool:
        """True if a user's module learns in place of a prompt."""
        return ":" in self.learner

    @property
    def has_candidates(self) -> bool:
        """True if the run has public templates beside its own."""
        return self.candidates.strip() != ""


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Dual-Priv pruning of visual tokens and of updates; a keep ratio of 1 switches it off.

    ``visual_fused`` is k, the number of tokens into which the pruned tokens are fused. ``visual_fusion_noise`` selects
    a reading of the noise scale in the published text, and never has an ε. ``update_warm_up`` counts local steps.
    """

    visual_keep_ratio: float
    visual_layer: int
    visual_score: Literal["attention", "random"]
    visual_fused: int
    visual_merge: Literal["attention", "average", "sum"]
    visual_fusion_noise: Literal["off", "sum", "mean", "absolute"]
    visual_fusion_std: float
    update_keep_ratio: float
    update_rule: Literal["noised", "random", "past", "random-past", "shrink"]
    update_block: Literal["token", "component", "coordinate", "matrix"]
    update_warm_up: int
    update_exploration: float
    update_frozen: bool


@dataclass(frozen=True, kw_only=True)
class RecordLevelConfig:
    """Privacy of one training example of a client; ``clipping`` is the rule that brings a row to the clip norm."""

    mechanism: Mechanism
    calibrate_to: CalibrateTo
    epsilon: float
    noise_multiplier: float
    delta: float
    clip_norm: float
    clipping: Literal["flat", "normalised"]
    selection_share: float
    noise_space: Literal["prompt", "feature"]
    trusts_server: bool


@dataclass(frozen=True, kw_only=True)
class ClientLevelConfig:
    """Privacy of a client's whole data; ``expected_cohort`` is public and is a count of clients.

    The mechanisms ``tree`` and ``banded`` have noise that is correlated over rounds, on a fixed schedule; ``bands`` = 0
    takes the best number. ``adaptive`` clipping begins at ``clip_norm``; ``bit_noise_share`` is σ_b over the expected
    cohort.
    """

    mechanism: CentralMechanism
    calibrate_to: CalibrateTo
    epsilon: float
    noise_multiplier: float
    max_epsilon: float
    delta: float
    clip_norm: float
    expected_cohort: float
    bands: int
    clipping: Literal["fixed", "adaptive"]
    target_quantile: float
    clip_learning_rate: float
    bit_noise_share: float


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Privacy at both levels, the source of randomness, and the arithmetic of sums and noise."""

    randomness: Literal["os", "seeded"]
    arithmetic: Literal["float", "integer"]
    record: RecordLevelConfig
    client: ClientLevelConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images or questions about images, and their partition among clients; ``max_tokens`` is public.

    ``class_shares`` is the file of the class shares that owners declare; public. The columns are those of a list or a
    data set of images; an empty name means the usual ones.
    """

    ref: Literal["auto", "demo", "shelf", "folder", "demo-vqa", "questions"]
    path: str
    classes: str
    image_column: str
    label_column: str
    domain_column: str
    client_column: str
    class_shares: str
    augmentation: Literal["none", "flip"]
    max_tokens: int
    partition: Literal["iid", "by-class", "by-domain", "by-client", "by-image", "dirichlet", "by-node", "flwr-datasets"]
    partitioner: str
    dirichlet_alpha: float
    val_fraction: float
    test_fraction: float

    @property
    def source(self) -> Literal["demo", "shelf", "folder", "demo-vqa", "questions"]:
        """The data source that ``ref`` selects; ``auto`` selects a folder if there is a path, else the demo."""
        if self.ref == "auto":
            return "folder" if self.path.strip() else "demo"
        return self.ref

    @property
    def asks_questions(self) -> bool:
        """True if records are questions about images, for a multimodal language model."""
        return self.source in ("demo-vqa", "questions")

    @property
    def is_embedded(self) -> bool:
        """True if the data came with the library, so that all of it is public."""
        return self.source in ("demo", "shelf", "demo-vqa")

    @property
    def is_by_domain(self) -> bool:
        """True if each client belongs to one domain of the data."""
        return self.partition == "by-domain"


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The frozen vision-language model, and the precision of its matrix products."""

    name: str
    precision: Literal["fp32", "bf16"]
    pretrained: str


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Interval and data of the evaluation; ``every`` is in rounds.

    ``new_clients`` counts clients beside the population. They hold records, take part in no round, and are scored as
    clients that come after the training.
    """

    every: int
    split: Literal["test", "val"]
    held_out_data: Literal["auto", "public", "private"]
    new_clients: int


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """Hardware of one actor; these keys never change a result."""

    device: str
    cpus_per_client: int
    gpus_per_client: float
    workspace_mib: int
    ray_address: str
    feature_cache: str


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Folder of the results, an absolute path, or empty for the default one; ``resume``: continue the run in it."""

    dir: str
    track: str
    resume: bool


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Checked configuration of one run: each instance satisfies every rule of ``ranges.py``. Timeouts in seconds.

    Raises:
        ConfigError: If a field breaks a rule, also on direct construction and ``dataclasses.replace``.
    """

    method: str
    method_path: str
    method_options: str
    rounds: int
    population: int
    supernodes: int
    seed: int
    join_timeout: float
    reply_timeout: float
    dead_actors: Literal["zero", "stop"]
    strategy: StrategyConfig
    train: TrainConfig
    prompt: PromptConfig
    pruning: PruningConfig
    fedpgp: FedPGPConfig
    fedotp: FedOTPConfig
    dpfpl_paper: DPFPLPaperConfig
    privacy: PrivacyConfig
    data: DataConfig
    backbone: BackboneConfig
    evaluation: EvaluationConfig
    resources: ResourcesConfig
    output: OutputConfig

    def __post_init__(self) -> None:
        _, problems = check(_key_types(RunConfig), self.to_run_config())
        _raise_all(problems)
        if self.train.class_prior == "auto":
            kind = default_prior(self.local_method.name, self.data.ref, self.data.partition)
            object.__setattr__(self, "train", dataclasses.replace(self.train, class_prior=kind))

    @classmethod
    def from_run_config(cls, flat: Mapping[str, ConfigValue]) -> Self:
        """Parse a flat run config in the form that Flower passes.

        Args:
            flat: Dotted kebab-case keys; keys under ``plugin.`` belong to the selected class and are ignored here.

        Returns:
            The typed tree. An int given for a float is converted, and ``~`` is expanded in the paths.

        Raises:
            ConfigError: If the config has problems. The message lists all of them, one a line.
        """
        values, problems = check(_key_types(cls), flat)
        _raise_all(problems)
        return _build(cls, values)

    @property
    def local_method(self) -> Method:
        """The local method, one of ours or a user's.

        Raises:
            ConfigError: If the class cannot be imported or is not a method.
        """
        return find_method(self.method, self.method_path, self.method_options)

    @property
    def claims_privacy(self) -> bool:
        """True if the run states an ε about the training data, proved or nominal."""
        return (self.privacy.record.mechanism, self.privacy.client.mechanism) != ("none", "none")

    @property
    def selects_start(self) -> bool:
        """True if a release before round 1 selects the start of the prompts from the candidates."""
        return self.prompt.init == "select"

    @property
    def chooses_start_by_client(self) -> bool:
        """True if each client chooses its own start, which its personal prompt then holds."""
        return self.selects_start and self.prompt.select == "client"

    @property
    def nominal_steps(self) -> int:
        """T in the nominal σ of dpfpl-paper, see `noised_steps`."""
        as_code = self.dpfpl_paper.published == "code"
        return noised_steps(self.rounds, self.train.local_steps, self.train.sampling_rate, as_code=as_code)

    @property
    def num_supernodes(self) -> int:
        """Number of Flower nodes of the run; node j hosts the clients j, j + nodes, j + 2 nodes and so on."""
        return self.supernodes or self.population

    def to_run_config(self) -> dict[str, ConfigValue]:
        """Return the flat form: ``RunConfig.from_run_config(config.to_run_config()) == config``."""
        return _flat_fields(self)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, ConfigValue]:
    """Turn nested tables into one flat table with dotted keys, as Flower does; the spelling of keys stays the same.

    Args:
        nested: Tables within tables, as ``tomllib`` returns them.
        prefix: Prefix of every key, with its own final dot.

    Raises:
        ConfigError: If a value is not a bool, int, float or string, because a Flower run config holds only these. Only
            ``prompt.candidates`` may be a list of strings; it becomes one string with a template a line.
    """
    flat: dict[str, ConfigValue] = {}
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        elif isinstance(value, bool | int | float | str):
            flat[key] = value
        elif key == CANDIDATES_KEY and isinstance(value, list) and all(isinstance(text, str) for text in value):
            flat[key] = "\n".join(value)  # a list of templates, because a Flower run config holds only scalars
        else:
            raise ConfigError(
                f"{key} = {value!r}: a {type(value).__name__} is not a config value; "
                "give true or false, a number or a quoted string"
            )
    return flat


def read_toml(path: Path) -> dict[str, ConfigValue]:
    """Read a TOML file of config keys into a flat table.

    Raises:
        ConfigError: If the file is missing, unreadable or not TOML, or holds a value that is not a scalar.
    """
    return flatten(_load_toml(path))


def app_defaults(app_dir: Path) -> dict[str, ConfigValue]:
    """Read the keys and defaults of the app, the flat ``[tool.flwr.app.config]`` of ``app_dir/pyproject.toml``.

    Raises:
        ConfigError: If the file is not usable or has no such table.
    """
    path = app_dir / "pyproject.toml"
    table: Any = _load_toml(path)
    for name in ("tool", "flwr", "app", "config"):
        table = table.get(name) if isinstance(table, dict) else None
    if not isinstance(table, dict):
        raise ConfigError(f"{path} has no [tool.flwr.app.config] table; give the directory of the Flower app")
    return flatten(table)


def parse_assignment(text: str) -> tuple[str, ConfigValue]:
    """Parse one ``key=value`` of the command line.

    Args:
        text: Assignment whose value is read as TOML (``4``, ``0.5``, ``true``, ``"text"``). A value that is not TOML is
            an unchanged string, so that paths and words need no quotes. An empty value is the empty string.

    Raises:
        ConfigError: If there is no ``=``, no key, or the value is a TOML array or table.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ConfigError(f"{text!r} is not an assignment; write key=value, for example rounds=20")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except ValueError:
        return key, value
    if key == CANDIDATES_KEY and isinstance(parsed["value"], list):
        return next(iter(flatten({key: parsed["value"]}).items()))
    if isinstance(parsed["value"], dict | list):
        raise ConfigError(f"{key} = {value}: arrays and tables are not config values; give one number, word or string")
    # A date is a string here. So is a text whose line breaks happen to make further keys.
    is_scalar = len(parsed) == 1 and isinstance(parsed["value"], bool | int | float | str)
    return key, parsed["value"] if is_scalar else value


def merge(defaults: Mapping[str, ConfigValue], *overrides: Mapping[str, ConfigValue]) -> dict[str, ConfigValue]:
    """Merge flat tables; later tables override earlier ones. Unknown keys stay, and ``RunConfig`` refuses them."""
    merged = dict(defaults)
    for override in overrides:
        merged.update(override)
    return merged


def _load_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path.absolute()} does not exist; give the path of a TOML file") from None
    except OSError as error:
        raise ConfigError(f"config file {path.absolute()} cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:  # TOML, encoding, or an integer beyond Python's limit of digits
        raise ConfigError(f"config file {path} is not valid TOML: {error}; correct the file") from error


def _raise_all(problems: list[str]) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"the run configuration has {count}:", *problems]))


def _children(cls: type) -> list[tuple[str, str, Any]]:
    """Return name, kebab-case key and type of every field."""
    return [(name, name.replace("_", "-"), hint) for name, hint in get_type_hints(cls).items()]


@functools.cache
def _key_types(cls: type, prefix: str = "") -> dict[str, Any]:
    types: dict[str, Any] = {}
    for _, key, hint in _children(cls):
        if dataclasses.is_dataclass(hint):
            types |= _key_types(cast(type, hint), f"{prefix}{key}.")
        else:
            types[prefix + key] = hint
    return types


def _build(cls: type[T], values: Mapping[str, ConfigValue], prefix: str = "") -> T:
    arguments = {
        name: _build(cast(type, hint), values, f"{prefix}{key}.")
        if dataclasses.is_dataclass(hint)
        else values[prefix + key]
        for name, key, hint in _children(cls)
    }
    return cls(**arguments)


def _flat_fields(config: object, prefix: str = "") -> dict[str, ConfigValue]:
    flat: dict[str, ConfigValue] = {}
    for name, key, hint in _children(type(config)):
        value = getattr(config, name)
        flat |= _flat_fields(value, f"{prefix}{key}.") if dataclasses.is_dataclass(hint) else {prefix + key: value}
    return flat

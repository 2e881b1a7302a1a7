"""pyproject.toml and RunConfig list the same keys with the same types, and the defaults are a valid run."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from fl_dualpriv.config.schema import RunConfig, app_defaults, merge, read_toml

APP_DIR = Path(__file__).parents[2]
DEFAULTS = app_defaults(APP_DIR)
CONFIGS = sorted(
    path for path in (APP_DIR / "simulations" / "configs").glob("*.toml") if not path.name.startswith("ablation-")
)


def leaf_types(cls: type, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, hint in get_type_hints(cls).items():
        key = prefix + name.replace("_", "-")
        found |= leaf_types(hint, f"{key}.") if dataclasses.is_dataclass(hint) else {key: hint}
    return found


def test_same_keys_in_the_same_order():
    # Top-level keys precede the tables in TOML, and so do plain fields in RunConfig.
    assert list(leaf_types(RunConfig)) == [key for key in DEFAULTS if not key.startswith("plugin.")]


@pytest.mark.parametrize("key", leaf_types(RunConfig))
def test_default_has_the_type_of_its_field(key):
    # Exact: an int default for a float field would make Flower refuse a float override.
    hint = leaf_types(RunConfig)[key]
    if get_origin(hint) is Literal:
        assert DEFAULTS[key] in get_args(hint)
    else:
        assert type(DEFAULTS[key]) is hint


def test_no_field_has_a_default():
    pending: list[type] = [RunConfig]
    while pending:
        cls = pending.pop()
        for field in dataclasses.fields(cls):
            assert field.default is dataclasses.MISSING, field.name
            assert field.default_factory is dataclasses.MISSING, field.name
        pending += [hint for hint in get_type_hints(cls).values() if dataclasses.is_dataclass(hint)]


def test_choices_are_those_of_the_comments():
    # "method = ...  # dpfpl | promptfl | ..." is what a reader of pyproject.toml sees.
    lines = (APP_DIR / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    checked = 0
    for key, hint in leaf_types(RunConfig).items():
        if get_origin(hint) is not Literal:
            continue
        comments = [line.partition("#")[2] for line in lines if line.startswith(f"{key.rpartition('.')[2]} = ")]
        words = " ".join(comments).replace("|", " ").replace(":", " ").split()
        if words:
            assert set(get_args(hint)) <= set(words), key
            checked += 1
    assert checked >= 9


def test_defaults_are_a_valid_run():
    assert (
        RunConfig.from_run_config(DEFAULTS).method
        == tomllib.loads((APP_DIR / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"][
            "method"
        ]
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid_runs(path):
    RunConfig.from_run_config(merge(DEFAULTS, read_toml(path)))

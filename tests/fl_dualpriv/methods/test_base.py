"""The table of methods: what each switches on, and the relations between them."""

from dataclasses import replace
from typing import get_args

import pytest

from fl_dualpriv.config.schema import Method
from fl_dualpriv.methods.base import METHODS


def test_methods_are_those_of_the_configuration():
    assert set(METHODS) == set(get_args(Method))


@pytest.mark.parametrize(
    ("name", "shared", "personal"),
    [
        ("zero-shot", False, False),
        ("promptfl", True, False),
        ("local-only", False, True),
        ("lowrank", True, True),
        ("full", True, True),
        ("dpfpl", True, True),
        ("dpfpl-paper", True, True),
        ("linear-probe", True, False),
        ("prototypes", True, False),
        ("fedpgp", True, True),
        ("dp-lora", True, False),
        ("ffa-lora", True, False),
        ("fedotp", True, True),
    ],
)
def test_which_prompts_move(name: str, shared: bool, personal: bool):
    parts = METHODS[name]
    assert (parts.shared, parts.personal) == (shared, personal)
    assert parts.trains == (name != "zero-shot")


def test_baselines_differ_from_dpfpl_by_one_switch():
    dpfpl = METHODS["dpfpl"]
    assert METHODS["lowrank"] == replace(dpfpl, residual=False)
    assert METHODS["full"] == replace(dpfpl, factorised=False)
    assert METHODS["local-only"] == replace(dpfpl, shared=False)
    assert METHODS["dpfpl-paper"] == replace(dpfpl, published_procedure=True)


def test_one_method_alone_has_a_nominal_epsilon():
    assert [name for name, parts in METHODS.items() if parts.published_procedure] == ["dpfpl-paper"]

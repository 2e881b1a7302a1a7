"""The table of methods: what each switches on, and the relations between them."""

import pytest

from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.methods.dpfpl import DPFPL


def test_a_method_has_the_name_of_its_class():
    assert all(method.name == name for name, method in METHODS.items())


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


def test_baselines_are_dpfpl_but_for_one_fact():
    """Each reduction overrides a single fact beside its name, and no code."""
    for name, fact in (("lowrank", "residual"), ("local-only", "shared"), ("dpfpl-paper", "published_procedure")):
        reduced = type(METHODS[name])
        assert reduced.__bases__ == (DPFPL,)
        assert {own for own in vars(reduced) if not own.startswith("__")} == {"name", fact}


def test_one_method_alone_has_a_nominal_epsilon():
    assert [name for name, parts in METHODS.items() if parts.published_procedure] == ["dpfpl-paper"]

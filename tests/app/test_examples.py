"""Every example in a docstring runs and prints what stands there."""

import doctest
import importlib
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("fl_dualpriv", "strategies", "simulations", "tools", "attacks", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, while they are imported
        module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_public_face_has_examples():
    import fl_dualpriv

    text = {name: getattr(fl_dualpriv, name).__doc__ or "" for name in fl_dualpriv._HOMES}
    assert all(text.values())
    with_examples = {name for name, doc in text.items() if ">>> " in doc}
    assert with_examples >= {"ModuleLearner", "pay", "plan_for", "poisson_sample", "private_step", "Ledger", "Payment"}

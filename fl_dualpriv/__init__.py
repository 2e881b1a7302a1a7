"""Federated prompt learning for vision-language models with proved differential privacy.

The names below are the public face. Each is imported on first use, because most need torch and a query of the version
does not.

* `load_prompt` reads a published prompt, and predicts with it.
* `RoundStrategy`, `Method` and `ModuleLearner` are what a strategy, a local method and a learner of your own derive
  from or use; ``fl_dualpriv.testing`` has their contracts.
* `plan_for`, `Ledger`, `pay`, `Payment`, `private_step` and `poisson_sample` make private steps in a loop of your own.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_dualpriv.learners.module import ModuleLearner
    from fl_dualpriv.methods.base import Method
    from fl_dualpriv.privacy.filters.pay import pay
    from fl_dualpriv.privacy.ledger import Ledger
    from fl_dualpriv.privacy.noise import OsRandom, poisson_sample
    from fl_dualpriv.privacy.plan import plan_for
    from fl_dualpriv.privacy.step import Payment, private_step
    from fl_dualpriv.publish.use import load_prompt
    from fl_dualpriv.server.strategy import RoundStrategy

_HOMES = {
    "Ledger": "privacy.ledger",
    "Method": "methods.base",
    "ModuleLearner": "learners.module",
    "OsRandom": "privacy.noise",
    "Payment": "privacy.step",
    "RoundStrategy": "server.strategy",
    "load_prompt": "publish.use",
    "pay": "privacy.filters.pay",
    "plan_for": "privacy.plan",
    "poisson_sample": "privacy.noise",
    "private_step": "privacy.step",
}

__all__ = [  # noqa: RUF022 - in the order of the text above
    "__version__",
    "load_prompt",
    "RoundStrategy",
    "Method",
    "ModuleLearner",
    "plan_for",
    "Ledger",
    "pay",
    "Payment",
    "private_step",
    "poisson_sample",
    "OsRandom",
]

try:
    __version__ = version("fl-dualpriv")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fl_dualpriv.{_HOMES[name]}"), name)

"""The methods by their names, users' methods as ``module:Class``, and sections of the configuration for one method.

Light on import: the facts of a method need no torch.
"""

import functools
import json
from dataclasses import dataclass
from typing import Literal

from fl_dualpriv.config.plugins import load_class, plugin_options
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.methods.base import Method
from fl_dualpriv.methods.dpfpl import DPFPL, DPFPLPaper, LocalOnly, LowRank
from fl_dualpriv.methods.fedotp import FedOTP
from fl_dualpriv.methods.fedpgp import FedPGP
from fl_dualpriv.methods.promptfl import (
    DPLoRA,
    FFALoRA,
    Full,
    LinearProbe,
    PromptFL,
    Prototypes,
    ZeroShot,
)

_SHIPPED: tuple[type[Method], ...] = (
    *(DPFPL, PromptFL, LocalOnly, LowRank, Full, ZeroShot, DPFPLPaper),
    *(LinearProbe, Prototypes, FedPGP, DPLoRA, FFALoRA, FedOTP),
)
_FACTS = ("shared", "personal", "published_procedure", "contrast", "learns")
METHODS: dict[str, Method] = {method.name: method() for method in _SHIPPED}
"""Each method of the library by its name in the configuration."""


@functools.lru_cache(maxsize=64)
def find_method(reference: str, folder: str = "", options: str = "") -> Method:
    """Return a method of the library, or make one of a user's class.

    Args:
        reference: Name of a method, or ``module:Class`` of a subclass of `Method`.
        folder: Folder of the module, if it is neither part of the app nor installed.
        options: JSON object of the class's options, with keys ``plugin.<class in lower case>.<field>``.

    Raises:
        ConfigError: If the class cannot be imported or is not a method, or if an option does not fit.

    Example:
        >>> find_method("promptfl").personal
        False
    """
    if ":" not in reference:
        return METHODS[reference]
    method_class = load_class("method", reference, Method, folder)
    if method_class.name not in METHODS:
        raise ConfigError(
            f"method = {reference!r}: its name is {method_class.name!r}; do not set name, or set it to that of the "
            f"method whose rules of the configuration hold for it: {', '.join(METHODS)}"
        )
    of_name = type(METHODS[method_class.name])
    if changed := [fact for fact in _FACTS if getattr(method_class, fact) != getattr(of_name, fact)]:
        raise ConfigError(
            f"method = {reference!r}: it changes {', '.join(changed)}, on which the rules of "
            f"{method_class.name!r} rest; derive it from the method that has these facts, and keep its name"
        )
    flat = json.loads(options or "{}")
    return method_class(**plugin_options(method_class, Method, flat))


@dataclass(frozen=True, kw_only=True)
class FedPGPConfig:
    """Keys of FedPGP: μ and τ of the contrastive term, see ``learners/contrast.py``."""

    contrastive_weight: float
    contrastive_temperature: float


@dataclass(frozen=True, kw_only=True)
class DPFPLPaperConfig:
    """Key of dpfpl-paper: the formulas of the paper or of its authors' code, see ``client/published_step.py``."""

    published: Literal["paper", "code"]


@dataclass(frozen=True, kw_only=True)
class FedOTPConfig:
    """Keys of FedOTP: features of patches; γ, λ and iterations of the transport plan, see ``learners/fedotp.py``."""

    patch_reading: Literal["token", "isolated"]
    mass: float
    regularisation: float
    iterations: int

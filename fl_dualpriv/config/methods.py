"""Method names, and sections of the run configuration that belong to one method. Imports the standard library only."""

from dataclasses import dataclass
from typing import Literal

Method = Literal[
    "dpfpl",
    "promptfl",
    "local-only",
    "lowrank",
    "full",
    "zero-shot",
    "dpfpl-paper",
    "linear-probe",
    "prototypes",
    "fedpgp",
    "dp-lora",
    "ffa-lora",
    "fedotp",
]


@dataclass(frozen=True, kw_only=True)
class FedPGPConfig:
    """Keys of FedPGP: μ and τ of the contrastive term, see ``learners/contrast.py``."""

    contrastive_weight: float
    contrastive_temperature: float


@dataclass(frozen=True, kw_only=True)
class FedOTPConfig:
    """Keys of FedOTP: features of patches; γ, λ and iterations of the transport plan, see ``learners/transport.py``."""

    patch_reading: Literal["token", "isolated"]
    mass: float
    regularisation: float
    iterations: int

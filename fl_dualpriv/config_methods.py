"""Methods, and sections of the run configuration that belong to one of them. Imports the standard library only."""

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
]


@dataclass(frozen=True, kw_only=True)
class FedPGPConfig:
    """μ and τ of the contrastive term, see ``prompts/contrast.py``."""

    contrastive_weight: float
    contrastive_temperature: float

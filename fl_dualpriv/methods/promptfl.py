"""PromptFL (Guo et al. 2023, arXiv:2208.11625): one shared prompt; and the controls with all or none of the prompts."""

from dataclasses import dataclass
from typing import ClassVar

from fl_dualpriv.methods.base import Learns, Method


@dataclass(frozen=True, kw_only=True)
class PromptFL(Method):
    """Sharing only: p_G is trained and averaged."""

    name: ClassVar[str] = "promptfl"
    personal: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """The control without factors: p_L moves freely."""


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Method):
    """The un-tuned model."""

    name: ClassVar[str] = "zero-shot"
    shared: ClassVar[bool] = False
    personal: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class LinearProbe(PromptFL):
    """A linear head on the features, in place of a prompt."""

    name: ClassVar[str] = "linear-probe"
    learns: ClassVar[Learns] = "linear-probe"


@dataclass(frozen=True, kw_only=True)
class Prototypes(PromptFL):
    """Sums of features by class, in place of a prompt."""

    name: ClassVar[str] = "prototypes"
    learns: ClassVar[Learns] = "prototypes"


@dataclass(frozen=True, kw_only=True)
class DPLoRA(PromptFL):
    """Both factors of a low-rank context, in place of the context."""

    name: ClassVar[str] = "dp-lora"
    learns: ClassVar[Learns] = "dp-lora"


@dataclass(frozen=True, kw_only=True)
class FFALoRA(PromptFL):
    """One factor of a low-rank context; the other is fixed."""

    name: ClassVar[str] = "ffa-lora"
    learns: ClassVar[Learns] = "ffa-lora"

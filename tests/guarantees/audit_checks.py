"""The audit as a check: what planted canaries prove must not exceed the ε that is claimed."""

import functools
import tomllib
from pathlib import Path
from typing import Any

from attacks.canaries import audit_record_level
from attacks.canary_clients import audit_client_level
from attacks.verdict import AuditResult
from fl_dualpriv.config.schema import RunConfig, app_defaults, flatten

APP_DIR = Path(__file__).parents[2]
CANARIES = 3072
"""Right guesses about all of them prove 6.2, six times the claim, and one audit takes seconds."""


@functools.cache
def config(level: str) -> RunConfig:
    """The audit's own configuration, for ε = 1 over four rounds."""
    text = (APP_DIR / "simulations" / "configs" / f"audit-{level}.toml").read_text()
    changes: dict[str, Any] = {f"privacy.{level}.epsilon": 1.0, "rounds": 4, "resources.feature-cache": "off"}
    return RunConfig.from_run_config(app_defaults(APP_DIR) | flatten(tomllib.loads(text)) | changes)


def claim_stands(result: AuditResult) -> None:
    assert not result.refuted, f"ε >= {result.epsilon_lower:.2f} is proved, and {result.epsilon_claimed:.2f} claimed"


def the_claim_about_records_stands() -> None:
    claim_stands(audit_record_level(config("record"), 0, canaries=CANARIES))


def the_claim_about_clients_stands() -> None:
    claim_stands(audit_client_level(config("client"), 0, canaries=CANARIES))

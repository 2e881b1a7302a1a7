"""Run the requested attacks, report their results beside the claims, and draw them."""

import io
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attacks.canaries import audit_record_level
from attacks.canary_clients import audit_client_level
from attacks.inversion import InversionResult, audit_inversion
from attacks.membership import MembershipResult, audit_membership
from attacks.verdict import CANARIES, AuditResult
from fl_dualpriv.config.plans import client_level_plan, record_level_plan
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_bytes, write_json
from fl_dualpriv.run.tables import epsilon_text

Attack = Literal["epsilon", "membership", "inversion"]


@dataclass(kw_only=True)
class Findings:
    """Results of all attacks that were run.

    Attributes:
        audits: The audit and its control without noise, for each audited level.
        membership: Result of membership inference on published personal prompts; None if it was not run.
        inversion: Result of gradient inversion on clients' uploads; None if it was not run.
    """

    audits: list[tuple[AuditResult, AuditResult]] = field(default_factory=list)
    membership: MembershipResult | None = None
    inversion: InversionResult | None = None

    @property
    def refuted(self) -> list[AuditResult]:
        """Audits that prove a larger ε than is claimed."""
        return [audit for audit, _ in self.audits if audit.refuted]

    def summary(self) -> dict[str, Any]:
        """Return one flat JSON object; with two audited levels, the second one is nested under its name."""
        entries: dict[str, Any] = {}
        for number, (audit, control) in enumerate(self.audits):
            entry = _audit_entry(audit, control)
            entries |= {f"{audit.level}_level": entry} if number else entry
        if self.membership is not None:
            entries.setdefault("epsilon_claimed", self.membership.epsilon_claimed)
            entries |= {"mia_auc": self.membership.mia_auc, "tpr_at_1_fpr": self.membership.tpr_at_1_fpr}
        if self.inversion is not None:
            entries.setdefault("epsilon_claimed", self.inversion.epsilon_claimed)
            entries |= {
                "inversion_score": self.inversion.inversion_score,
                "inversion_baseline": self.inversion.baseline_score,
            }
        return entries


def _audit_entry(audit: AuditResult, control: AuditResult) -> dict[str, Any]:
    return {
        "level": audit.level,
        "epsilon_claimed": audit.epsilon_claimed,
        "epsilon_lower": audit.epsilon_lower,
        "confidence": audit.confidence,
        "delta": audit.delta,
        "refuted": audit.refuted,
        "epsilon_estimate": audit.epsilon_estimate,
        "epsilon_lower_without_noise": control.epsilon_lower,
        "canaries": audit.canaries,
        "guesses": audit.guesses,
        "correct": audit.correct,
    }


def run_attacks(
    config: RunConfig, attacks: Collection[Attack], say: Callable[[str], None], *, canaries: int = CANARIES
) -> Findings:
    """Run attacks on a configuration, with the configuration's seed.

    Args:
        config: The run to attack, with its claims.
        attacks: Names of the attacks: ``epsilon`` for one-run audits of the levels that claim an ε, ``membership``,
            ``inversion``.
        say: Callback for each line for the user.
        canaries: Number of canaries of each audit.

    Raises:
        ConfigError: If an attack is not possible, or if only ``epsilon`` is requested and no ε is proved.
    """
    findings = Findings()
    if "epsilon" in attacks:
        for audit_level in _levels(config, alone=set(attacks) == {"epsilon"}):
            audit = audit_level(config, config.seed, canaries=canaries)
            control = audit_level(config, config.seed, canaries=canaries, noisy=False)
            findings.audits.append((audit, control))
            for line in audit_lines(audit, control):
                say(line)
        if not findings.audits:
            say("no ε is proved for this configuration: there is none to bound from below")
    if "membership" in attacks:
        findings.membership = audit_membership(config, config.seed)
        say(membership_line(findings.membership))
    if "inversion" in attacks:
        findings.inversion = audit_inversion(config, config.seed)
        say(inversion_line(findings.inversion))
    return findings


def _levels(config: RunConfig, *, alone: bool) -> list[Callable[..., AuditResult]]:
    """Return the audits of the levels at which an ε is proved."""
    levels: list[Callable[..., AuditResult]] = []
    if record_level_plan(config) is not None:
        levels.append(audit_record_level)
    if client_level_plan(config) is not None:
        levels.append(audit_client_level)
    if not levels and alone:
        raise ConfigError(
            f"method = {config.method!r} with these privacy sections proves no ε: there is none to bound from below; "
            'set privacy.record.mechanism or privacy.client.mechanism = "gaussian" (and not method = "dpfpl-paper")'
        )
    return levels


def audit_lines(audit: AuditResult, control: AuditResult) -> list[str]:
    """Return the lines that state the verdict; the bound is rounded down and the claim up."""
    verdict = "REFUTED: more leaks than is claimed" if audit.refuted else "not refuted"
    weak = "" if control.refuted else "; too little to refute this claim: plant more canaries"
    return [
        f"{audit.level} level: claimed ε ≤ {epsilon_text(audit.epsilon_claimed)} at δ = {audit.delta:g}; the audit "
        f"proves ε ≥ {_down(audit.epsilon_lower)} with {100 * audit.confidence:g} % confidence: {verdict}",
        f"  {audit.correct} of {audit.guesses} guesses right, {audit.canaries} canaries; estimate from the scores, no "
        f"bound: ε ≈ {audit.epsilon_estimate:.2f}",
        f"  control without noise: ε ≥ {_down(control.epsilon_lower)} of {_down(control.provable)} that so many "
        f"canaries can prove{weak}",
    ]


def _down(epsilon: float) -> str:
    return f"{int(epsilon * 1000) / 1000:.3f}"


def membership_line(result: MembershipResult) -> str:
    """Return the line about membership inference, with the stronger of the two attacks."""
    best = result.stronger
    return (
        f"membership: claimed ε {_claim(result.epsilon_claimed)}; AUC {best.auc:.3f} "
        f"[{best.auc_low:.3f}, {best.auc_high:.3f}], true positives at 1 % false ones {100 * result.tpr_at_1_fpr:.1f} %"
    )


def inversion_line(result: InversionResult) -> str:
    """Return the line about inversion: its score, and the score of a reconstruction that ignores the upload."""
    return (
        f"inversion: claimed ε {_claim(result.epsilon_claimed)}; cosine {result.inversion_score:.3f}, without the "
        f"upload {result.baseline_score:.3f}; labels right {100 * result.label_accuracy:.0f} %, by chance "
        f"{100 * result.label_chance:.0f} %"
    )


def _claim(claimed: float | str) -> str:
    return claimed if isinstance(claimed, str) else epsilon_text(claimed)


def write_report(findings: Findings, config: RunConfig, folder: Path) -> None:
    """Write ``audit.json`` (results and configuration) and ``audit.png``."""
    write_bytes(folder / "audit.png", draw(findings))
    write_json(folder / "audit.json", findings.summary() | {"config": config.to_run_config()})


def draw(findings: Findings) -> bytes:
    """Draw one panel per result (scores of canaries, ROC curve, cosines) and return a PNG image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = len(findings.audits) + (findings.membership is not None) + (findings.inversion is not None)
    figure, axes = pyplot.subplots(ncols=max(1, panels), figsize=(5.0 * max(1, panels), 4.0), squeeze=False)
    places = iter(axes[0])
    for audit, _ in findings.audits:
        place = next(places)
        for there, label in ((True, "present"), (False, "absent")):
            place.hist(audit.scores[audit.present == there], bins=80, alpha=0.6, label=label)
        place.set_xlabel("score of a canary")
        place.set_ylabel("canaries")
        place.set_title(
            f"{audit.level} level: claimed ε ≤ {epsilon_text(audit.epsilon_claimed)},\n"
            f"proved ε ≥ {_down(audit.epsilon_lower)} ({100 * audit.confidence:g} %)",
            fontsize=9,
        )
        place.legend()
    if findings.membership is not None:
        place = next(places)
        for label, curve in (
            ("loss threshold", findings.membership.loss_threshold),
            ("LiRA", findings.membership.lira),
        ):
            place.plot(curve.fpr, curve.tpr, label=f"{label}, AUC {curve.auc:.3f}")
        place.plot([0, 1], [0, 1], linestyle="--", color="gray")
        place.set_xlabel("false-positive rate")
        place.set_ylabel("true-positive rate")
        place.set_title(f"membership: claimed ε {_claim(findings.membership.epsilon_claimed)}", fontsize=9)
        place.legend()
    if findings.inversion is not None:
        place = next(places)
        place.hist(findings.inversion.score_by_upload, alpha=0.6, label="uploads")
        place.axvline(findings.inversion.baseline_score, linestyle="--", color="gray", label="without the upload")
        place.set_xlabel("cosine of true and reconstructed features")
        place.set_ylabel("uploads")
        place.set_title(f"inversion: claimed ε {_claim(findings.inversion.epsilon_claimed)}", fontsize=9)
        place.legend()
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()

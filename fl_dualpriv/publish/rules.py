"""Rules of publication: decide if a prompt may be published, and state its guarantee or plainly that it has none."""

import math
from pathlib import Path
from typing import Literal

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.ledger import LedgerContent
from fl_dualpriv.publish.card import Guarantee, PublishedFacts
from fl_dualpriv.publish.collect import GLOBAL_ROW, PERSONAL_ROW, Material, Row, read_material
from fl_dualpriv.publish.file import PublishedPrompt
from fl_dualpriv.publish.readers import load_reader

Level = Literal["record", "client"]

_ROUNDING = 1e-6
"""Relative difference that equal compositions may have when they are summed in another order."""


def publish(
    folder: Path,
    client: int | None,
    *,
    level: Level | None = None,
    not_private: bool = False,
    allow_reproducible_noise: bool = False,
    backbone: tuple[str, str] | None = None,
    device: str = "auto",
) -> PublishedPrompt:
    """Prepare a prompt of a finished run for publication.

    Args:
        folder: Folder of the run, or state folder of a deployed node.
        client: Client that owns the personal prompt. None means the global prompt.
        level: The only level whose guarantee is stated. None means all levels that the run states.
        not_private: Publish a prompt that has no guarantee, and say so.
        allow_reproducible_noise: Publish although anyone who knows the seed can remove the noise, and say so.
        backbone: Name and weights of the model, if they are stored elsewhere than in the run. The weights must be the
            same.
        device: Device of the model.

    Raises:
        ConfigError: If there is no such prompt, or the model is not the one of the run.
        PrivacyError: If these rules do not allow the publication.
    """
    material = read_material(folder, client)
    guarantees, notes = guarantees_of(material, level, not_private=not_private)
    if guarantees and material.source.randomness == "seeded":
        if not allow_reproducible_noise:
            raise PrivacyError(
                f"{folder}: the noise of the run comes from a seed (privacy.randomness = seeded): anyone who knows the "
                'seed can remove the noise. Run it again with privacy.randomness = "os", or publish the prompt as a '
                "demonstration with --allow-reproducible-noise"
            )
        notes += ("reproducible noise: the guarantee does not hold against anyone who knows the seed",)
    name, pretrained = backbone or (material.backbone, material.pretrained)
    reader = load_reader(material.use, material.prompt, name, pretrained, device)
    facts = PublishedFacts(
        use=material.use,
        source=material.source,
        guarantees=guarantees,
        not_private=not guarantees,
        notes=(*notes, *material.notes),
    )
    return PublishedPrompt(prompt=material.prompt, probe=reader.probe().float(), facts=facts)


def guarantees_of(
    material: Material, level: Level | None, *, not_private: bool
) -> tuple[tuple[Guarantee, ...], tuple[str, ...]]:
    """Return the guarantee of a prompt at each level, and notes on levels that do not cover it.

    Guarantee:
        ε is the larger of two values: the ε of the run's plan, and the ε that the accountant computes for the fullest
        ledger in the folder, other runs and damaged lines included. A level gives no guarantee if it has no line in
        the run's table, if its ε is nominal, or if the ledger that must be in the folder is missing.

    Raises:
        PrivacyError: If the prompt has no guarantee and ``not_private`` is False, or if it has one and ``not_private``
            is True. Also if the chosen level does not cover the prompt, or if no level was chosen and a level that the
            run states does not cover it.
    """
    wanted = GLOBAL_ROW if material.source.client is None else PERSONAL_ROW
    rows = [row for row in material.rows if row["release"] == wanted and row["guarantee"] == "theorem"]
    covered = {row["unit"]: row for row in rows}
    whose = material.source.whose
    if not_private:
        if covered:
            raise PrivacyError(f"the {whose} has a guarantee ({', '.join(sorted(covered))} level): omit --not-private")
        return (), ()
    if not covered:
        raise PrivacyError(f"the {whose} has no guarantee: {_why_none(material)}. To publish it all the same, say so "
                           "with --not-private")  # fmt: skip
    if level is not None and level not in covered:
        raise PrivacyError(
            f"the {whose} is not covered at {level} level, only at {' and '.join(sorted(covered))} level"
        )
    open_levels = sorted(material.claims - covered.keys())
    if open_levels and level is None:
        raise PrivacyError(
            f"the run states an ε at {' and '.join(open_levels)} level, and that does not cover the {whose}; to "
            f"publish it with the guarantee that it has, say --level {' or --level '.join(sorted(covered))}"
        )
    chosen = [level] if level is not None else sorted(covered, reverse=True)
    notes = tuple(f"{unit} level: this prompt is not covered" for unit in open_levels)
    return tuple(_guarantee(material, covered[unit]) for unit in chosen), notes


def _why_none(material: Material) -> str:
    if any(row["guarantee"] != "theorem" for row in material.rows):
        return "the ε of dpfpl-paper is nominal, not a bound"
    if material.claims:
        return f"what the run states at {' and '.join(sorted(material.claims))} level does not cover it"
    return "the run was made without differential privacy"


def _guarantee(material: Material, row: Row) -> Guarantee:
    unit, delta = row["unit"], float(row["delta"])
    epsilon, releases, note = float(row["epsilon"]), int(row["releases"]), str(row["note"])
    contents = material.ledgers.get(unit)
    if contents is None and material.deployed and unit == "record" and material.source.client is None:
        note += "; every client keeps its own ledger on its node"
    elif contents is None or (contents and not any(_is_of(content, material.run_token) for content in contents)):
        raise PrivacyError(f"the {unit}-level ledger has no line of this run: nothing says what was released")
    for content in contents or ():
        spent = content.epsilon(delta)
        if spent > epsilon * (1 + _ROUNDING):
            releases, note = content.releases(), f"{row['note']}; ε of a whole ledger, which holds more than the plan"
        epsilon = max(epsilon, spent)
    if not math.isfinite(epsilon):
        raise PrivacyError(f"the {unit}-level ledger is damaged: no finite ε can be shown")
    return Guarantee(
        unit=unit,
        relation=str(row["relation"]),
        sampling=str(row["sampling"]),
        releases=releases,
        epsilon=epsilon,
        delta=delta,
        trusts=str(row["trusts"]),
        note=note,
    )


def _is_of(content: LedgerContent, run_token: str) -> bool:
    return any(event.run == run_token for event in content.events)


def file_name(folder: Path, client: int | None) -> str:
    """Return the default file name of a published prompt."""
    return f"{folder.resolve().name}-{'global' if client is None else f'client-{client}'}.safetensors"

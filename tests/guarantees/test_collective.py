"""Personal prompts that the server makes of all uploads: post-processing of releases, each for its own client."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MessageType

from fl_dualpriv import messages
from fl_dualpriv.config.plans import record_level_plan
from fl_dualpriv.config.releases import list_releases
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import PrivacyError
from strategies.dpfpl import DPFPL
from tests.guarantees import collective_checks, run_checks
from tests.guarantees.run_checks import Federation
from tests.guarantees.server_checks import client_level
from tests.made_strategy import made_strategy


@pytest.fixture
def federation(tmp_path: Path, tiny_clip_dir: Path) -> Federation:
    images = run_checks.write_images(tmp_path / "images")
    return Federation(folder=tmp_path / "run", images=images, clip=tiny_clip_dir)


def test_parts_see_the_releases_alone() -> None:
    collective_checks.parts_see_the_releases_alone()


def test_the_stated_noise_is_the_public_one() -> None:
    collective_checks.the_stated_noise_is_the_public_one()


def test_a_sum_has_the_noise_it_states() -> None:
    collective_checks.a_sum_has_the_noise_it_states()


def test_each_client_is_sent_its_own_part() -> None:
    collective_checks.each_client_is_sent_its_own_part()


def test_each_client_keeps_its_own_part(federation: Federation) -> None:
    collective_checks.each_client_keeps_its_own_part(federation)


def test_other_parts_are_refused(federation: Federation) -> None:
    collective_checks.other_parts_are_refused(federation)


def test_a_part_is_refused_where_the_server_makes_none(federation: Federation) -> None:
    collective_checks.a_part_is_refused_where_the_server_makes_none(federation)


def test_the_checkpoint_holds_the_memory(tmp_path: Path) -> None:
    collective_checks.the_checkpoint_holds_the_memory(tmp_path)


def test_uploads_that_the_server_noises_are_refused() -> None:
    with pytest.raises(PrivacyError, match="uploads that the clients noised"):
        made_strategy(DPFPL, client_level(1.0), collective=collective_checks.rule_of({}))


def test_epsilon_is_that_of_the_clients_own_plan_and_the_table_says_whose_uploads_there_are(
    federation: Federation,
) -> None:
    def rows(changes: dict[str, Any]) -> list[Any]:
        config = RunConfig.from_run_config(federation.config(changes))
        return list_releases(config, record_level_plan(config), None, scored=True)

    before, found = rows({}), rows(collective_checks.CHANGES)
    assert [(r.release, r.epsilon) for r in found] == [(r.release, r.epsilon) for r in before]
    (note,) = (r.note for r in found if r.release == "published personal prompt")
    assert "all clients' uploads" in note


def test_a_score_of_other_parts_is_refused(federation: Federation) -> None:
    """Missing, of another shape or with a prompt of another kind: no score. Not finite: the client fails by itself."""
    grid = federation.nodes(**collective_checks.CHANGES, **{"evaluation.held-out-data": "public"})
    part = torch.zeros(1, *run_checks.PROMPT.shape)

    def ask(kind: messages.PromptKind, parts: torch.Tensor | None) -> Message:
        request = messages.EvaluateRequest(
            partitions=(0,),
            global_prompt=run_checks.PROMPT,
            server_round=1,
            run_token="t",
            prompt=kind,
            personal_parts=parts,
        )
        (reply,) = grid.send_and_receive([Message(messages.evaluate_content(request), 1, MessageType.EVALUATE)])
        return reply

    wrong: tuple[tuple[messages.PromptKind, torch.Tensor | None], ...] = (
        ("personal", None),
        ("personal", part[0]),
        ("personal", part.double()),
        ("global", part),
        ("free", part),
    )
    for kind, parts in wrong:
        reply = ask(kind, parts)
        assert reply.has_error()
        assert "PrivacyError" in (reply.error.reason or "")
    scores = messages.read_scores(ask("personal", part / 0))
    assert scores.partitions == ()
    assert "not finite" in scores.failed[0]
    file = federation.folder / "clients" / "client-000" / "part.safetensors"
    assert not file.exists()
    assert messages.read_scores(ask("personal", part)).partitions == (0,)
    assert file.exists()
    assert messages.read_scores(ask("global", None)).partitions == (0,)

"""What is put into a Flower message comes out again, and nothing unexpected passes."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fl_dualpriv import messages
from fl_dualpriv.metrics import ScoreTable
from fl_dualpriv.privacy.plan import RoundTerms

PROMPT = torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0  # messages cannot be made outside a task


def message(content: RecordDict, kind: str = MessageType.TRAIN) -> Message:
    return Message(content, 1, kind)


def keys(content: RecordDict) -> set[str]:
    return {f"{name}/{key}" for name, record in content.items() for key in record}


def test_the_prompt_survives_bitwise_and_is_a_copy():
    arrays = messages.to_arrays(PROMPT.clone().requires_grad_(True))
    back = messages.from_arrays(arrays)
    assert torch.equal(back, PROMPT)
    assert back.dtype == torch.float32
    back += 1  # the record's own memory is read-only
    assert torch.equal(messages.from_arrays(arrays), PROMPT)


TERMS = RoundTerms(
    mechanism="gaussian",
    trusts_server=False,
    clip_norm=0.5,
    noise_multiplier=1.1,
    sampling_rate=0.2,
    releases=3,
    arithmetic="integer",
)
TRAIN = messages.TrainRequest(partitions=(0, 4), global_prompt=PROMPT, server_round=7, run_token="abc", terms=TERMS)


@pytest.mark.parametrize("arrays", [None, messages.to_arrays(PROMPT)], ids=["packed here", "packed before"])
def test_train_task_survives(arrays: ArrayRecord | None):
    back = messages.read_train(message(messages.train_content(TRAIN, arrays)))
    assert torch.equal(back.global_prompt, PROMPT)
    others = {f.name: getattr(back, f.name) for f in fields(back) if f.name != "global_prompt"}
    assert list(others.values()) == [(0, 4), 7, "abc", TERMS, None]


PARTS = torch.stack([PROMPT + 1, PROMPT + 2])


@pytest.mark.parametrize("arrays", [None, messages.to_arrays(PROMPT)], ids=["packed here", "packed before"])
def test_personal_parts_travel_beside_the_global_prompt(arrays: ArrayRecord | None):
    content = messages.train_content(replace(TRAIN, personal_parts=PARTS), arrays)
    assert {name for name in keys(content) if name.startswith("arrays/")} == {
        "arrays/global-prompt",
        "arrays/personal-parts",
    }
    back = messages.read_train(message(content))
    assert back.personal_parts is not None
    assert torch.equal(back.personal_parts, PARTS)
    assert torch.equal(back.global_prompt, PROMPT)
    assert arrays is None or list(arrays) == ["global-prompt"]  # the next node gets it too
    score = messages.EvaluateRequest(
        partitions=(0, 4),
        global_prompt=PROMPT,
        server_round=2,
        run_token="abc",
        prompt="personal",
        personal_parts=PARTS,
    )
    scored = messages.read_evaluate(message(messages.evaluate_content(score, arrays)))
    assert scored.personal_parts is not None
    assert torch.equal(scored.personal_parts, PARTS)


@pytest.mark.parametrize(
    "names", [("personal-parts",), ("global-prompt", "extra"), ("global-prompt", "personal-parts", "extra")], ids=str
)
def test_other_arrays_in_a_task_are_refused(names: tuple[str, ...]):
    content = messages.train_content(TRAIN)
    content["arrays"] = ArrayRecord({name: Array(PROMPT.numpy()) for name in names})
    with pytest.raises(ValueError, match="in a message; expected only 'global-prompt'"):
        messages.read_train(message(content))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mechanism", "laplace"),
        ("trusts-server", 0),
        ("clip-norm", "0.5"),
        ("noise-multiplier", True),
        ("sampling-rate", [0.2]),
        ("local-steps", 3.0),
        ("arithmetic", "double"),
        ("arithmetic", 1),
        ("server-round", "7"),
    ],
)
def test_a_task_of_another_type_is_no_task(key: str, value: Any):
    content = messages.train_content(TRAIN)
    content.config_records["config"][key] = value
    with pytest.raises(ValueError, match="in a"):
        messages.read_train(message(content))


@pytest.mark.parametrize(
    "key", ["mechanism", "trusts-server", "clip-norm", "noise-multiplier", "local-steps", "arithmetic"]
)
def test_a_task_without_terms_is_no_task(key: str):
    content = messages.train_content(TRAIN)
    del content.config_records["config"][key]
    with pytest.raises(KeyError):
        messages.read_train(message(content))


def test_the_server_sends_one_tensor_and_says_who_when_and_on_what_terms():
    assert keys(messages.train_content(TRAIN)) == {
        "arrays/global-prompt",
        "config/partitions",
        "config/server-round",
        "config/run-token",
        "config/mechanism",
        "config/trusts-server",
        "config/clip-norm",
        "config/noise-multiplier",
        "config/sampling-rate",
        "config/local-steps",
        "config/arithmetic",
    }


@pytest.mark.parametrize("kind", ["zero-shot", "free", "global", "personal"])
def test_evaluate_task_survives(kind: messages.PromptKind):
    task = messages.EvaluateRequest(partitions=(3,), global_prompt=PROMPT, server_round=2, run_token="abc", prompt=kind)
    back = messages.read_evaluate(message(messages.evaluate_content(task)))
    assert torch.equal(back.global_prompt, PROMPT)
    assert (back.partitions, back.server_round, back.run_token, back.prompt) == ((3,), 2, "abc", kind)


def test_an_unknown_prompt_kind_is_refused():
    content = RecordDict(
        {
            "arrays": messages.to_arrays(PROMPT),
            "config": ConfigRecord({"partitions": [0], "server-round": 1, "run-token": "abc", "prompt": "clean"}),
        }
    )
    with pytest.raises(ValueError, match=r"'clean'.*allowed: zero-shot, free, global, personal"):
        messages.read_evaluate(message(content))


@pytest.mark.parametrize("partitions", [1, "0, 1", [0.5], ["0"], [True]], ids=str)
def test_clients_are_a_list_of_whole_numbers(partitions: object):
    content = messages.train_content(TRAIN)
    content["config"]["partitions"] = partitions
    with pytest.raises(ValueError, match="expected a list of whole numbers"):
        messages.read_train(message(content))


def uploads(values: torch.Tensor, partitions: tuple[int, ...] = (3,), failed: dict[int, str] | None = None):
    return messages.Uploads(partitions=partitions, values=values, failed=failed or {})


def test_uploads_are_one_tensor_and_say_whose_they_are():
    assert keys(messages.uploads_content(uploads(PROMPT[None]))) == {
        "arrays/upload",
        "clients/partitions",
        "clients/failed",
        "clients/reasons",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_uploads_come_out_in_double(dtype: torch.dtype):
    values = torch.stack([PROMPT, -PROMPT]).to(dtype)
    back = messages.read_uploads(message(messages.uploads_content(uploads(values, (5, 2), {9: "boom"}))), (2, 3))
    assert back.values.dtype == torch.float64
    assert torch.equal(back.values, values.double())
    assert (back.partitions, back.failed) == ((5, 2), {9: "boom"})


def test_a_node_where_all_failed_answers_too():
    nothing = uploads(torch.zeros(0, 2, 3), (), {0: "boom", 1: "bang"})
    back = messages.read_uploads(message(messages.uploads_content(nothing)), (2, 3))
    assert (back.partitions, back.failed) == ((), {0: "boom", 1: "bang"})


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({}, "arrays"),
        ({"global-prompt": PROMPT[None]}, "global-prompt"),
        ({"upload": PROMPT[None], "personal": PROMPT}, "personal"),
        ({"upload": PROMPT.T[None]}, "3, 2"),
        ({"upload": PROMPT}, r"\(2, 3\)"),
        ({"upload": torch.stack([PROMPT, PROMPT])}, "2, 2, 3"),
        ({"upload": PROMPT.long()[None]}, "int64"),
        ({"upload": PROMPT.to(torch.complex64)[None]}, "complex64"),
    ],
    ids=["none", "other name", "extra", "transposed", "no stack", "two for one", "integers", "complex"],
)
def test_unexpected_uploads_are_refused_by_name(arrays: dict[str, torch.Tensor], named: str):
    content = messages.uploads_content(uploads(PROMPT[None]))
    content["arrays"] = ArrayRecord({name: Array(np.ascontiguousarray(v.numpy())) for name, v in arrays.items()})
    with pytest.raises(ValueError, match=named):
        messages.read_uploads(message(content), (2, 3))


def test_cards_survive():
    cards = [
        messages.ClientCard(partition=3, num_examples=120, rows="records apart"),
        messages.ClientCard(partition=7, num_examples=1),
    ]
    content = messages.cards_content(cards)
    assert messages.read_cards(message(content, MessageType.QUERY)) == cards
    content.config_records["machine"]["rows"] = ["a page of text", "together"]  # a node may say anything
    assert [card.rows for card in messages.read_cards(message(content, MessageType.QUERY))] == [None, "together"]


def scores_of(correct: list[list[int]], held: list[list[int]], total: list[int]) -> messages.Scores:
    table = ScoreTable(correct=np.array(correct), total=np.array(total), held=np.array(held, dtype=bool))
    return messages.Scores(partitions=tuple(range(4, 4 + len(correct))), values=table, failed={8: "boom"})


SCORES = scores_of([[1, 0, 3], [0, 0, 2]], [[1, 0, 0], [0, 1, 1]], [2, 0, 4])
NO_SCORES = messages.Scores(
    partitions=(),
    values=ScoreTable(correct=np.zeros((0, 3), int), total=np.array([2, 0, 4]), held=np.zeros((0, 3), bool)),
    failed={0: "boom"},
)


def same(one: messages.Scores, two: messages.Scores) -> bool:
    arrays = all(np.array_equal(getattr(one.values, n), getattr(two.values, n)) for n in ("correct", "total", "held"))
    return arrays and (one.partitions, one.failed) == (two.partitions, two.failed)


@pytest.mark.parametrize("scores", [SCORES, NO_SCORES], ids=["two", "none"])
def test_scores_survive(scores: messages.Scores):
    assert same(messages.read_scores(message(messages.scores_content(scores), MessageType.EVALUATE)), scores)


def test_a_row_that_all_clients_share_is_sent_once():
    shared = scores_of([[1, 0, 3]] * 3, [[1, 0, 1]] * 3, [2, 0, 4])
    content = messages.scores_content(shared)
    assert content["score"] == MetricRecord({"total": [2, 0, 4], "correct": [1, 0, 3], "held": [1, 0, 1]})
    assert same(messages.read_scores(message(content, MessageType.EVALUATE)), shared)


def test_a_score_is_counts_of_held_out_images_and_public_lists_and_nothing_about_training():
    content = messages.scores_content(SCORES)
    assert keys(RecordDict({"score": content["score"]})) == {"score/total", "score/correct", "score/held"}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("correct", [3, 0, 3, 0, 0, 2], "impossible counts"),
        ("correct", [1, 0, 3, 0, 0, -1], "impossible counts"),
        ("total", [2, -1, 4], "impossible counts"),
        ("held", [1, 0, 0, 0, 2, 1], "impossible counts"),
        ("correct", [1, 0], "2 counts for 2 clients and 3 groups"),
        ("total", [2, 0], "6 counts for 2 clients and 2 groups"),
        ("total", [2.0, 0.0, 4.0], "whole numbers"),
        ("accuracy", [1, 1], "accuracy"),
    ],
)
def test_counts_that_cannot_be_are_refused(key: str, value: list[int], reason: str):
    content = messages.scores_content(SCORES)
    content["score"][key] = value
    with pytest.raises(ValueError, match=reason):
        messages.read_scores(message(content))


RAY = """<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=7)
  File "clients/app.py", line 70, in train
    raise RuntimeError("disk: full")
RuntimeError: disk: full

The above exception was the direct cause of the following exception:

  File "ray_actor.py", line 65, in run
    raise ClientAppException(str(ex)) from ex
flwr.clientapp.client_app.ClientAppException: \nException ClientAppException occurred. Message: disk: full'>"""


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (RAY, "RuntimeError: disk: full"),
        ("RuntimeError: disk: full", "RuntimeError: disk: full"),
        ("", "no reason given"),
    ],
    ids=["ray", "local", "empty"],
)
def test_a_failure_is_told_in_the_clients_own_words(reason: str, expected: str):
    asked = Message(RecordDict(), 1, "train")
    assert messages.failure_reason(Message(Error(2, reason), reply_to=asked)) == expected

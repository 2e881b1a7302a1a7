"""What is put into a Flower message comes out again, and nothing unexpected passes."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fl_dualpriv import wire
from fl_dualpriv.evaluation import Score

PROMPT = torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0  # messages cannot be made outside a task


def message(content: RecordDict, kind: str = MessageType.TRAIN) -> Message:
    return Message(content, 1, kind)


def keys(content: RecordDict) -> set[str]:
    return {f"{name}/{key}" for name, record in content.items() for key in record}


def test_the_prompt_survives_bitwise_and_is_a_copy():
    arrays = wire.to_arrays(PROMPT.clone().requires_grad_(True))
    back = wire.from_arrays(arrays)
    assert torch.equal(back, PROMPT)
    assert back.dtype == torch.float32
    back += 1  # the record's own memory is read-only
    assert torch.equal(wire.from_arrays(arrays), PROMPT)


def test_train_task_survives():
    task = wire.TrainTask(global_prompt=PROMPT, server_round=7, run_token="abc", noise_multiplier=1.1)
    back = wire.read_train(message(wire.train_content(task)))
    assert torch.equal(back.global_prompt, PROMPT)
    assert [getattr(back, f.name) for f in fields(back)[1:]] == [7, "abc", 1.1]


def test_the_server_sends_one_tensor_and_three_numbers():
    task = wire.TrainTask(global_prompt=PROMPT, server_round=7, run_token="abc", noise_multiplier=1.1)
    assert keys(wire.train_content(task)) == {
        "arrays/global-prompt",
        "config/server-round",
        "config/run-token",
        "config/noise-multiplier",
    }


@pytest.mark.parametrize("kind", ["zero-shot", "global", "personal"])
def test_evaluate_task_survives(kind: wire.PromptKind):
    task = wire.EvaluateTask(global_prompt=PROMPT, server_round=2, run_token="abc", prompt=kind)
    back = wire.read_evaluate(message(wire.evaluate_content(task)))
    assert torch.equal(back.global_prompt, PROMPT)
    assert (back.server_round, back.run_token, back.prompt) == (2, "abc", kind)


def test_an_unknown_prompt_kind_is_refused():
    content = RecordDict(
        {
            "arrays": wire.to_arrays(PROMPT),
            "config": ConfigRecord({"server-round": 1, "run-token": "abc", "prompt": "clean"}),
        }
    )
    with pytest.raises(ValueError, match=r"'clean'.*allowed: zero-shot, global, personal"):
        wire.read_evaluate(message(content))


def test_an_upload_is_one_tensor_and_nothing_else():
    assert keys(wire.upload_content(PROMPT)) == {"arrays/upload"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_an_upload_comes_out_in_double(dtype: torch.dtype):
    upload = PROMPT.to(dtype)
    back = wire.read_upload(message(wire.upload_content(upload)), (2, 3))
    assert back.dtype == torch.float64
    assert torch.equal(back, upload.double())


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({}, "arrays"),
        ({"global-prompt": PROMPT}, "global-prompt"),
        ({"upload": PROMPT, "personal": PROMPT}, "personal"),
        ({"upload": PROMPT.T}, "3, 2"),
        ({"upload": PROMPT[None]}, "1, 2, 3"),
        ({"upload": PROMPT.long()}, "int64"),
        ({"upload": PROMPT.to(torch.complex64)}, "complex64"),
    ],
    ids=["none", "other name", "extra", "transposed", "extra dimension", "integers", "complex"],
)
def test_unexpected_uploads_are_refused_by_name(arrays: dict[str, torch.Tensor], named: str):
    record = ArrayRecord({name: Array(np.ascontiguousarray(value.numpy())) for name, value in arrays.items()})
    with pytest.raises(ValueError, match=named):
        wire.read_upload(message(RecordDict({"arrays": record})), (2, 3))


def test_card_survives():
    card = wire.ClientCard(partition=3, num_examples=120)
    assert wire.read_card(message(wire.card_content(card), MessageType.QUERY)) == card


def test_score_survives():
    score = Score(local_correct=1, local_total=2, neighbour_correct=3, neighbour_total=4)
    content = wire.score_content(score)
    assert wire.read_score(message(content, MessageType.EVALUATE)) == score
    # counts of held-out images, nothing about training
    assert keys(content) == {"score/" + f.name.replace("_", "-") for f in fields(Score)}


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
    assert wire.failure_reason(Message(Error(2, reason), reply_to=asked)) == expected

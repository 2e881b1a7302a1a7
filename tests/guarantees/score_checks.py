"""What an accuracy is of: domain, classes, weights and prompt, counted anew from the files that a run leaves."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MessageType
from PIL import Image
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.data.load import load_data
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.tasks.build import build_task
from fl_dualpriv.tasks.images import ImageTask
from tests.guarantees.run_checks import PROMPT, TERMS, Federation

DOMAINS, CLASSES = ("attic", "cellar"), ("cat", "dog", "tree")
POPULATION, NEW = 4, 2
RUN: dict[str, Any] = {
    "population": POPULATION,
    "rounds": 2,
    "seed": 3,
    "data.partition": "by-domain",
    "evaluation.new-clients": NEW,
    "evaluation.held-out-data": "auto",
    "privacy.record.mechanism": "none",
    "privacy.randomness": "seeded",  # else now and then a planted bug changes no score
    # Rates at which a few steps of random weights change many answers.
    "train.global-learning-rate": 5.0,
    "train.local-learning-rate": 5.0,
}
Scores = dict[str, list[float | None]]


def write_domains(folder: Path) -> Path:
    """Two domains of three classes, with a test set of as many images of no two classes. All images are alike."""
    for split, sizes in (("train", (12, 12, 12)), ("test", (2, 9, 16))):
        for domain in DOMAINS:
            for name, size in zip(CLASSES, sizes, strict=True):
                place = folder / split / domain / name
                place.mkdir(parents=True)
                for i in range(size):
                    Image.new("RGB", (32, 32)).save(place / f"{i:02d}.png")
    return folder


@contextmanager
def features_apart() -> Iterator[None]:
    """Random image features: those of a tiny model with random weights are so close that all answers are one class."""

    def rows(self: ImageTask, split: str, indices: np.ndarray, mirrored: None, *, patches: bool) -> np.ndarray:
        rng = np.random.default_rng(len(split))
        features = rng.normal(size=(len(self.images(split)), self.backbone.embed_dim)).astype(np.float32)
        return (features / np.linalg.norm(features, axis=1, keepdims=True))[indices]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTask, "_rows", rows)
        yield


def run_by_domain(federation: Federation, **changes: Any) -> tuple[Path, dict[str, Any]]:
    load_data.cache_clear()
    data = federation.folder / "data"
    if not data.exists():
        write_domains(data)
    out = federation.run("out", RUN | {"data.path": str(data)} | changes)
    return out, json.loads((out / "summary.json").read_text(encoding="utf-8"))


def correct_of(task: ImageTask, config: RunConfig, prompt: Tensor) -> np.ndarray:
    """Whether each test image is classified correctly."""
    images = task.held_out("test")
    (logits,) = task.learner(config).logits(prompt[None], images)
    return (logits.argmax(dim=1) == images.labels).numpy()


def accuracy_at(correct: np.ndarray, images: Any, domain: str) -> float:
    """Mean over the classes of a domain, which the paths of the files name."""
    places = [(path.parent.parent.name, path.parent.name) for path in images.paths]
    return float(np.mean([correct[[i for i, p in enumerate(places) if p == (domain, c)]].mean() for c in CLASSES]))


def counted_anew(out: Path, summary: dict[str, Any]) -> Scores:
    """The accuracies of all clients, from the prompts in their folders and the names of the images' folders."""
    config = RunConfig.from_run_config(summary["config"])
    task = build_task(config)
    assert isinstance(task, ImageTask)
    images, shared = task.images("test"), read_tensors(out / "prompts" / "global.safetensors")[0]["global"]
    found: Scores = {"local": [], "neighbour": [], "general": [], "new_client": []}
    of_shared = correct_of(task, config, shared)
    for client in range(POPULATION + NEW):
        home, abroad = DOMAINS[client % 2], DOMAINS[1 - client % 2]
        if client >= POPULATION:
            found["new_client"].append(accuracy_at(of_shared, images, home))
            continue
        file = out / "clients" / f"client-{client:03d}" / "prompt.safetensors"
        own = correct_of(task, config, shared + read_tensors(file)[0]["personal"])
        found["local"].append(accuracy_at(own, images, home))
        found["neighbour"].append(accuracy_at(own, images, abroad))
        found["general"].append(accuracy_at(of_shared, images, home))
    return found


def _compare(federation: Federation, *kinds: str) -> None:
    with features_apart():
        out, summary = run_by_domain(federation)
        anew, told = counted_anew(out, summary), summary["clients"]["final"]
    for kind in kinds:
        assert told[kind] == pytest.approx(anew[kind]), f"{kind} is not what the files say"
        mean = summary["accuracy"]["final"][kind]
        assert mean == pytest.approx(np.mean(np.array(anew[kind], dtype=float))), f"the mean of {kind} is another"
    # Else the check could not tell one accuracy from another.
    assert anew["local"] != pytest.approx(anew["neighbour"]), "home and abroad look the same"
    assert anew["local"] != pytest.approx(anew["general"]), "the personal part changes nothing"
    before = summary["accuracy"]["zero_shot"]["new_client"]
    assert summary["accuracy"]["final"]["new_client"] != pytest.approx(before), "the shared prompt changes nothing"


def local_and_neighbour_are_of_their_domains(federation: Federation) -> None:
    _compare(federation, "local", "neighbour")


def general_is_of_the_shared_prompt(federation: Federation) -> None:
    _compare(federation, "general")


def new_clients_are_scored_with_the_shared_prompt(federation: Federation) -> None:
    _compare(federation, "new_client")


# --- new clients ------------------------------------------------------------------------------------------------------


@contextmanager
def train_requests_seen() -> Iterator[list[int]]:
    """The clients that train messages name."""
    seen: list[int] = []
    push = LocalGrid._push

    def watching(self: LocalGrid, message: Message) -> str:
        if message.metadata.message_type == MessageType.TRAIN:
            seen.extend(messages.read_train(message).partitions)
        return push(self, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalGrid, "_push", watching)
        yield seen


def no_train_message_names_a_new_client(federation: Federation) -> None:
    changes = {"privacy.record.mechanism": "gaussian", "evaluation.every": 2}
    with train_requests_seen() as seen:
        out, summary = run_by_domain(federation, **changes)
    assert sorted(set(seen)) == list(range(POPULATION)), f"train messages name {sorted(set(seen))}"
    folders = sorted(path.name for path in (out / "clients").iterdir())
    assert folders == [f"client-{i:03d}" for i in range(POPULATION)], f"state of {', '.join(folders)}"
    assert summary["accuracy"]["final"]["new_client"] is not None, "new clients have no score"


def a_node_trains_no_new_client(federation: Federation) -> None:
    """Whoever asks: the node that scores a new client refuses a round for it, before data, ledger or state."""
    load_data.cache_clear()
    data = str(write_domains(federation.folder / "data"))
    changes = {"data.partition": "by-domain", "evaluation.new-clients": 2, "data.path": data}
    grid = federation.nodes(**changes)
    request = messages.TrainRequest(partitions=(2,), global_prompt=PROMPT, server_round=1, run_token="t", terms=TERMS)
    (reply,) = grid.send_and_receive([Message(messages.train_content(request), 1, MessageType.TRAIN)])
    assert reply.has_error(), "a new client took part in a round"
    assert not (federation.folder / "clients" / "client-002").exists(), "a new client has state"


# --- where scores of single clients stay ------------------------------------------------------------------------------


def scores_of_clients_on_private_records_stay_with_the_operator(federation: Federation) -> None:
    out, summary = run_by_domain(federation, **{"evaluation.held-out-data": "private"})
    assert summary["clients"] == summary["spread"] == {}, "a result holds scores of single clients on private records"
    told = json.loads((out / "operator" / "clients.json").read_text(encoding="utf-8"))
    assert len(told["clients"]["final"]["local"]) == POPULATION, "the operator is not told the scores of clients"
    mean = np.mean(told["clients"]["final"]["local"])
    assert mean == pytest.approx(summary["accuracy"]["final"]["local"]), "the operator is told other scores"

"""What must hold of class priors, checked on the code that runs; called by tests here and on broken code.

Every closed form is compared with the slow, obvious one: autograd of F.cross_entropy(logits + log π), record by record.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.learners.base import ClientData, Objective
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.learners.factored import FactoredTower
from fl_dualpriv.learners.fedotp import TransportObjective, transport_plan
from fl_dualpriv.learners.head import LowRankHead
from fl_dualpriv.learners.linear_probe import LinearProbe, ProbeObjective
from fl_dualpriv.privacy.step import client_rows, clipped_sums
from fl_dualpriv.tasks import class_prior
from fl_dualpriv.tasks.build import build_task
from fl_dualpriv.tasks.images import ImageTask
from fl_dualpriv.towers.base import PromptTower
from tests.guarantees.run_checks import Federation
from tests.guarantees.step_checks import CTX_DIM, EMBED, IDENTITY, N_CLS, N_CTX, SCALE, START, TOWER, class_features

PATCHES, RANK, TOP_M = 6, 2, 3
SIZES = (4, 7, 3)  # of the batches: clients step in another order than this one
Logits = Callable[[Tensor, ClientData], Tensor]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """One closed form.

    Attributes:
        name: Of the learner.
        objective: The code that runs.
        prompts: One for each client.
        logits: (prompt, records) → logits of the loss without a prior, (record, n_cls), slow and differentiable.
        top_m: Residuals that are kept; 0: all.
    """

    name: str
    objective: Objective[Any]
    prompts: Tensor
    logits: Logits
    top_m: int = 0


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def log_prior(shares: Sequence[float]) -> Tensor | None:
    own = class_prior.log_prior(np.array(shares), 0.01)
    return None if own is None else torch.from_numpy(own)


def clients() -> list[ClientData]:
    """Three clients: two classes of five on its list, uniform, and declared shares. Labels are of all classes."""
    priors = [log_prior(shares) for shares in ([0.5, 0.5, 0, 0, 0], [0.2] * 5, [0.6, 0.2, 0.1, 0.1, 0])]
    assert priors[1] is None
    return [
        ClientData(
            features=unit(size, EMBED, seed=10 + place),
            labels=torch.randint(0, N_CLS, (size,), generator=torch.Generator().manual_seed(20 + place)),
            patches=unit(size, PATCHES, EMBED, seed=30 + place),
            log_prior=prior,
        )
        for place, (size, prior) in enumerate(zip(SIZES, priors, strict=True))
    ]


def classification(tower: PromptTower, *, top_m: int = 0, feature: bool = False) -> Classification:
    return Classification(
        tower=tower,
        logit_scale=SCALE,
        top_m=top_m,
        noise_space="feature" if feature else "prompt",
        workspace_bytes=2**20,
    )


def near(start: Tensor, spread: float = 0.05) -> Tensor:
    """A prompt near the start for each client."""
    generator = torch.Generator().manual_seed(5)
    return start + spread * torch.randn(len(SIZES), *start.shape, generator=generator)


def cosines(classes_of: Callable[[Tensor], Tensor]) -> Logits:
    return lambda prompt, data: SCALE * data.features @ classes_of(prompt).T


def learners() -> Iterator[Learner]:
    """Every closed form of a loss with a softmax."""
    words = cosines(class_features)
    yield Learner(name="prompt", objective=classification(TOWER), prompts=near(START), logits=words)
    exact_top = classification(TOWER, top_m=TOP_M)
    yield Learner(name="top-m", objective=exact_top, prompts=near(START), logits=words, top_m=TOP_M)
    yield Learner(
        name="feature space",
        objective=classification(IDENTITY, feature=True),
        prompts=near(unit(N_CLS, EMBED, seed=6)),
        logits=cosines(lambda prompt: prompt),
    )
    zero_shot = unit(N_CLS, EMBED, seed=7)
    yield Learner(
        name="head",
        objective=classification(LowRankHead(zero_shot)),
        prompts=near(torch.zeros(RANK, N_CLS + EMBED), 0.3),
        logits=cosines(
            lambda prompt: torch.nn.functional.normalize(zero_shot + prompt[:, :N_CLS].T @ prompt[:, N_CLS:], dim=1)
        ),
    )
    yield Learner(
        name="linear probe",
        objective=ProbeObjective(
            tower=LinearProbe(N_CLS, EMBED), logit_scale=SCALE, top_m=0, noise_space="prompt", workspace_bytes=2**20
        ),
        prompts=near(torch.zeros(N_CLS, EMBED + 1), 0.2),
        logits=lambda w, data: SCALE * (data.features @ w[:, :-1].T + w[:, -1]),
    )
    for fixed in (False, True):
        tower = FactoredTower(TOWER, START, RANK, seed=0, fixed=fixed)
        yield Learner(
            name="ffa-lora" if fixed else "dp-lora",
            objective=classification(tower),
            prompts=near(tower.initial(), 0.2),
            logits=cosines(lambda prompt, tower=tower: class_features(tower.effective(prompt[None])[0])),
        )
    yield Learner(
        name="fedotp",
        objective=TransportObjective(
            tower=TOWER,
            local_start=0.5 * START,
            logit_scale=SCALE,
            mass=0.8,
            regularisation=0.1,
            iterations=60,
            workspace_bytes=2**20,
        ),
        prompts=near(torch.zeros(2 * N_CTX, CTX_DIM), 0.1),
        logits=transported,
    )


def transported(prompts: Tensor, data: ClientData) -> Tensor:
    """FedOTP's logits s⟨T, S⟩, class by class and image by image; T is held."""
    assert data.patches is not None
    classes = torch.stack([class_features(prompts[:N_CTX]), class_features(prompts[N_CTX:] + 0.5 * START)])
    rows = []
    for image in data.patches:
        similar = [image @ classes[:, c].T for c in range(N_CLS)]
        rows.append(torch.stack([(transport_plan(s.detach(), 0.8, 0.1, 60) * s).sum() for s in similar]))
    return SCALE * torch.stack(rows)


def slow_row(learner: Learner, prompt: Tensor, record: ClientData) -> Tensor:
    """Autograd of one record's F.cross_entropy(logits + log π); with top-m, of the m largest residuals, balanced."""
    leaf = prompt.clone().requires_grad_(True)
    logits = learner.logits(leaf, record)
    adjusted = logits if record.log_prior is None else logits + record.log_prior
    if not learner.top_m:
        return torch.autograd.grad(torch.nn.functional.cross_entropy(adjusted, record.labels), leaf)[0]
    label = int(record.labels[0])
    (residual,) = torch.autograd.grad(torch.nn.functional.cross_entropy(adjusted, record.labels), adjusted)
    kept = sorted(range(N_CLS), key=lambda c: -float(residual[0, c].abs()))[: learner.top_m]
    weights = torch.tensor([float(residual[0, c]) if c in kept else 0.0 for c in range(N_CLS)])
    others = float(weights.sum() - weights[label])
    balanced = torch.where(weights > 0, weights * -float(weights[label]) / others, weights)
    return torch.autograd.grad((logits[0] * balanced).sum(), leaf)[0]


def some(data: ClientData, picked: Sequence[int]) -> ClientData:
    """Some records of a client, whose prior stays."""
    index = torch.tensor(picked)
    assert data.patches is not None
    return replace(data, features=data.features[index], labels=data.labels[index], patches=data.patches[index])


def every_closed_form_is_autograds_with_the_prior() -> None:
    """Rows, clipped sums with a clip that reaches none, and plain sums, of clients that step together."""
    data = clients()
    picked = [np.arange(size) for size in SIZES]
    for learner in learners():
        gradients = learner.objective.bind(data).gradients(learner.prompts, picked)
        clipped, sums = clipped_sums(gradients, 1e6, "float"), gradients.sums()
        for place, (own, prompt) in enumerate(zip(data, learner.prompts, strict=True)):
            expected = torch.stack([slow_row(learner, prompt, some(own, [i])) for i in range(own.num_examples)])
            room = 1e-5 * float(expected.abs().max()) * own.num_examples
            found = torch.cat(list(client_rows(gradients, place)))[: own.num_examples]
            where = f"{learner.name}, client {place}"
            assert torch.allclose(found.float(), expected, rtol=1e-4, atol=room), f"a row is another loss's: {where}"
            total = expected.sum(dim=0)
            of_clip = clipped[place].value.float()
            assert torch.allclose(of_clip, total, rtol=1e-4, atol=room), f"a clipped sum is another loss's: {where}"
            if not learner.top_m:  # without privacy every residual is kept
                assert torch.allclose(sums[place], total, rtol=1e-4, atol=room), f"a sum is another loss's: {where}"


def a_record_takes_only_its_own_row() -> None:
    """Dropped or not finite, it moves the sum by exactly its clipped row, because the prior stays."""
    for learner in learners():
        for place, (own, prompt) in enumerate(zip(clients(), learner.prompts, strict=True)):

            def total(data: ClientData, clip: float, learner: Learner = learner, prompt: Tensor = prompt) -> Tensor:
                gradients = learner.objective.bind([data]).gradients(prompt[None], [np.arange(data.num_examples)])
                return clipped_sums(gradients, clip, "float")[0].value

            everyone = range(own.num_examples)
            clip = 0.7 * float(np.median([float(total(some(own, [i]), 1e6).norm()) for i in everyone]))
            whole = total(own, clip)
            for gone in everyone:
                features, patches = own.features.clone(), own.patches
                assert patches is not None
                patches = patches.clone()
                features[gone], patches[gone] = torch.nan, torch.nan
                readings = {
                    "dropped": some(own, [i for i in everyone if i != gone]),
                    "zeroed": replace(own, features=features, patches=patches),
                }
                row = total(some(own, [gone]), clip)
                for reading, rest in readings.items():
                    moved = whole - total(rest, clip)
                    where = f"{learner.name}, client {place}, record {gone} {reading}"
                    assert float(moved.norm()) <= clip * (1 + 1e-4), f"a record moves the sum by more than C: {where}"
                    assert float((moved - row).norm()) <= 1e-4 * clip, f"a record moves others' rows: {where}"


def a_client_has_its_own_prior() -> None:
    """A client gets the same sums alone and beside clients with other priors, in two orders of the clients."""
    data, picked = clients(), [np.arange(size) for size in SIZES]
    for learner in learners():
        for order in ([0, 1, 2], [2, 0, 1]):
            prompts = learner.prompts[order]
            together = learner.objective.bind([data[i] for i in order]).gradients(prompts, [picked[i] for i in order])
            sums, clipped = together.sums(), clipped_sums(together, 1e6, "float")
            for place, i in enumerate(order):
                alone = learner.objective.bind([data[i]]).gradients(prompts[place : place + 1], [picked[i]])
                expected, where = alone.sums()[0], f"{learner.name}, client {i} at {place}"
                assert torch.allclose(sums[place], expected, rtol=1e-4, atol=1e-4), f"another client's prior: {where}"
                of_clip = clipped_sums(alone, 1e6, "float")[0].value
                assert torch.allclose(clipped[place].value, of_clip, rtol=1e-4, atol=1e-4), f"another's: {where}"


def list_task(federation: Federation, images: Path, **changes: Any) -> ImageTask:
    """Two clients: the first one lists two classes of three."""
    config = federation.config(
        {"data.path": str(images), "data.partition": "by-class", "train.class-prior": "list"} | changes
    )
    task = build_task(RunConfig.from_run_config(config))
    assert isinstance(task, ImageTask)
    return task


def a_prior_of_a_list_knows_no_count(federation: Federation) -> None:
    """A record that is removed, or cannot be read, leaves it bit by bit, where its list stays as declared."""
    whole = federation.folder / "whole"
    shutil.copytree(federation.images, whole)
    (whole / "tree").mkdir()
    Image.new("RGB", (32, 32), (0, 99, 0)).save(whole / "tree" / "0.png")
    for i in range(1, 5):
        shutil.copy(whole / "tree" / "0.png", whole / "tree" / f"{i}.png")
    for i in range(4):  # an uneven client
        (whole / "dog" / f"{i}.png").unlink()
    task = list_task(federation, whole)
    priors = {"whole": task.client_data(0).log_prior}
    # A record of the training set: others are held out.
    record = next(i for i in task.partitions[0] if task.data.train.labels[i] == 0)
    name = task.data.train.paths[record].name  # type: ignore[attr-defined] - images of a folder
    for reading in ("removed", "unreadable"):
        images = federation.folder / reading
        shutil.copytree(whole, images)
        (images / "cat" / name).unlink()
        if reading == "unreadable":
            (images / "cat" / name).write_bytes(b"no image")
        priors[reading] = list_task(federation, images).client_data(0).log_prior
    before = priors["whole"]
    assert before is not None
    for reading, prior in priors.items():
        assert prior is not None
        assert torch.equal(prior, before), f"the prior follows a record that is {reading}"
    assert torch.equal(before, torch.tensor([0.495, 0.495, 0.01], dtype=torch.float64).log().float()), "not the list's"

"""One federated task in one file, and its plain torch model, which plain Flower, pfl and the reference loop train.

The data, the initial prompt and the frozen parts come from our own Task, so every contestant works on the same numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fl_dualpriv.files import read_tensors, write_tensors

Kind = Literal["head", "tower"]


@dataclass(frozen=True, kw_only=True)
class PeerTask:
    """A federation without privacy.

    Attributes:
        kind: ``head`` for low-rank factors on frozen class features; ``tower`` for context vectors of a frozen text
            tower.
        features: Cached image features, (client, record, embed_dim).
        labels: Class ids, (client, record).
        start: The trained matrix before round 1.
        frozen: For a head ``zero-shot`` (n_cls, embed_dim); for a tower ``sos``, ``suffix`` and ``ends``.
        backbone: Name of the backbone that holds the tower.
        scale: CLIP's inverse temperature.
        local_steps: Full-batch SGD steps per client and round.
        learning_rate: Learning rate of these steps; the server takes the plain mean.
    """

    kind: Kind
    features: Tensor
    labels: Tensor
    start: Tensor
    frozen: dict[str, Tensor]
    backbone: str
    scale: float
    local_steps: int
    learning_rate: float

    @property
    def clients(self) -> int:
        """Number of clients; all of them take part in every round."""
        return len(self.labels)


def save_task(path: Path, task: PeerTask) -> None:
    """Write a task as one safetensors file."""
    tensors = {"features": task.features, "labels": task.labels, "start": task.start}
    tensors |= {f"frozen.{name}": value for name, value in task.frozen.items()}
    metadata = {
        "kind": task.kind,
        "backbone": task.backbone,
        "scale": repr(task.scale),
        "local-steps": str(task.local_steps),
        "learning-rate": repr(task.learning_rate),
    }
    write_tensors(path, tensors, metadata)


def load_task(path: Path) -> PeerTask:
    """Read a task that `save_task` wrote."""
    tensors, metadata = read_tensors(path)
    kind = metadata["kind"]
    assert kind in ("head", "tower")
    return PeerTask(
        kind=kind,
        features=tensors["features"],
        labels=tensors["labels"],
        start=tensors["start"],
        frozen={k.removeprefix("frozen."): v for k, v in tensors.items() if k.startswith("frozen.")},
        backbone=metadata["backbone"],
        scale=float(metadata["scale"]),
        local_steps=int(metadata["local-steps"]),
        learning_rate=float(metadata["learning-rate"]),
    )


class PeerModel(nn.Module):
    """A torch module in the usual form; only ``prompt`` is trained and sent."""

    def __init__(self, task: PeerTask) -> None:
        super().__init__()
        self.prompt = nn.Parameter(task.start.clone())
        self._scale = task.scale
        self._classes = _Head(task) if task.kind == "head" else _Tower(task)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (record, n_cls) of features (record, embed_dim)."""
        classes = nn.functional.normalize(self._classes(self.prompt), dim=-1)
        return self._scale * images @ classes.T

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(self(images), labels)

    @torch.no_grad()
    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return no metrics; pfl requires this method, but training measures nothing."""
        return {}


class _Head:
    def __init__(self, task: PeerTask) -> None:
        self._base = task.frozen["zero-shot"]

    def __call__(self, prompt: Tensor) -> Tensor:
        """Return the class features W₀ + U V for the prompt [Uᵀ | V]."""
        n_cls = len(self._base)
        return self._base + prompt[:, :n_cls].T @ prompt[:, n_cls:]


class _Tower:
    def __init__(self, task: PeerTask) -> None:
        from fl_dualpriv.models.open_clip import load_backbone

        self._backbone = load_backbone(task.backbone, "", "cpu")
        self._sos, self._suffix, self._ends = (task.frozen[name] for name in ("sos", "suffix", "ends"))

    def __call__(self, prompt: Tensor) -> Tensor:
        """Compute the class features like CoOp: run every class's whole row through open_clip's transformer."""
        n_cls, n_suffix, width = self._suffix.shape
        prefix = torch.cat([self._sos, prompt]).expand(n_cls, -1, -1)
        padding = prompt.new_zeros(n_cls, self._backbone.context_length - prefix.shape[1] - n_suffix, width)
        return self._backbone.encode_embeddings(torch.cat([prefix, self._suffix, padding], dim=1), self._ends)


def local_steps(model: PeerModel, images: Tensor, labels: Tensor, task: PeerTask) -> None:
    """Run a client's local steps of one round in place."""
    optimizer = torch.optim.SGD(model.parameters(), lr=task.learning_rate)
    for _ in range(task.local_steps):
        optimizer.zero_grad()
        model.loss(images, labels).backward()
        optimizer.step()


def reference(task: PeerTask, rounds: list[int]) -> dict[int, Tensor]:
    """Compute the global prompt after the given rounds with a plain loop over clients."""
    model, prompt, prompt_by_round = PeerModel(task), task.start.clone(), {}
    for server_round in range(1, max(rounds) + 1):
        total = torch.zeros_like(prompt, dtype=torch.float64)
        for images, labels in zip(task.features, task.labels, strict=True):
            with torch.no_grad():
                model.prompt.copy_(prompt)
            local_steps(model, images, labels, task)
            total += model.prompt.detach()
        prompt = (total / task.clients).float()
        if server_round in rounds:
            prompt_by_round[server_round] = prompt
    return prompt_by_round

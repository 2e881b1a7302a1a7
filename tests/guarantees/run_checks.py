"""What must hold of a client's round and of whole runs, checked on the app: ledger, refusals, randomness."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType
from PIL import Image
from torch import Tensor

from clients.app import app
from fl_dualpriv import messages
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import LocalGrid, run_local
from fl_dualpriv.privacy import release
from fl_dualpriv.privacy.accounting import COARSE_GRID, epsilon
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey
from fl_dualpriv.privacy.plan import RoundTerms
from fl_dualpriv.run.tables import SEEDED_NOTE

APP_DIR = Path(__file__).parents[2]
STEPS = 2
# What the configuration below promises, and what its honest server asks for.
TERMS = RoundTerms(
    mechanism="gaussian", trusts_server=False, clip_norm=1.0, noise_multiplier=1.5, sampling_rate=0.15, releases=STEPS
)
DELTA = 1e-3
PROMPT = torch.zeros(4, 32)


def write_images(folder: Path) -> Path:
    """Two classes of ten images; one class a client, so that each holds seven records for training."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Two clients with a few images each and a tiny CLIP.

    Attributes:
        folder: Fresh; everything is written below it.
        images: A folder per class.
        clip: The model.
    """

    folder: Path
    images: Path
    clip: Path

    def config(self, changes: dict[str, Any]) -> dict[str, Any]:
        base: dict[str, Any] = {
            "population": 2,
            "rounds": 4,
            "join-timeout": 1.0,
            "train.local-steps": STEPS,
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.noise-multiplier": TERMS.noise_multiplier,
            "privacy.record.delta": DELTA,
            "data.path": str(self.images),
            "backbone.name": f"local-dir:{self.clip}",
            "resources.device": "cpu",
            "resources.feature-cache": "off",
            "output.dir": str(self.folder),
        }
        return app_defaults(APP_DIR) | base | changes

    def run(self, name: str, changes: dict[str, Any]) -> Path:
        """A whole run; the folder of its results."""
        run_local(APP_DIR, self.config(changes | {"output.dir": str(self.folder / name)}))
        return self.folder / name

    def nodes(self, node_file: str = "", **changes: Any) -> LocalGrid:
        """Two nodes with a client each; the text is what the first one's owner says."""
        grid = LocalGrid(app, 2, self.config(changes))
        if node_file:
            path = self.folder / "node.toml"
            path.write_text(node_file, encoding="utf-8")
            grid.contexts[1].node_config["node-file"] = str(path)
        return grid

    @property
    def ledger(self) -> Ledger:
        """Of the first client."""
        return Ledger(self.folder / "clients" / "client-000" / "ledger.jsonl")


def train(grid: LocalGrid, server_round: int, terms: RoundTerms = TERMS, token: str = "t") -> Message:
    """Ask the first client for a round."""
    task = messages.TrainRequest(
        partitions=(0,), global_prompt=PROMPT, server_round=server_round, run_token=token, terms=terms
    )
    (reply,) = grid.send_and_receive([Message(messages.train_content(task), 1, MessageType.TRAIN)])
    return reply


def upload_of(reply: Message) -> Tensor | None:
    """What left; None: the client refused or failed."""
    assert not reply.has_error(), reply.error.reason
    uploads = messages.read_uploads(reply, tuple(PROMPT.shape))
    assert len(uploads.partitions) + len(uploads.failed) == 1
    return uploads.values[0] if uploads.partitions else None


# --- the client's ledger ----------------------------------------------------------------------------------------------


@contextmanager
def draws_seen(ledger: Ledger) -> Iterator[list[int]]:
    """For every noise that is drawn, how many releases the ledger held at that moment."""
    seen: list[int] = []
    draw = release.gaussian_noise

    def watched(source: RandomSource, shape: tuple[int, ...], std: float) -> Tensor:
        seen.append(ledger.read().releases())
        return draw(source, shape, std)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release, "gaussian_noise", watched)
        yield seen


def rounds_seen(federation: Federation) -> list[int]:
    """Two rounds of one client; see `draws_seen`."""
    grid = federation.nodes()
    with draws_seen(federation.ledger) as seen:
        for server_round in (1, 2):
            assert upload_of(train(grid, server_round)) is not None
    return seen


def a_client_writes_its_ledger_before_its_noise(federation: Federation) -> None:
    seen = rounds_seen(federation)
    assert seen[0] > 0, "noise was drawn before its event was written"
    assert seen[-1] > seen[0], "noise was drawn before its event was written"


def the_ledger_covers_every_release(federation: Federation) -> None:
    """At every draw, as many releases are written down as have been made, this one included."""
    seen = rounds_seen(federation)
    assert all(written >= made for made, written in enumerate(seen, 1)), f"{len(seen)} releases, {seen[-1]} written"


# --- what a client refuses --------------------------------------------------------------------------------------------

_WEAKER: tuple[RoundTerms, ...] = (
    replace(TERMS, noise_multiplier=1.0),
    replace(TERMS, clip_norm=2.0),
    replace(TERMS, sampling_rate=0.5),
    replace(TERMS, releases=STEPS + 1),
    replace(TERMS, trusts_server=True),
    replace(TERMS, mechanism="none"),
)


def weaker_terms_are_refused(federation: Federation) -> None:
    grid = federation.nodes()
    for terms in _WEAKER:
        assert upload_of(train(grid, 1, terms)) is None, f"an upload left on these terms: {terms}"
    assert federation.ledger.read().releases() == 0
    assert upload_of(train(grid, 1)) is not None  # the honest ones


def floats_are_refused_from_an_integer_run(federation: Federation) -> None:
    """Terms carry the arithmetic: a server cannot ask a client of an integer run for floats."""
    grid = federation.nodes(**{"privacy.arithmetic": "integer"})
    assert upload_of(train(grid, 1, TERMS)) is None, "an upload left in floats of a run in integers"
    assert federation.ledger.read().releases() == 0
    assert upload_of(train(grid, 1, replace(TERMS, arithmetic="integer"))) is not None


def floats_are_refused_where_the_owner_demands_integers(federation: Federation) -> None:
    owner = (
        f'state-dir = "{federation.folder / "clients" / "client-000"}"\ndata-path = "{federation.images}"\n'
        f"[budget]\nepsilon = 1000\ndelta = {DELTA}\nmax-sampling-rate = 0.15\nmin-noise-multiplier = 1.5\n"
        "max-clip-norm = 1.0\ninteger-arithmetic = true\n"
    )
    reply = train(federation.nodes(owner), 1)
    assert reply.has_error(), "an upload left in floats, and the owner demands integers"
    assert 'privacy.arithmetic = "float", only "integer"' in (reply.error.reason or "")
    assert federation.ledger.read().releases() == 0
    grid = federation.nodes(owner, **{"privacy.arithmetic": "integer"})
    assert upload_of(train(grid, 1, replace(TERMS, arithmetic="integer"))) is not None


def private_scores_stay(federation: Federation) -> None:
    """Held-out images that were cut out of a client's own folder are private: their scores are no release."""
    grid = federation.nodes()
    for kind in get_args(messages.PromptKind):
        request = messages.EvaluateRequest(
            partitions=(0,), global_prompt=PROMPT, server_round=1, run_token="t", prompt=kind
        )
        (reply,) = grid.send_and_receive([Message(messages.evaluate_content(request), 1, MessageType.EVALUATE)])
        assert reply.has_error(), f"{kind} scores on private images left"
        assert "unaccounted release" in (reply.error.reason or "")


def a_round_is_done_once(federation: Federation) -> None:
    grid = federation.nodes()
    once = upload_of(train(grid, 1))
    assert once is not None
    twice = upload_of(train(grid, 1))
    assert twice is not None
    assert torch.equal(once, twice), "a message that was sent twice had two releases"
    assert federation.ledger.read().releases() == STEPS
    (federation.folder / "clients" / "client-000" / "prompt.safetensors").unlink()  # as if it was killed before
    assert upload_of(train(grid, 1)) is None, "a round that was paid for once was made twice"
    assert federation.ledger.read().releases() == STEPS


def no_run_starts_on_what_another_spent(federation: Federation) -> None:
    """Without an owner's budget the plan of one run is all: a second server, or a new token, gets the rest at most."""
    grid = federation.nodes()
    answered = sum(
        upload_of(train(grid, server_round, token=token)) is not None for token in "ab" for server_round in range(1, 5)
    )
    assert answered == 4, f"{answered} rounds were answered under two tokens, and the plan accounts for 4"


def no_round_exceeds_the_owners_budget(federation: Federation) -> None:
    """A budget of two rounds: two are answered, whatever run asks, and the third is refused."""
    most = epsilon(TERMS.sampling_rate, TERMS.noise_multiplier, 2 * STEPS, DELTA, COARSE_GRID) + 1e-6
    grid = federation.nodes(
        f'state-dir = "{federation.folder / "clients" / "client-000"}"\ndata-path = "{federation.images}"\n'
        f"[budget]\nepsilon = {most}\ndelta = {DELTA}\n"
        f"max-sampling-rate = {TERMS.sampling_rate}\nmin-noise-multiplier = {TERMS.noise_multiplier}\n"
        'max-clip-norm = 1.0\nfilter = "worst-terms"\n'
    )
    answered = [upload_of(train(grid, r, token=token)) is not None for r, token in ((1, "a"), (1, "b"), (2, "b"))]
    spent = federation.ledger.read().epsilon(DELTA)
    assert spent <= most, f"ε of {spent:.3f} was spent, and {most:.3f} is the owner's budget"
    assert answered == [True, True, False]


# --- randomness -------------------------------------------------------------------------------------------------------

_BOTH_LEVELS: dict[str, Any] = {
    "rounds": 2,
    "privacy.client.mechanism": "gaussian",
    "privacy.client.calibrate-to": "noise-multiplier",
    "privacy.client.noise-multiplier": 4.0,
    "privacy.client.expected-cohort": 2.0,
}


def no_stream_is_asked_for_twice(federation: Federation) -> None:
    """2 clients x 2 rounds x 2 steps have a batch and a noise each, and each round a cohort and a server noise."""
    asked: Counter[StreamKey] = Counter()
    drawn: Counter[bytes] = Counter()
    make, words = KeyedRandom.__init__, KeyedRandom.words

    def counted(self: KeyedRandom, key: StreamKey) -> None:
        asked[key] += 1
        make(self, key)

    def remembered(self: KeyedRandom, count: int) -> Any:
        found = words(self, count)
        if count:
            drawn[found.tobytes()] += 1
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyedRandom, "__init__", counted)
        patch.setattr(KeyedRandom, "words", remembered)
        federation.run("seeded", _BOTH_LEVELS | {"privacy.randomness": "seeded"})
    assert sum(n for key, n in asked.items() if key.purpose in ("batch", "noise")) == 16, "a draw shares its stream"
    assert sum(n for key, n in asked.items() if key.purpose in ("cohort", "server-noise")) == 4
    assert max(asked.values()) == 1, "a stream was asked for twice"
    assert max(drawn.values()) == 1, "two streams gave the same words"


def randomness_of_the_kernel_does_not_repeat(federation: Federation) -> None:
    """Under one seed, what is said to come from the operating system differs from run to run."""
    uploads = []
    for name in ("one", "two"):
        own = replace(federation, folder=federation.folder / name)
        uploads.append(upload_of(train(own.nodes(**{"privacy.randomness": "os"}), 1)))
    one, two = uploads
    assert one is not None
    assert two is not None
    # Two noises of the same scale differ by sqrt(2) of it; float rounding by 1e-7.
    assert float((one - two).norm()) > 0.1 * float(one.norm()), "whoever knows the seed can repeat the noise"


def seeded_noise_is_marked(federation: Federation) -> None:
    """In the summary, in its notes, and in the file of the prompt itself."""
    out = federation.run("seeded", _BOTH_LEVELS | {"privacy.randomness": "seeded"})
    summary = json.loads((out / "summary.json").read_text())
    assert any(note.startswith(SEEDED_NOTE) for note in summary["notes"]), "seeded noise without its mark"
    assert summary["randomness"] == "seeded", "seeded noise without its mark"
    assert read_tensors(out / "prompts" / "global.safetensors")[1]["randomness"] == "seeded", (
        "a prompt without its mark"
    )

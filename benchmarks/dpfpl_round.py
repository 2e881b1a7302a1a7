"""One round of ten clients: the DP-FPL paper's formulas against ours, with a warm and with a cold feature cache.

The paper's round (arXiv:2501.13904, Algorithm 1) is rebuilt from the text, not from the authors' code. The clients run
one after the other. Each runs its batch through the image tower and all classes' 77-token prompts through the text
tower, clips the batch mean and adds noise to the gradients of u and v. Its epsilon is nominal. The direct counterpart
is the same formulas on our engine (`method = "dpfpl-paper"`), with cached features and the shared prefix. Its prompts
must equal those of the rebuilt round, so only the work differs. The benchmark also measures sound methods with the same
number of records and all clients together: record-level DP with exact per-example gradients, and record-level DP in the
feature noise space. The authors' code also reloads the whole model for each client and batch; that is left out here.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks import machine

machine.one_thread()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.harness import assert_equal, emit, interleaved, relative_difference, timed  # noqa: E402
from benchmarks.towers import TOY, VIT_B_16, Setting, make_model, make_setting  # noqa: E402
from fl_dualpriv.client.published_step import PublishedTraining, published_updates  # noqa: E402
from fl_dualpriv.client.state import PersonalState, fresh_state  # noqa: E402
from fl_dualpriv.client.step import LocalTraining, Participant, cohort_update  # noqa: E402
from fl_dualpriv.config.methods import METHODS  # noqa: E402
from fl_dualpriv.learners.base import ClientData  # noqa: E402
from fl_dualpriv.learners.classification import Classification  # noqa: E402
from fl_dualpriv.methods.lowrank import subspace_bases  # noqa: E402
from fl_dualpriv.methods.published import CLIP, LOCAL_DIVISOR, nominal_sigma  # noqa: E402
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey, gaussian_noise  # noqa: E402
from fl_dualpriv.privacy.plan import RecordLevelPlan  # noqa: E402

CLIENTS, N_CLS, RANK = 10, 10, 8
LEARNING_RATE = 0.001
_SIGMA = nominal_sigma(0.4, 1e-5, 100)  # the paper's largest ε, T = 100
_NOISE_MULTIPLIER = 1.0
_FEATURES = "image features of the round"


@dataclass(frozen=True, kw_only=True)
class Round:
    """Common start of all contestants; ``images`` is (client, record, 3, height, width)."""

    setting: Setting
    images: Tensor
    states: list[PersonalState]

    @property
    def records(self) -> int:
        """Number of records of one client; each record is used once in the round."""
        return self.images.shape[1]


def source(partition: int, purpose: str, step: int) -> RandomSource:
    """Return the random stream from which every contestant draws."""
    return KeyedRandom(StreamKey(seed=0, purpose=purpose, partition=partition, server_round=1, step=step))


def make_round(config: dict[str, Any], clients: int, records: int) -> Round:
    """Make random images, and nonzero personal prompts, because after some rounds they are not zero."""
    model = make_model(config)
    setting = make_setting(model, n_cls=N_CLS, clients=clients, batch=records)
    generator = torch.Generator().manual_seed(1)
    side = config["vision_cfg"]["image_size"]
    n_ctx, width = setting.prompts.shape[1:]
    rank = min(RANK, n_ctx)
    states = [
        replace(fresh_state(n_ctx, width, rank), personal=0.02 * torch.randn(n_ctx, width, generator=generator))
        for _ in range(clients)
    ]
    return Round(
        setting=setting, images=torch.randn(clients, records, 3, side, side, generator=generator), states=states
    )


@torch.no_grad()
def encode(model: Any, images: Tensor) -> Tensor:
    """Return the unit-norm features of images."""
    return nn.functional.normalize(model.encode_image(images), dim=-1)


def published_round(task: Round, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Run a round by the paper's formulas; return (move of p_G, p_L) of each client."""
    return [_published_client(task, client, batch) for client in range(len(task.states))]


def _published_client(task: Round, client: int, batch: int) -> tuple[Tensor, Tensor]:
    setting, personal, row_basis = task.setting, task.states[client].personal, task.states[client].row_basis
    order = torch.from_numpy(source(client, "shuffle", 0).uniforms(task.records)).argsort()
    move = torch.zeros_like(personal)
    for step in range(task.records // batch):
        picked = order[step * batch : (step + 1) * batch]
        features = encode(setting.model, task.images[client, picked])
        prompt = (setting.prompts[0] + move + personal).requires_grad_(True)
        logits = setting.scale * features @ setting.coop(prompt).T
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, setting.labels[client, picked]), prompt)
        u, v = subspace_bases(personal, row_basis)
        grad_u = _clipped(gradient @ v.T) + _noise(client, "noise-u", step, (u.shape[0], u.shape[1]), batch)
        grad_v = _clipped(u.T @ gradient) + _noise(client, "noise-v", step, (v.shape[0], v.shape[1]), batch)
        eq4 = grad_u @ v + u @ grad_v - u @ (u.T @ grad_u) @ v
        personal, row_basis = personal - LEARNING_RATE * eq4 / LOCAL_DIVISOR, v
        move = move - LEARNING_RATE * _clipped(gradient)
    return move, personal


def _clipped(matrix: Tensor) -> Tensor:
    return matrix * min(1.0, CLIP / max(float(matrix.norm()), 1e-12))


def _noise(client: int, name: str, step: int, shape: tuple[int, int], batch: int) -> Tensor:
    return gaussian_noise(source(client, name, step), shape, _SIGMA * CLIP / batch).float()


def client_data(task: Round, client: int, features: Tensor) -> ClientData:
    """Return the data of a client with given features."""
    labels = task.setting.labels[client]
    return ClientData(features=features, labels=labels)


def published_on_our_towers(task: Round, features: list[Tensor], batch: int) -> list[tuple[Tensor, Tensor]]:
    """Run the paper's round on our engine, with cached features and the shared prefix."""
    training = PublishedTraining(
        local_steps=task.records // batch,
        batch_size=batch,
        global_learning_rate=LEARNING_RATE,
        local_learning_rate=LEARNING_RATE,
        sigma=_SIGMA,
    )
    results = published_updates(
        global_prompt=task.setting.prompts[0],
        participants=participants(task, features),
        tower=task.setting.ours,
        logit_scale=task.setting.scale,
        training=lambda participant: training,
    )
    return [(upload, moved.personal) for upload, moved in results]


def participants(task: Round, features: list[Tensor]) -> list[Participant]:
    """Return the clients in the form that our engine takes."""
    return [
        Participant(
            partition=client,
            state=state,
            data=client_data(task, client, features[client]),
            random=lambda purpose, step, client=client: source(client, purpose, step),
        )
        for client, state in enumerate(task.states)
    ]


def our_round(
    task: Round,
    features: list[Tensor],
    steps: int,
    *,
    private: bool = True,
    noise_space: Literal["prompt", "feature"] = "prompt",
) -> list[tuple[Tensor, PersonalState]]:
    """Run our round with every record in every step's batch, so that records and steps equal the paper's."""
    plan = RecordLevelPlan(
        clip_norm=1.0,
        noise_multiplier=_NOISE_MULTIPLIER,
        sampling_rate=1.0,
        releases=steps,
        delta=1e-5,
        trusts_server=False,
        personal=True,
    )
    return cohort_update(
        global_prompt=task.setting.prompts[0],
        participants=[replace(p, event=plan.event("run", 1, steps)) for p in participants(task, features)],
        objective=Classification(
            tower=task.setting.ours,
            logit_scale=task.setting.scale,
            top_m=0,
            noise_space=noise_space,
            workspace_bytes=512 * 2**20,
        ),
        method=METHODS["dpfpl"],
        training=LocalTraining(
            local_steps=steps,
            sampling_rate=1.0,
            global_learning_rate=LEARNING_RATE,
            local_learning_rate=LEARNING_RATE,
        ),
        plan=plan if private else None,
    )


def features_of(task: Round) -> list[Tensor]:
    """Compute the image features, which a round with a cold cache needs first."""
    return [encode(task.setting.model, images) for images in task.images]


def main(arguments: list[str] | None = None) -> None:
    """Check that the rebuilt round gives the same results as ours, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--self-check", action="store_true", help="toy sizes, a few seconds; the ratios mean nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="records per step and client (the paper: 32)")
    options = parser.parse_args(arguments)
    toy, batch = options.self_check, options.batch
    task = make_round(TOY if toy else VIT_B_16, 3 if toy else CLIENTS, batch)
    steps = task.records // batch
    results: dict[str, Any] = {}

    def keep(name: str, work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            results[name] = work()

        return run

    times = 1 if toy else 3
    dp = "ours, exact record-level DP, warm"
    costs = interleaved(
        {
            # First, because the others read its features. Its cost is what a cold cache adds to a round.
            _FEATURES: timed(keep(_FEATURES, lambda: features_of(task))),
            "paper's formulas": timed(keep("published", lambda: published_round(task, batch))),
            "ours, warm cache": timed(
                keep("ours", lambda: published_on_our_towers(task, results[_FEATURES], batch)), times
            ),
            dp: timed(keep("private", lambda: our_round(task, results[_FEATURES], steps)), times),
            "ours, record-level DP at the features, warm": timed(
                lambda: our_round(task, results[_FEATURES], steps, noise_space="feature"), times
            ),
            "ours without DP, warm": timed(lambda: our_round(task, results[_FEATURES], steps, private=False), times),
        },
        options.repeats,
    )
    difference = max(
        relative_difference(a, b)
        for mine, yours in zip(results["ours"], results["published"], strict=True)
        for a, b in zip(mine, yours, strict=True)
    )
    assert_equal("the paper's formulas, rebuilt and ours", difference, 1e-4)
    alone = our_round(replace(task, states=task.states[:1]), results[_FEATURES][:1], steps)
    assert_equal("a client alone and in its cohort", relative_difference(alone[0][0], results["private"][0][0]), 1e-5)
    cold = costs[_FEATURES].best
    base = costs["paper's formulas"].best
    emit(
        "dpfpl_round",
        headline={
            "warm_ratio": base / costs["ours, warm cache"].best,
            "cold_ratio": base / (costs["ours, warm cache"].best + cold),
            "warm_ratio_exact_dp": base / costs[dp].best,
            "cold_ratio_exact_dp": base / (costs[dp].best + cold),
            "warm_ratio_feature_dp": base / costs["ours, record-level DP at the features, warm"].best,
            "warm_ratio_without_dp": base / costs["ours without DP, warm"].best,
        },
        costs=costs,
        unit="round",
        details={
            "clients": len(task.states),
            "records of a client and round": task.records,
            "local steps": steps,
            "largest difference of the paper's formulas": float(f"{difference:.2e}"),
        },
        kind="self-check" if toy else "full",
    )


if __name__ == "__main__":
    main()

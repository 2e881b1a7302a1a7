"""The ClientApp: query (who am I), train (one round of local steps), evaluate (score a prompt)."""

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from fl_dualpriv.config import RunConfig
    from fl_dualpriv.world import World

# torch and open_clip are imported inside the handlers: Flower's driver imports this file too and needs neither.
app = ClientApp()


@functools.lru_cache(maxsize=4)
def _config(items: tuple[tuple[str, bool | int | float | str], ...]) -> "RunConfig":
    from fl_dualpriv.config import RunConfig

    return RunConfig.from_run_config(dict(items))


def _setting(context: Context) -> tuple["RunConfig", "World", int]:
    """The parsed configuration, the shared objects of this process, and which client this is."""
    from fl_dualpriv.world import build_world

    config = _config(tuple(sorted(context.run_config.items())))
    return config, build_world(config), int(context.node_config["partition-id"])


def _client_folder(config: "RunConfig", context: Context, partition_id: int) -> Path:
    """The client's own folder: the node's ``state-dir`` if its owner set one, else one beside the run's results."""
    from fl_dualpriv.world import run_folder

    if "state-dir" in context.node_config:
        return Path(str(context.node_config["state-dir"]))
    return run_folder(config.output.dir, context.run_id) / "clients" / f"client-{partition_id:03d}"


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which client this is and how many records it holds (public metadata), after checking data and model."""
    from fl_dualpriv import wire

    _, world, partition_id = _setting(context)
    card = wire.ClientCard(partition=partition_id, num_examples=len(world.partitions[partition_id]))
    return Message(wire.card_content(card), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move the prompts for one round; upload the move of p_G, keep p_L."""
    from dataclasses import replace

    from clients.dpfpl_paper import PublishedTraining, nominal_sigma, published_update
    from clients.dualpriv import LocalTraining, local_update
    from fl_dualpriv import wire
    from fl_dualpriv.client import ClientFolder, check_noise, check_task
    from fl_dualpriv.methods import METHODS
    from fl_dualpriv.plans import record_level_plan
    from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent
    from fl_dualpriv.privacy.noise import RandomSource, StreamKey, random_sources

    config, world, partition_id = _setting(context)
    task = wire.read_train(message)
    parts, plan = METHODS[config.method], record_level_plan(config)
    folder = ClientFolder(_client_folder(config, context, partition_id))
    device = world.backbone.device
    prompt = task.global_prompt.to(device)
    state = folder.load(task.run_token, prompt.shape[0], prompt.shape[1], config.prompt.rank).to(device)
    data = world.client_data(partition_id)
    sources = random_sources(config.privacy.randomness)

    def random(purpose: str, step: int) -> RandomSource:
        return sources(
            StreamKey(
                seed=config.seed, purpose=purpose, partition=partition_id, server_round=task.server_round, step=step
            )
        )

    if parts.published_procedure:
        record = config.privacy.record
        steps = config.rounds * config.train.local_steps
        upload, state = published_update(
            global_prompt=prompt,
            state=state,
            data=data,
            class_features=world.text.class_features,
            logit_scale=world.backbone.logit_scale,
            training=PublishedTraining(
                local_steps=config.train.local_steps,
                batch_size=max(1, round(config.train.sampling_rate * data.num_examples)),
                global_learning_rate=config.train.global_learning_rate,
                local_learning_rate=config.train.local_learning_rate,
                sigma=nominal_sigma(record.epsilon, record.delta, steps) if record.mechanism == "gaussian" else 0.0,
            ),
            random=random,
        )
    else:
        ledger = Ledger(folder.ledger)
        if plan is not None:
            check_noise(plan, task.noise_multiplier)

        def before_release(step: int) -> None:
            if plan is not None:
                ledger.record(
                    LedgerEvent(
                        run=task.run_token,
                        unit="record",
                        server_round=task.server_round,
                        step=step,
                        sampling_rate=plan.sampling_rate,
                        noise_multiplier=plan.noise_multiplier,
                    )
                )

        training = LocalTraining(
            local_steps=config.train.local_steps,
            sampling_rate=config.train.sampling_rate,
            global_learning_rate=config.train.global_learning_rate,
            local_learning_rate=config.train.local_learning_rate,
            update_keep_ratio=config.pruning.update_keep_ratio,
            microbatch=config.train.microbatch,
        )
        with ledger.exclusive() if plan is not None else contextlib.nullcontext():
            if plan is not None:
                check_task(plan, ledger, state, task.server_round, config.train.local_steps)
            upload, state = local_update(
                global_prompt=prompt,
                state=state,
                data=data,
                class_features=world.text.class_features,
                logit_scale=world.backbone.logit_scale,
                parts=parts,
                training=training,
                plan=plan,
                random=random,
                before_release=before_release,
            )
    folder.save(replace(state, server_round=task.server_round), prompt, task.run_token)
    return Message(wire.upload_content(upload), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the zero-shot, the global or the personal prompt on held-out images."""
    import torch

    from fl_dualpriv import wire
    from fl_dualpriv.client import ClientFolder
    from fl_dualpriv.errors import PrivacyError
    from fl_dualpriv.evaluation import score
    from fl_dualpriv.plans import may_score

    config, world, partition_id = _setting(context)
    if not may_score(config):
        raise PrivacyError("the held-out images are private here: their scores would be an unaccounted release")
    task = wire.read_evaluate(message)
    device = world.backbone.device
    prompt = task.global_prompt.to(device)
    if task.prompt == "personal":
        folder = ClientFolder(_client_folder(config, context, partition_id))
        prompt = (
            prompt
            + folder.load(task.run_token, prompt.shape[0], prompt.shape[1], config.prompt.rank).to(device).personal
        )
    with torch.no_grad():
        zero_shot = task.prompt == "zero-shot"
        classes = world.text.zero_shot_features() if zero_shot else world.text.class_features(prompt)
    images = world.held_out(config.evaluation.split)
    held = world.client_data(partition_id).held_classes
    return Message(wire.score_content(score(classes, images.features, images.labels, held)), reply_to=message)

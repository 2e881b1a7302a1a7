"""Answer one message on a node: find and apply the owner's file, and let no text about private data leave the node.

torch and the model are imported inside the functions, because Flower's driver imports the ClientApp and needs neither.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict

from fl_dualpriv.errors import ConfigError, PrivacyError, type_alone
from fl_dualpriv.node.file import NodeFile, find_node_file, make_state_folder

if TYPE_CHECKING:
    from fl_dualpriv.client.node import Node, RunContext
    from fl_dualpriv.config.ranges import ConfigValue

_log = logging.getLogger("fl_dualpriv")
_run_contexts: "dict[int, RunContext]" = {}


def _run_config(context: Context, owner: "NodeFile | None") -> "dict[str, ConfigValue]":
    """Return the run's configuration, with the decisions of this node's owner in place of the server's values.

    Guarantee:
        A node with an owner's file imports no class from a folder that the configuration names. Its code is that of
        the pinned bundle and of the packages that are installed there.
    """
    from fl_dualpriv.config.plugins import CLIENT_CLASS_PATHS
    from fl_dualpriv.node.device import usable_device

    flat = dict(context.run_config)
    if owner is None:
        return flat
    flat |= owner.overrides()
    if owner.class_shares is not None and flat.get("train.class-prior") != "declared":  # no other run reads them
        flat["data.class-shares"] = ""
    if Path(str(flat.get("prompt.candidates", ""))).is_absolute():
        raise ConfigError(
            "prompt.candidates names a file, and a node reads no file that a run names; write the templates into the "
            "configuration: `fl-dualpriv run` does that"
        )
    for key in CLIENT_CLASS_PATHS:
        if flat.get(key):
            raise PrivacyError(
                f"{key} = {flat[key]!r}: a node imports no code from a folder that a run names; put the file into the "
                'app, for example into clients/, name it "clients.module:Class", and let the owners of the nodes pin '
                "that bundle"
            )
    if "node-file" in context.node_config:  # a deployed node has its own machine and folder
        if owner.data_path is not None:
            flat["data.partition"] = "by-node"
        chosen = str(context.node_config.get("device") or owner.device or "auto")
        flat["resources.device"], note = usable_device(chosen)
        if note:
            _log.warning("%s", note)
    return flat


def _run_context(context: Context, owner: "NodeFile | None") -> "RunContext":
    """Return the parsed configuration and the shared objects of this process. They are made once per run.

    The configuration never changes during a run.

    Raises:
        PrivacyError: If the run exceeds the limits of the node's owner. Then no image is read for it.
    """
    from fl_dualpriv.client.node import RunContext
    from fl_dualpriv.config.plans import record_level_plan
    from fl_dualpriv.config.schema import RunConfig

    run_context = _run_contexts.get(context.run_id)
    if run_context is None:
        config = RunConfig.from_run_config(_run_config(context, owner))
        if owner is not None and owner.budget is not None:
            reproducible = config.privacy.randomness == "seeded"
            owner.budget.check_plan(record_level_plan(config), reproducible=reproducible)
        run_context = RunContext(config)
        _run_contexts.clear()  # one run at a time: its features need the memory
        _run_contexts[context.run_id] = run_context
    return run_context


def _node(context: Context, owner: "NodeFile | None") -> "Node":
    """Return this node, with the folders for the state of its clients."""
    from fl_dualpriv.client.node import Node
    from fl_dualpriv.tasks.base import run_folder

    if owner is not None and owner.state_dir is not None:
        make_state_folder(owner.state_dir)  # before any write into it, also that of a refusal
    chosen = context.node_config.get("state-dir")
    run_context = _run_context(context, owner)
    state_dir = None if chosen is None else Path(str(chosen))
    return Node(
        run_context=run_context,
        index=int(context.node_config["partition-id"]),
        run_folder=run_folder(run_context.config.output.dir, context.run_id),
        state_dir=owner.state_dir or state_dir if owner else state_dir,
        budget=owner.budget if owner else None,
    )


def reply(message: Message, context: Context, answer: "Callable[[Node], RecordDict]") -> Message:
    """Answer a message. With an owner's budget, only refusals leave with their text: other errors may quote data."""
    from fl_dualpriv.client.state import ClientFolder

    named = context.node_config.get("node-file")
    owner = find_node_file(None if named is None else str(named))  # first: without the owner's file no data may be read
    if owner is None or owner.budget is None:
        return Message(answer(_node(context, owner)), reply_to=message)
    try:
        try:
            node = _node(context, owner)
        except PrivacyError as error:  # `answer` logs its refusals itself
            if owner.state_dir is not None:
                asked = f"{message.metadata.message_type}, a whole run"
                ClientFolder(owner.state_dir).log_refusal(f"Flower's run {context.run_id}", asked, str(error))
            raise
        return Message(answer(node), reply_to=message)
    except PrivacyError:
        raise
    except Exception as error:
        _log.warning("a message failed: %s", error, exc_info=error)
        raise RuntimeError(type_alone(error)) from None

"""Answer one message on a node: find the owner's file, apply it, and let no words about private data leave.

torch and the model are imported inside the functions, because Flower's driver imports the ClientApp and needs neither.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict

from fl_dualpriv.errors import PrivacyError, type_alone
from fl_dualpriv.node.file import NodeFile, find_node_file, make_state_folder

if TYPE_CHECKING:
    from fl_dualpriv.client.node import Node, RunContext
    from fl_dualpriv.config.ranges import ConfigValue

_log = logging.getLogger("fl_dualpriv")
_run_contexts: "dict[int, RunContext]" = {}


def _run_config(context: Context, owner: "NodeFile | None") -> "dict[str, ConfigValue]":
    """The run's configuration with what the owner of this node decides in place of what the server names."""
    from fl_dualpriv.node.device import usable_device

    flat = dict(context.run_config)
    if owner is None:
        return flat
    flat |= owner.overrides()
    if "node-file" in context.node_config:  # a deployed node: this machine is its own, and so is the folder
        if owner.data_path is not None:
            flat["data.partition"] = "by-node"
        chosen = str(context.node_config.get("device") or owner.device or "auto")
        flat["resources.device"], note = usable_device(chosen)
        if note:
            _log.warning("%s", note)
    return flat


def _run_context(context: Context, owner: "NodeFile | None") -> "RunContext":
    """The parsed configuration and the shared objects of this process, made once a run: it never changes in one.

    Raises:
        PrivacyError: If the run is outside of what the owner of the node allows: then no image is read for it.
    """
    from fl_dualpriv.client.node import RunContext
    from fl_dualpriv.config.plans import record_level_plan
    from fl_dualpriv.config.schema import RunConfig

    found = _run_contexts.get(context.run_id)
    if found is None:
        config = RunConfig.from_run_config(_run_config(context, owner))
        if owner is not None and owner.budget is not None:
            reproducible = config.privacy.randomness == "seeded"
            owner.budget.check_plan(record_level_plan(config), reproducible=reproducible)
        found = RunContext(config)
        _run_contexts.clear()  # one run at a time: the memory is for its features
        _run_contexts[context.run_id] = found
    return found


def _node(context: Context, owner: "NodeFile | None") -> "Node":
    """This node, and where it keeps what belongs to its clients."""
    from fl_dualpriv.client.node import Node
    from fl_dualpriv.tasks.base import run_folder

    if owner is not None and owner.state_dir is not None:
        make_state_folder(owner.state_dir)  # before anything is written into it, a refusal included
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
    """Answer; on a node whose owner holds a budget no error but a refusal leaves in words: they may quote data."""
    from fl_dualpriv.client.state import ClientFolder

    named = context.node_config.get("node-file")
    owner = find_node_file(None if named is None else str(named))  # first: without it nothing may be read
    if owner is None or owner.budget is None:
        return Message(answer(_node(context, owner)), reply_to=message)
    try:
        try:
            node = _node(context, owner)
        except PrivacyError as error:  # what `answer` refuses, it notes itself
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

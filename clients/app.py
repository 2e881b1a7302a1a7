"""The ClientApp: query (whom a node hosts), train (one round of local steps), evaluate (score a prompt)."""

from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from clients.hosting import Node, Setting

# torch and open_clip are imported inside the handlers: Flower's driver imports this file too and needs neither.
app = ClientApp()


_settings: "dict[int, Setting]" = {}


def _setting(context: Context) -> "Setting":
    """The parsed configuration and the shared objects of this process, made once a run: it never changes in one."""
    from clients.hosting import Setting
    from fl_dualpriv.config import RunConfig

    found = _settings.get(context.run_id)
    if found is None:
        found = Setting(RunConfig.from_run_config(context.run_config))
        _settings.clear()  # one run at a time: the memory is for its features
        _settings[context.run_id] = found
    return found


def _node(context: Context) -> "Node":
    """This node, and where it keeps what belongs to its clients."""
    from clients.hosting import Node
    from fl_dualpriv.node_file import find_node_file
    from fl_dualpriv.world import run_folder

    named, chosen = context.node_config.get("node-file"), context.node_config.get("state-dir")
    owner = find_node_file(None if named is None else str(named))  # first: without it nothing may be read
    setting = _setting(context)
    state_dir = None if chosen is None else Path(str(chosen))
    return Node(
        setting=setting,
        index=int(context.node_config["partition-id"]),
        run_folder=run_folder(setting.config.output.dir, context.run_id),
        state_dir=owner.state_dir or state_dir if owner else state_dir,
        budget=owner.budget if owner else None,
    )


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which clients are here and how many records each holds (public metadata), after checking data and model."""
    from fl_dualpriv import wire

    return Message(wire.cards_content(_node(context).cards()), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move the prompts of the clients that are asked for one round; upload the move of p_G, keep p_L."""
    from clients.training import TrainRound
    from fl_dualpriv import wire

    node = _node(context)
    uploads = TrainRound(node, wire.read_train(message)).run()
    node.report_memory()
    return Message(wire.uploads_content(uploads), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the zero-shot, the global or the personal prompts on held-out images."""
    from fl_dualpriv import wire

    return Message(wire.scores_content(_node(context).score(wire.read_evaluate(message))), reply_to=message)

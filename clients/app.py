"""The ClientApp: query (hosted clients), train (local steps; or select the start), evaluate (score a prompt)."""

from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_dualpriv.node.answer import reply

if TYPE_CHECKING:
    from fl_dualpriv.client.node import Node

# Flower's driver imports this file and needs no torch. The handlers therefore import torch and the model themselves.
app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Report the clients of this node and their public record counts, after a check of data and model."""
    from fl_dualpriv import messages

    return reply(message, context, lambda node: messages.cards_content(node.cards()))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move the prompts of the requested clients for one round; upload the move of p_G, keep p_L."""
    from fl_dualpriv import messages
    from fl_dualpriv.client.round import TrainRound

    def answer(node: "Node") -> RecordDict:
        uploads = TrainRound(node, messages.read_train(message)).run()
        node.report_memory()
        return messages.uploads_content(uploads)

    return reply(message, context, answer)


@app.train("select")
def select(message: Message, context: Context) -> Message:
    """Select the start of the prompts before round 1: upload noised votes, or let each client choose its own start."""
    from fl_dualpriv import messages
    from fl_dualpriv.client.selection import SelectionRound

    return reply(
        message,
        context,
        lambda node: messages.uploads_content(SelectionRound(node, messages.read_select(message)).run()),
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the zero-shot, the global or the personal prompts on held-out images."""
    from fl_dualpriv import messages

    return reply(message, context, lambda node: messages.scores_content(node.score(messages.read_evaluate(message))))

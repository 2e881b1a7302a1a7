"""Wait for the nodes of a run, and ask each for the clients that it hosts."""

import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fl_dualpriv import messages
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError


def check_engine(config: RunConfig, engine: str) -> None:
    """Refuse what the engine does not support.

    Raises:
        ConfigError: If a simulation is configured to read a folder per node, or to join a cluster that it did not join.
    """
    if config.data.partition == "by-node" and engine != "deployment":
        raise ConfigError(
            'data.partition = "by-node" is for deployed nodes, each with its own folder: here all clients would have '
            'the same records; set it to "iid", "by-class" or "dirichlet"'
        )
    if engine == "ray" and config.resources.ray_address and os.environ.get("RAY_ADDRESS", "local") == "local":
        raise ConfigError(
            f"resources.ray-address = {config.resources.ray_address!r}: this simulation was started with a Ray of its "
            "own; use `fl-dualpriv run`, which joins the cluster, or leave the key empty"
        )


Joined = tuple[dict[int, messages.ClientCard], dict[int, int]]
"""Each client's card and the id of its node, both by partition."""


def join(grid: Grid, config: RunConfig) -> Joined:
    """Wait for all nodes, then ask each for its clients. No client is sampled before: Flower's sampling would race.

    Returns:
        Each client's card and the id of its node, both by partition, in order.

    Raises:
        ConfigError: If there are too few or too many nodes, if a node cannot start, or if a client is missing or hosted
            twice.
    """
    expected, deadline = config.num_supernodes, time.monotonic() + config.join_timeout
    while len(nodes := list(grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(0.2)
    if len(nodes) != expected:
        key = "supernodes" if config.supernodes else "population"
        raise ConfigError(
            f"{key} = {expected}, but {len(nodes)} nodes joined within {config.join_timeout:g} s; start the simulation "
            f'with --federation-config "num-supernodes={expected}", or set {key} = {len(nodes)}'
        )
    requests = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    node_cards: list[tuple[messages.ClientCard, int]] = []
    replies = list(grid.send_and_receive(requests, timeout=config.reply_timeout))
    if silent := len(nodes) - len(replies):
        raise ConfigError(
            f"{silent} of {len(nodes)} nodes did not report their clients within {config.reply_timeout:g} s: look at "
            "their logs, or raise reply-timeout"
        )
    for reply in replies:
        if reply.has_error():
            raise ConfigError(f"a client cannot start: {messages.failure_reason(reply)}")
        node_cards += [(card, reply.metadata.src_node_id) for card in messages.read_cards(reply)]
    node_cards.sort(key=lambda pair: pair[0].partition)
    partitions = [card.partition for card, _ in node_cards]
    if partitions != list(range(config.population)):
        some = ", ".join(map(str, partitions[:10])) + (", …" if len(partitions) > 10 else "")
        raise ConfigError(
            f"the nodes host {len(partitions)} clients ({some}); expected each of 0..{config.population - 1} once"
        )
    # A card is untrusted input, and the divisors are computed from it.
    if strange := [card for card, _ in node_cards if not 1 <= card.num_examples < 2**53]:
        raise ConfigError(
            f"client {strange[0].partition} reports {strange[0].num_examples} records; a client must have at least one "
            "and fewer than 2**53: check its node"
        )
    return {card.partition: card for card, _ in node_cards}, {card.partition: node for card, node in node_cards}


def begin_to_join(grid: Grid, config: RunConfig, engine: str) -> Callable[[], Joined]:
    """Begin to `join` where that may run beside other work, and return the function that waits for its result.

    The actors of a simulation load the model and the data when they are first asked. With an embedded model, which is
    small, they do so while the server does the same. Larger models wait for the server's check of memory. The thread
    does not keep a process alive whose server failed meanwhile.
    """
    if engine != "ray" or config.backbone.name not in ("demo", "shelf", "demo-vqa"):
        return functools.partial(join, grid, config)
    result: Future[Joined] = Future()

    def ask() -> None:
        try:
            result.set_result(join(grid, config))
        except BaseException as error:  # the caller gets it
            result.set_exception(error)

    threading.Thread(target=ask, name="join", daemon=True).start()
    return result.result

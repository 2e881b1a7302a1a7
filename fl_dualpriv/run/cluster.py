"""An existing Ray cluster: its address, and the names of the machines that did the work."""

import os
import socket
import sys
from collections import Counter
from collections.abc import Iterable

from fl_dualpriv.errors import ConfigError

AUTO = "auto"
_ANSWER_SECONDS = 10.0


def cluster_address(value: str) -> str:
    """Return the address of the Ray cluster that a run joins; empty for a Ray of its own on this machine.

    Args:
        value: ``resources.ray-address``: empty, ``HOST:PORT``, or ``auto`` for the environment's RAY_ADDRESS.

    Raises:
        ConfigError: If ``auto`` is asked for without RAY_ADDRESS, or nothing answers at the address.
    """
    address = value
    if value == AUTO:
        address = os.environ.get("RAY_ADDRESS", "")
        if not address:
            raise ConfigError(
                'resources.ray-address = "auto": the environment has no RAY_ADDRESS; set it, or write HOST:PORT'
            )
    if address:
        _check_answers(address)
    return address


def _check_answers(address: str) -> None:
    """Connect once, because Ray itself would try for a minute.

    Raises:
        ConfigError: If the address is none, or nothing answers there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"resources.ray-address = {address!r}: must be HOST:PORT, as `ray start --head` prints it, without ray://"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"resources.ray-address = {address!r}: nothing answers there ({error}); start a cluster with "
            "`ray start --head`, or leave the key empty"
        ) from error


def machine_id() -> str:
    """Return the first letters of the Ray node and a hyphen if this process is one of Ray's; else an empty text."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    return ray.get_runtime_context().get_node_id()[:6] + "-"


def machine() -> str:
    """Return the name of this machine, with the Ray node behind it if this process is one of Ray's."""
    node = machine_id().rstrip("-")
    return f"{socket.gethostname()} ({node})" if node else socket.gethostname()


def counted(machines: Iterable[str]) -> str:
    """Return how often each machine occurs, in words.

    Example:
        >>> counted(["b", "a", "b"])
        'a: 1, b: 2'
    """
    return ", ".join(f"{name}: {count}" for name, count in sorted(Counter(machines).items()))

"""Network of a rehearsal: each node in a separate network namespace, or all nodes on this machine's loopback.

A namespace has its own loopback and one cable to a bridge, on which the server listens. A node in a namespace reaches
only the bridge, and no program outside the namespace reaches the port between the node and its apps. Namespaces need
Linux, iproute2 and root.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Network:
    """Network of the nodes: a separate network namespace for each, joined by a bridge, or 127.0.0.1 for all.

    Attributes:
        spaces: Names of the namespaces, one per node; empty if all nodes are on 127.0.0.1.
        server: Address of the server.
    """

    spaces: tuple[str, ...]
    server: str

    @staticmethod
    @contextlib.contextmanager
    def opened(nodes: int, *, wanted: bool) -> "Iterator[Network]":
        """Make namespaces if they are wanted and this user may make them. Remove them at the end."""
        number = os.getpid() % 250 + 1
        bridge, spaces = f"fdp{number}br", tuple(f"fdp{number}n{node}" for node in range(nodes))
        ours = wanted and _ip(f"link add {bridge} type bridge")  # False: another user's, or not permitted
        made = ours and Network._make(bridge, spaces, f"10.213.{number}")
        try:
            yield (
                Network(spaces=spaces, server=f"10.213.{number}.1") if made else Network(spaces=(), server="127.0.0.1")
            )
        finally:
            if ours:
                for space in spaces:
                    _ip(f"netns del {space}")
                _ip(f"link del {bridge}")

    @staticmethod
    def _make(bridge: str, spaces: Sequence[str], net: str) -> bool:
        done = _ip(f"addr add {net}.1/24 dev {bridge}") and _ip(f"link set {bridge} up")
        for node, space in enumerate(spaces):
            outer, inner = f"{space}o", f"{space}i"
            done = done and _ip(f"netns add {space}") and _ip(f"link add {outer} type veth peer name {inner}")
            done = done and _ip(f"link set {outer} master {bridge} up") and _ip(f"link set {inner} netns {space}")
            done = done and _ip(f"-n {space} addr add {net}.{node + 10}/24 dev {inner}")
            done = done and _ip(f"-n {space} link set {inner} up") and _ip(f"-n {space} link set lo up")
        return done

    def inside(self, node: int) -> list[str]:
        """Return the words to put before a command so that it runs in a node's namespace."""
        return ["ip", "netns", "exec", self.spaces[node]] if self.spaces else []


def _ip(words: str) -> bool:
    try:
        return subprocess.run(["ip", *words.split()], capture_output=True, check=False).returncode == 0
    except OSError:
        return False

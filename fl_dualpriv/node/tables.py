"""Read the keys of a node's file for its device, its model and its server. See `node.file`.

Standard library only, because a SuperNode reads them before it loads any other package.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICES = re.compile(r"auto|cpu|cuda(:[0-9]+)?")
_DEFAULT_PORT = 9094  # Flower's own


@dataclass(frozen=True, kw_only=True)
class NodeModel:
    """The only model that a run may use on this node, for any ``backbone`` of the run.

    Attributes:
        name: Name as in ``backbone.name``. A folder after ``local-dir:`` or ``hf:`` has an absolute path.
        pretrained: Weights as in ``backbone.pretrained``.
    """

    name: str
    pretrained: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeServer:
    """Connection of this node to its server. Options of ``fl-dualpriv node start`` take precedence.

    Attributes:
        address: ``HOST:PORT``.
        insecure: True to connect without TLS, for a server on this machine.
        root_certificates: PEM file that verifies the server's certificate. None means the system's certificates.
        private_key: SSH key by which the server knows this node. None means anonymous.
        partition_id: Number of this node's client in the run, from 0.
        port: TCP port on this machine, for the processes of this node's apps.
    """

    address: str
    insecure: bool = False
    root_certificates: Path | None = None
    private_key: Path | None = None
    partition_id: int = 0
    port: int = _DEFAULT_PORT

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Host and port of the address."""
        return split_address(self.address)

    @property
    def is_here(self) -> bool:
        """True if the address names this machine's loopback."""
        host = self.host_and_port[0]
        return host in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", host) is not None


def split_address(address: str) -> tuple[str, int]:
    """Split ``HOST:PORT``; brackets of an IPv6 address are removed.

    Raises:
        ValueError: If the address has another form.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 1 <= int(port) <= 65535) or "/" in host:
        raise ValueError(f"{address!r}: give HOST:PORT, without https://")
    return host.strip("[]"), int(port)


def folder(key: str, value: Any, problems: list[str]) -> Path | None:
    """Return an absolute path. Return None if the value is missing or, with a line in ``problems``, wrong."""
    if value is None:
        return None
    if not isinstance(value, str) or not Path(value).is_absolute():
        problems.append(f"{key} = {value!r}; give an absolute path in quotes")
        return None
    return Path(value)


def device(value: Any, problems: list[str]) -> str | None:
    """Return the device of the model, or None."""
    if value is not None and not (isinstance(value, str) and DEVICES.fullmatch(value)):
        problems.append(f"device = {value!r}; it must be auto, cpu, cuda or cuda:N")
        return None
    return value


def model(table: Any, problems: list[str]) -> NodeModel | None:
    """Read the table [model]."""
    if table is None:
        return None
    name = _text(_table("model", table, {"name", "pretrained"}, problems), "model.name", problems, required=True)
    pretrained = _text(table if isinstance(table, Mapping) else {}, "model.pretrained", problems)
    return NodeModel(name=name, pretrained=pretrained) if name else None


def server(table: Any, problems: list[str]) -> NodeServer | None:
    """Read the table [server]."""
    if table is None:
        return None
    keys = {"address", "insecure", "root-certificates", "private-key", "partition-id", "port"}
    server_table = _table("server", table, keys, problems)
    before = len(problems)
    address = _text(server_table, "server.address", problems, required=True)
    if address:
        try:
            split_address(address)
        except ValueError as error:
            problems.append(f"server.address = {error}")
    insecure = server_table.get("insecure", False)
    if not isinstance(insecure, bool):
        problems.append(f"server.insecure = {insecure!r}; it must be true or false")
    root = folder("server.root-certificates", server_table.get("root-certificates"), problems)
    key = folder("server.private-key", server_table.get("private-key"), problems)
    if insecure is True and (root or key):
        problems.append("server.insecure disables TLS; root-certificates and private-key are for TLS: choose one")
    index = _count(server_table, "server.partition-id", 0, 0, 2**31, problems)
    port = _count(server_table, "server.port", _DEFAULT_PORT, 1, 65535, problems)
    if len(problems) > before:
        return None
    return NodeServer(
        address=address,
        insecure=insecure,
        root_certificates=root,
        private_key=key,
        partition_id=index,
        port=port,
    )


def _table(name: str, table: Any, keys: set[str], problems: list[str]) -> Mapping[str, Any]:
    if not isinstance(table, Mapping):
        problems.append(f"{name} must be a table")
        return {}
    problems += [f"unknown key {name}.{key}" for key in sorted(set(table) - keys)]
    return table


def _text(table: Mapping[str, Any], key: str, problems: list[str], *, required: bool = False) -> str:
    value = table.get(key.partition(".")[2], "")
    if not isinstance(value, str):
        problems.append(f"{key} = {value!r}; give a text in quotes")
        return ""
    if required and not value.strip():
        problems.append(f"{key} is missing")
    return value.strip()


def _count(table: Mapping[str, Any], key: str, default: int, lowest: int, highest: int, problems: list[str]) -> int:
    value = table.get(key.partition(".")[2], default)
    if type(value) is not int or not lowest <= value <= highest:
        problems.append(f"{key} = {value!r}; it must be a whole number from {lowest} to {highest}")
        return default
    return value


def columns(value: Any, problems: list[str]) -> dict[str, str]:
    """Read the table of column names of a list or data set: ``image`` and ``label``, either optional."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name.strip() for name in value.values()):
        problems.append(f'columns = {value!r}; it must be a table of names: image = "photo", label = "species"')
        return {}
    if unknown := sorted(set(value) - {"image", "label"}):
        problems.append(f"unknown key {', '.join(f'columns.{key}' for key in unknown)}; allowed are image and label")
    return {key: str(name) for key, name in value.items()}

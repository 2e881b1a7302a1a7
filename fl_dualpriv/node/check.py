"""``fl-dualpriv node check``: check everything that a node needs before it joins. Nothing is sent, nothing joined.

Each check is a function of the owner's file that returns a finding. *Bad* means that the node would not work, or would
not protect its data. *Note* means that the owner must judge.
"""

import contextlib
import datetime
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.node.contact import Contact, contact, key_fingerprint, proxy_on_the_way, root_validity
from fl_dualpriv.node.data import asks_questions, look_at
from fl_dualpriv.node.device import probe
from fl_dualpriv.node.file import NodeFile, make_state_folder, missing_folders
from fl_dualpriv.node.tables import NodeServer

_AHEAD, _BEHIND = 4.0, 300.0
"""Seconds by which this clock may differ. Flower's server refuses signed requests from 5 s ahead or 305 s behind."""
_SOON = datetime.timedelta(days=14)
_DISK_MIB = 500


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table."""

    what: str
    verdict: Literal["good", "note", "bad"]
    says: str


def check(node: NodeFile, server: NodeServer | None, *, offline: bool = False) -> Iterator[Finding]:
    """Yield all findings, one by one.

    Args:
        node: The owner's file.
        server: Connection to the server, from the file or the options.
        offline: Do not try to reach the server.
    """
    yield _guarded("app", lambda: _app(node))
    yield _guarded("state", lambda: _state(node))
    yield _guarded("data", lambda: _data(node))
    yield _guarded("device", lambda: _device(node))
    yield _guarded("model", lambda: _model(node))
    yield _guarded("budget", lambda: _budget(node))
    if server is None:
        yield _bad("server", "no address: put a [server] with an address into the file")
        return
    yield _guarded("port", lambda: _port(server.port))
    if not server.insecure:
        yield _guarded("CA", lambda: _root(server))
        yield _guarded("key", lambda: _key(server))
    if offline:
        yield _note("server", "not tried (--offline)")
        yield _note("clock", "not compared with the server's (--offline)")
        return
    if proxy := proxy_on_the_way(server):
        yield _note("proxy", f"the node would reach its server through {proxy}; the checks below went without it")
    connection = contact(server)
    yield _guarded("server", lambda: _server(server, connection))
    yield _guarded("clock", lambda: _clock(connection))


def _good(what: str, says: str) -> Finding:
    return Finding(what=what, verdict="good", says=says)


def _note(what: str, says: str) -> Finding:
    return Finding(what=what, verdict="note", says=says)


def _bad(what: str, says: str) -> Finding:
    return Finding(what=what, verdict="bad", says=says)


def _guarded(what: str, look: Callable[[], Finding]) -> Finding:
    """Make one check. A check that raises is a bad finding, and the other checks still follow."""
    try:
        return look()
    except ConfigError as error:
        return _bad(what, str(error))
    except Exception as error:  # libraries of models and images raise any error
        return _bad(what, f"{type(error).__name__}: {error}")


def _app(node: NodeFile) -> Finding:
    if not node.apps:
        return _bad("app", "no app is allowed: put the digest that `fl-dualpriv node hash APP` prints under [app]")
    return _good("app", f"{len(node.apps)} allowed: " + ", ".join(f"{digest[:12]}…" for digest in node.apps))


def _state(node: NodeFile) -> Finding:
    if missing := missing_folders(node):
        return _bad("state", f"the file has {missing}")
    folder = node.state_dir
    if folder is None:
        return _note("state", "no state-dir: prompt and ledger go with each run")
    try:
        make_state_folder(folder)
        trial = folder / f".check-{os.getpid()}"
        with trial.open("wb") as file:
            file.write(b"\0" * 4096)
            os.fsync(file.fileno())
        trial.unlink()
    except OSError as error:
        return _bad("state", f"{folder} cannot be written to: {error.strerror}")
    free = shutil.disk_usage(folder).free // 2**20
    if folder.stat().st_mode & 0o007:
        return _note("state", f"{folder} may be read by every user of this machine: chmod o-rwx {folder}")
    message = f"{folder} can be written to, {free} MiB free"
    return (
        _good("state", message)
        if free >= _DISK_MIB
        else _note("state", f"{message}: features of many images take more")
    )


def _data(node: NodeFile) -> Finding:
    if node.data_path is None:
        return _note("data", "no data-path: the run names the data, which were not checked")
    data = look_at(node.data_path, node.classes, node.columns)
    if data.found.are_all and data.found.count:
        return _good("data", "; ".join([data.says, *([data.note] if data.note else [])]))
    message = "; ".join(
        [f"{data.says}, but {data.found.says()}", *data.found.lines(), *([data.note] if data.note else [])]
    )
    return (_note if data.found.count else _bad)("data", message)


def _device(node: NodeFile) -> Finding:
    device, note = probe(node.device or "auto")
    if note:
        return _note("device", note)
    return _good("device", device if device != "auto" else "auto: a GPU if there is one, else the CPU")


def _model(node: NodeFile) -> Finding:
    if node.model is None:
        return _note("model", "none named under [model]: the run names the model, which was not loaded")
    if node.data_path is not None and asks_questions(node.data_path):
        from fl_dualpriv.models.load import load_answering_model

        load_answering_model(node.model.name, "cpu", None)
        return _good("model", f"{node.model.name} loads")
    from fl_dualpriv.models.load import load_backbone

    backbone = load_backbone(node.model.name, node.model.pretrained, "cpu")
    message = (
        f"{node.model.name} loads: {backbone.weight_bytes / 2**20:.0f} MiB of weights, prompts of {backbone.ctx_dim}"
    )
    return _good("model", message)


def _budget(node: NodeFile) -> Finding:
    budget = node.budget
    if budget is None:
        return _note("budget", "no [budget]: only the configuration of each run limits what leaves")
    assert node.state_dir is not None  # `_state` reported it
    from fl_dualpriv.privacy.filters.choose import check_header, filter_of
    from fl_dualpriv.privacy.ledger import Ledger

    content = Ledger(node.state_dir / "ledger.jsonl").read()
    try:
        chosen = filter_of(budget)
        check_header(content, chosen.header)
    except PrivacyError as error:
        return _bad("budget", str(error))
    share = chosen.share(content)
    message = f"{chosen.claim()}; {chosen.balance(content)}; {len(content.events)} rounds so far"
    if budget.integer_arithmetic:
        message += '; only with privacy.arithmetic = "integer"'
    if content.damaged:
        message += f"; {content.damaged} damaged lines, each charged at the worst"
    if not share < 1:
        return _bad("budget", f"{message}: every further run will be refused")
    one_run = budget.filter.name == "reserve" and budget.filter.expected_runs == 1
    if not content.damaged and share <= 0.9 and not one_run:
        return _good("budget", message)
    return _note("budget", message)


def _port(port: int) -> Finding:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the node's own server does
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            return _bad("port", f"{port} of this machine is taken ({error.strerror}): give another one, server.port")
    return _good("port", f"{port} of this machine is free")


def _root(server: NodeServer) -> Finding:
    if server.root_certificates is None:
        return _note("CA", "no root-certificates: the system's authorities are trusted")
    begin, end = root_validity(server.root_certificates)
    if begin > (now := datetime.datetime.now(datetime.UTC)):  # a wrong clock shows without a server
        message = f"valid from {begin:%Y-%m-%d %H:%M}, and this clock says {now:%Y-%m-%d %H:%M} UTC: is it behind?"
        return _bad("CA", f"{server.root_certificates}, {message}")
    return _dated("CA", f"{server.root_certificates}", end)


def _dated(what: str, of: str, expires: datetime.datetime) -> Finding:
    left = expires - datetime.datetime.now(datetime.UTC)
    if left <= datetime.timedelta():
        return _bad(what, f"{of} expired on {expires:%Y-%m-%d}")
    message = f"{of}, valid until {expires:%Y-%m-%d}"
    return _good(what, message) if left > _SOON else _note(what, f"{message}: {left.days} days left")


def _key(server: NodeServer) -> Finding:
    if server.private_key is None:
        return _note("key", "no private-key: a server that asks who its nodes are will refuse this one")
    fingerprint = key_fingerprint(server.private_key)
    return _good("key", f"{fingerprint}; for the server's operator to register: {server.private_key}.pub")


def _server(server: NodeServer, connection: Contact) -> Finding:
    if connection.problem:
        return _bad("server", connection.problem)
    if server.insecure:
        with contextlib.suppress(ValueError):
            if socket.gethostbyname(server.host_and_port[0]).startswith("127."):
                return _good("server", f"{server.address} answers, without TLS, on this machine")
        return _note("server", f"{server.address} answers without TLS: anyone on the way can read and change all")
    assert connection.expires is not None
    return _dated("server", f"{server.address} answers, its certificate is of this CA", connection.expires)


def _clock(connection: Contact) -> Finding:
    if connection.ahead is None:
        return _note("clock", "not compared: the server did not say its time")
    message = (
        f"this clock is {abs(connection.ahead):.0f} s {'ahead of' if connection.ahead > 0 else 'behind'} the server's"
    )
    if not -_BEHIND < connection.ahead < _AHEAD:
        return _bad("clock", f"{message}; a server refuses what is {_AHEAD:g} s ahead or {_BEHIND:g} s behind: set it")
    return _good("clock", message)

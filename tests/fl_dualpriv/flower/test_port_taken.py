"""A port that is taken between its choice and its use: another one is tried, and who answers there is not asked."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_dualpriv.flower import engine as flower_engine
from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower import supervisor
from fl_dualpriv.flower.engine import RunFailed, _SuperLink


@pytest.fixture
def foreign() -> Iterator[tuple[int, list[bytes]]]:
    """A program that says "healthy" to whoever asks; its port, and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1], asked
        server.shutdown(socket.SHUT_RDWR)


def link_of(script: str, port: int, log: Path) -> _SuperLink:
    with log.open("ab") as stream:
        command = [sys.executable, "-S", "-c", script, str(port)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=stream)
    return _SuperLink(process=process, environ={}, home=log.parent, log=log)


def test_who_listens_is_known(foreign: tuple[int, list[bytes]]) -> None:
    port, _ = foreign
    script = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    childs = int(child.stdout.readline())
    assert supervisor.listens(os.getpid(), port)
    assert supervisor.listens(os.getpid(), childs)  # a process below counts
    assert supervisor.listens(child.pid, childs)
    assert not supervisor.listens(child.pid, port)
    child.communicate("\n")
    assert not supervisor.listens(os.getpid(), childs)


def test_a_superlink_whose_port_is_taken_does_not_come_up(foreign: tuple[int, list[bytes]], tmp_path: Path) -> None:
    port, asked = foreign
    # Like Flower's: it starts, and only then asks for its port.
    link = link_of(
        "import socket, sys, time; time.sleep(0.3); socket.create_server(('127.0.0.1', int(sys.argv[1])))",
        port,
        tmp_path / "flower.log",
    )
    assert not flower_engine._comes_up(link, port, 0)
    assert link.process.returncode == 1
    assert asked == []  # its "healthy" is not ours


def test_another_reason_to_end_is_no_reason_to_try_again(tmp_path: Path) -> None:
    (port,) = flower_env.free_ports(1)
    log = tmp_path / "flower.log"
    log.write_text("OSError: [Errno 98] Address already in use\n")  # of an earlier try
    with pytest.raises(RunFailed, match=r"ended at once\n.*\n  RuntimeError: no memory"):
        flower_engine._comes_up(link_of("raise RuntimeError('no memory')", port, log), port, log.stat().st_size)


@pytest.mark.slow
def test_flowers_superlink_gets_another_port_and_gives_up_at_last(
    foreign: tuple[int, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, asked = foreign
    free = flower_env.free_ports(2)
    chosen = iter([[port, free[1]], free])
    monkeypatch.setattr(flower_env, "free_ports", lambda count: next(chosen))
    with flower_engine._superlink(tmp_path / "flower.log", {}) as link:
        assert supervisor.listens(link.process.pid, free[0])
        pid = link.process.pid
    assert not supervisor.alive(pid)
    monkeypatch.setattr(flower_env, "free_ports", lambda count: [port, free[1]])
    with (
        pytest.raises(RunFailed, match=r"3 free ports .* were taken by other programs"),
        flower_engine._superlink(tmp_path / "flower.log", {}),
    ):
        pass
    assert asked == []
    assert supervisor.descendants(os.getpid()) == []

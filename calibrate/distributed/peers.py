"""A connection between rank 0 and every other rank, for nothing but to learn at once that a process is gone.

The kernel closes a connection when a process ends, however it ends, and its keep-alive probes end it when the other
machine is gone. Neither waits for an answer of the other process: a rank busy for minutes is not taken for a dead one.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any

_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, seconds, probes: gone after 25 s
_BYE = b"bye\n"


class Peers:
    """Watches from the start until `leave`.

    Args:
        post, fetch: put text under a name where all ranks find it, and wait for it.
        on_lost: called once, in another thread, with the rank that is gone.
        patience: seconds for all ranks to come.

    Raises:
        OSError: rank 0 cannot be reached, or not all ranks came.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        *,
        post: Callable[[str, str], None],
        fetch: Callable[[str], str],
        on_lost: Callable[[int], None],
        patience: float,
    ):
        self._on_lost = on_lost
        self._leaving = False
        self._others: dict[int, socket.socket] = (
            _accept(size, post, patience) if rank == 0 else {0: _connect(rank, host, fetch("peers"), patience)}
        )
        for connection in self._others.values():
            _keep_alive(connection)
        threading.Thread(target=self._watch, daemon=True).start()

    def leave(self) -> None:
        """Tell the others that this process ends as it should, so that they do not take it for lost."""
        self._leaving = True
        self._send(_BYE)

    def _send(self, message: bytes) -> None:
        for connection in self._others.values():
            try:
                connection.sendall(message)
            except OSError:
                continue  # gone, which the watch finds out

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._others.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            heard = dict.fromkeys(self._others, b"")
            while selector.get_map():
                for key, _ in selector.select():
                    rank = key.data
                    try:
                        part = self._others[rank].recv(1024)
                    except OSError:
                        part = b""
                    heard[rank] += part
                    if heard[rank].endswith(_BYE):
                        selector.unregister(self._others[rank])
                    elif heard[rank].startswith(b"lost ") and heard[rank].endswith(b"\n"):
                        return self._lost(int(heard[rank].split()[1]))
                    elif not part:
                        return self._lost(rank)

    def _lost(self, rank: int) -> None:
        if not self._leaving:
            self._send(f"lost {rank}\n".encode())  # from rank 0, to those who are not connected with that rank
            self._on_lost(rank)


def _accept(size: int, post: Callable[[str, str], None], patience: float) -> dict[int, socket.socket]:
    family: Any = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    token = secrets.token_hex(16)
    found: dict[int, socket.socket] = {}
    with socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6) as server:
        server.settimeout(patience)
        post("peers", f"{server.getsockname()[1]} {token}")
        while len(found) < size - 1:
            connection, _ = server.accept()
            connection.settimeout(10)
            try:
                said, rank = connection.recv(256).decode().split()
                welcome = secrets.compare_digest(said, token) and 0 < int(rank) < size
            except (OSError, ValueError):
                welcome = False
            if not welcome:
                connection.close()  # no rank of this job
                continue
            connection.settimeout(None)
            found[int(rank)] = connection
    return found


def _connect(rank: int, host: str, place: str, patience: float) -> socket.socket:
    port, token = place.split()
    connection = socket.create_connection((host, int(port)), timeout=patience)
    connection.sendall(f"{token} {rank}".encode())
    connection.settimeout(None)
    return connection


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

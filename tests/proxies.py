"""A proxy on 127.0.0.1: SOCKS 5, SOCKS 4 with names, or HTTP's CONNECT.  It takes every name for `target_port` here."""

from __future__ import annotations

import base64
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

_LIMIT = 60.0


class Proxy:
    """A context manager.

    Args:
        kind: ``"socks5"``, ``"socks4"`` or ``"http"``.
        target_port: where everything goes.
        user: what ``user`` or ``user:password`` the client must give; None: none is asked for.
        answer: in place of the last answer; the connection ends after it.
        slow: send answers byte by byte.
    """

    def __init__(
        self, kind: str, target_port: int, *, user: str | None = None, answer: bytes | None = None, slow: bool = False
    ) -> None:
        self._kind, self._target_port, self._user, self._answer, self._slow = kind, target_port, user, answer, slow
        #: Host and port that each connection asked for.
        self.asked: list[tuple[str, int]] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()  # guards the next two
        self._open: set[socket.socket] = set()
        self._closing = False
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"{self._kind}://{self._user + '@' if self._user else ''}127.0.0.1:{self.port}"

    def _start(self, run: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=run, args=args, name="proxy", daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._closing:
                    sock.close()
                    return
                self._open.add(sock)
            self.connections += 1
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(_LIMIT)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            {"socks5": self._socks5, "socks4": self._socks4, "http": self._http}[self._kind](sock)
            target = socket.create_connection(("127.0.0.1", self._target_port))
            with self._lock:
                self._open.add(target)
            self._start(self._pump, target, sock)
            self._pump(sock, target)
        except OSError:
            self._drop(sock)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(source, sink)

    def _drop(self, *socks: socket.socket) -> None:
        for sock in socks:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other side was faster

    def _send(self, sock: socket.socket, data: bytes) -> None:
        for piece in (data[at : at + 1] for at in range(len(data))) if self._slow else [data]:
            sock.sendall(piece)

    def _finish(self, sock: socket.socket, good: bytes, is_welcome: bool, bad: bytes) -> None:
        if self._answer is None and is_welcome:
            self._send(sock, good)
            return
        self._send(sock, bad if self._answer is None else self._answer)
        raise ConnectionAbortedError

    def _socks5(self, sock: socket.socket) -> None:
        version, count = _exactly(sock, 2)
        methods = _exactly(sock, count)
        assert version == 5
        if self._user is not None:
            if 2 not in methods:
                self._send(sock, b"\x05\xff")
                raise ConnectionAbortedError
            self._send(sock, b"\x05\x02")
            name = _exactly(sock, _exactly(sock, 2)[1])
            password = _exactly(sock, _exactly(sock, 1)[0])
            is_welcome = f"{name.decode()}:{password.decode()}" == self._user
            self._send(sock, b"\x01\x00" if is_welcome else b"\x01\x01")
            if not is_welcome:
                raise ConnectionAbortedError
        else:
            self._send(sock, b"\x05\x00")
        kind = _exactly(sock, 4)[3]
        if kind == 3:
            host = _exactly(sock, _exactly(sock, 1)[0]).decode()
        else:
            family = socket.AF_INET if kind == 1 else socket.AF_INET6
            host = socket.inet_ntop(family, _exactly(sock, 4 if kind == 1 else 16))
        self.asked.append((host, struct.unpack("!H", _exactly(sock, 2))[0]))
        self._finish(sock, b"\x05\x00\x00\x03\x04name\x00\x01", True, b"")

    def _socks4(self, sock: socket.socket) -> None:
        _, _, port, address = struct.unpack("!BBH4s", _exactly(sock, 8))
        user = _until(sock, b"\0")[:-1].decode()
        host = _until(sock, b"\0")[:-1].decode() if address == b"\0\0\0\x01" else socket.inet_ntoa(address)
        self.asked.append((host, port))
        self._finish(sock, b"\0\x5a" + bytes(6), user == (self._user or ""), b"\0\x5d" + bytes(6))

    def _http(self, sock: socket.socket) -> None:
        first, *lines = _until(sock, b"\r\n\r\n").decode().rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        assert method == "CONNECT" and f"Host: {target}" in lines
        host, _, port = target.rpartition(":")
        self.asked.append((host, int(port)))
        wanted = f"Proxy-Authorization: Basic {base64.b64encode((self._user or '').encode()).decode()}"
        is_welcome = self._user is None or wanted in lines
        good = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n"
        self._finish(sock, good, is_welcome, b"HTTP/1.1 407 Who are you?\r\nProxy-Authenticate: Basic\r\n\r\n")

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closing = True
            self._drop(self._listener, *self._open)
        self._listener.close()
        for thread in list(self._threads):
            thread.join(_LIMIT)
            assert not thread.is_alive()
        for sock in self._open:
            sock.close()


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionResetError("hung up")
        data += more
    return data


def _until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data += _exactly(sock, 1)
    return data

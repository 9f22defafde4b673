"""paho-mqtt as the control plane: one fresh paho client per attempt to connect, behind a tap on its socket.

paho opens TCP and TLS, sends CONNECT, SUBSCRIBE and DISCONNECT and reads what answers them.  The bytes of the data
plane never pass through it: it is handed a socket-like object (its own `SocketLike` protocol) that serves it only what
our parser set aside for it, and that lets nobody write in the middle of somebody else's packet.

Everything here runs on one thread at a time: first the connector, then the owner of the connection.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from paho.mqtt.client import Client as PahoClient
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

if TYPE_CHECKING:
    from paho.mqtt.client import SocketLike

    from cloudpubsub._address import Address
    from cloudpubsub._options import Options

__all__ = ["WOULD_BLOCK", "Control", "Tap", "open_control", "waits_for"]

#: What a non-blocking socket, plain or TLS, raises when it can do nothing now.
WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_LINGER_BYTES = 1 << 16
_open_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child must not keep a connection open, so that the broker sees it when the parent ends."""
    for sock in list(_open_sockets):
        sock.close()
    _open_sockets.clear()


os.register_at_fork(after_in_child=_close_in_child)


def waits_for(blocked: OSError) -> int:
    """The event after which a write that raised `blocked` can go on: TLS may have to read before it can write."""
    return select.POLLIN if isinstance(blocked, ssl.SSLWantReadError) else select.POLLOUT


class _ClosingTLS(ssl.SSLSocket):
    """A TLS socket that does not outlive a failed handshake: paho would leave it to the garbage collector.

    `open_control` makes a class of it for each attempt, with the time that its handshake may take: paho 2.1 gives it a
    keep-alive, which may be far too long or too short.
    """

    timeout_s: float | None = None

    def do_handshake(self, block: bool = False) -> None:
        _open_sockets.add(self)
        self.settimeout(self.timeout_s)
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class Tap:
    """The real socket, and what paho sees of it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        #: Bytes set aside for paho.
        self.control = bytearray()
        #: While a batch of the data plane is half written, paho may not write.
        self.is_writing = False
        #: The event that paho's last blocked write waits for.
        self.waits_for = select.POLLOUT
        #: Why paho's last write failed, of which paho says nothing.
        self.error: OSError | None = None
        #: Seconds that `close` may take to read what the peer still sends, 0 without a goodbye, and its end on the
        #: monotonic clock: closing a socket with unread bytes resets it, and the broker would lose our last packets.
        self.linger_s = 0.0
        self.linger_until_s = 0.0
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def recv(self, size: int) -> bytes:
        if not self.control:
            raise BlockingIOError
        taken = bytes(self.control[:size])
        del self.control[:size]
        return taken

    def send(self, data: bytes | bytearray) -> int:
        self.waits_for = select.POLLOUT
        if self.is_writing:
            raise BlockingIOError
        try:
            return self.sock.send(data)
        except WOULD_BLOCK as exc:
            self.waits_for = waits_for(exc)
            raise BlockingIOError from None
        except OSError as exc:
            self.error = self._hear_why(exc)
            raise

    def _hear_why(self, error: OSError) -> OSError:
        """A write failed because the peer hung up; the alert that it sent before that, if it is still to be had."""
        try:
            while self.sock.recv(_LINGER_BYTES):
                pass
        except WOULD_BLOCK:
            pass
        except ssl.SSLEOFError:
            pass
        except ssl.SSLError as better:
            return better
        except OSError:
            pass
        return error

    def fileno(self) -> int:
        return self.sock.fileno()

    def setblocking(self, flag: bool) -> None:
        self.sock.setblocking(flag)

    def close(self) -> None:
        try:
            if self.linger_s > 0:
                self._linger()
        except (OSError, ValueError):
            pass  # the peer was faster, or TLS has ended; either way the connection is over
        finally:
            self.sock.close()

    def _linger(self) -> None:
        """Say that nothing more comes, and read to the end."""
        deadline_s = min(time.monotonic() + self.linger_s, self.linger_until_s)
        self.linger_s = 0.0
        self.sock.shutdown(socket.SHUT_WR)
        while (left_s := deadline_s - time.monotonic()) > 0:
            self.sock.settimeout(left_s)
            # Below TLS: what it still carries does not matter any more.
            if not socket.socket.recv(self.sock, _LINGER_BYTES):
                return


class Control(PahoClient):
    """A paho client for one connection.  `tap` is there once TCP and TLS are up."""

    tap: Tap | None = None

    def _create_socket_connection(self) -> socket.socket:
        sock = super()._create_socket_connection()
        _open_sockets.add(sock)  # before the TLS handshake, which may take long
        return sock

    def _create_socket(self) -> SocketLike:
        sock = cast(socket.socket, super()._create_socket())
        try:
            self.tap = Tap(sock)
        except BaseException:
            sock.close()
            raise
        return self.tap

    @property
    def is_closed(self) -> bool:
        """The only sign that paho gives of a closed connection."""
        return self.socket() is None

    def pump(self, data: bytes | bytearray) -> None:
        """Let paho read `data`.  Raises ValueError if the broker broke the protocol."""
        assert self.tap is not None
        self.tap.control += data
        while self.tap.control and not self.is_closed:
            before = len(self.tap.control)
            try:
                self.loop_read()
            except Exception as exc:  # struct.error and others, as paho's version has it
                raise ValueError(f"the broker sent what paho cannot read: {type(exc).__name__}: {exc}") from exc
            if len(self.tap.control) == before:
                return

    def hang_up(self) -> None:
        """Close without a word."""
        if self.tap is not None:
            self.tap.linger_s = 0.0
            with contextlib.suppress(OSError):
                self.tap.close()


def _quiet(*_: Any) -> None:
    """Its presence keeps paho from writing on the thread that calls it."""


def open_control(
    options: Options,
    address: Address,
    client_id: str,
    *,
    clean_session: bool,
    with_will: bool,
    timeout_s: float,
    on_suback: Callable[[int, list[int]], None] | None = None,
    on_unsuback: Callable[[int], None] | None = None,
) -> Control:
    """Connect TCP and TLS and queue CONNECT.  Blocks; asks for credentials and reads certificates anew.

    Raises OSError (ssl.SSLError is one), ValueError, an error of this package, or whatever a credentials callable
    raises.
    """
    control = Control(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=clean_session,
        protocol=MQTTProtocolVersion.MQTTv311,
        reconnect_on_failure=False,
    )
    control.on_socket_register_write = _quiet
    if on_suback is not None:

        def note(_client: Any, _userdata: Any, mid: int, codes: list[Any], _properties: Any) -> None:
            on_suback(mid, [int(code.value) for code in codes])

        control.on_subscribe = note
    if on_unsuback is not None:

        def note_end(_client: Any, _userdata: Any, mid: int, _codes: Any, _properties: Any) -> None:
            on_unsuback(mid)

        control.on_unsubscribe = note_end
    username, password = options.credentials()
    if username is not None:
        control.username_pw_set(username, password)
    if with_will and options.will is not None:
        control.will_set(options.will.topic, options.will.payload_bytes, 1, options.will.retain)
    if address.tls:
        assert options.tls is not None
        context = options.tls.context()
        context.sslsocket_class = type("_ClosingTLS", (_ClosingTLS,), {"timeout_s": timeout_s})
        control.tls_set_context(context)
        if options.tls.insecure:
            control.tls_insecure_set(True)
    control.connect_timeout = timeout_s
    control.connect_async(address.host, address.port, options.keep_alive)
    try:
        control.reconnect()
    except BaseException:
        control.hang_up()
        raise
    return control

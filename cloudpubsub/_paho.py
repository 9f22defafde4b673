"""paho-mqtt as the control plane: one fresh paho client per attempt to connect, behind a tap on its socket.

paho opens TCP, TLS and WebSocket, sends CONNECT, SUBSCRIBE and DISCONNECT and reads what answers them.  The bytes of
the data plane never pass through it: it is handed a socket-like object (its own `SocketLike` protocol) that serves it
only what our parser set aside for it, and that lets nobody write in the middle of somebody else's packet.

Everything here runs on one thread at a time: first the connector, then the owner of the connection.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from paho.mqtt.client import Client as PahoClient
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cloudpubsub._deadline import left_s
from cloudpubsub._link import PACKET_MAX
from cloudpubsub._proxy import Proxy, open_through, parse_proxy
from cloudpubsub._websocket import Handshake, WebSocket

if TYPE_CHECKING:
    from paho.mqtt.client import SocketLike

    from cloudpubsub._address import Address
    from cloudpubsub._options import Options

__all__ = ["WOULD_BLOCK", "BrokerLimits", "Control", "Stage", "Tap", "open_control", "waits_for"]

Stage = Literal["name resolution", "TCP", "proxy", "TLS", "WebSocket"]

#: What a non-blocking socket, plain or TLS, raises when it can do nothing now.
WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_LINGER_BYTES = 1 << 16
_open_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child must not keep a connection open, so that the broker sees it when the parent ends."""
    for sock in list(_open_sockets):
        sock.close()
    _open_sockets.clear()


def _end_in_child() -> None:
    _noting.release()
    _close_in_child()


# Held while a socket is made and noted, so that no fork comes in between; nothing in there waits for the network.
_noting = threading.Lock()
os.register_at_fork(before=_noting.acquire, after_in_parent=_noting.release, after_in_child=_end_in_child)


def waits_for(blocked: OSError) -> int:
    """The event after which a write that raised `blocked` can go on: TLS may have to read before it can write."""
    return select.POLLIN if isinstance(blocked, ssl.SSLWantReadError) else select.POLLOUT


class Tap:
    """The real socket, or the WebSocket on it, and what paho sees of it."""

    def __init__(self, sock: socket.socket | WebSocket) -> None:
        self.sock = sock
        self._raw = sock.raw if isinstance(sock, WebSocket) else sock
        self.is_tls = isinstance(self._raw, ssl.SSLSocket)
        #: A read that brings less than was asked for means that there is no more.  TLS hands out one record a call, and
        #: of what a WebSocket reads a part is frames.
        self.tells_when_empty = sock is self._raw and not self.is_tls
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

    def limit_unsent(self, size: int) -> None:
        """Have the kernel take no more than about so many bytes that it has not sent yet."""
        with contextlib.suppress(OSError):  # of a kernel or a socket that cannot, the queue is longer
            self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size)

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
        """Say that nothing more comes, and read to the end: while acknowledgements come, what we sent is on its way."""
        silence_s, self.linger_s = self.linger_s, 0.0
        self.sock.shutdown(socket.SHUT_WR)
        while (left_s := self.linger_until_s - time.monotonic()) > 0:
            self.sock.settimeout(min(silence_s, left_s))
            # Below TLS and WebSocket: what they still carry does not matter any more.
            if not socket.socket.recv(self._raw, _LINGER_BYTES):
                return


class Control(PahoClient):
    """A paho client for one connection.  `tap` is there once TCP, TLS and WebSocket are up."""

    tap: Tap | None = None
    #: What the broker said of itself in an MQTT 5 CONNACK.
    limits: BrokerLimits | None = None
    #: Told what the attempt to connect is at, on the thread that makes it.
    on_stage: Callable[[Stage], None] = staticmethod(lambda _: None)
    #: In seconds: for one address, and for the handshake.
    tcp_timeout: float = 5.0
    tls_timeout: float = 5.0
    #: On the monotonic clock, for what may not take as long as it likes.
    deadline_s = 0.0
    #: None: connect directly.
    way: Proxy | None = None
    _handshake: Handshake | None = None

    def _get_proxy(self) -> dict[str, Any] | None:
        """None, always: paho would take one from the environment, or not, as PySocks is installed or not."""
        return None

    def _create_socket_connection(self) -> socket.socket:
        if self.way is None:
            sock = self._connect_directly()
        else:
            self.on_stage("proxy")
            sock = open_through(self.way, self.host, self.port, self.deadline_s, _open_sockets.add)
        _open_sockets.add(sock)  # before the TLS handshake, which may take long
        self.on_stage("TLS" if self._ssl else "WebSocket")
        return sock if self._ssl else self._before_websocket(sock)

    def _connect_directly(self) -> socket.socket:
        self.on_stage("name resolution")
        found = socket.getaddrinfo(self.host, self.port, 0, socket.SOCK_STREAM)
        error: OSError = OSError(f"{self.host}: no address")
        for family, kind, protocol, _, address in found:
            self.on_stage("TCP")
            with _noting:
                sock = socket.socket(family, kind, protocol)
                _open_sockets.add(sock)
            try:
                sock.settimeout(min(self.tcp_timeout, left_s(self.deadline_s)))
                sock.connect(address)
                return sock
            except OSError as exc:
                sock.close()
                error = exc
        raise error

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        # As paho does it, but within what is left of the time (its 2.1 waits as long as the keep-alive is), and a
        # socket whose handshake failed is not left to the garbage collector.
        assert self._ssl_context is not None
        sock: socket.socket = tcp_sock
        try:
            with _noting:
                sock = tls = self._ssl_context.wrap_socket(
                    tcp_sock, server_hostname=self.host, do_handshake_on_connect=False
                )
                _open_sockets.add(tls)
            tls.settimeout(min(self.tls_timeout, left_s(self.deadline_s)))
            tls.do_handshake()
        except BaseException:
            sock.close()
            raise
        self.on_stage("WebSocket")
        return cast(ssl.SSLSocket, self._before_websocket(tls))

    def _before_websocket(self, sock: socket.socket) -> socket.socket:
        """What paho is to shake hands on, if that comes next."""
        if self.transport != "websockets":
            return sock
        self._handshake = Handshake(sock, self.deadline_s)
        return cast(socket.socket, self._handshake)

    def _create_socket(self) -> SocketLike:
        sock: socket.socket | WebSocket | None = None
        try:
            made = super()._create_socket()
            # paho's own framing is left behind: it masks byte by byte and cuts packets off after a short write.
            sock = cast(socket.socket, made) if self._handshake is None else self._handshake.finish()
            self.tap = Tap(sock)
        except BaseException as exc:
            for one in (sock, self._handshake):
                if one is not None:
                    one.close()
            if self._handshake is not None and isinstance(exc, Exception):
                raise self._handshake.explain(exc) from exc
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


class BrokerLimits(NamedTuple):
    """The properties of an MQTT 5 CONNACK that matter here; under 3.1.1 there are none, and these are the defaults."""

    receive_maximum: int = 65_535
    maximum_packet_size: int = PACKET_MAX
    topic_alias_maximum: int = 0
    maximum_qos: int = 2
    retain_available: bool = True
    wildcards_available: bool = True
    shared_available: bool = True
    server_keep_alive: int | None = None

    @classmethod
    def of(cls, properties: Any) -> BrokerLimits:
        """From paho's properties."""

        def get(name: str, default: Any) -> Any:
            return getattr(properties, name, default)

        return cls(
            get("ReceiveMaximum", 65_535),
            min(PACKET_MAX, get("MaximumPacketSize", PACKET_MAX)),
            get("TopicAliasMaximum", 0),
            get("MaximumQoS", 2),
            bool(get("RetainAvailable", 1)),
            bool(get("WildcardSubscriptionAvailable", 1)),
            bool(get("SharedSubscriptionAvailable", 1)),
            get("ServerKeepAlive", None),
        )


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
    packet_max: int,
    receive_maximum: int = 65_535,
    on_stage: Callable[[Stage], None] | None = None,
    on_suback: Callable[[int, list[int]], None] | None = None,
    on_unsuback: Callable[[int], None] | None = None,
) -> Control:
    """Connect TCP, TLS and WebSocket and queue CONNECT.  Blocks; asks for credentials and reads certificates anew.

    Raises OSError (ssl.SSLError is one), ValueError, an error of this package, or whatever a credentials callable
    raises.
    """
    is_5 = options.protocol == "5"
    control = Control(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=None if is_5 else clean_session,
        protocol=MQTTProtocolVersion.MQTTv5 if is_5 else MQTTProtocolVersion.MQTTv311,
        transport="websockets" if address.path else "tcp",
        reconnect_on_failure=False,
    )
    if on_stage is not None:
        control.on_stage = on_stage

    def note_limits(client: Any, _userdata: Any, _flags: Any, _code: Any, properties: Any) -> None:
        client.limits = BrokerLimits.of(properties)

    control.on_connect = note_limits
    control.deadline_s = time.monotonic() + timeout_s
    if options.proxy is not None:
        control.way = parse_proxy(options.proxy)
    if address.path:
        control.ws_set_options(address.path, address.http_headers)
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
        control.tls_set_context(options.tls.context())
        if options.tls.insecure:
            control.tls_insecure_set(True)
    control.connect_timeout = timeout_s
    control.tcp_timeout = options.tcp_timeout
    control.tls_timeout = options.tls_timeout
    session: dict[str, Any] = {}
    if is_5:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = packet_max
        properties.ReceiveMaximum = receive_maximum
        if not clean_session:
            properties.SessionExpiryInterval = options.session_expiry
        session = {"clean_start": clean_session, "properties": properties}
    control.connect_async(address.host, address.port, options.keep_alive, **session)
    try:
        control.reconnect()
    except BaseException:
        control.hang_up()
        raise
    return control

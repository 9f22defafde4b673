"""What the package rests on in paho, and paho does not promise.

Each test is one behaviour that `cloudpubsub._paho` or what stands on it would break without.  They know nothing of the
package: a failure here says what a new paho does otherwise.  `tests/test_paho_versions.py` runs them with the oldest
paho that pyproject.toml allows; the environment of the tests has the newest.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

import paho.mqtt
import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests import packets
from tests.brokers import HOST, TlsFiles
from tests.fake_broker import FakeBroker
from tests.making import Inbox
from tests.packets import (
    Connack,
    Connect,
    Disconnect,
    Pingresp,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
)
from tests.script import Script

V311, V5 = MQTTProtocolVersion.MQTTv311, MQTTProtocolVersion.MQTTv5
both_versions = pytest.mark.parametrize("version", [V311, V5])


class Line:
    """A socket for paho, in memory: gives what the test put in, takes as much as there is room for."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.incoming = bytearray()
        self.ended = False  # the peer has closed
        self.room = room
        self.sent = bytearray()
        self.failure: OSError | None = None
        self.sizes: list[int] = []  # of what paho wanted to send
        self.closed = 0
        self.blocking: bool | None = None

    def recv(self, size: int) -> bytes:
        if not self.incoming:
            if self.ended:
                return b""
            raise BlockingIOError
        taken = bytes(self.incoming[:size])
        del self.incoming[:size]
        return taken

    def send(self, data: bytes) -> int:
        self.sizes.append(len(data))
        if self.failure is not None:
            raise self.failure
        if not self.room:
            raise BlockingIOError
        taken = bytes(data[: self.room])
        self.room -= len(taken)
        self.sent += taken
        return len(taken)

    def close(self) -> None:
        self.closed += 1

    def fileno(self) -> int:
        return -1

    def setblocking(self, flag: bool) -> None:
        self.blocking = flag


class OnLine(Client):
    """paho with a `Line` for a socket."""

    def __init__(self, version: MQTTProtocolVersion = V311, line: Line | None = None) -> None:
        clean = {} if version == V5 else {"clean_session": True}
        super().__init__(
            CallbackAPIVersion.VERSION2, client_id="x", protocol=version, reconnect_on_failure=False, **clean
        )
        self.line = line or Line()
        self.created = 0
        self.version = int(version)
        self.connected, self.subscribed, self.unsubscribed = Inbox(), Inbox(), Inbox()
        self.on_connect, self.on_subscribe, self.on_unsubscribe = self.connected, self.subscribed, self.unsubscribed
        self.on_socket_register_write = lambda client, userdata, sock: None
        self.connect_async(HOST, 1, 60)

    def _create_socket(self) -> Any:
        self.created += 1
        return self.line

    def hears(self, *several: packets.Packet) -> None:
        self.line.incoming += b"".join(packets.build(each, self.version) for each in several)

    def said(self) -> list[packets.Packet]:
        return packets.parse_all(bytes(self.line.sent), self.version)


def online(version: MQTTProtocolVersion = V311) -> OnLine:
    """Accepted by the broker, with nothing left to write."""
    client = OnLine(version)
    client.reconnect()
    client.loop_write()
    client.hears(Connack())
    client.loop_read()
    assert len(client.connected.calls) == 1 and not client.want_write()
    client.line.sent.clear()
    return client


def write_all(client: OnLine) -> None:
    for _ in range(1000):
        if not client.want_write():
            return
        client.line.room = max(client.line.room, 1)
        client.loop_write()
    pytest.fail("paho always has something to write")


def test_it_is_the_paho_that_was_asked_for() -> None:
    assert paho.mqtt.__version__ == os.environ.get("CLOUDPUBSUB_PAHO", paho.mqtt.__version__)
    assert paho.mqtt.__version__.startswith("2.")


# ---- the socket


class Noting(Client):
    """paho on real sockets; notes what it asks of a subclass."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id="x", reconnect_on_failure=False, **settings)
        self.on_socket_register_write = lambda client, userdata, sock: None
        self.opened: list[Any] = []
        self.created: list[Any] = []

    def _create_socket_connection(self) -> socket.socket:
        self.opened.append(super()._create_socket_connection())
        return self.opened[-1]

    def _create_socket(self) -> Any:
        self.created.append(super()._create_socket())
        return self.created[-1]

    def close(self) -> None:
        for sock in (*self.opened, *self.created):
            sock.close()


def test_each_reconnect_makes_one_socket_and_socket_returns_it() -> None:
    with FakeBroker(Script(), parallel=True) as broker:
        client = Noting()
        client.connect_async(HOST, broker.port)
        assert client.created == [] and client.socket() is None  # nothing happens before `reconnect`
        for count in (1, 2):
            client.reconnect()
            assert len(client.created) == len(client.opened) == count
            assert client.socket() is client.created[-1] is client.opened[-1]
        assert client.opened[0].fileno() == -1, "the socket before it is left open"
        client.close()


def test_connect_timeout_is_the_time_limit_of_the_socket_that_is_opened() -> None:
    seen = []

    class Looking(Noting):
        def _create_socket_connection(self) -> socket.socket:
            sock = super()._create_socket_connection()
            seen.append(sock.gettimeout())
            return sock

    with FakeBroker(Script()) as broker:
        client = Looking()
        client.connect_timeout = 3.5
        client.connect_async(HOST, broker.port)
        client.reconnect()
        client.close()
    assert seen == [3.5]


def test_what_create_socket_returns_is_all_that_paho_uses() -> None:
    client = OnLine()
    client.reconnect()
    assert client.socket() is client.line and client.created == 1
    assert client.line.blocking is False
    client.loop_write()
    assert client.said() == [Connect("x", version=4)]
    client.reconnect()
    assert client.created == 2 and client.line.closed == 1


def test_a_failed_create_socket_comes_out_of_reconnect() -> None:
    class Failing(OnLine):
        def _create_socket(self) -> Any:
            raise OSError("no way")

    client = Failing()
    with pytest.raises(OSError, match="no way"):
        client.reconnect()
    assert client.socket() is None


def test_tls_is_shaken_hands_by_the_socket_class_of_the_context(tls_files: TlsFiles) -> None:
    calls: list[bool] = []

    class Shaking(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            calls.append(block)
            self.settimeout(10)  # in 2.1 paho has set its keep-alive; ours is to stand
            super().do_handshake(block)

    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tls_files.server_cert, tls_files.server_key)
    got: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        accepted, _ = listener.accept()
        with accepted, server.wrap_socket(accepted, server_side=True) as secure:
            secure.settimeout(10)
            got.append(secure.recv(100))

    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        context = ssl.create_default_context(cafile=tls_files.ca)
        context.sslsocket_class = Shaking
        client = Noting()
        client.tls_set_context(context)
        client.connect_async(HOST, listener.getsockname()[1])
        client.reconnect()
        assert isinstance(client.created[0], Shaking) and client.socket() is client.created[0]
        client.loop_write()
        thread.join(60)
        client.close()
    assert packets.parse_all(got[0], 4) == [Connect("x", version=4)]
    assert calls == [False]


# ---- reading


def test_one_packet_is_read_at_a_time() -> None:
    client = online()
    for mid in (1, 2, 3):
        client.hears(Suback(mid, (1,)))
    for count in (1, 2, 3):
        assert client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
        assert [call[2] for call in client.subscribed.calls] == list(range(1, count + 1))
        assert len(client.line.incoming) == 5 * (3 - count)


@both_versions
def test_a_half_packet_is_kept_while_there_is_no_more(version: MQTTProtocolVersion) -> None:
    client = OnLine(version)
    client.reconnect()
    stream = b"".join(
        packets.build(each, int(version))
        # Long enough for a remaining length of two bytes.
        for each in (Connack(), Suback(1, (1,) * 200), Pingresp(), Unsuback(2, (0,) if version == V5 else ()))
    )
    for value in stream:
        client.loop_read()  # nothing there
        client.line.incoming.append(value)
        client.loop_read()
        assert not client.line.incoming and client.socket() is not None
    assert [len(box.calls) for box in (client.connected, client.subscribed, client.unsubscribed)] == [1, 1, 1]
    _, _, mid, codes, _ = client.subscribed.calls[0]
    assert mid == 1 and [code.value for code in codes] == [1] * 200
    assert client.unsubscribed.calls[0][2] == 2


MALFORMED = {
    "connack of one byte": b"\x20\x01\x00",
    "connack of three bytes": b"\x20\x03\x00\x00\x00",
    "suback of one byte": b"\x90\x01\x00",
    "publish whose topic does not end": b"\x32\x04\xff\xff\x00\x00",
    "a type that does not exist": b"\x00\x00",
    "a length of five bytes": b"\x20\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_packet_raises_or_closes(data: bytes) -> None:
    client = online()
    client.line.incoming += data
    try:
        client.loop_read()
    except Exception:
        return  # `struct.error` in 2.1, for instance
    assert client.socket() is None


# ---- writing


@both_versions
def test_nothing_is_written_by_the_thread_that_asks(version: MQTTProtocolVersion) -> None:
    client = online(version)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (client.subscribe, ([("a", 1), ("b/#", 1)],)),
        (client.unsubscribe, ("a",)),
        (client.disconnect, ()),
    ]
    mids = []
    for call, arguments in calls:
        thread_result: list[Any] = []
        thread = threading.Thread(target=lambda call=call, args=arguments, to=thread_result: to.append(call(*args)))
        thread.start()
        thread.join(60)
        mids.append(thread_result[0])
        assert client.want_write()
        assert client.line.sizes[1:] == [], "written at once"  # the first was CONNECT
    write_all(client)
    subscribe, unsubscribe, last = client.said()
    (_, first_mid), (_, second_mid), _ = mids
    # The mid that the caller gets is the packet id on the wire, by which he knows the answer.
    assert subscribe == Subscribe(first_mid, (Subscription("a"), Subscription("b/#")))
    assert unsubscribe == Unsubscribe(second_mid, ("a",))
    assert isinstance(last, Disconnect)


@both_versions
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_order_is_kept_after_a_blocked_send(version: MQTTProtocolVersion, step: int) -> None:
    client = online(version)
    client.line.room = 0
    for number in range(4):
        client.subscribe([(f"t/{number}", 1)])
        client.unsubscribe(f"t/{number}")
    while client.want_write():
        for _ in range(2):  # the second time there is no room
            client.loop_write()
            assert client.socket() is client.line
        client.line.room = step
    said = client.said()
    assert [type(each) for each in said] == [Subscribe, Unsubscribe] * 4
    topics = [each.filters[0] if isinstance(each, Unsubscribe) else each.subscriptions[0].filter for each in said]
    assert topics == [f"t/{number // 2}" for number in range(8)]


def test_a_blocked_send_is_repeated_with_the_same_bytes() -> None:
    """TLS asks for that: its refused write has taken some of them already."""
    client = online()
    client.line.room = 0
    client.line.sizes.clear()
    client.subscribe([("t", 1)])
    for _ in range(3):
        client.loop_write()
        assert client.want_write()
    assert len(set(client.line.sizes)) == 1
    write_all(client)
    assert client.said() == [Subscribe(1, (Subscription("t"),))]


@both_versions
def test_a_failed_send_closes_and_raises_nothing(version: MQTTProtocolVersion) -> None:
    client = online(version)
    client.line.failure = BrokenPipeError()
    client.subscribe([("t", 1)])
    client.loop_write()
    assert client.socket() is None and client.line.closed == 1


# ---- the end


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
def test_a_refused_connection_is_closed_and_not_made_again(code: int) -> None:
    """Code 1 above all, after which paho would connect again with MQTT 3.1, from within `loop_read`."""
    client = OnLine()
    client.reconnect()
    client.loop_write()
    client.hears(Connack(code))
    client.loop_read()
    assert client.created == 1
    assert client.socket() is None and client.line.closed == 1
    assert client.said() == [Connect("x", version=4)]


@both_versions
def test_the_end_of_the_stream_closes(version: MQTTProtocolVersion) -> None:
    client = online(version)
    client.line.ended = True
    client.loop_read()
    assert client.socket() is None and client.line.closed == 1 and client.created == 1


@pytest.mark.parametrize("reason", [0, 0x8E, 0x8B])
def test_a_disconnect_of_the_broker_closes(reason: int) -> None:
    client = online(V5)
    client.hears(Disconnect(reason, form=1 if reason else 0))
    client.loop_read()
    assert client.socket() is None and client.line.closed == 1 and client.created == 1


@both_versions
@pytest.mark.parametrize("room", [0, 1])
def test_our_disconnect_closes_when_it_is_out_and_not_before(version: MQTTProtocolVersion, room: int) -> None:
    client = online(version)
    client.line.room = room
    client.subscribe([("t", 1)])
    client.disconnect()
    client.loop_write()
    assert client.socket() is client.line and not client.line.closed
    client.line.room = 1000
    while client.socket() is not None and client.want_write():
        client.loop_write()
    assert client.socket() is None and client.line.closed == 1
    assert [type(each) for each in client.said()] == [Subscribe, Disconnect]


# ---- MQTT 5


def test_clean_start_and_properties_of_connect() -> None:
    client = OnLine(V5)
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 3600
    properties.ReceiveMaximum = 100
    properties.TopicAliasMaximum = 0
    for clean in (False, True):
        client.connect_async(HOST, 1, 30, clean_start=clean, properties=properties)
        client.reconnect()
        client.line.sent.clear()
        client.loop_write()
        wanted = {"session_expiry": 3600, "receive_maximum": 100, "topic_alias_maximum": 0}
        assert client.said() == [Connect("x", clean, 30, properties=wanted)]


def test_on_connect_gives_the_limits_that_the_broker_told() -> None:
    client = OnLine(V5)
    client.reconnect()
    client.loop_write()
    told = {"receive_maximum": 7, "maximum_packet_size": 5000, "server_keep_alive": 20, "topic_alias_maximum": 10}
    client.hears(Connack(session_present=True, properties=told))
    client.loop_read()
    _, _, flags, reason, properties = client.connected.calls[0]
    assert flags.session_present and reason.value == 0
    found = [
        getattr(properties, name)
        for name in ("ReceiveMaximum", "MaximumPacketSize", "ServerKeepAlive", "TopicAliasMaximum")
    ]
    assert found == [7, 5000, 20, 10]
    assert not hasattr(properties, "AssignedClientIdentifier"), "what was not told is not there"


def test_a_refusal_gives_its_reason_and_text() -> None:
    client = OnLine(V5)
    client.reconnect()
    client.loop_write()
    client.hears(Connack(0x86, properties={"reason_string": "who are you"}))
    client.loop_read()
    _, _, _, reason, properties = client.connected.calls[0]
    assert (reason.value, reason.is_failure, properties.ReasonString) == (0x86, True, "who are you")
    assert client.socket() is None and client.created == 1


# ---- WebSockets


def test_the_wrapper_of_a_websocket_keeps_the_real_socket() -> None:
    """paho does the handshake, and we take the socket from under its wrapper."""
    answer = (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Accept: {}\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
    )

    def serve(listener: socket.socket) -> None:
        import base64
        import hashlib

        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(10)
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += accepted.recv(1000)
            fields = dict(line.split(": ", 1) for line in asked.decode().split("\r\n")[1:] if line)
            key = {name.lower(): value for name, value in fields.items()}["sec-websocket-key"]
            guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            proof = base64.b64encode(hashlib.sha1((key + guid).encode()).digest()).decode()
            # What follows the answer at once must not be swallowed by reading it.
            accepted.sendall(answer.format(proof).encode() + b"first frame")
            accepted.recv(1000)

    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        client = Noting(transport="websockets")
        client.ws_set_options(path="/mqtt")
        client.connect_async(HOST, listener.getsockname()[1])
        client.reconnect()
        wrapper = client.created[0]
        assert client.socket() is wrapper
        real = wrapper._socket
        assert real is client.opened[0]
        real.settimeout(10)
        assert real.recv(100) == b"first frame"
        client.close()
        thread.join(60)

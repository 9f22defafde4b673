"""Servers that do what Mosquitto does not do on request: pings, close frames, fragments, errors, and no answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub._keep_alive import KeepAlive
from tests.fake_broker import Connection, FakeBroker, puback
from tests.making import Inbox
from tests.packets import Connack, Publish, Suback, Subscribe, build
from tests.publishing import LIMIT, client_to, publish_numbers, until
from tests.script import Event, Reply, Script
from tests.websockets import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    FrameSocket,
    agreement,
    frame,
    request_of,
)


def scripted(script: Callable[[Connection], None]) -> Callable[[Connection], None]:
    def serve(connection: Connection) -> None:
        script(Connection(FrameSocket.accept(connection.sock), connection.number))  # type: ignore[arg-type]

    return serve


def ws_of(connection: Connection) -> FrameSocket:
    assert isinstance(connection.sock, FrameSocket)
    return connection.sock


def ws_client(port: int, spool: Path | None = None, **settings: Any) -> cloudpubsub.Client:
    return client_to(port, spool, broker=f"ws://localhost:{port}", **{"client_id": "gateway", **settings})


def numbers_of(script: Script) -> list[int]:
    return [int(publish.payload) for publish in script.publishes]


def connectors() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.endswith("-connector")]


@pytest.mark.parametrize(
    ("url", "path"),
    [("ws://localhost:{}", "/mqtt"), ("ws://localhost:{}/", "/"), ("ws://localhost:{}/a%20b/c", "/a%20b/c")],
)
def test_the_handshake_asks_for_the_path_and_the_host(url: str, path: str) -> None:
    asked: list[FrameSocket] = []

    def serve(connection: Connection) -> None:
        asked.append(FrameSocket.accept(connection.sock))
        Script()(Connection(asked[0], connection.number))  # type: ignore[arg-type]

    with FakeBroker(serve) as broker, client_to(0, None, broker=url.format(broker.port)) as client:
        client.wait(client.publish("t", b"x"), LIMIT)
    assert asked[0].request == f"GET {path} HTTP/1.1"
    assert asked[0].headers["host"] == f"localhost:{broker.port}"
    assert asked[0].headers["origin"] == f"http://localhost:{broker.port}"


def test_pings_of_the_server_are_answered_while_messages_flow() -> None:
    count, pongs = 200, []

    def ping(event: Event) -> Reply | None:
        if isinstance(event.packet, Publish):
            ws_of(event.connection).send_frame(PING, event.packet.payload)
        return None

    script = Script(ping)

    def serve(connection: Connection) -> None:
        try:
            script(connection)
        finally:
            pongs.extend(payload for opcode, payload in ws_of(connection).others if opcode == PONG)

    with FakeBroker(scripted(serve)) as broker, ws_client(broker.port, max_inflight=1) as client:
        publish_numbers(client, range(count))
        assert client.flush(LIMIT) == 0
    assert [int(pong) for pong in pongs] == list(range(count))
    assert numbers_of(script) == list(range(count))


def test_a_ping_is_answered_when_nothing_else_happens() -> None:
    answered = threading.Event()

    def serve(connection: Connection) -> None:
        connection.accept()
        for size in (0, 1, 125):
            ws_of(connection).send_frame(PING, b"p" * size)
            assert ws_of(connection).wait_other(PONG) == b"p" * size
        answered.set()
        connection.until_gone()

    with FakeBroker(scripted(serve)) as broker, ws_client(broker.port):
        assert answered.wait(LIMIT)


def test_pings_of_the_server_do_not_stand_for_its_mqtt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudpubsub._connection.KeepAlive", lambda _: KeepAlive(0.2))  # a second is the least

    def serve(connection: Connection) -> None:
        connection.accept()
        try:
            while True:  # PINGREQ is never answered
                ws_of(connection).send_frame(PING)
                ws_of(connection).wait_other(PONG)
                threading.Event().wait(0.02)
        except ConnectionError:
            pass  # the client hung up, as it should

    with FakeBroker(scripted(serve)) as broker, ws_client(broker.port) as client:
        until(lambda: "silent" in client.stats().last_error)


def test_a_close_frame_is_answered_and_the_rest_sent_again() -> None:
    closings: list[bytes] = []

    def close(event: Event) -> Reply | None:
        if isinstance(event.packet, Publish) and event.number == 5:
            ws = ws_of(event.connection)
            ws.send_frame(CLOSE, b"\x03\xe9going away")
            closings.append(ws.wait_other(CLOSE))
            event.connection.hang_up()
        return None

    script = Script(close)
    with FakeBroker(scripted(script)) as broker, ws_client(broker.port) as client:
        publish_numbers(client, range(20))
        assert client.flush(LIMIT) == 0
        assert client.stats().last_error == "closed by the broker" and client.stats().malformed == 0
    assert closings == [b"\x03\xe9"]
    assert sorted(set(numbers_of(script))) == list(range(20))


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 40_000])
def test_a_server_that_ends_within_a_frame_loses_nothing(cut: int) -> None:
    whole = frame(BINARY, puback(1) * 20_000)  # acknowledged again and again: that is allowed

    def end(event: Event) -> Reply | None:
        if isinstance(event.packet, Publish) and event.number == 3:
            ws_of(event.connection).raw.sendall(whole[:cut])
            event.connection.hang_up()
        return None

    script = Script(end)
    with FakeBroker(scripted(script)) as broker, ws_client(broker.port, max_inflight=10) as client:
        publish_numbers(client, range(10))
        assert client.flush(LIMIT) == 0
        assert broker.connections == 2
    assert sorted(set(numbers_of(script))) == list(range(10))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (frame(TEXT, b"hello"), "websocket: the server sent a text frame"),
        (frame(BINARY, b"\xd0\x00", key=b"abcd"), "websocket: the server sent a masked frame"),
        (b"\xff\x00", "websocket: the server sent a frame with reserved bits"),
    ],
)
def test_an_error_in_the_protocol_ends_the_connection_and_is_named(bad: bytes, named: str) -> None:
    closings: list[bytes] = []

    def break_it(event: Event) -> Reply | None:
        if isinstance(event.packet, Publish) and event.number == 1:
            ws_of(event.connection).raw.sendall(bad)
            closings.append(ws_of(event.connection).wait_other(CLOSE))
            event.connection.hang_up()
        return None

    with FakeBroker(scripted(Script(break_it))) as broker, ws_client(broker.port) as client:
        client.wait(client.publish("t", b"x"), LIMIT)
        assert client.stats().last_error.startswith(named)
        assert client.stats().malformed == 1
    assert closings == [b"\x03\xea"]


def test_messages_in_fragments_and_between_pings_are_put_together() -> None:
    payloads = [b"", b"x" * 256 * 1024, b"y" * 3]
    inbox = Inbox()

    def deliver(event: Event) -> Reply | None:
        if not isinstance(event.packet, Subscribe):
            return None
        connection = event.connection
        data = build(Suback(event.packet.packet_id, (1,)), 4)
        data += b"".join(build(Publish("t", payload, packet_id=number, qos=1), 4)
                         for number, payload in enumerate(payloads, 1))  # fmt: skip
        pieces = [data[at : at + 7_001] for at in range(0, len(data), 7_001)]
        for number, piece in enumerate(pieces):
            opcode = CONTINUATION if number else BINARY
            ws_of(connection).send_frame(opcode, piece, final=number == len(pieces) - 1, wide=8)
            ws_of(connection).send_frame(PING, b"%d" % number)
        ws_of(connection).raw.sendall(frame(BINARY) * 3)
        return b""

    script = Script(deliver)
    with FakeBroker(scripted(script), parallel=True) as broker:
        client = ws_client(broker.port)
        client.subscribe("t", inbox)
        with client:
            inbox.wait(len(payloads))
    assert inbox.payloads == payloads


def test_two_fragments_of_connack_may_be_apart() -> None:
    def serve(connection: Connection) -> None:
        connection.receive_connect()
        whole = frame(BINARY, build(Connack(), 4)[:1], final=False) + frame(CONTINUATION, build(Connack(), 4)[1:])
        for value in whole:
            ws_of(connection).raw.sendall(bytes([value]))
        connection.until_gone()

    with FakeBroker(scripted(serve)) as broker, ws_client(broker.port) as client:
        until(lambda: client.stats().connected)


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "the server answered 'HTTP/1.1 404 Not Found'"),
        (b"HTTP/1.1 200 OK\r\nConnection: upgrade\r\n\r\n", "the server answered 'HTTP/1.1 200 OK'"),
        (b"HTTP/1.1 101 OK\r\nConnection: upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n", "the server agreed"),
        (b"HTTP/1.1 101 OK\r\nConnection: upgrade\r\nSec-WebSocket-Accept:\xff\r\n\r\n", "the server agreed"),
        (b"x" * 17_000, "the server's answer to the handshake is longer"),
        (b"", "the server hung up without an answer"),
    ],
)  # fmt: skip
def test_a_handshake_that_fails_is_named_and_tried_again(answer: bytes, named: str) -> None:
    def serve(connection: Connection) -> None:
        if connection.number == 1:
            request_of(connection.sock)
            connection.send(answer)
            connection.hang_up()
        scripted(Script())(connection)

    with FakeBroker(serve) as broker, ws_client(broker.port) as client:
        client.wait(client.publish("t", b"x"), LIMIT)
        assert client.stats().last_error.startswith(f"websocket: {named}")


def test_an_answer_with_status_200_is_refused_even_if_the_rest_is_right() -> None:
    def serve(connection: Connection) -> None:
        _, headers = request_of(connection.sock)
        connection.send(agreement(headers).replace(b"101", b"200"))
        assert not connection.sock.recv(1)

    with FakeBroker(serve) as broker, ws_client(broker.port) as client:
        until(lambda: "answered 'HTTP/1.1 200" in client.stats().last_error)


def test_a_handshake_that_trickles_ends_in_time_and_leaves_no_thread() -> None:
    gone = threading.Semaphore(0)

    def serve(connection: Connection) -> None:
        try:
            request_of(connection.sock)
            connection.send(b"HTTP/1.1 101 OK\r\nX: ")
            while True:  # a byte each time that much less than connect_timeout has passed
                connection.send(b"x")
                threading.Event().wait(0.02)
        finally:
            gone.release()

    with FakeBroker(serve, parallel=True) as broker:
        with ws_client(broker.port, connect_timeout=0.1) as client:
            for _ in range(3):  # more than may hang at the same time
                assert gone.acquire(timeout=LIMIT)
            assert client.stats().last_error == "WebSocket timed out"
        until(lambda: not connectors())

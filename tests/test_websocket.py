"""`WebSocket` and `Handshake` on a socket that a test plays: what is read, what is written, and when it would block."""

from __future__ import annotations

import socket
import ssl
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.client import WebsocketConnectionError

from cloudpubsub._websocket import Handshake, WebSocket, WebSocketError
from tests.websockets import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, first_frame, frame

LARGE = bytes(range(256)) * 1000


class Played:
    """A socket: `comes` is read piece by piece, an exception in it is raised; `room` says what a send takes.

    An int in `room` is how many bytes at most, an exception is raised; when it is used up everything is taken.
    """

    def __init__(self) -> None:
        self.comes: list[bytes | Exception] = []
        self.room: list[int | Exception] = []
        self.sent = b""
        self.offered: list[bytes] = []
        self.shut: list[int] = []

    def recv_into(self, view: Any) -> int:
        if not self.comes:
            raise BlockingIOError
        piece = self.comes.pop(0)
        if isinstance(piece, Exception):
            raise piece
        if len(piece) > len(view):
            self.comes.insert(0, piece[len(view) :])
        n = min(len(piece), len(view))
        view[:n] = piece[:n]
        return n

    def send(self, data: Any) -> int:
        self.offered.append(bytes(data))
        room = self.room.pop(0) if self.room else len(data)
        if isinstance(room, Exception):
            raise room
        n = min(room, len(data))
        self.sent += bytes(data[:n])
        return n

    def shutdown(self, how: int) -> None:
        self.shut.append(how)

    def frames(self) -> list[tuple[int, bytes]]:
        """What was sent, which must be whole frames."""
        found, rest = [], self.sent
        while rest:
            one = first_frame(rest)
            assert one is not None, f"{len(rest)} bytes of a frame"
            found.append(one[:2])
            rest = rest[one[2] :]
        return found


@pytest.fixture
def raw() -> Played:
    return Played()


@pytest.fixture
def ws(raw: Played) -> WebSocket:
    return WebSocket(raw)  # type: ignore[arg-type]


def read(ws: WebSocket, size: int = 70_000) -> bytes:
    """All that is there."""
    data, view = b"", bytearray(size)
    while True:
        try:
            n = ws.recv_into(memoryview(view))
        except (BlockingIOError, ssl.SSLWantWriteError):
            return data
        data += view[:n]
        if n == 0:
            return data + b"<end>"


def send_all(ws: WebSocket, data: bytes) -> None:
    """As `_connection` does it: the same bytes again until they are counted."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[ws.send(rest) :]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass


def test_a_large_write_goes_in_frames_of_64_kib_at_most(ws: WebSocket, raw: Played) -> None:
    send_all(ws, LARGE)
    assert b"".join(payload for _, payload in raw.frames()) == LARGE
    assert {opcode for opcode, _ in raw.frames()} == {BINARY}
    assert max(len(payload) for _, payload in raw.frames()) == 64 * 1024


def test_each_frame_has_a_key_of_its_own(ws: WebSocket, raw: Played) -> None:
    for _ in range(20):
        ws.send(b"x")
    assert len({raw.sent[at + 2 : at + 6] for at in range(0, len(raw.sent), 7)}) > 15


def test_nothing_is_counted_before_the_whole_frame_is_out(ws: WebSocket, raw: Played) -> None:
    raw.room = [1, BlockingIOError(), 3, BlockingIOError(), BlockingIOError(), 2, BlockingIOError()]
    for _ in range(4):
        with pytest.raises(BlockingIOError):
            ws.send(b"payload")
    assert ws.send(b"payload") == 7
    assert raw.frames() == [(BINARY, b"payload")]


def test_tls_is_offered_the_same_bytes_again(ws: WebSocket, raw: Played) -> None:
    raw.room = [ssl.SSLWantWriteError(), ssl.SSLWantReadError(), ssl.SSLWantWriteError()]
    raw.comes = [frame(PING, b"1")]
    for kind in (ssl.SSLWantWriteError, ssl.SSLWantReadError):
        with pytest.raises(kind):
            ws.send(b"payload")
    assert read(ws) == b""
    assert ws.send(b"payload") == 7
    assert len(set(raw.offered[:4])) == 1
    assert read(ws) == b"" and raw.frames() == [(BINARY, b"payload"), (PONG, b"1")]


rooms = st.lists(st.integers(1, 5) | st.builds(BlockingIOError) | st.builds(ssl.SSLWantWriteError), max_size=30)
steps = st.lists(st.binary(min_size=1, max_size=9) | st.just(None) | st.just(LARGE[:70_000]), max_size=12)


@settings(max_examples=60)
@given(rooms, steps)
def test_answers_go_between_frames_whatever_the_socket_takes(room: list[Any], actions: list[bytes | None]) -> None:
    raw = Played()
    ws = WebSocket(raw)  # type: ignore[arg-type]
    raw.room = room
    payload, pings = b"", 0
    for data in actions:
        if data is None:
            pings += 1
            raw.comes.append(frame(PING, b"%d" % pings))
            read(ws)
        else:
            rest = memoryview(data)
            payload += data
            while rest:
                try:
                    rest = rest[ws.send(rest) :]
                except (BlockingIOError, ssl.SSLWantWriteError):
                    read(ws)
    raw.room.clear()
    read(ws)
    pongs = [int(data) for opcode, data in raw.frames() if opcode == PONG]
    assert b"".join(data for opcode, data in raw.frames() if opcode == BINARY) == payload
    assert pongs == sorted(set(pongs)) and pongs[-1:] == ([pings] if pings else [])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_a_stream_in_pieces_is_put_together(ws: WebSocket, raw: Played, size: int) -> None:
    stream = frame(BINARY, b"one") + frame(BINARY) + frame(BINARY, LARGE[:300], final=False) + frame(PING, b"!")
    stream += frame(CONTINUATION, b"", final=False) + frame(CONTINUATION, b"tail") + frame(PONG, b"unasked")
    stream += frame(BINARY, LARGE[:9_000])
    raw.comes = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert read(ws) == b"one" + LARGE[:300] + b"tail" + LARGE[:9_000]
    assert raw.frames() == [(PONG, b"!")]


def test_what_is_read_into_little_room_is_not_lost(ws: WebSocket, raw: Played) -> None:
    raw.comes = [frame(BINARY, LARGE[:1000]), frame(PING, b"x" * 125), frame(BINARY, b"end")]
    assert read(ws, size=1) == LARGE[:1000] + b"end"
    assert raw.frames() == [(PONG, b"x" * 125)]


def test_frames_without_payload_are_not_the_end(ws: WebSocket, raw: Played) -> None:
    raw.comes = [frame(BINARY), frame(PONG), frame(BINARY, b"x")]
    assert ws.recv(10) == b"x"


def test_an_answer_that_is_blocked_asks_for_room_and_goes_when_there_is(ws: WebSocket, raw: Played) -> None:
    raw.room = [3, BlockingIOError(), BlockingIOError()]
    raw.comes = [frame(PING, b"1")]
    for _ in range(2):
        with pytest.raises(ssl.SSLWantWriteError):
            ws.recv_into(bytearray(10))
    with pytest.raises(BlockingIOError):
        ws.recv_into(bytearray(10))
    assert raw.frames() == [(PONG, b"1")]


def test_of_many_pings_without_room_the_last_is_answered(ws: WebSocket, raw: Played) -> None:
    raw.room = [BlockingIOError()] * 60
    raw.comes = [frame(PING, b"%d" % number) for number in range(50)]
    assert read(ws) == b""
    raw.room.clear()
    ws.send(b"x")
    assert raw.frames() == [(PONG, b"0"), (PONG, b"49"), (BINARY, b"x")]


def test_an_answer_that_fails_hides_nothing_that_is_to_be_read(ws: WebSocket, raw: Played) -> None:
    raw.room = [BrokenPipeError()]
    raw.comes = [frame(PING), frame(BINARY, b"the last words"), b""]
    assert read(ws) == b"the last words<end>"


@pytest.mark.parametrize("words", [b"", b"\x03\xe8", b"\x03\xf0go away"])
def test_a_close_frame_is_answered_and_is_the_end(ws: WebSocket, raw: Played, words: bytes) -> None:
    raw.comes = [frame(BINARY, b"x") + frame(CLOSE, words) + frame(BINARY, b"behind")]
    assert read(ws) == b"x<end>" and read(ws) == b"<end>"
    assert raw.frames() == [(CLOSE, words[:2])]
    with pytest.raises(BrokenPipeError):
        ws.send(b"more")
    assert len(raw.frames()) == 1


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (frame(TEXT, b"x"), "text frame"),
        (frame(BINARY, b"x", key=b"abcd"), "masked frame"),
        (frame(3), "unknown opcode"),
        (b"\xc2\x00", "reserved bits"),
        (frame(PING, b"x", final=False), "control frame"),
        (frame(CONTINUATION), "fragments"),
        (b"\x82\x7f" + b"\xff" * 8, "2^63"),
        (frame(BINARY) * 1001, "without payload"),
        (frame(PING) * 1001, "without payload"),
    ],
)
def test_an_error_in_the_protocol_is_named_after_what_came_before_it(
    ws: WebSocket, raw: Played, bad: bytes, named: str
) -> None:
    raw.comes = [frame(BINARY, b"before") + bad[:1], bad[1:]]
    assert ws.recv(100) == b"before"
    for _ in range(2):
        with pytest.raises(WebSocketError) as caught:
            ws.recv(100)
        assert caught.value.strerror.startswith("websocket: ") and named in caught.value.strerror
    assert raw.frames()[-1] == (CLOSE, b"\x03\xea")


def test_shutting_down_says_goodbye_once(ws: WebSocket, raw: Played) -> None:
    ws.shutdown(socket.SHUT_WR)
    ws.shutdown(socket.SHUT_WR)
    assert raw.frames() == [(CLOSE, b"\x03\xe8")] and raw.shut == [socket.SHUT_WR] * 2


def test_shutting_down_does_not_cut_into_a_frame(ws: WebSocket, raw: Played) -> None:
    raw.room = [3, BlockingIOError()]
    with pytest.raises(BlockingIOError):
        ws.send(b"payload")
    ws.shutdown(socket.SHUT_WR)
    assert len(raw.sent) == 3 and raw.shut == [socket.SHUT_WR]


class TestHandshake:
    @pytest.fixture
    def pair(self) -> Any:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            yield ours, theirs

    def shake(self, ours: socket.socket, deadline_s: float = 60.0) -> Handshake:
        """Read the answer as paho does."""
        handshake = Handshake(ours, time.monotonic() + deadline_s)
        line = b""
        while line != b"\r\n":
            byte = handshake.recv(1)
            if not byte:
                raise handshake.explain(WebsocketConnectionError("WebSocket handshake error"))
            line = byte if line.endswith(b"\n") else line + byte
        handshake.finish()
        return handshake

    @pytest.mark.parametrize(
        ("answer", "named"),
        [
            (b"", "hung up without an answer"),
            (b"HTTP/1.1 101 Sw", "agreed to the handshake, but"),
            (b"HTTP/1.1 404 Not Found\r\n\r\n", "answered 'HTTP/1.1 404 Not Found'"),
            (b"HTTP/1.1 403 \x1b[31m\xff\r\n\r\n", "answered 'HTTP/1.1 403 ?[31m"),
            (b"\x20\x02\x00\x00", "answered"),
            (b"x" * 20_000, "longer than 16384 bytes"),
        ],
    )
    def test_what_went_wrong_is_named(self, pair: Any, answer: bytes, named: str) -> None:
        ours, theirs = pair
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(WebSocketError) as caught:
            self.shake(ours)
        assert named in caught.value.strerror

    def test_a_time_limit_is_for_all_bytes_together(self, pair: Any) -> None:
        ours, theirs = pair
        with pytest.raises(TimeoutError):
            self.shake(ours, 0.05)
        theirs.sendall(b"HTTP/1.1 101 OK\r\n")
        with pytest.raises(TimeoutError):
            self.shake(ours, 0.0)

    def test_errors_that_speak_for_themselves_are_left_as_they_are(self, pair: Any) -> None:
        for error in (TimeoutError(), ConnectionResetError(104, "reset"), ssl.SSLEOFError(8, "EOF")):
            assert Handshake(pair[0], 0.0).explain(error) is error

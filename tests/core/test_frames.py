"""WebSocket frames against those of `tests.websockets`, written from RFC 6455 in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.websockets import BINARY, CLOSE, CONTINUATION, PING, PONG, frame

from .build import load

pytestmark = pytest.mark.usefixtures("core")  # built before the first example is timed


class Frames:
    """The C object, fed in pieces."""

    def __init__(self) -> None:
        self.ffi, self.lib = load()
        self.c = self.ffi.new("cps_frames *")
        self.payload = b""
        self.pings: list[bytes] = []

    def feed(self, data: bytes) -> Frames:
        # Exactly as large as it is, so that a sanitizer sees a byte too many.
        at = self.ffi.new("uint8_t[]", len(data)) if data else self.ffi.NULL
        if data:
            self.ffi.memmove(at, data, len(data))
        kept = self.lib.cps_frames_take(self.c, at, len(data))
        assert kept <= len(data)
        self.payload += bytes(self.ffi.buffer(at, kept)) if kept else b""
        if self.c.has_ping:
            self.pings.append(bytes(self.c.ping[0 : self.c.ping_bytes]))
            self.c.has_ping = False
        return self

    @property
    def closing(self) -> bytes | None:
        return bytes(self.c.control[0 : self.c.control_bytes]) if self.c.is_closed else None


payloads = st.one_of(st.binary(max_size=6), st.sampled_from([0, 125, 126, 127, 65_535, 65_536]).map(bytes))


@given(payloads, st.binary(min_size=4, max_size=4), st.sampled_from([BINARY, CLOSE, PONG]), st.integers(0, 8))
def test_frames_are_masked_as_the_document_says(data: bytes, key: bytes, opcode: int, skew: int) -> None:
    ffi, lib = load()
    source = ffi.new("uint8_t[]", bytes(skew) + data)
    out = ffi.new("uint8_t[]", len(data) + 14)
    size = lib.cps_frames_make(out, opcode, source + skew, len(data), key)
    assert bytes(ffi.buffer(out, size)) == frame(opcode, data, key=key)


controls = st.tuples(st.sampled_from([PING, PONG]), st.binary(max_size=125))
messages = st.lists(st.tuples(payloads, st.sampled_from([0, 2, 8])), min_size=1, max_size=4)


sizes = st.lists(st.sampled_from([1, 1, 2, 3, 50, 70_000]), min_size=1, max_size=50)


@settings(max_examples=50)
@given(st.lists(st.tuples(messages, st.none() | controls), max_size=6), sizes)
def test_a_stream_cut_anywhere_gives_its_payload_and_its_pings(parts: list[Any], cuts: list[int]) -> None:
    stream, payload, pings, idle = b"", b"", [], 0
    for fragments, control in parts:
        for number, (fragment, wide) in enumerate(fragments):
            last = number == len(fragments) - 1
            stream += frame(CONTINUATION if number else BINARY, fragment, final=last, wide=wide)
            payload += fragment
            idle += not fragment
            if control is not None and not last:  # also between the fragments
                stream += frame(*control)
                pings += [control[1]] if control[0] == PING else []
                idle += 1
    frames = Frames()
    at, rest = 0, iter(cuts)
    while at < len(stream):
        size = next(rest, 1_000)
        frames.feed(stream[at : at + size])
        at += size
    assert (frames.payload, frames.c.fault, frames.closing) == (payload, 0, None)
    assert frames.c.idle_frames == idle
    assert frames.pings[-1:] == pings[-1:]  # of several in one piece only the last is kept


@pytest.mark.parametrize(
    ("stream", "fault"),
    [
        (b"\xc2", "RESERVED"), (b"\xa2", "RESERVED"), (b"\x92", "RESERVED"), (b"\x83", "RESERVED"),
        (b"\x8f", "RESERVED"), (b"\x81", "IS_TEXT"), (b"\x01", "IS_TEXT"), (b"\x82\x80", "MASKED"),
        (b"\x82\xff", "MASKED"), (b"\x89\x80", "MASKED"), (b"\x09", "CONTROL"), (b"\x08", "CONTROL"),
        (b"\x89\x7e", "CONTROL"), (b"\x88\x7f", "CONTROL"), (b"\x80", "SEQUENCE"), (b"\x00", "SEQUENCE"),
        (b"\x02\x00\x82", "SEQUENCE"), (b"\x02\x00\x80\x00\x80", "SEQUENCE"),
        (b"\x82\x7f\x80" + bytes(7), "TOO_LARGE"), (b"\x82\x7f" + b"\xff" * 8, "TOO_LARGE"),
    ],
)  # fmt: skip
def test_what_no_server_may_send_is_named(stream: bytes, fault: str) -> None:
    before = frame(BINARY, b"before")
    whole, pieces = Frames().feed(before + stream + b"behind"), Frames()
    for byte in before + stream:
        assert pieces.c.fault == 0
        pieces.feed(bytes([byte]))
    for frames in (whole, pieces):
        assert frames.c.fault == getattr(frames.lib, f"CPS_FRAMES_{fault}")
        assert frames.payload == b"before"
        assert frames.feed(b"\x82\x01x").payload == b"before"


@pytest.mark.parametrize("words", [b"", b"\x03\xe8", b"\x03\xf0" + b"x" * 123])
def test_nothing_is_taken_behind_a_close_frame(words: bytes) -> None:
    frames = Frames().feed(frame(BINARY, b"before") + frame(CLOSE, words) + frame(BINARY, b"behind"))
    assert (frames.payload, frames.closing) == (b"before", words)
    assert frames.feed(b"\x81\x00").closing == words and frames.c.fault == 0


@given(st.binary(max_size=40), st.integers(0, 40))
def test_any_bytes_are_taken_or_refused_the_same_in_one_piece_or_two(stream: bytes, cut: int) -> None:
    whole, pieces = Frames().feed(stream), Frames().feed(stream[:cut]).feed(stream[cut:])
    assert whole.payload == pieces.payload and whole.closing == pieces.closing
    assert whole.c.fault == pieces.c.fault and whole.pings == pieces.pings[-1:]


def test_a_frame_of_2_to_the_63_is_a_stream_like_any_other() -> None:
    frames = Frames().feed(b"\x82\x7f\x7f" + b"\xff" * 7)
    for _ in range(3):
        frames.feed(b"x" * 100_000)
    assert frames.payload == b"x" * 300_000 and frames.c.fault == 0

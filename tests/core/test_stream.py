"""The inbound stream, cut anywhere, and acknowledgements taken from it into the window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .objects import Stream, Window
from .plain import packet, puback, publish

BASE = 1 << 41


def expect(kind: int, data: bytes, **other: Any) -> dict[str, Any]:
    """What the stream is to report for the packet `data`."""
    plain: dict[str, Any] = dict.fromkeys(("topic", "payload", "properties"))
    plain |= {"packet_id": 0, "flags": data[0] & 15, "qos": 0, "reason": 0, "dup": False, "retain": False}
    return plain | {"session_present": False, "type": kind, "bytes": data} | other


def samples(level: int) -> list[dict[str, Any]]:
    """One packet of every kind that a broker may send, with what it says."""
    none = b"" if level == 5 else None
    some = b"\x26\x00\x01a\x00\x01b" if level == 5 else b""
    out = [
        expect(2, b"\x20\x02\x01\x00", session_present=True),
        expect(2, b"\x20\x02\x00\x05", reason=5),
        expect(4, puback(513), packet_id=513),
        expect(5, b"\x50\x02\x00\x09", packet_id=9),
        expect(6, b"\x62\x02\x00\x09", packet_id=9),
        expect(7, b"\x70\x02\x00\x09", packet_id=9),
        expect(9, b"\x90\x03\x00\x0a\x01", packet_id=10),
        expect(11, b"\xb0\x02\x00\x0b", packet_id=11),
        expect(13, b"\xd0\x00"),
        expect(14, b"\xe0\x00"),
    ]
    for topic, payload, qos, dup, retain in [
        (b"t", b"", 0, 0, 0), (b"a/b", b"hello", 1, 1, 0), (b"c" * 300, b"p" * 5000, 1, 0, 1), (b"q2", b"x", 2, 1, 1),
    ]:  # fmt: skip
        data = publish(topic, payload, 77, qos=qos, dup=dup, retain=retain, level=level, properties=some)
        props = some if level == 5 else none
        seen = {"topic": topic, "payload": payload, "properties": props, "packet_id": 77 if qos else 0}
        out.append(expect(3, data, **seen, qos=qos, dup=bool(dup), retain=bool(retain)))
    if level == 5:
        out += [
            expect(2, packet(0x20, b"\x00\x00\x03\x21\x00\x14"), properties=b"\x21\x00\x14"),
            expect(3, publish(b"", b"x", 5, level=5), topic=b"", payload=b"x", packet_id=5, qos=1, properties=b""),
            expect(4, puback(7, 0x10), packet_id=7, reason=0x10),
            expect(4, puback(8, 0x97, 0), packet_id=8, reason=0x97, properties=b""),
            expect(4, puback(9, 0x87, 4, 0x1F, 0, 1, 65), packet_id=9, reason=0x87, properties=b"\x1f\x00\x01A"),
            expect(14, b"\xe0\x01\x8e", reason=0x8E),
            expect(14, b"\xe0\x02\x8b\x00", reason=0x8B, properties=b""),
            expect(15, b"\xf0\x02\x18\x00"),
        ]
    return out


@pytest.mark.parametrize("level", [4, 5])
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 20])
def test_packets_are_whole_however_they_are_cut(open_stream: Callable[..., Stream], level: int, piece: int) -> None:
    wanted = samples(level)
    data = b"".join(one["bytes"] for one in wanted)
    stream = open_stream(16, level=level)
    seen: list[dict[str, Any]] = []
    for at in range(0, len(data), piece):
        stream.feed(data[at : at + piece])
        more, status = stream.drain()
        assert status == stream.lib.CPS_EMPTY
        seen += more
    assert seen == wanted
    assert stream.lib.cps_stream_waiting_bytes(stream.c) == 0


@settings(max_examples=100)
@given(level=st.sampled_from([4, 5]), data=st.data())
def test_random_cuts_and_late_taking_change_nothing(level: int, data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(samples(level)), max_size=12))
    raw = b"".join(one["bytes"] for one in wanted)
    cuts = [*sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=8))), len(raw)]
    stream, seen, begin = Stream(data.draw(st.sampled_from([8, 100, 9000])), 1 << 16, level), [], 0
    for end in cuts:
        stream.feed(raw[begin:end])
        begin = end
        if data.draw(st.booleans()) and isinstance(one := stream.next(), dict):
            seen.append(one)
    more, status = stream.drain()
    assert status == stream.lib.CPS_EMPTY and seen + more == wanted
    stream.close()


MALFORMED = {
    "remaining length of five bytes": b"\x30\xff\xff\xff\xff\x01",
    "remaining length without end": b"\x40\x80\x80\x80\x80",
    "topic one byte longer than the packet": packet(0x30, b"\x00\x04abc"),
    "topic longer than the packet": packet(0x32, b"\x00\x09abc\x00\x01"),
    "topic cut in its length": packet(0x30, b"\x00"),
    "no packet id": packet(0x32, b"\x00\x01a\x00"),
    "packet id 0": publish(b"a", b"", 0),
    "empty topic": publish(b"", b"x", 1),
    "QoS 3": b"\x36",
    "PUBACK of 1 byte": b"\x40\x01\x00",
    "PUBACK of nothing": b"\x40\x00",
    "PUBACK 0": puback(0),
    "PUBACK with flags": b"\x42",
    "SUBACK 0": b"\x90\x03\x00\x00\x01",
    "PUBREL without its flag": b"\x60",
    "CONNACK of 1 byte": b"\x20\x01\x00",
    "CONNACK with unknown flags": b"\x20\x02\x02\x00",
    "PINGRESP with a body": b"\xd0\x01\x00",
    "type 0": b"\x00",
    "CONNECT": b"\x10",
    "SUBSCRIBE": b"\x82",
    "PINGREQ": b"\xc0",
    "AUTH in 3.1.1": b"\xf0\x00",
    "an HTTP server": b"HTTP/1.1 400 Bad Request",
}
MALFORMED_5 = {
    "no properties": packet(0x30, b"\x00\x01a"),
    "properties longer than PUBLISH": packet(0x30, b"\x00\x01a\x05ab"),
    "property length of five bytes": packet(0x30, b"\x00\x01a\xff\xff\xff\xff\x01"),
    "properties longer than PUBACK": puback(1, 0x10, 1),
    "properties longer than CONNACK": packet(0x20, b"\x00\x00\x03\x21"),
    "properties longer than DISCONNECT": packet(0xE0, b"\x8b\x09"),
}


@pytest.mark.parametrize(
    ("level", "data"),
    [pytest.param(4, data, id=name) for name, data in MALFORMED.items()]
    + [pytest.param(5, data, id=name) for name, data in MALFORMED_5.items()],
)
@pytest.mark.parametrize("piece", [1, 100])
@pytest.mark.parametrize("by_acks", [False, True])
def test_malformed_packets_poison_the_stream(
    open_stream: Callable[..., Stream], open_window: Callable[..., Window], level: int, data: bytes, piece: int,
    by_acks: bool,
) -> None:  # fmt: skip
    stream, window = open_stream(level=level), open_window(4)
    good = b"\xd0\x00"
    stream.feed(good)
    assert stream.drain()[0] == [expect(13, good)]
    status = stream.lib.CPS_EMPTY
    for at in range(0, len(data), piece):
        stream.feed(data[at : at + piece])
        status = stream.take(window)[0] if by_acks else stream.next()
        if by_acks and status == stream.lib.CPS_OK:
            status = stream.next()
    assert status == stream.lib.CPS_DAMAGED
    stream.feed(good * 20)
    assert stream.next() == stream.lib.CPS_DAMAGED
    assert stream.take(window)[0] == stream.lib.CPS_DAMAGED
    stream.lib.cps_stream_reset(stream.c)
    stream.feed(good)
    assert stream.drain() == ([expect(13, good)], stream.lib.CPS_EMPTY)


@settings(max_examples=500)
@given(data=st.binary(max_size=60), level=st.sampled_from([4, 5]), first=st.sampled_from(range(0x20, 0x100, 2)))
def test_no_bytes_of_a_broker_break_the_stream(data: bytes, level: int, first: int) -> None:
    """Whole and byte by byte the same packets and the same end."""
    raw, results = bytes([first]) + data, []
    for piece in (1, 100):
        stream, seen = Stream(8, 4096, level), []
        status = stream.lib.CPS_EMPTY
        for at in range(0, len(raw), piece):
            stream.feed(raw[at : at + piece])
            more, status = stream.drain()
            seen += more
        results.append((seen, status))
        stream.close()
    assert results[0] == results[1]


def test_too_large_is_said_before_it_is_read(open_stream: Callable[..., Stream]) -> None:
    stream = open_stream(64, packet_max=200)
    largest = publish(b"t", b"x" * 194, qos=0)
    assert len(largest) == 200
    stream.feed(largest + packet(0x30, bytes(198))[:3])
    assert stream.drain() == ([expect(3, largest, topic=b"t", payload=b"x" * 194)], stream.lib.CPS_TOO_LARGE)
    stream.feed(b"\xd0\x00" * 50)
    assert stream.next() == stream.lib.CPS_TOO_LARGE


def test_buffer_grows_for_one_packet_and_shrinks_again(open_stream: Callable[..., Stream]) -> None:
    stream = open_stream(1024, packet_max=100_000)
    size = stream.lib.cps_stream_buffer_bytes
    data = publish(b"t", b"x" * 90_000, qos=0)
    for at in range(0, len(data), 700):
        stream.feed(data[at : at + 700])
        assert size(stream.c) <= 100_000 + 700
    assert size(stream.c) > 90_000
    one = stream.next()
    assert isinstance(one, dict) and one["payload"] == b"x" * 90_000
    stream.feed(b"\xd0\x00")
    assert size(stream.c) == 1024
    assert stream.drain() == ([expect(13, b"\xd0\x00")], stream.lib.CPS_EMPTY)


def test_a_caller_who_takes_nothing_gets_no_more_space(open_stream: Callable[..., Stream]) -> None:
    stream = open_stream(64, packet_max=1000)
    for _ in range(500):
        stream.feed(b"\xd0\x00")
    assert stream.space(1) == stream.lib.CPS_OK
    stream.feed(b"\xd0")
    assert stream.space(1) == stream.lib.CPS_FULL
    assert len(stream.drain()[0]) == 500
    stream.feed(b"\x00")
    assert len(stream.drain()[0]) == 1


def test_stream_refuses_impossible_sizes(core: tuple[Any, Any]) -> None:
    ffi, lib = core
    out = ffi.new("cps_stream **")
    for initial, packet_max in ((0, 10), (10, 0), (10, lib.CPS_WIRE_PACKET_MAX + 1), (1 << 31, 10)):
        assert lib.cps_stream_open(initial, packet_max, 4, out) == lib.CPS_TOO_LARGE
    assert out[0] == ffi.NULL


def filled(window: Window, n: int) -> None:
    for i in range(n):
        assert window.push(BASE + i * 40, BASE + i * 40 + 40) == i + 1


@pytest.mark.parametrize("piece", [1, 3, 5, 1000])
def test_acks_are_taken_however_they_are_cut(
    open_stream: Callable[..., Stream], open_window: Callable[..., Window], piece: int
) -> None:
    window, stream = open_window(100), open_stream(16, level=5)
    filled(window, 60)
    order = [2, 1, *range(60, 2, -1)]
    data = b"".join(puback(n, *([0x10] if n % 3 == 0 else [0, 0] if n % 7 == 0 else [])) for n in order)
    settled: list[int] = []
    for at in range(0, len(data), piece):
        stream.feed(data[at : at + piece])
        status, positions, packets = stream.take(window)
        assert status == stream.lib.CPS_EMPTY and packets == len(positions)
        assert stream.acks.settled_bytes == 40 * packets
        settled += positions
    assert settled == [BASE + (n - 1) * 40 for n in order]
    assert window.head() == BASE + 60 * 40 and window.inflight == (0, 0)


def test_what_stops_the_acks_stays_for_next(
    open_stream: Callable[..., Stream], open_window: Callable[..., Window]
) -> None:
    window, stream = open_window(100), open_stream(level=5)
    filled(window, 9)
    refusal, ping = puback(3, 0x97), b"\xd0\x00"
    stream.feed(puback(1) + puback(2) + refusal + puback(4) + ping + puback(5) + puback(6) + puback(7)[:3])
    ok, full, empty = stream.lib.CPS_OK, stream.lib.CPS_FULL, stream.lib.CPS_EMPTY
    assert stream.take(window) == (ok, [BASE, BASE + 40], 2)
    assert stream.take(window) == (ok, [], 0)
    assert stream.next() == expect(4, refusal, packet_id=3, reason=0x97)
    assert window.inflight[0] == 7
    assert stream.take(window) == (ok, [BASE + 120], 1)
    assert stream.next() == expect(13, ping)
    assert stream.take(window, 1) == (full, [BASE + 160], 1)
    assert stream.take(window, 0) == (full, [], 0)
    assert stream.take(window, 1) == (empty, [BASE + 200], 1)
    assert window.ack(3) == (BASE + 80, BASE + 120)
    assert window.head() == BASE + 240


def test_unknown_ids_are_taken_and_counted(
    open_stream: Callable[..., Stream], open_window: Callable[..., Window]
) -> None:
    window, stream = open_window(10), open_stream()
    filled(window, 2)
    stream.feed(puback(9) + puback(1) + puback(1) + puback(2))
    assert stream.take(window) == (stream.lib.CPS_EMPTY, [BASE, BASE + 40], 4)
    assert window.lib.cps_window_unknown_acks(window.c) == 2


def test_positions_are_optional(open_stream: Callable[..., Stream], open_window: Callable[..., Window]) -> None:
    window, stream = open_window(10), open_stream()
    filled(window, 3)
    stream.feed(puback(1) + puback(2))
    assert stream.take(window, None) == (stream.lib.CPS_EMPTY, [], 2)
    assert stream.acks.settled == 2 and window.head() == BASE + 80

"""Framing of records against a plain encoder and decoder."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .build import load
from .objects import ANY_BYTES, Stream, Window
from .plain import decode, pad, puback, publish, record

BASE = 1 << 41
ROOMY = 1 << 20


@dataclass
class Log:
    """Records one behind the other, as the log would hand them out."""

    data: bytearray = field(default_factory=bytearray)
    messages: list[tuple[int, int, bytes, bytes, bool]] = field(default_factory=list)  # start, end, ...

    def add(self, topic: bytes, payload: bytes, userdata: bytes = b"", retain: bool = False, **more: Any) -> int:
        position = BASE + len(self.data)
        self.data += record(position, topic, payload, userdata, retain, **more)
        self.messages.append((position, BASE + len(self.data), topic, payload, retain))
        return position


@dataclass
class Framed:
    status: int
    consumed: int
    packets: bytes
    messages: int
    resent: int
    skipped: int
    needs: int
    stop: int
    held: int
    unsendable: tuple[int, int]  # why, and its position


def frame(
    window: Window, data: bytes | bytearray, *, position: int = BASE, room: int = ROOMY, dup_below: int = 0,
    limit: int = 1 << 30, level: int = 4, now_ms: int = 0, **more: Any,
) -> Framed:  # fmt: skip
    ffi, lib = load()
    held = ffi.new("uint8_t[]", bytes(data) or b"\0")
    source = ffi.new("cps_wire_source *", {
        "bytes": held, "size_bytes": len(data), "position": position, "dup_below": dup_below, "now_ms": now_ms,
        "messages_max": limit, "bytes_max": 1 << 40, "packet_bytes_max": lib.CPS_WIRE_PACKET_MAX,
        "level": level, **more,
    })  # fmt: skip
    out, framed = ffi.new("uint8_t[]", room + 1), ffi.new("cps_wire_framed *")
    out[room] = 0xEE
    status = lib.cps_wire_frame(source, window.c, out, room, framed)
    lib.cps_window_check(window.c)
    assert out[room] == 0xEE, "wrote behind the output"
    packets = bytes(ffi.buffer(out, framed.produced_bytes))
    return Framed(
        status, framed.consumed_bytes, packets, framed.messages, framed.resent, framed.skipped, framed.packet_bytes,
        framed.stop, framed.held, (framed.unsendable, framed.unsendable_position),
    )  # fmt: skip


MESSAGE = st.tuples(
    st.sampled_from([b"t", b"gateway-17/temp", b"\xc3\xa4/" * 50]),
    st.sampled_from([b"", b"x", b"21.5", b"y" * 113, b"z" * 130, b"w" * 20000]),
    st.sampled_from([b"", b"mine"]),
    st.booleans(),
    st.sampled_from([0, 0, 8, 24]),  # pad in front
)


@settings(max_examples=150)
@given(
    messages=st.lists(MESSAGE, max_size=12), room=st.sampled_from([150, 400, ROOMY]), limit=st.integers(1, 5),
    capacity=st.integers(1, 6), level=st.sampled_from([4, 5]), known=st.integers(0, 12),
    acked=st.sets(st.integers(0, 5)),
)  # fmt: skip
def test_framing_in_pieces_gives_every_message_once_in_order(
    messages: list[tuple[bytes, bytes, bytes, bool, int]], room: int, limit: int, capacity: int, level: int, known: int,
    acked: set[int],
) -> None:  # fmt: skip
    """With out-of-order acknowledgements before a reconnect, each stop answered by its remedy."""
    lib = load()[1]
    log = Log()
    for topic, payload, userdata, retain, pad_bytes in messages:
        log.data += pad(pad_bytes) if pad_bytes else b""
        log.add(topic, payload, userdata, retain)
    dup_below = log.messages[known][0] if known < len(log.messages) else BASE + len(log.data)
    window = Window(capacity, next_id=65534)
    ids = [window.push(start, end) for start, end, *_ in log.messages[:capacity]]
    done = sorted(n for n in acked if n < len(ids))
    assert all(window.ack(ids[n]) for n in done)
    window.restart()
    remembered = {log.messages[n][0] for n in done if window.was_acked(log.messages[n][0])}

    expected, sent, at, resent, skipped = [], b"", 0, 0, 0
    next_id = (65534 + len(ids) - 1) % 65535 + 1
    flying: list[int] = []
    for start, _end, topic, payload, retain in log.messages:
        if start not in remembered:
            expected.append((topic, payload, int(retain), int(start < dup_below)))
    for _ in range(100):
        framed = frame(
            window, log.data[at:], position=BASE + at, room=room, dup_below=dup_below, limit=limit, level=level
        )
        assert framed.status == lib.CPS_OK and framed.messages <= limit
        at, sent = at + framed.consumed, sent + framed.packets
        resent, skipped = resent + framed.resent, skipped + framed.skipped
        flying += [m["packet_id"] for m in decode(framed.packets, level)[0]]
        if framed.stop == lib.CPS_WIRE_SPAN_END:
            break
        if framed.stop == lib.CPS_WIRE_OUTPUT_FULL and framed.messages == 0:
            assert framed.needs > room
            room = framed.needs
        elif framed.stop == lib.CPS_WIRE_WINDOW_FULL:
            assert flying and all(window.ack(packet_id) for packet_id in flying)
            flying = []
        else:
            assert framed.stop in (lib.CPS_WIRE_LIMIT, lib.CPS_WIRE_OUTPUT_FULL) and framed.messages > 0
    assert at == len(log.data)
    seen, rest = decode(sent, level)
    assert rest == b""
    assert [(m["topic"], m["payload"], m["retain"], m["dup"]) for m in seen] == expected
    assert resent == sum(dup for *_, dup in expected) and skipped == len(remembered)
    if not remembered:
        assert [m["packet_id"] for m in seen] == [(next_id - 1 + n) % 65535 + 1 for n in range(len(seen))]
    window.close()


def test_packet_is_byte_for_byte_what_mqtt_says(open_window: Callable[..., Window]) -> None:
    data = record(BASE, b"a/b", b"hi", b"mine", retain=True)
    assert frame(open_window(1), data).packets == b"\x33\x09\x00\x03a/b\x00\x01hi"
    assert frame(open_window(1), data, dup_below=BASE + 1).packets == b"\x3b\x09\x00\x03a/b\x00\x01hi"
    assert frame(open_window(1), data, level=5).packets == b"\x33\x0a\x00\x03a/b\x00\x01\x00hi"


@pytest.mark.parametrize("remaining", [127, 128, 16383, 16384, 2097151, 2097152])
def test_length_bytes_change_where_mqtt_says(open_window: Callable[..., Window], remaining: int) -> None:
    payload = b"p" * (remaining - 5)
    framed = frame(open_window(1), record(BASE, b"t", payload), room=remaining + 5)
    assert framed.packets == publish(b"t", payload, 1)
    tight = frame(open_window(1), record(BASE, b"t", payload), room=len(framed.packets) - 1)
    assert (tight.messages, tight.needs) == (0, len(framed.packets))


def test_packet_size_is_limited_by_mqtt(core: tuple[Any, Any]) -> None:
    ffi, lib = core
    size = ffi.new("uint32_t *")
    most = lib.CPS_WIRE_REMAINING_MAX
    assert most == 268435455
    for level, overhead in ((4, 4), (5, 5)):
        assert lib.cps_wire_packet_bytes(10, most - overhead - 10, level, size) == lib.CPS_OK
        assert size[0] == lib.CPS_WIRE_PACKET_MAX == most + 5
        assert lib.cps_wire_packet_bytes(10, most - overhead - 9, level, size) == lib.CPS_TOO_LARGE
    for topic, payload in ((65536, 0), (1, (1 << 64) - 1), ((1 << 64) - 1, 1)):
        assert lib.cps_wire_packet_bytes(topic, payload, 4, size) == lib.CPS_TOO_LARGE


def test_window_holds_what_was_framed(open_window: Callable[..., Window]) -> None:
    log, window = Log(), open_window(2)
    for n in range(3):
        log.add(b"t", bytes(n))
    framed = frame(window, log.data, now_ms=77)
    assert (framed.stop, framed.messages) == (window.lib.CPS_WIRE_WINDOW_FULL, 2)
    assert framed.consumed == log.messages[2][0] - BASE
    assert window.inflight == (2, len(framed.packets)) and window.oldest() == (BASE, 77)
    assert window.ack(2) == log.messages[1][:2] and window.ack(1) == log.messages[0][:2]
    assert window.head() == log.messages[1][1]


def damaged(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


GOOD = record(BASE, b"t", b"first")


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(b"\0" * 40, id="zeros"),
        pytest.param(record(BASE + 8, b"t", b"x"), id="foreign position"),
        pytest.param(record(BASE + len(GOOD), b"t", b"x")[:32], id="cut"),
        pytest.param(b"\0" * 4, id="shorter than any record"),
        pytest.param(damaged(record(BASE + len(GOOD), b"t", b"x"), 22, b"\xff\xff"), id="topic longer than the record"),
        pytest.param(record(BASE + len(GOOD), b"", b"x"), id="no topic"),
        pytest.param(damaged(record(BASE + len(GOOD), b"t", b"x"), 20, b"\x80"), id="unknown flag"),
        pytest.param(pad(16)[:8], id="pad longer than the span"),
        pytest.param(struct.pack("<II", 0, 1 << 31), id="pad of nothing"),
    ],
)
def test_damage_is_told_where_it_is(open_window: Callable[..., Window], second: bytes) -> None:
    window = open_window(9)
    framed = frame(window, GOOD + second)
    assert (framed.status, framed.stop) == (window.lib.CPS_DAMAGED, window.lib.CPS_WIRE_REFUSED)
    assert (framed.consumed, framed.messages) == (len(GOOD), 1)
    assert framed.packets == publish(b"t", b"first", 1) and window.inflight[0] == 1


@settings(max_examples=300)
@given(flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=4), cut=st.integers(0, 3000))
def test_no_bytes_of_a_segment_break_the_framing(flips: list[tuple[int, int]], cut: int) -> None:
    log, window = Log(), Window(50)
    for n in range(20):
        log.add(b"topic/%d" % n, b"p" * (n * 7), b"u" * (n % 3))
    for at, value in flips:
        log.data[at % len(log.data)] = value
    framed = frame(window, log.data[: max(0, len(log.data) - cut)])
    assert framed.status in (window.lib.CPS_OK, window.lib.CPS_DAMAGED)
    assert len(decode(framed.packets, 4)[0]) == framed.messages == window.inflight[0]
    window.close()


def test_pubacks_are_framed_as_a_batch(core: tuple[Any, Any]) -> None:
    ffi, lib = core
    out, produced = ffi.new("uint8_t[]", 16), ffi.new("size_t *")
    assert lib.cps_wire_puback(out, 16, [1, 0x1234, 65535], 3, produced) == lib.CPS_OK
    assert bytes(ffi.buffer(out, produced[0])) == puback(1) + puback(0x1234) + puback(65535)
    assert lib.cps_wire_puback(out, 11, [7, 8, 9], 3, produced) == lib.CPS_FULL
    assert bytes(ffi.buffer(out, produced[0])) == puback(7) + puback(8)


def test_resend_skips_what_was_acknowledged(
    open_stream: Callable[..., Stream], open_window: Callable[..., Window]
) -> None:
    """Two broken connections, acknowledgements out of order, then everything once."""
    log, window, stream = Log(), open_window(8), open_stream()
    for n in range(6):
        log.add(b"t", b"%d" % n)
    positions = [start for start, *_ in log.messages]
    assert frame(window, log.data).messages == 6
    stream.feed(puback(2) + puback(5))
    assert stream.take(window)[1] == [positions[1], positions[4]]
    window.restart()
    again = frame(window, log.data, dup_below=positions[5], limit=2)
    assert (again.messages, again.resent, again.skipped) == (2, 2, 1)
    assert [m["payload"] for m in decode(again.packets, 4)[0]] == [b"0", b"2"]
    stream.feed(puback(9))  # "2": ids go on from 7, and the record skipped between took 8
    assert stream.take(window)[1] == [positions[2]] and window.head() is None
    window.restart()
    last = frame(window, log.data, dup_below=positions[5])
    seen = decode(last.packets, 4)[0]
    assert [(m["payload"], m["dup"]) for m in seen] == [(b"0", 1), (b"3", 1), (b"5", 0)]
    assert (last.resent, last.skipped, last.stop) == (2, 3, stream.lib.CPS_WIRE_SPAN_END)
    stream.feed(b"".join(puback(m["packet_id"]) for m in seen))
    assert stream.take(window)[1] == [positions[0], positions[3], positions[5]]
    assert window.head() == log.messages[-1][1]


def test_any_bytes_limit_is_no_limit(open_window: Callable[..., Window]) -> None:
    log, window = Log(), open_window(8, bytes_max=ANY_BYTES)
    for _ in range(8):
        log.add(b"t", b"x" * 10_000)
    assert frame(window, log.data).messages == 8


# ---- what only some messages, or only MQTT 5, have


def aliases(limit: int) -> Any:
    ffi, lib = load()
    table = ffi.new("cps_wire_aliases *")
    lib.cps_wire_aliases_reset(table, limit)
    return table


def test_a_topic_travels_once_and_then_by_its_alias(open_window: Callable[..., Window]) -> None:
    log, window, table = Log(), open_window(8), aliases(10)
    for n in range(3):
        log.add(b"gateway-17/temperature", b"%d" % n)
    first, *others = decode(frame(window, log.data, level=5, aliases=table).packets, 5)[0]
    (alias,) = struct.unpack(">H", first["properties"][1:])
    assert first["topic"] == b"gateway-17/temperature" and first["properties"][0] == 0x23 and 1 <= alias <= 10
    assert [(one["topic"], one["properties"], one["payload"]) for one in others] == [
        (b"", first["properties"], b"1"), (b"", first["properties"], b"2"),
    ]  # fmt: skip


@settings(max_examples=100)
@given(
    topics=st.lists(st.sampled_from([b"a", b"b/c", b"d" * 254, b"e" * 255, b"f" * 300]), max_size=30),
    limit=st.integers(0, 5), room=st.sampled_from([300, 700, ROOMY]), capacity=st.integers(1, 9),
)  # fmt: skip
def test_a_broker_that_follows_the_aliases_knows_every_topic(
    topics: list[bytes], limit: int, room: int, capacity: int
) -> None:
    """However framing is cut, and on a second connection too, where no alias of the first means anything."""
    log, window, lib = Log(), Window(capacity), load()[1]
    for n, topic in enumerate(topics):
        log.add(topic, b"%d" % n)
    for _ in range(2):
        table, known, at, seen = aliases(limit), {}, 0, []  # type: ignore[var-annotated]
        while at < len(log.data):
            framed = frame(window, log.data[at:], position=BASE + at, room=room, level=5, aliases=table)
            assert framed.status == lib.CPS_OK
            for one in decode(framed.packets, 5)[0]:
                assert window.ack(one["packet_id"]) is not None
                topic = one["topic"]
                if one["properties"]:
                    (alias,) = struct.unpack(">H", one["properties"][1:])
                    assert 1 <= alias <= limit
                    topic = topic or known[alias]
                    known[alias] = topic
                seen.append(topic)
            at += framed.consumed
            if framed.stop == lib.CPS_WIRE_OUTPUT_FULL and not framed.messages:
                room = framed.needs
        assert seen == topics
        window.restart()
    window.close()


def test_properties_are_sent_under_5_and_left_out_under_311(open_window: Callable[..., Window]) -> None:
    log, mine = Log(), b"\x26\x00\x01k\x00\x01v"
    log.add(b"t", b"payload", b"userdata", properties=mine)
    log.add(b"t", b"", properties=b"")
    for level, properties in ((4, b""), (5, mine)):
        seen = decode(frame(open_window(4), log.data, level=level).packets, level)[0]
        assert [(m["payload"], m["properties"]) for m in seen] == [(b"payload", properties), (b"", b"")]


@pytest.mark.parametrize(
    ("boot_ms", "earlier_boot", "left_s"),
    [(5_000, False, 10), (5_001, False, 10), (6_000, False, 9), (14_999, False, 1), (15_000, False, None),
     (4_000, False, 10), (9_999, True, 1), (10_000, True, None), (0, True, 10)],
)  # fmt: skip
def test_a_message_travels_with_what_is_left_of_its_life(
    boot_ms: int, earlier_boot: bool, left_s: int | None, open_window: Callable[..., Window]
) -> None:
    """A stamp of the future is a clock that went back; one of an earlier boot is at least as old as this boot."""
    log = Log()
    log.add(b"t", b"p", ttl_ms=10_000, stamp_ms=5_000)
    window = open_window(4)
    framed = frame(window, log.data, level=5, boot_ms=boot_ms, earlier_boot=earlier_boot)
    seen = [m["properties"] for m in decode(framed.packets, 5)[0]]
    assert seen == ([] if left_s is None else [b"\x02" + struct.pack(">I", left_s)])
    ended = window.endings()
    assert ended == ([] if left_s is not None else [(BASE, BASE + len(log.data), 1, len(log.data), 2)])
    assert framed.consumed == len(log.data)


def test_a_message_carries_its_id_and_where_the_one_before_it_ended(open_window: Callable[..., Window]) -> None:
    ffi = load()[0]
    log, prefix, after = Log(), ffi.new("uint8_t[]", b"0123/"), ffi.new("uint64_t *", 77)
    log.add(b"t", b"1")
    log.data += pad(24)
    log.add(b"t", b"2")
    framed = frame(
        open_window(4), log.data, level=5, id_prefix=prefix, id_prefix_bytes=5, after=after
    )
    ids = [m["properties"] for m in decode(framed.packets, 5)[0]]
    (first, end, *_), (second, last, *_) = log.messages
    for properties, text in zip(ids, (f"0123/{first}/{end}/77", f"0123/{second}/{last}/{end}"), strict=True):
        assert properties == b"\x26\x00\x0ecloudpubsub-id" + struct.pack(">H", len(text)) + text.encode()
    assert after[0] == last


def test_what_the_broker_will_not_take_is_held_and_told(open_window: Callable[..., Window]) -> None:
    log, window, lib = Log(), open_window(8), load()[1]
    log.add(b"t", b"x" * 50)
    large = log.add(b"t", b"x" * 100)
    retained = log.add(b"t", b"x", retain=True)
    log.add(b"t", b"y")
    at, told = 0, []
    for _ in range(3):
        framed = frame(window, log.data[at:], position=BASE + at, packet_bytes_max=100, no_retain=True)
        at += framed.consumed
        told.append((framed.stop, framed.messages, framed.held, framed.unsendable))
    assert told == [
        (lib.CPS_WIRE_HELD, 1, 1, (lib.CPS_WIRE_OVERSIZE, large)),
        (lib.CPS_WIRE_HELD, 0, 1, (lib.CPS_WIRE_RETAINED, retained)),
        (lib.CPS_WIRE_SPAN_END, 1, 0, (lib.CPS_WIRE_SENDABLE, 0)),
    ]
    assert window.inflight[0] == 2 and lib.cps_window_held(window.c) == 2


def test_an_alias_never_makes_a_packet_too_large(open_window: Callable[..., Window]) -> None:
    log = Log()
    log.add(b"topic", b"x" * 50)
    size = len(publish(b"topic", b"x" * 50, 1, level=5))
    framed = frame(open_window(4), log.data, level=5, aliases=aliases(5), packet_bytes_max=size)
    assert framed.packets == publish(b"topic", b"x" * 50, 1, level=5)


def test_the_first_messages_can_be_held_back(open_window: Callable[..., Window]) -> None:
    log, window = Log(), open_window(8)
    for n in range(4):
        log.add(b"t", b"%d" % n)
    framed = frame(window, log.data, hold_messages=2, limit=1)
    assert [m["payload"] for m in decode(framed.packets, 4)[0]] == [b"2"]
    assert (framed.held, framed.messages, framed.stop) == (2, 1, window.lib.CPS_WIRE_LIMIT)


def test_no_further_packet_is_framed_when_so_many_bytes_are(open_window: Callable[..., Window]) -> None:
    log = Log()
    for _ in range(5):
        log.add(b"t", b"x" * 93)
    framed = frame(open_window(8), log.data, bytes_max=101)
    assert framed.messages == 2 and framed.stop == load()[1].CPS_WIRE_LIMIT


def test_properties_longer_than_the_record_are_damage(open_window: Callable[..., Window]) -> None:
    log = Log()
    log.add(b"t", b"1234", properties=b"12345")
    data = damaged(bytes(log.data), 32 + 1 + 4 + 5, struct.pack("<H", 10))
    assert frame(open_window(4), data).status == load()[1].CPS_DAMAGED
    assert frame(open_window(4), damaged(data, 32 + 1 + 4 + 5, struct.pack("<H", 9))).status == load()[1].CPS_OK

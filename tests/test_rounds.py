"""Rounds and exchanges without the GIL, on a pair of sockets: what they leave to Python, and that they say it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cloudpubsub._append import append
from cloudpubsub._delivery import Batch, Pubacks
from cloudpubsub._link import Receiver
from cloudpubsub._rounds import exchange, rounds
from cloudpubsub._sender import Sender
from cloudpubsub._spool import Log
from tests import packets
from tests.packets import Publish
from tests.test_streams import memory_log

LONG_MS = 60_000  # that no test waits for
MUCH = 2_000  # in flight
PUBACK = b"\x40\x02"


class End:
    """A sender with its socket, and the other end of that."""

    def __init__(self, window: int = 100, **settings: Any) -> None:
        self.log: Log = memory_log(**settings)
        self.sender = Sender(self.log, window, 1 << 20)
        self.sender.restart()
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.settimeout(60)

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()
        self.log.close(1.0)

    def rounds(self, budget_ms: int = LONG_MS, idle_ms: int = LONG_MS) -> tuple[int, int, int, int, bool]:
        written, received, settled, self.queued, error, is_called, self.is_over = rounds(
            self.sender, self.ours.fileno(), self.log.wake_fd, budget_ms, idle_ms, 500
        )
        return written, received, settled, error, is_called

    def arrived(self) -> list[Publish]:
        data = self.theirs.recv(1 << 20)
        return [one for one in packets.parse_all(data, 4) if isinstance(one, Publish)]

    def acknowledge(self, published: list[Publish]) -> None:
        self.theirs.sendall(b"".join(PUBACK + one.packet_id.to_bytes(2, "big") for one in published))


@pytest.fixture
def end() -> Iterator[End]:
    with contextlib.closing(End()) as made:
        yield made


class Waiting:
    """Rounds on a thread of their own, which are waiting when this is made."""

    def __init__(self, end: End, budget_ms: int = LONG_MS, idle_ms: int = LONG_MS) -> None:
        self._end = end
        self._result: list[tuple[int, int, int, int, bool]] = []
        self._thread = threading.Thread(target=lambda: self._result.append(end.rounds(budget_ms, idle_ms)))
        self._thread.start()
        self.until_idle()

    def until_idle(self) -> None:
        deadline_s = time.monotonic() + 60
        while self._end.sender.at_work_ms != 0:
            assert time.monotonic() < deadline_s

    def result(self) -> tuple[int, int, int, int, bool]:
        self._thread.join(60)
        return self._result[0]


def test_a_stretch_ends_a_while_after_the_first_byte(end: End) -> None:
    for number in range(3):
        append(end.log, "t", b"%d" % number)
    written, *rest = end.rounds(20)
    assert written > 0 and rest == [0, 0, 0, False]
    published = end.arrived()
    assert [one.payload for one in published] == [b"0", b"1", b"2"]
    end.acknowledge(published)
    assert end.rounds(20)[1:] == (12, 3, 0, False)
    assert end.log.stats()["acked"] == 3


def test_with_nothing_to_do_it_waits_as_long_as_it_may(end: End) -> None:
    assert end.rounds(LONG_MS, 20) == (0, 0, 0, 0, False)
    assert end.sender.at_work_ms != 0


def test_what_is_published_meanwhile_is_sent_and_settled_at_once(end: End) -> None:
    waiting = Waiting(end)
    for number in range(5):
        append(end.log, "t", b"%d" % number)
        published = end.arrived()
        assert [one.payload for one in published] == [b"%d" % number]
        end.acknowledge(published)
        end.log.wait_settled(end.log.published() - 1, 60)
    end.log.wake()
    assert waiting.result()[1:] == (20, 5, 0, True)


def test_a_message_was_framed_when_it_was_and_not_when_waiting_began(end: End) -> None:
    waiting = Waiting(end)
    later_ms = (time.monotonic() + 0.1) * 1000
    while time.monotonic() * 1000 < later_ms:
        pass
    append(end.log, "t", b"late")
    end.arrived()
    end.log.wake()
    waiting.result()
    inflight, _, framed_ms, _ = end.sender.inflight()
    assert inflight == 1 and framed_ms >= int(later_ms)


def test_who_calls_is_heard_at_once_and_once(end: End) -> None:
    waiting = Waiting(end)
    end.log.wake()
    assert waiting.result() == (0, 0, 0, 0, True)
    end.log.wake()
    append(end.log, "t", b"behind the call")
    written, *_, is_called = end.rounds()
    assert written > 0 and is_called
    assert end.rounds(LONG_MS, 20) == (0, 0, 0, 0, False)


def test_with_a_full_window_it_waits_for_room(end: End) -> None:
    for number in range(150):
        append(end.log, "t", b"%d" % number)
    waiting = Waiting(end)
    published = end.arrived()
    assert len(published) == 100
    end.acknowledge(published)
    assert [one.payload for one in end.arrived()] == [b"%d" % number for number in range(100, 150)]
    end.log.wake()
    assert waiting.result()[2] == 100


def test_behind_a_large_full_window_it_sleeps_and_hears_who_calls() -> None:
    with contextlib.closing(End(2 * MUCH, ring_bytes=1 << 20)) as end:
        for number in range(3 * MUCH):
            append(end.log, "t", b"%d" % number)
        waiting = Waiting(end)  # the other end reads nothing and says nothing
        later_s = time.monotonic() + 0.1
        while time.monotonic() < later_s:
            assert end.sender.at_work_ms == 0
        assert end.sender.inflight()[0] == 2 * MUCH
        end.log.wake()
        assert waiting.result()[1:] == (0, 0, 0, True)


def test_with_a_socket_that_takes_no_more_it_waits_for_that(end: End) -> None:
    end.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    payload = bytes(4_000)
    for _ in range(3):
        append(end.log, "t", payload)
    waiting = Waiting(end)
    append(end.log, "t", b"last")
    waiting.until_idle()
    data = b""
    while not data.endswith(b"last"):
        data += end.theirs.recv(1 << 20)
    published = [one for one in packets.parse_all(data, 4) if isinstance(one, Publish)]
    assert [len(one.payload) for one in published] == [4_000, 4_000, 4_000, 4]
    end.log.wake()
    assert waiting.result()[4]


def test_closing_the_log_ends_it(end: End) -> None:
    waiting = Waiting(end)
    assert end.log.close(60) == 0
    assert waiting.result() == (0, 0, 0, 0, True)


def test_what_was_acknowledged_counts_although_sending_has_failed(end: End) -> None:
    append(end.log, "t", b"first")
    end.rounds(20)
    end.acknowledge(end.arrived())
    append(end.log, "t", b"second")
    end.ours.shutdown(socket.SHUT_WR)
    assert end.rounds() == (0, 4, 1, errno.EPIPE, False)
    assert end.log.stats()["acked"] == 1


def test_a_reset_is_told_by_its_number(end: End) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        ours.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()
        deadline_s = time.monotonic() + 60
        error = 0
        while not error and time.monotonic() < deadline_s:
            error = rounds(end.sender, ours.fileno(), end.log.wake_fd, LONG_MS, LONG_MS, 500)[4]
        assert error == errno.ECONNRESET


def test_what_is_no_acknowledgement_is_left_to_take(end: End) -> None:
    append(end.log, "t", b"first")
    end.rounds(20)
    (first,) = end.arrived()
    end.theirs.sendall(b"\xd0\x00" + PUBACK + first.packet_id.to_bytes(2, "big"))
    assert end.rounds()[1:] == (6, 0, 0, False)
    assert end.is_over
    assert end.sender.take(False)[1] == 1
    assert end.sender.pingresps == 1


def test_what_the_peer_has_not_taken_is_told(end: End) -> None:
    append(end.log, "t", bytes(1000))
    end.rounds(20)
    assert end.queued > 1000
    end.arrived()
    end.rounds(20, 20)
    assert end.queued == 0


def test_the_end_is_told(end: End) -> None:
    append(end.log, "t", b"first")
    end.rounds(20)
    assert not end.is_over
    end.theirs.close()
    append(end.log, "t", b"second")
    assert end.rounds()[3] in (0, errno.EPIPE, errno.ECONNRESET)
    assert end.is_over


def test_its_time_is_limited(end: End) -> None:
    for number in range(150):
        append(end.log, "t", b"%d" % number)
    assert end.rounds(20)[2] == 0  # the window is full, and nobody answers
    assert len(end.arrived()) == 100


class Receiving:
    """The subscribe connection's end of a socket, and the other one."""

    def __init__(self) -> None:
        self.receiver = Receiver(1 << 20)
        self.receiver.restart()
        self.acks = Pubacks()
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.settimeout(60)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)

    def done(self, *ids: int) -> None:
        batch = Batch(acks=self.acks, wake=lambda: None)
        for packet_id in ids:
            batch.acknowledge(packet_id)

    def exchange(self, timeout_ms: int = 0) -> tuple[int, bytearray, int, int, int]:
        return exchange(self.receiver, self.acks, self.ours.fileno(), self.wake, timeout_ms)

    def messages(self) -> list[bytes]:
        batch, payloads = Batch(), []
        self.receiver.take(batch, 256, 1 << 20)
        while (turn := batch.next()) is not None:
            payloads.append(turn[0].payload)
            batch.step()
        return payloads


@pytest.fixture
def receiving() -> Iterator[Receiving]:
    made = Receiving()
    yield made
    made.ours.close()
    made.theirs.close()
    os.close(made.wake)


def test_an_exchange_sends_acknowledgements_in_order_and_receives(receiving: Receiving) -> None:
    assert receiving.exchange() == (0, b"", 0, 0, 0)
    receiving.done(7, 1, 65535)
    sent = b"".join(packets.build(Publish("t", b"%d" % number, number), 4) for number in (1, 2))
    receiving.theirs.sendall(sent)
    assert receiving.exchange(LONG_MS) == (12, b"", len(sent), 0, 0)
    assert len(receiving.acks) == 0
    assert [one.packet_id for one in packets.parse_all(receiving.theirs.recv(100), 4)] == [7, 1, 65535]
    assert receiving.messages() == [b"1", b"2"]


def test_a_call_ends_an_exchange_and_is_told_once(receiving: Receiving) -> None:
    os.eventfd_write(receiving.wake, 3)
    assert receiving.exchange(LONG_MS) == (0, b"", 0, 3, 0)
    assert receiving.exchange() == (0, b"", 0, 0, 0)


def test_what_the_socket_does_not_take_comes_back_and_is_not_waited_for(receiving: Receiving) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            receiving.ours.send(bytes(1 << 16))
    receiving.done(*range(1, 101))
    written, unsent, received, wakes, error = receiving.exchange(LONG_MS)
    assert (received, wakes, error) == (0, 0, 0)
    assert written + len(unsent) == 400
    assert len(unsent) > 0
    assert unsent.endswith(PUBACK + b"\x00\x64")
    assert len(receiving.acks) == 0


def test_of_a_broken_connection_what_came_before_is_received(receiving: Receiving) -> None:
    sent = packets.build(Publish("t", b"last", 1), 4)
    receiving.theirs.sendall(sent)
    receiving.theirs.close()
    receiving.done(9)
    written, unsent, received, _, error = receiving.exchange(LONG_MS)
    assert (written, unsent, received, error) == (0, PUBACK + b"\x00\x09", len(sent), 0)
    assert receiving.messages() == [b"last"]
    assert receiving.ours.recv(1) == b""  # the end is still to be heard


def test_an_error_of_receiving_is_told(receiving: Receiving) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()  # with a reset
    listener.close()
    ours.setblocking(False)
    told = exchange(receiving.receiver, receiving.acks, ours.fileno(), receiving.wake, LONG_MS)
    ours.close()
    assert told == (0, b"", 0, 0, errno.ECONNRESET)


def test_a_flood_is_received_in_parts_that_leave_room_to_work_it_off(receiving: Receiving) -> None:
    flood = packets.build(Publish("t", bytes(1000), 1), 4) * 2_000
    feeder = threading.Thread(target=lambda: receiving.theirs.sendall(flood))
    feeder.start()
    total, parts = 0, []
    while total < len(flood):
        received = receiving.exchange(LONG_MS)[2]
        assert 0 < received <= 1 << 20
        parts += receiving.messages()
        total += received
    while more := receiving.messages():
        parts += more
    feeder.join(60)
    assert len(parts) == 2_000

"""Rounds without the GIL, on a pair of sockets: what they leave to Python, and that they say it."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator

import pytest

from cloudpubsub._append import append
from cloudpubsub._rounds import rounds
from cloudpubsub._sender import Sender
from cloudpubsub._spool import Log
from tests import packets
from tests.packets import Publish
from tests.test_streams import memory_log

LONG_MS = 60_000  # that no test waits for
PATIENT = 2_000
PUBACK = b"\x40\x02"


class End:
    """A sender with its socket, and the other end of that."""

    def __init__(self) -> None:
        self.log: Log = memory_log()
        self.sender = Sender(self.log, 100, 1 << 20)
        self.sender.restart()
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.settimeout(60)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)

    def rounds(self, budget_ms: int = LONG_MS) -> tuple[int, int, int, int]:
        return rounds(self.sender, self.ours.fileno(), self.wake, budget_ms, PATIENT, 500)

    def arrived(self) -> list[Publish]:
        data = self.theirs.recv(1 << 20)
        return [one for one in packets.parse_all(data, 4) if isinstance(one, Publish)]

    def acknowledge(self, published: list[Publish]) -> None:
        self.theirs.sendall(b"".join(PUBACK + one.packet_id.to_bytes(2, "big") for one in published))


@pytest.fixture
def end() -> Iterator[End]:
    made = End()
    yield made
    made.ours.close()
    made.theirs.close()
    os.close(made.wake)
    made.log.close(1.0)


def test_a_stretch_ends_when_the_log_does(end: End) -> None:
    for number in range(3):
        append(end.log, "t", b"%d" % number)
    written, received, settled, error = end.rounds()
    assert written > 0 and (received, settled, error) == (0, 0, 0)
    published = end.arrived()
    assert [one.payload for one in published] == [b"0", b"1", b"2"]
    end.acknowledge(published)
    assert end.rounds()[1:] == (12, 3, 0)
    assert end.log.stats()["acked"] == 3


def test_with_a_full_window_it_waits_for_room_and_for_who_calls(end: End) -> None:
    for number in range(150):
        append(end.log, "t", b"%d" % number)
    os.eventfd_write(end.wake, 1)
    end.rounds()
    published = end.arrived()
    assert len(published) == 100
    end.acknowledge(published)
    assert end.rounds()[2] == 100
    assert [one.payload for one in end.arrived()] == [b"%d" % number for number in range(100, 150)]


def test_what_was_acknowledged_counts_although_sending_has_failed(end: End) -> None:
    append(end.log, "t", b"first")
    end.rounds()
    end.acknowledge(end.arrived())
    append(end.log, "t", b"second")
    end.ours.shutdown(socket.SHUT_WR)
    assert end.rounds() == (0, 4, 1, errno.EPIPE)
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
            error = rounds(end.sender, ours.fileno(), end.wake, 0, PATIENT, 500)[3]
        assert error == errno.ECONNRESET


def test_what_is_no_acknowledgement_is_left_to_take(end: End) -> None:
    append(end.log, "t", b"first")
    end.rounds()
    (first,) = end.arrived()
    end.theirs.sendall(b"\xd0\x00" + PUBACK + first.packet_id.to_bytes(2, "big"))
    assert end.rounds()[1:] == (6, 0, 0)
    assert end.sender.take(False)[1] == 1
    assert end.sender.pingresps == 1


def test_its_time_is_limited(end: End) -> None:
    for number in range(150):
        append(end.log, "t", b"%d" % number)
    assert end.rounds(20)[2] == 0  # the window is full, and nobody answers
    assert len(end.arrived()) == 100

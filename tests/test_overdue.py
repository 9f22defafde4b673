"""When an acknowledgement is overdue: by the send queue of the kernel, not by the clock alone."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

from cloudpubsub._overdue import Overdue
from tests.brokers import Broker
from tests.fake_broker import FakeBroker
from tests.fault_relay import FaultRelay, Faults, Harm
from tests.packets import Publish
from tests.publishing import LIMIT, client_to, publish_numbers, until
from tests.script import Event, Script

T = 30.0


def begun(position: int = 8, framed_s: float = 100.0) -> Overdue:
    overdue = Overdue(T)
    overdue.restart(framed_s)
    overdue.oldest(position, framed_s, False)
    overdue.wrote(1000, framed_s)
    return overdue


def test_what_the_peer_has_not_taken_is_never_overdue() -> None:
    overdue = begun()
    overdue.queue(1, 500.0)
    assert overdue.due_s(100.0) == math.inf


def test_the_time_runs_from_when_the_peer_took_it() -> None:
    overdue = begun()
    overdue.queue(1, 110.0)
    overdue.queue(0, 150.0)
    assert overdue.due_s(100.0) == 150.0 + T


def test_acknowledgements_of_earlier_messages_put_it_off() -> None:
    overdue = begun()
    overdue.queue(0, 100.0)
    overdue.acked(120.0)
    overdue.oldest(16, 120.0, True)
    assert overdue.due_s(100.0) == 120.0 + T


def test_a_later_message_that_was_acknowledged_does_not() -> None:
    """However many others come: the first that overtook the oldest counts."""
    overdue = begun()
    overdue.queue(0, 100.0)
    for now_s in (105.0, 110.0, 125.0):
        overdue.acked(now_s)
        overdue.oldest(8, now_s, True)
    assert overdue.due_s(100.0) == 105.0 + T


def test_each_message_has_its_own_time() -> None:
    overdue = Overdue(T)
    overdue.restart(0.0)
    for second in range(20):
        overdue.wrote(100, float(second))
    overdue.queue(1000, 50.0)  # the first ten seconds' bytes
    overdue.oldest(8, 50.0, False)
    assert overdue.due_s(5.0) == 50.0 + T
    assert overdue.due_s(15.0) == math.inf
    overdue.queue(0, 60.0)
    assert overdue.due_s(15.0) == 60.0 + T


def test_memory_is_bounded_however_long_nothing_is_taken() -> None:
    overdue = Overdue(T)
    overdue.restart(0.0)
    for n in range(100_000):
        overdue.wrote(10, n / 1000)
    assert len(overdue._marks) < 300
    overdue.queue(0, 100.0)
    assert len(overdue._left) < 300 and not overdue.waits


# ---- on a link


def test_a_slow_link_with_a_full_window_makes_progress_and_is_never_given_up(broker: Broker, tmp_path: Path) -> None:
    """Each message takes longer than the time limit on its way out of the send queue."""
    with FaultRelay(broker.port, Faults(up=Harm(rate=200_000))) as relay:
        # What the peer's TCP would take at once, it takes no faster than the link is.
        relay._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with client_to(relay.port, tmp_path, ack_timeout=1.5, max_payload_bytes=400_000) as client:
            for _ in range(3):
                client.publish("a", bytes(400_000))
            assert client.flush(LIMIT) == 0
            assert client.stats().connects == 1


def test_a_broker_that_swallows_one_acknowledgement_is_left_and_the_message_sent_again(tmp_path: Path) -> None:
    """Though it goes on acknowledging all the others."""

    def swallow(event: Event) -> Any:
        return b"" if isinstance(event.packet, Publish) and event.number == 3 else None

    script = Script(swallow)
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, ack_timeout=1.5) as client:
        positions = publish_numbers(client, range(5))
        until(lambda: client.stats().connects >= 2 or publish_numbers(client, [9]))
        client.wait(positions[2], LIMIT)
        assert client.flush(LIMIT) == 0
        assert "no acknowledgement" in client.stats().last_error
    assert sum(publish.payload == b"2" for publish in script.publishes) == 2

"""A full window is refilled a good piece at a time, but what a broker does not give is not waited for.

Nor is it asked for all the time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub._publisher import Publisher
from tests import packets
from tests.fake_broker import ACCEPTED, Connection, FakeBroker, puback
from tests.packets import Puback
from tests.publishing import LIMIT, client_to, publish_numbers, until

WINDOW = 3000  # so large that acknowledgements are left alone for a while
FEW, TIMES = 10, 20
QUOTA_EXCEEDED = 0x97


def stingy(connection: Connection) -> None:
    """Acknowledges few, and no more before as many came again."""
    connection.accept(ACCEPTED)
    waiting = [publish.packet_id for publish in connection.publishes(WINDOW)]
    for _ in range(TIMES):
        connection.send(puback(*waiting[:FEW]))
        waiting = waiting[FEW:] + [publish.packet_id for publish in connection.publishes(FEW)]
    connection.send(puback(*waiting))
    connection.until_gone()


@pytest.mark.parametrize("settings", [{}, {"on_publish": lambda _: None}], ids=["without the GIL", "in Python"])
def test_a_broker_that_waits_for_more_gets_it(settings: dict[str, Any], tmp_path: Path) -> None:
    with FakeBroker(stingy) as broker, client_to(broker.port, tmp_path, max_inflight=WINDOW, **settings) as client:
        publish_numbers(client, range(WINDOW + FEW * TIMES))
        assert client.flush(LIMIT) == 0
        assert client.stats().connects == 1


def refusing(connection: Connection) -> None:
    """Refuses the first message for now, acknowledges some of the others, and then says nothing."""
    connection.accept(ACCEPTED)
    first, *others = [publish.packet_id for publish in connection.publishes(WINDOW)]
    assert first is not None
    connection.send(packets.build(Puback(first, QUOTA_EXCEEDED), 5) + puback(*others[:500]))
    connection.until_gone()


@pytest.mark.parametrize("settings", [{}, {"on_publish": lambda _: None}], ids=["without the GIL", "in Python"])
def test_while_sending_stands_still_the_thread_sleeps(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0
    next_bytes = Publisher._next_bytes

    def count(publisher: Publisher) -> memoryview | None:
        nonlocal turns
        turns += 1
        return next_bytes(publisher)

    def has_slept() -> bool:
        before, later_s = turns, time.monotonic() + 0.5
        while time.monotonic() < later_s:
            pass
        return turns - before < 10

    monkeypatch.setattr(Publisher, "_next_bytes", count)
    settings = {**settings, "max_inflight": WINDOW, "protocol": "5", "ack_timeout": 600, "keep_alive": 600}
    with FakeBroker(refusing) as broker, client_to(broker.port, tmp_path, **settings) as client:
        publish_numbers(client, range(2 * WINDOW))
        until(lambda: client.stats().acked == 0 and client.stats().inflight == WINDOW - 501)
        until(has_slept)

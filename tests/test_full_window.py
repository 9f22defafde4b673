"""A full window is refilled a good piece at a time, but what a broker does not give is not waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fake_broker import ACCEPTED, Connection, FakeBroker, puback
from tests.publishing import LIMIT, client_to, publish_numbers

WINDOW = 3000  # so large that acknowledgements are left alone for a while
FEW, TIMES = 10, 20


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

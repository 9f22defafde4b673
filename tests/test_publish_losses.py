"""What a client says about messages that the disk lost, and about those that it did not."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudpubsub import Client, DeliveryFailed, Drop
from tests.brokers import Rumqttd
from tests.publishing import LIMIT, client_to
from tests.reader import read_spool
from tests.spools import DAMAGES, SMALL

NOBODY = 1
COUNT = 600
BY_NAME = {damage.name: damage for damage in DAMAGES}


def has_failed(client: Client, position: int) -> bool:
    try:
        client.wait(position, LIMIT)
    except DeliveryFailed:
        return True
    return False


def pending_in(path: Path) -> set[int]:
    return {message.position for message in read_spool(path).pending}


@pytest.mark.parametrize("name", ["payload", "zeros in the middle", "missing file", "cut between records", "pad crc"])
def test_waiting_fails_for_what_was_lost_and_for_nothing_else(name: str, rumqttd: Rumqttd, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    with client_to(NOBODY, spool, **SMALL) as client:
        for number in range(COUNT):
            client.publish(f"a/{number}", b"%03d" % number * (4 * (number % 60)), userdata=b"\xff" * (number % 5))
    whole = pending_in(spool)
    assert len(whole) == COUNT
    BY_NAME[name].do(spool)
    lost = whole - pending_in(spool)
    drops: list[Drop] = []
    with client_to(rumqttd.port, spool, **SMALL, on_drop=drops.append) as client:
        client.flush(LIMIT)
        stats = client.stats()
        failed = {position for position in whole if has_failed(client, position)}
    assert (stats.acked, stats.dropped) == (COUNT - len(lost), len(lost))
    assert failed == lost
    assert sum(drop.count for drop in drops) == len(lost)

"""Three NATS nodes that keep everything three times, and a client that knows them all."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import HOST
from tests.collector import Collector
from tests.making import Inbox
from tests.more_brokers import Nats, nats_cluster
from tests.publishing import LIMIT, client_to, number_of, until
from tests.test_publish_broker_restart import publishing

pytestmark = [pytest.mark.usefixtures("need_nats"), pytest.mark.slow_brokers, pytest.mark.timeout(600)]

COUNT = 4_000
ELECTION = 60.0  # a cluster that has lost a node, or has just been started, elects for seconds


def stream_of_messages(node: Nats) -> dict[str, Any]:
    """What the cluster says of the stream that MQTT messages are kept in, asked in NATS's own protocol."""
    with socket.create_connection((HOST, node.client_port), timeout=LIMIT) as sock, sock.makefile("rb") as answers:
        answers.readline()  # INFO
        sock.sendall(b'CONNECT {"verbose":false}\r\nSUB answer 1\r\n')
        sock.sendall(b"PUB $JS.API.STREAM.INFO.$MQTT_msgs answer 0\r\n\r\n")
        while not (line := answers.readline()).startswith(b"MSG"):
            assert line, "closed"
        found: dict[str, Any] = json.loads(answers.read(int(line.split()[-1])))
        return found


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Nats]]:
    with nats_cluster(tmp_path / "cluster") as running:
        yield running


@pytest.fixture
def collector(nodes: list[Nats]) -> Iterator[Collector]:
    """On the last node, which no test ends."""
    collector = Collector(nodes[-1].port, "n/#", key=number_of)
    collector.start(ELECTION)
    yield collector
    collector.stop()


def test_the_node_in_use_is_killed_and_nothing_is_lost(
    nodes: list[Nats], collector: Collector, tmp_path: Path
) -> None:
    by_url = {f"mqtt://{HOST}:{node.port}": node for node in nodes}
    connected = Inbox()
    client = client_to(
        0, tmp_path / "spool", broker=list(by_url), max_publish_rate=2_000, ack_timeout=10, on_connect=connected
    )
    with publishing(client, COUNT, "n/x", ELECTION):
        collector.wait_for(COUNT // 4, ELECTION)
        assert stream_of_messages(nodes[-1])["config"]["num_replicas"] == 3
        in_use = by_url[connected.first[0]]
        assert in_use is nodes[0]  # the first that was named
        in_use.kill()
        until(lambda: len(connected.first) >= 2, ELECTION)
        assert by_url[connected.first[-1]] is not in_use
    assert client.stats().acked == client.stats().published == COUNT
    collector.wait_for(COUNT, ELECTION)
    assert collector.first_deliveries() == list(range(COUNT))

"""The will is for those who die, not for those who leave."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import cloudpubsub
from cloudpubsub._paho import Tap
from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker
from tests.collector import Collector
from tests.killed_publisher import Publisher
from tests.publishing import CLIENT_ID, LIMIT, client_to, publish_numbers, until

WILL = cloudpubsub.Will("status", b"gone")


def _end_marker(broker: Broker, collector: Collector, tmp_path: Path) -> None:
    """Everything that the broker published before has arrived when this has."""
    with client_to(broker.port, tmp_path / "marker", client_id="marker") as client:
        client.wait(client.publish("status", b"marker"), LIMIT)
    until(lambda: b"marker" in collector.arrivals())


def test_a_killed_process_leaves_its_will(broker: Broker, tmp_path: Path) -> None:
    with Collector(broker.port, "status") as collector, Publisher() as publisher:
        publisher.start(
            0,
            broker=f"mqtt://127.0.0.1:{broker.port}",
            client_id=CLIENT_ID,
            spool=str(tmp_path / "spool"),
            will={"topic": "status", "payload": "gone"},
        )
        until(lambda: publisher.was_connected)
        publisher.kill()
        collector.wait_for(1, LIMIT)
        assert collector.arrivals() == [b"gone"]


def test_the_goodbye_arrives_with_a_full_pipeline(broker: Broker, tmp_path: Path) -> None:
    with Collector(broker.port, "status") as collector:
        client = client_to(broker.port, tmp_path / "spool", will=WILL)
        client.start()
        thread = threading.Thread(target=_publish_until_closed, args=(client,))
        thread.start()
        until(lambda: client.stats().acked > 10_000)
        client.close(30)
        thread.join(LIMIT)
        _end_marker(broker, collector, tmp_path)
        assert collector.arrivals() == [b"marker"]


def test_the_goodbye_arrives_over_a_slow_link(mosquitto: Broker, tmp_path: Path) -> None:
    with Collector(mosquitto.port, "status") as collector, Relay(mosquitto.port) as relay:
        client = client_to(relay.port, tmp_path / "spool", will=WILL, max_inflight_bytes=1 << 20)
        client.start()
        until(lambda: client.stats().connected)
        relay.set_rate(500_000)
        publish_numbers(client, range(100_000))
        until(lambda: client.stats().inflight > 1_000)
        client.close(30)
        assert client.stats().backlog_messages > 0, "it was not slow"
        _end_marker(mosquitto, collector, tmp_path)
        assert collector.arrivals() == [b"marker"]


def test_the_goodbye_is_waited_for_while_the_broker_answers() -> None:
    """Each pause is shorter than the limit, all of them together are longer."""
    ours, theirs = socket.create_server(("127.0.0.1", 0)), socket.socket()
    with ours, theirs:
        theirs.connect(ours.getsockname())
        tap = Tap(ours.accept()[0])
        tap.linger_s, tap.linger_until_s = 1.0, time.monotonic() + LIMIT
        closing = threading.Thread(target=tap.close)
        closing.start()
        assert theirs.recv(1) == b"", "it says that nothing more comes"
        for _ in range(8):
            time.sleep(0.2)  # what a busy broker takes for each
            theirs.sendall(b"\x40\x02\x00\x01")
        # A socket that was closed before would have answered with a reset.
        theirs.shutdown(socket.SHUT_WR)
        closing.join(LIMIT)
        assert not closing.is_alive()
        assert theirs.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def _publish_until_closed(client: cloudpubsub.Client) -> None:
    try:
        while True:
            client.publish("topic", b"x" * 100)
    except cloudpubsub.ClosedError:
        pass

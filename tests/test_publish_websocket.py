"""Both connections through WebSockets, against Mosquitto and over links that cut them anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from tests.brokers import Mosquitto, TlsFiles
from tests.collector import Collector
from tests.fault_relay import FaultRelay, Faults, Harm, both, in_turn
from tests.making import Inbox
from tests.publishing import LIMIT, client_to, number_of, publish_numbers, until

SIZES = (0, 1, 119, 125, 126, 127, 4_096, 65_529, 65_536, 131_072, 256 * 1024)

ClientTo = Callable[..., cloudpubsub.Client]


pytestmark = pytest.mark.usefixtures("need_mosquitto")


@pytest.fixture(scope="module")
def shared(tls_files: TlsFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("shared"), tls=tls_files, websockets=True) as running:
        yield running


@pytest.fixture
def broker(request: pytest.FixtureRequest, need_mosquitto: None) -> Mosquitto:
    """One for all tests that do not stop it."""
    running: Mosquitto = request.getfixturevalue("shared")
    return running


@pytest.fixture(params=["ws", "wss"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def to(scheme: str, tls_files: TlsFiles, tmp_path: Path) -> ClientTo:
    """A client for a port of this machine, not started."""

    def make(port: int, **settings: Any) -> cloudpubsub.Client:
        if scheme == "wss":
            settings["tls"] = cloudpubsub.TLS(ca=tls_files.ca)
        return client_to(port, tmp_path / "spool", broker=f"{scheme}://localhost:{port}/mqtt", **settings)

    return make


def port_of(broker: Mosquitto, scheme: str) -> int:
    return broker.websocket_tls_port if scheme == "wss" else broker.websocket_port


def collecting(broker: Mosquitto, scheme: str, topic: str, **settings: Any) -> Collector:
    """Under a name of its own, because the broker is shared and the session stays."""
    return Collector(broker.port, topic, client_id=f"collector-{scheme}-{topic[:5]}", **settings)


def payload_of(size: int) -> bytes:
    return (b"%d " % size * (size // 2 + 1))[:size]


def wait_for(inbox: Inbox, count: int, client: cloudpubsub.Client) -> list[bytes]:
    """Payloads that came.  While it waits it keeps Mosquitto busy, which else takes 6 s for 256 KiB."""

    def look() -> bool:
        client.publish("noise", b"")
        return len(inbox.calls) >= count

    until(look)
    return inbox.payloads


def test_messages_of_every_size_go_out_and_come_in(broker: Mosquitto, scheme: str, to: ClientTo) -> None:
    inbox, payloads = Inbox(), [payload_of(size) for size in SIZES]
    client = to(port_of(broker, scheme))
    client.subscribe("sizes/+", inbox)
    with client, collecting(broker, scheme, "sizes/+") as collector:
        client.wait_subscribed(LIMIT)
        for number, payload in enumerate(payloads):
            client.publish(f"sizes/{number}", payload)
        assert client.flush(LIMIT) == 0
        collector.wait_for(len(payloads), LIMIT)
        assert collector.arrivals() == payloads
        assert wait_for(inbox, len(payloads), client) == payloads
        assert client.stats().reconnects == 0 and client.stats().malformed == 0


def test_a_restart_of_the_broker_loses_nothing(scheme: str, to: ClientTo, tls_files: TlsFiles, tmp_path: Path) -> None:
    count, inbox = 3_000, Inbox()
    with Mosquitto(tmp_path / "mosquitto", tls=tls_files, websockets=True) as broker:
        with Collector(broker.port, "numbers", key=number_of) as collector:
            client = to(port_of(broker, scheme), max_publish_rate=8_000)
            client.subscribe("commands", inbox)
            with client:
                publish_numbers(client, range(count))
                collector.wait_for(count // 4, LIMIT)
                broker.restart()
                assert client.flush(LIMIT) == 0
                collector.wait_for(count, LIMIT)
                until(lambda: client.stats().reconnects >= 2)  # both connections
                client.wait_subscribed(LIMIT)
                client.publish("commands", b"go")
                assert inbox.wait(1)[0].payload == b"go"
            assert collector.first_deliveries() == list(range(count))


def test_the_command_line_takes_the_url_from_the_environment(broker: Mosquitto) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CLOUDPUBSUB_")}
    environ["CLOUDPUBSUB_BROKER"] = f"ws://localhost:{broker.websocket_port}"

    command = [sys.executable, "-m", "cloudpubsub", "pub", "-t", "kept", "-m", "text", "-r"]
    subprocess.run(command, env=environ, check=True, timeout=LIMIT)
    with collecting(broker, "ws", "kept") as collector:
        collector.wait_for(1, LIMIT)
        assert collector.arrivals() == [b"text"]


def test_everything_works_byte_by_byte(broker: Mosquitto, scheme: str, to: ClientTo) -> None:
    inbox = Inbox()
    with FaultRelay(port_of(broker, scheme), both(chunk=1)) as relay:
        client = to(relay.port)
        client.subscribe("t", inbox)
        with client:
            client.wait_subscribed(LIMIT)
            payloads = [payload_of(size) for size in (0, 1, 124, 130)]
            for payload in payloads:
                client.publish("t", payload)
            assert client.flush(LIMIT) == 0
            inbox.wait(len(payloads))
        assert inbox.payloads == payloads


def test_a_link_that_is_cut_anywhere_loses_nothing(broker: Mosquitto, scheme: str, to: ClientTo) -> None:
    count = 600
    cuts = [Faults(up=Harm(after=after, then="reset")) for after in (230, 700, 3_001)]
    if scheme == "wss":  # the handshakes alone are larger
        cuts = [Faults(up=Harm(after=after, then="reset")) for after in (700, 1_700, 4_001)]
    with FaultRelay(port_of(broker, scheme), in_turn(*cuts, both())) as relay:
        with collecting(broker, scheme, "numbers", key=number_of) as collector:
            client = to(relay.port, max_inflight=40)
            with client:
                publish_numbers(client, range(count))
                assert client.flush(LIMIT) == 0
            collector.wait_for(count, LIMIT)
            assert collector.first_deliveries() == list(range(count))
        assert relay.seen().number == len(cuts) + 1


def test_large_messages_that_fill_the_socket_arrive_whole(broker: Mosquitto, scheme: str, to: ClientTo) -> None:
    payloads = [bytes([number]) * 900_000 for number in range(3)]
    with FaultRelay(port_of(broker, scheme), both(rate=20_000_000)) as relay:
        client = to(relay.port, max_payload_bytes=1_000_000, max_inflight_bytes=4 << 20, ring_bytes=8 << 20)
        with collecting(broker, scheme, "large") as collector, client:
            for payload in payloads:
                client.publish("large", payload)
            assert client.flush(LIMIT) == 0
            assert client.stats().reconnects == 0
            collector.wait_for(len(payloads), LIMIT)
        assert collector.arrivals() == payloads


def test_the_goodbye_keeps_the_will_from_being_published(broker: Mosquitto, scheme: str, to: ClientTo) -> None:
    name = f"polite-{scheme}"
    with collecting(broker, scheme, "goodbye/#") as collector:
        with to(port_of(broker, scheme), client_id=name, will=cloudpubsub.Will("goodbye/will", b"lost")) as client:
            client.wait(client.publish("goodbye/t", b"x"), LIMIT)
        until(lambda: f"Client {name} disconnected" in broker.log_text())
        with client_to(broker.port, None, client_id="other") as other:
            other.wait(other.publish("goodbye/t", b"end"), LIMIT)
        collector.wait_for(2, LIMIT)
        assert collector.arrivals() == [b"x", b"end"]

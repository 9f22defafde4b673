"""The brokers, the collector and their fixtures do what the end-to-end tests rely on."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import paho.mqtt.client as paho
import psutil
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from tests.brokers import HOST, Broker, Mosquitto, Rumqttd, TlsFiles
from tests.collector import Collector
from tests.publishing import until

LIMIT = 60.0  # seconds that nothing here may take


def publish(port: int, payloads: list[bytes], *, protocol: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv311) -> None:
    """Publish with paho at QoS 1 and return when everything is acknowledged."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="source", protocol=protocol)
    client.max_inflight_messages_set(1000)
    client.connect(HOST, port)
    client.loop_start()
    try:
        for sent in [client.publish("t/x", payload, qos=1) for payload in payloads]:
            sent.wait_for_publish(LIMIT)
            assert sent.is_published()
    finally:
        client.disconnect()
        client.loop_stop()


def packets(first: int, count: int) -> bytes:
    """PUBLISH packets to t/x at QoS 1 whose payload is their number in 8 bytes, with packet ids from 1."""
    return b"".join(
        b"\x32\x0f\x00\x03t/x" + (number % 65535 + 1).to_bytes(2, "big") + number.to_bytes(8, "big")
        for number in range(first, first + count)
    )


def flood(port: int, total: int, window: int = 5000) -> None:
    """Publish numbers from 0, as fast as a socket goes, and return when everything is acknowledged."""
    with socket.create_connection((HOST, port), timeout=LIMIT) as peer, peer.makefile("rb") as answers:
        peer.sendall(b"\x10\x11\x00\x04MQTT\x04\x02\x00\x3c\x00\x05flood")
        assert answers.read(4) == b"\x20\x02\x00\x00"
        for first in range(0, total, window):
            count = min(window, total - first)
            peer.sendall(packets(first, count))
            acknowledged = answers.read(4 * count)
            assert acknowledged[::4] == b"\x40" * count
        peer.sendall(b"\xe0\x00")


def numbers(count: int) -> list[bytes]:
    return [number.to_bytes(8, "big") for number in range(count)]


def test_messages_arrive_in_order(broker: Broker) -> None:
    with Collector(broker.port) as collector:
        publish(broker.port, numbers(500))
        collector.wait_for(500, LIMIT)
        assert collector.first_deliveries() == collector.arrivals() == numbers(500)
        assert (collector.duplicates, collector.connects) == (0, 1)


def test_many_messages_reach_a_subscriber_that_was_away(broker: Broker) -> None:
    with Collector(broker.port):
        pass
    flood(broker.port, 200_000)
    collector = Collector(broker.port)
    collector.begin()  # a broker may say that the subscription stands when all that waited is sent
    try:
        collector.wait_for(200_000, 4 * LIMIT)
        assert collector.first_deliveries() == numbers(200_000)
    finally:
        collector.stop()


def test_log_of_rumqttd_skips_when_it_is_too_small(tmp_path: Path) -> None:
    with Rumqttd(tmp_path, log_bytes=1 << 20) as broker:
        with Collector(broker.port):
            pass
        flood(broker.port, 200_000)
        with Collector(broker.port) as collector:
            flood_end = (199_999).to_bytes(8, "big")
            collector.wait_for(1000, LIMIT)
            publish(broker.port, [b"end"])
            while b"end" not in (seen := collector.first_deliveries()):
                collector.wait_for(len(seen) + 1, LIMIT)
            assert seen[-2] == flood_end and len(seen) < 200_000


def test_equal_keys_count_as_duplicates(broker: Broker) -> None:
    with Collector(broker.port, key=lambda topic, payload: (topic, payload[:1])) as collector:
        publish(broker.port, [b"a1", b"b1", b"a2", b"c1"])
        collector.wait_for(3, LIMIT)
        assert collector.first_deliveries() == [("t/x", b"a"), ("t/x", b"b"), ("t/x", b"c")]
        assert collector.duplicates == 1


def test_wait_for_says_how_many_came(broker: Broker) -> None:
    with Collector(broker.port) as collector:
        publish(broker.port, numbers(3))
        collector.wait_for(3, LIMIT)
        with pytest.raises(TimeoutError, match=r"3 of 4 messages .*3 deliveries, 1 connections"):
            collector.wait_for(4, 0.05)


def test_restart_keeps_the_ports(broker: Broker) -> None:
    with Collector(broker.port) as collector:
        port, pid = broker.port, broker.pid
        broker.stop()
        assert not broker.is_running
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port), timeout=1)
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind((HOST, port))
        broker.start()
        assert broker.is_running and broker.port == port and broker.pid != pid
        deadline_publish(collector, broker)


def test_kill_is_survived(broker: Broker) -> None:
    with Collector(broker.port) as collector:
        for _ in range(3):
            broker.kill()
            broker.start()
        deadline_publish(collector, broker)


def deadline_publish(collector: Collector, broker: Broker) -> None:
    """The collector finds the broker again; it may look subscribed for the moment in which it has not yet noticed."""
    for attempt in range(100):
        publish(broker.port, [b"after %d" % attempt])
        try:
            collector.wait_for(1, 1)
        except TimeoutError:
            continue
        assert collector.connects >= 2
        return
    pytest.fail("the collector did not come back")


def test_mosquitto_keeps_sessions_over_a_restart(mosquitto: Mosquitto) -> None:
    with Collector(mosquitto.port):
        pass
    flood(mosquitto.port, 1000)
    mosquitto.restart()
    with Collector(mosquitto.port) as collector:
        collector.wait_for(1000, LIMIT)
        assert collector.first_deliveries() == numbers(1000)


def test_nobody_else_can_reach_them(broker: Broker) -> None:
    listening = [each.laddr for each in psutil.Process(broker.pid).net_connections("inet") if each.status == "LISTEN"]
    assert {address.ip for address in listening} == {HOST}
    assert broker.port in {address.port for address in listening}


def context(ca: str, client: tuple[str, str] | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=ca)
    if client is not None:
        made.load_cert_chain(*client)
    return made


def check_not_verified(collector: Collector) -> None:
    collector.begin()
    try:
        until(lambda: "CERTIFICATE_VERIFY_FAILED" in collector.problem)
        assert collector.connects == 0
    finally:
        collector.stop()


@pytest.fixture(params=["mosquitto", "rumqttd"])
def tls_broker_type(request: pytest.FixtureRequest) -> type[Broker]:
    if request.param == "mosquitto":
        request.getfixturevalue("need_mosquitto")
        return Mosquitto
    return Rumqttd


def test_tls_works_and_a_foreign_authority_does_not(
    tls_broker_type: type[Broker], tls_files: TlsFiles, tmp_path: Path
) -> None:
    with tls_broker_type(tmp_path / "broker", tls=tls_files) as broker:
        with Collector(broker.tls_port, tls=context(tls_files.ca)) as collector:
            flood(broker.port, 20_000)
            collector.wait_for(20_000, LIMIT)
            assert collector.first_deliveries() == numbers(20_000)
        check_not_verified(Collector(broker.tls_port, tls=context(tls_files.foreign_ca)))


def test_certificate_of_another_host_is_refused(
    tls_broker_type: type[Broker], tls_files: TlsFiles, tmp_path: Path
) -> None:
    other = (tls_files.other_host_cert, tls_files.other_host_key)
    with tls_broker_type(tmp_path / "broker", tls=tls_files, certificate=other) as broker:
        check_not_verified(Collector(broker.tls_port, tls=context(tls_files.ca)))


@pytest.mark.usefixtures("need_mosquitto")
def test_mosquitto_asks_for_client_certificates(tls_files: TlsFiles, tmp_path: Path) -> None:
    ours = (tls_files.client_cert, tls_files.client_key)
    foreign = (tls_files.foreign_client_cert, tls_files.foreign_client_key)
    with Mosquitto(tmp_path / "broker", tls=tls_files, require_certificate=True) as broker:
        with Collector(broker.tls_port, tls=context(tls_files.ca, ours)) as collector:
            publish(broker.port, [b"x"])
            collector.wait_for(1, LIMIT)
        for client in (None, foreign):
            with pytest.raises(TimeoutError, match="not subscribed"):
                Collector(broker.tls_port, tls=context(tls_files.ca, client)).start(timeout=1)


def test_users_and_passwords(tls_broker_type: type[Broker], tmp_path: Path) -> None:
    with tls_broker_type(tmp_path / "broker", users={"gate": "s3cret"}) as broker:
        with Collector(broker.port, username="gate", password="s3cret") as collector:
            assert collector.connects == 1
        for password in ("wrong", ""):
            with pytest.raises(TimeoutError, match="not subscribed"):
                Collector(broker.port, username="gate", password=password).start(timeout=0.5)
        with pytest.raises(TimeoutError, match="not subscribed"):
            Collector(broker.port).start(timeout=0.5)


def test_rumqttd_speaks_version_5(rumqttd: Rumqttd) -> None:
    with Collector(rumqttd.port) as collector:
        publish(rumqttd.v5_port, numbers(10), protocol=MQTTProtocolVersion.MQTTv5)
        collector.wait_for(10, LIMIT)
        assert collector.first_deliveries() == numbers(10)


def test_failure_to_start_shows_the_log(tmp_path: Path, need_mosquitto: None) -> None:
    broker = Mosquitto(tmp_path, extra=("no_such_setting true",))
    with pytest.raises(RuntimeError, match=r"(?s)ended with.*no_such_setting"):
        broker.start()
    assert not broker.is_running
    broker.close()


def test_broker_ends_with_the_process_that_started_it(broker: Broker, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from tests.brokers import Mosquitto, Rumqttd\n"
        f"broker = {type(broker).__name__}(pathlib.Path(sys.argv[1])).start()\n"
        "print(broker.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "second")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        child.wait(LIMIT)

"""TLS on the publish connection, against Mosquitto with certificates made for this run."""

from __future__ import annotations

import dataclasses
import datetime
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

import cloudpubsub
from cloudpubsub.demo.relay import Relay
from tests.brokers import Mosquitto, TlsFiles
from tests.collector import Collector
from tests.fake_broker import Connection, FakeBroker
from tests.proxies import Proxy
from tests.publishing import LIMIT, client_to, greatest_step_back, number_of, publish_numbers, until
from tests.script import Script
from tests.websockets import FrameSocket

pytestmark = pytest.mark.usefixtures("need_mosquitto")


@contextmanager
def tls_broker(directory: Path, files: TlsFiles, **settings: Any) -> Iterator[Mosquitto]:
    with Mosquitto(directory / "mosquitto", tls=files, **settings) as broker:
        yield broker


def tls_client(port: int, directory: Path, tls: cloudpubsub.TLS, host: str = "localhost", **settings: Any):
    return client_to(port, directory / "spool", **{"broker": f"mqtts://{host}:{port}", "tls": tls, **settings})


def refusal(client: cloudpubsub.Client) -> str:
    """Why the client, started, does not connect."""
    with client:
        client.publish("topic", b"payload")
        until(lambda: client.stats().last_error)
        assert client.stats().connects == 0 and client.stats().acked == 0
        return client.stats().last_error


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_known_authority_and_the_right_host_are_accepted(host: str, tls_files: TlsFiles, tmp_path: Path) -> None:
    with tls_broker(tmp_path, tls_files) as broker:
        with tls_client(broker.tls_port, tmp_path, cloudpubsub.TLS(ca=tls_files.ca), host) as client:
            client.wait(client.publish("topic", b"payload"), LIMIT)


def test_an_unknown_authority_is_refused(tls_files: TlsFiles, tmp_path: Path) -> None:
    with tls_broker(tmp_path, tls_files) as broker:
        client = tls_client(broker.tls_port, tmp_path, cloudpubsub.TLS(ca=tls_files.foreign_ca))
        assert "certificate not accepted" in refusal(client)


def test_the_authorities_of_the_system_do_not_know_ours(tls_files: TlsFiles, tmp_path: Path) -> None:
    with tls_broker(tmp_path, tls_files) as broker:
        client = client_to(broker.tls_port, tmp_path / "spool", broker=f"mqtts://localhost:{broker.tls_port}")
        assert "certificate not accepted" in refusal(client)


def test_a_certificate_for_another_host_is_refused(tls_files: TlsFiles, tmp_path: Path) -> None:
    other = (tls_files.other_host_cert, tls_files.other_host_key)
    with tls_broker(tmp_path, tls_files, certificate=other) as broker:
        error = refusal(tls_client(broker.tls_port, tmp_path, cloudpubsub.TLS(ca=tls_files.ca)))
        assert "certificate not accepted" in error and "Hostname mismatch" in error


@pytest.mark.parametrize(
    ("first_day", "last_day", "state"), [(-2, -1, "certificate expired"), (1, 2, "clock wrong")]
)
def test_a_certificate_out_of_its_time_is_named(first_day: int, last_day: int, state: str, tmp_path: Path) -> None:
    now, authority = datetime.datetime.now(datetime.timezone.utc), trustme.CA()
    days = [now + datetime.timedelta(days=day) for day in (first_day, last_day)]
    issued = authority.issue_cert("localhost", not_before=days[0], not_after=days[1])
    ca, both = tmp_path / "ca.pem", tmp_path / "both.pem"
    authority.cert_pem.write_to_path(ca)
    issued.private_key_and_cert_chain_pem.write_to_path(both)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)

    def serve(connection: Connection) -> None:
        try:
            context.wrap_socket(connection.sock, server_side=True)
        except OSError:
            pass  # the client hung up, as it should

    with FakeBroker(serve) as broker:
        client = tls_client(broker.port, tmp_path, cloudpubsub.TLS(ca=str(ca)))
        with client:
            until(lambda: client.stats().publish_link == state)
            assert client.stats().last_error.startswith("TLS: certificate not accepted: certificate")
            assert client.stats().subscribe_link == "idle"


def test_a_client_certificate_that_has_expired_is_named(tls_files: TlsFiles, tmp_path: Path) -> None:
    now, authority = datetime.datetime.now(datetime.timezone.utc), trustme.CA()
    issued = authority.issue_cert("client@x", not_after=now - datetime.timedelta(days=1))
    ca, both = tmp_path / "ca.pem", tmp_path / "both.pem"
    authority.cert_pem.write_to_path(ca)
    issued.private_key_and_cert_chain_pem.write_to_path(both)
    files = dataclasses.replace(tls_files, ca=str(ca))
    with tls_broker(tmp_path, files, require_certificate=True) as broker:
        tls = cloudpubsub.TLS(ca=tls_files.ca, cert=str(both))
        with tls_client(broker.tls_port, tmp_path, tls) as client:
            until(lambda: client.stats().publish_link == "certificate expired")


def test_insecure_accepts_any_certificate(tls_files: TlsFiles, tmp_path: Path) -> None:
    other = (tls_files.other_host_cert, tls_files.other_host_key)
    with tls_broker(tmp_path, tls_files, certificate=other) as broker:
        with tls_client(broker.tls_port, tmp_path, cloudpubsub.TLS(insecure=True)) as client:
            client.wait(client.publish("topic", b"payload"), LIMIT)


def test_a_client_certificate_opens_a_broker_that_asks_for_one(tls_files: TlsFiles, tmp_path: Path) -> None:
    tls = cloudpubsub.TLS(ca=tls_files.ca, cert=tls_files.client_cert, key=tls_files.client_key)
    with tls_broker(tmp_path, tls_files, require_certificate=True) as broker:
        with tls_client(broker.tls_port, tmp_path, tls) as client:
            client.wait(client.publish("topic", b"payload"), LIMIT)


def test_without_a_client_certificate_that_broker_refuses(tls_files: TlsFiles, tmp_path: Path) -> None:
    with tls_broker(tmp_path, tls_files, require_certificate=True) as broker:
        error = refusal(tls_client(broker.tls_port, tmp_path, cloudpubsub.TLS(ca=tls_files.ca)))
        assert error.startswith("TLS: ") and "CERTIFICATE_REQUIRED" in error


def test_a_client_certificate_of_another_authority_is_refused(tls_files: TlsFiles, tmp_path: Path) -> None:
    tls = cloudpubsub.TLS(ca=tls_files.ca, cert=tls_files.foreign_client_cert, key=tls_files.foreign_client_key)
    with tls_broker(tmp_path, tls_files, require_certificate=True) as broker:
        assert refusal(tls_client(broker.tls_port, tmp_path, tls)).startswith("TLS: ")


def test_a_missing_certificate_file_is_named(tls_files: TlsFiles, tmp_path: Path) -> None:
    with tls_broker(tmp_path, tls_files) as broker:
        tls = cloudpubsub.TLS(ca=str(tmp_path / "missing.pem"))
        assert "missing.pem" in refusal(tls_client(broker.tls_port, tmp_path, tls))


def test_tls_spoken_to_a_plain_port_is_an_error_and_no_hang(mosquitto: Mosquitto, tls_files: TlsFiles, tmp_path: Path):
    assert refusal(tls_client(mosquitto.port, tmp_path, cloudpubsub.TLS(ca=tls_files.ca), connect_timeout=5.0))


def test_a_version_below_1_2_is_refused(tls_files: TlsFiles, tmp_path: Path) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.load_cert_chain(tls_files.server_cert, tls_files.server_key)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1

    def handshake(connection: Connection) -> None:
        with pytest.raises(OSError):
            old.wrap_socket(connection.sock.dup(), server_side=True)

    with FakeBroker(handshake) as broker:
        assert refusal(tls_client(broker.port, tmp_path, cloudpubsub.TLS(ca=tls_files.ca))).startswith("TLS: ")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions_from_1_2_on_are_accepted(version: ssl.TLSVersion, tls_files: TlsFiles, tmp_path: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tls_files.server_cert, tls_files.server_key)
    server.minimum_version = server.maximum_version = version
    spoken: list[str | None] = []

    def serve(connection: Connection) -> None:
        with server.wrap_socket(connection.sock.dup(), server_side=True) as wrapped:
            spoken.append(wrapped.version())
            Connection(wrapped, connection.number).accept()
            Connection(wrapped, connection.number).until_gone()

    with FakeBroker(serve) as broker, tls_client(broker.port, tmp_path, cloudpubsub.TLS(ca=tls_files.ca)) as client:
        until(lambda: client.stats().connected)
    assert spoken == [version.name.replace("_", ".")]


@pytest.mark.parametrize("scheme", ["mqtts", "wss"])
@pytest.mark.parametrize(
    ("offered", "chosen"),
    [((), None), (("x-amzn-mqtt-ca",), "x-amzn-mqtt-ca"), (("other", "mqtt"), "mqtt")],
)
def test_alpn_is_offered_by_both_connections(
    scheme: str, offered: tuple[str, ...], chosen: str | None, tls_files: TlsFiles, tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls_files.server_cert, tls_files.server_key)
    context.set_alpn_protocols(["mqtt", "x-amzn-mqtt-ca"])
    selected: list[str | None] = []

    def serve(connection: Connection) -> None:
        with context.wrap_socket(connection.sock.dup(), server_side=True) as wrapped:
            selected.append(wrapped.selected_alpn_protocol())
            sock: Any = wrapped if scheme == "mqtts" else FrameSocket.accept(wrapped)
            Script()(Connection(sock, connection.number))

    # Port 443, where ALPN tells MQTT from HTTPS, is not ours to listen on; a proxy takes us from there to the server.
    with FakeBroker(serve, parallel=True) as broker, Proxy("http", broker.port) as proxy:
        tls = cloudpubsub.TLS(ca=tls_files.ca, alpn=offered)
        with tls_client(443, tmp_path, tls, broker=f"{scheme}://localhost:443", proxy=proxy.url) as client:
            client.subscribe("t", print)
            client.wait_subscribed(LIMIT)
            client.wait(client.publish("t", b"x"), LIMIT)
        assert proxy.asked == [("localhost", 443)] * 2
    assert selected == [chosen] * 2


def test_a_server_that_never_answers_the_handshake_is_given_up(tls_files: TlsFiles, tmp_path: Path) -> None:
    """For good, and after `connect_timeout`: no more than two attempts may hang at the same time."""
    with FakeBroker(lambda connection: connection.until_gone(), parallel=True) as broker:
        tls = cloudpubsub.TLS(ca=tls_files.ca)
        client = tls_client(broker.port, tmp_path, tls, connect_timeout=0.3, keep_alive=3600)
        with client:
            until(lambda: broker.connections >= 2)
            assert client.stats().last_error == "TLS timed out"
            until(lambda: broker.connections >= 5)


def test_50_000_messages_cross_tls_and_three_cuts(tls_files: TlsFiles, tmp_path: Path) -> None:
    count, cuts, window = 50_000, 3, 2_000
    with tls_broker(tmp_path, tls_files) as broker, Relay(broker.tls_port) as relay:
        with Collector(broker.port, key=number_of) as collector:
            client = tls_client(relay.port, tmp_path, cloudpubsub.TLS(ca=tls_files.ca), max_inflight=window)
            with client:
                publisher = threading.Thread(target=publish_numbers, args=(client, range(count)))
                publisher.start()
                for cut in range(cuts):
                    collector.wait_for(count * (cut + 1) // (cuts + 1), LIMIT)
                    until(lambda: client.stats().connected)
                    relay.cut()
                    relay.restore()
                collector.wait_for(count, LIMIT)
                publisher.join(LIMIT)
                assert client.flush(LIMIT) == 0
            assert collector.first_deliveries() == list(range(count))
            assert greatest_step_back(collector.arrivals()) <= window
            assert client.stats().reconnects >= 1


def test_large_messages_fill_the_socket_and_arrive_through_tls(tls_files: TlsFiles, tmp_path: Path) -> None:
    payloads = [bytes([number]) * 900_000 for number in range(12)]
    with tls_broker(tmp_path, tls_files) as broker, Relay(broker.tls_port) as relay:
        with Collector(broker.port) as collector:
            tls = cloudpubsub.TLS(ca=tls_files.ca)
            relay.set_rate(20_000_000)  # the socket is full again and again
            with tls_client(
                relay.port, tmp_path, tls, max_payload_bytes=1_000_000, max_inflight_bytes=4 << 20, ring_bytes=8 << 20
            ) as client:
                for payload in payloads:
                    client.publish("large", payload)
                assert client.flush(LIMIT) == 0
                assert client.stats().reconnects == 0
            collector.wait_for(len(payloads), LIMIT)
            assert collector.arrivals() == payloads

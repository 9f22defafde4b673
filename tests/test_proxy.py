"""Connections through proxies on loopback, which are the only ones that know the broker's name."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from tests.brokers import Mosquitto, TlsFiles
from tests.fake_broker import Connection, FakeBroker
from tests.making import Inbox
from tests.proxies import Proxy
from tests.publishing import LIMIT, client_to, until
from tests.script import Script

NAME = "broker.invalid"  # which no resolver knows

KINDS = ("socks5", "socks4", "http")


def through(proxy: Proxy, broker: str, url: str | None = None, **settings: Any) -> cloudpubsub.Client:
    return client_to(0, None, broker=broker, proxy=url or proxy.url, **settings)


def publishes(client: cloudpubsub.Client) -> None:
    with client:
        client.wait(client.publish("t", b"x"), LIMIT)


def failure(client: cloudpubsub.Client) -> str:
    with client:
        until(lambda: client.stats().last_error)
        return client.stats().last_error


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("kind", "user"),
    [("socks5", None), ("socks5", "us:s3cret"), ("socks4", None), ("socks4", "us"), ("http", None),
     ("http", "us:s3cret")],
)  # fmt: skip
def test_the_proxy_is_asked_for_the_name(kind: str, user: str | None, slow: bool) -> None:
    with FakeBroker(Script()) as broker, Proxy(kind, broker.port, user=user, slow=slow) as proxy:
        publishes(through(proxy, f"mqtt://{NAME}:1884"))
        assert proxy.asked == [(NAME, 1884)]


@pytest.mark.parametrize(("kind", "shown"), [("socks5", "2001:db8::1"), ("http", "[2001:db8::1]")])
def test_addresses_go_as_they_are(kind: str, shown: str) -> None:
    with FakeBroker(Script()) as broker, Proxy(kind, broker.port) as proxy:
        publishes(through(proxy, "mqtt://[2001:db8::1]"))
        assert proxy.asked == [(shown, 1883)]


def test_both_connections_go_through_it_with_tls_and_websocket(
    need_mosquitto: None, tls_files: TlsFiles, tmp_path: Path
) -> None:
    inbox = Inbox()
    with Mosquitto(tmp_path / "mosquitto", tls=tls_files, websockets=True) as broker:
        with Proxy("socks5", broker.websocket_tls_port) as proxy:
            client = through(proxy, "wss://localhost", tls=cloudpubsub.TLS(ca=tls_files.ca))
            client.subscribe("t", inbox)
            with client:
                client.wait_subscribed(LIMIT)
                client.publish("t", b"x" * 100_000)
                assert client.flush(LIMIT) == 0
                # Mosquitto is slow with large messages to WebSockets while nothing else happens.
                until(lambda: client.publish("noise", b"") >= 0 and inbox.calls)
            assert proxy.asked == [("localhost", 443)] * 2
    assert inbox.payloads == [b"x" * 100_000]


@pytest.mark.parametrize(
    ("kind", "answer", "named"),
    [
        ("socks5", b"\x05\x05\x00\x01" + bytes(6), "refused"),
        ("socks5", b"\x05\x00", "onnection closed"),
        ("socks5", b"HTTP/1.1 400 Bad request\r\n\r\n", "invalid data"),
        ("socks4", b"\x00\x5b" + bytes(6), "rejected"),
        ("http", b"HTTP/1.1 502 Bad gateway\r\n\r\n", "answered 'HTTP/1.1 502 Bad gateway'"),
        ("http", b"HTTP/1.1 200 OK\r\nVia", "hung up in the middle"),
        ("http", b"x" * 17_000, "more than 16384 bytes"),
        ("http", b"\x05\x00\r\n\r\n", "answered"),
    ],
)
def test_a_refusal_is_named(kind: str, answer: bytes, named: str) -> None:
    with Proxy(kind, 1, answer=answer) as proxy:
        error = failure(through(proxy, f"mqtt://{NAME}"))
    assert error.startswith(f"proxy {kind}://127.0.0.1:{proxy.port}: ") and named in error


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [("socks5", "u:s3cret", "u:secr3t"), ("http", "u:s3cret", "u:secr3t"), ("socks4", "s3cret", "secr3t")],
)
def test_wrong_credentials_are_refused_and_not_shown(
    kind: str, right: str, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with Proxy(kind, 1, user=right) as proxy:
        client = through(proxy, f"mqtt://{NAME}", f"{kind}://{wrong}@127.0.0.1:{proxy.port}")
        error = failure(client)
    assert error.startswith(f"proxy {kind}://127.0.0.1:{proxy.port}: ")
    for text in (error, caplog.text, repr(client.options), str(client.stats())):
        assert "secr3t" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_is_not_there_is_told_from_the_broker(kind: str) -> None:
    with Proxy(kind, 1) as proxy:
        pass
    error = failure(through(proxy, f"mqtt://{NAME}"))
    assert error.startswith(f"proxy {kind}://127.0.0.1:{proxy.port}: ") and "Connection refused" in error


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_trickles_ends_in_time_and_leaves_no_thread(kind: str) -> None:
    gone = threading.Semaphore(0)
    first = {"socks5": b"\x05\x00\x05\x00\x00\x03\xff", "socks4": b"", "http": b"HTTP/1.1 200 OK\r\nX: "}[kind]

    def serve(connection: Connection) -> None:
        try:
            connection.send(first)
            while True:  # the address behind a SOCKS answer may have 255 bytes, so this goes on for twenty seconds
                threading.Event().wait(0.09)
                connection.send(b"\x00")
        finally:
            gone.release()

    def hold(connection: Connection) -> None:
        try:
            connection.sock.recv(100)
            while connection.sock.recv(100):
                pass
        finally:
            gone.release()

    with FakeBroker(hold if kind == "socks4" else serve, parallel=True) as proxy:
        settings = {"broker": f"mqtt://{NAME}", "proxy": f"{kind}://127.0.0.1:{proxy.port}", "connect_timeout": 0.1}
        with client_to(0, None, **settings) as client:
            for _ in range(3):  # more than may hang at the same time
                assert gone.acquire(timeout=LIMIT)
            assert client.stats().last_error == "proxy timed out"
        until(lambda: not [thread for thread in threading.enumerate() if thread.name.endswith("-connector")])


def test_the_environment_names_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("mqtt_proxy", "http://127.0.0.1:1")
    with FakeBroker(Script()) as broker:
        publishes(client_to(broker.port, None))

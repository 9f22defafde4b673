"""What goes on for hours must not fill the disk with log lines."""

from __future__ import annotations

import logging
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import Message
from cloudpubsub.demo.relay import Relay
from tests.brokers import Rumqttd
from tests.making import eventually
from tests.publishing import LIMIT, client_to, publish_numbers

NOBODY = 1
KIB = 1024
SMALL: dict[str, Any] = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}


class Refusing:
    """Takes connections and ends each at once."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.count = 0

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.close()
            self.count += 1

    def end(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def refusing() -> Iterator[Refusing]:
    broker = Refusing()
    thread = threading.Thread(target=broker.serve)
    thread.start()
    try:
        yield broker
    finally:
        broker.end()
        thread.join()


@pytest.fixture(autouse=True)
def all_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cloudpubsub")


def test_a_broker_that_ends_every_connection_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with refusing() as broker, client_to(broker.port, None, reconnect_max=0.03) as client:
        client.subscribe("t", print)
        eventually(lambda: broker.count >= 60, "many attempts")
        assert 0 < len(caplog.records) <= 12, caplog.text


def test_a_link_that_comes_and_goes_does_not_fill_the_log(
    rumqttd: Rumqttd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Relay(rumqttd.port) as relay, client_to(relay.port, tmp_path / "spool", reconnect_max=0.03) as client:
        for _ in range(15):
            eventually(lambda: client.stats().connected, "connected")
            relay.cut()
            eventually(lambda: not client.stats().connected, "cut")
            relay.restore()
        assert len(caplog.records) <= 12, caplog.text


def test_a_spool_that_is_full_all_the_time_does_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: dict[str, Any] = {**SMALL, "max_spool_messages": 100}
    with client_to(NOBODY, tmp_path / "spool", **sizes, on_drop=lambda _: None) as client:
        for _ in range(30):
            publish_numbers(client, range(2_000))
        eventually(lambda: client.stats().dropped > 0)
        assert len(caplog.records) <= 12, caplog.text


def test_a_disk_that_is_gone_does_not_fill_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with client_to(NOBODY, tmp_path / "spool", **SMALL, on_drop=lambda _: None) as client:
        publish_numbers(client, range(100))
        shutil.rmtree(tmp_path / "spool")
        for _ in range(20):
            publish_numbers(client, range(1_000))
        assert client.stats().storage.startswith("failed")
        assert len(caplog.records) <= 12, caplog.text


def test_callbacks_that_always_raise_do_not_fill_the_log(
    rumqttd: Rumqttd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Message) -> None:
        raise ValueError("a text that differs", object())

    with client_to(rumqttd.port, tmp_path / "spool", on_publish=fail) as client:
        publish_numbers(client, range(2_000))
        client.flush(LIMIT)
        eventually(lambda: client.stats().callback_errors == 2_000)
        assert 0 < len(caplog.records) <= 6, caplog.text


def test_many_damaged_records_do_not_fill_the_log(
    rumqttd: Rumqttd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with client_to(NOBODY, tmp_path / "spool", ring_bytes=64 * KIB, segment_bytes=256 * KIB) as client:
        publish_numbers(client, range(5_000))
    for segment in (tmp_path / "spool" / "log").iterdir():
        data = bytearray(segment.read_bytes())
        for at in range(1_000, len(data) - 1_000, 500):
            data[at] ^= 1
        segment.write_bytes(data)
    caplog.clear()
    with client_to(rumqttd.port, tmp_path / "spool", **SMALL, on_drop=lambda _: None) as client:
        assert client.flush(LIMIT) > 100
        assert len(caplog.records) <= 12, caplog.text


def test_a_storage_that_fails_and_comes_back_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with client_to(NOBODY, tmp_path / "spool", on_full="drop_newest", spill_timeout=0.1, **SMALL) as client:
        publish_numbers(client, range(10))
        (tmp_path / "spool").rename(tmp_path / "away")
        for _ in range(3):
            publish_numbers(client, range(2_000))
        assert client.stats().storage.startswith("failed")
        (tmp_path / "away").rename(tmp_path / "spool")

        def works() -> bool:
            publish_numbers(client, range(1))
            return client.stats().storage == "ok"

        eventually(works, "back on the disk")
        eventually(lambda: "works again" in caplog.text, "said so")
    said = [(record.levelno, record.getMessage()) for record in caplog.records if "the storage" in record.getMessage()]
    assert said == [
        (logging.WARNING, "the storage failed: No such file or directory; it is tried again"),
        (logging.INFO, "the storage works again"),
    ]

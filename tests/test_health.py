"""What a watchdog is told: threads that ended or are stuck, a storage that fails, a connection that is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub._rounds import exchange
from tests.fake_broker import FakeBroker
from tests.making import url
from tests.packets import Connack, Publish
from tests.peer import PUBACK, Peer
from tests.publishing import LIMIT, client_to, until
from tests.script import Script


def test_an_outage_is_no_problem(tmp_path: Path) -> None:
    client = client_to(1, tmp_path)
    assert client.health() == cloudpubsub.Health() and client.health().ok
    with client:
        client.publish("a", b"")
        until(lambda: client.stats().last_error)
        assert client.health().ok
    assert client.health().problems == ("the client is closed",)


def test_a_working_client_is_well(tmp_path: Path) -> None:
    with FakeBroker(Script(), parallel=True) as broker, client_to(broker.port, tmp_path) as client:
        client.subscribe("a", print)
        client.wait_subscribed(LIMIT)
        client.wait(client.publish("a", b""), LIMIT)
        assert client.health(stuck_after=10).ok


def test_a_handler_that_hangs_is_told(tmp_path: Path) -> None:
    hangs, go_on = threading.Event(), threading.Event()

    def hang(_message: object) -> None:
        hangs.set()
        go_on.wait(LIMIT)

    with FakeBroker(Script()) as broker, client_to(broker.port, tmp_path, on_publish=hang) as client:
        client.publish("a", b"")
        assert hangs.wait(LIMIT)
        until(lambda: not client.health(stuck_after=0.01).ok)
        assert "handler or callback runs for" in client.health(stuck_after=0.01).problems[0]
        assert client.health(stuck_after=0.01).needs_restart
        go_on.set()
        until(lambda: client.health(stuck_after=10).ok)


def test_a_refused_connection_is_told(tmp_path: Path) -> None:
    with FakeBroker(Script(connack=Connack(5))) as broker, client_to(broker.port, tmp_path) as client:
        until(lambda: client.health().problems)
        health = client.health()
        assert health.problems[0].startswith("publish connection: refused: refused: not authorised")
        assert not health.ok and not health.needs_restart


def test_a_thread_that_is_stuck_is_told(tmp_path: Path) -> None:
    """In a credentials callable it could not be: that has a thread of its own.  In the hook it is."""
    hangs, go_on = threading.Event(), threading.Event()

    def hook(message: cloudpubsub.Message, _id: cloudpubsub.MessageId) -> bytes:
        hangs.set()
        go_on.wait(LIMIT)
        return message.payload

    script = Script()
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, payload_hook=hook) as client:
        client.publish("a", b"")
        assert hangs.wait(LIMIT)
        until(lambda: not client.health(stuck_after=0.01).ok)
        assert "publish thread is stuck" in client.health(stuck_after=0.01).problems[0]
        go_on.set()
        script.wait(Publish)
        assert client.health(stuck_after=10).ok


@pytest.mark.parametrize("value", [None, "5", float("nan"), True])
def test_a_wrong_limit_is_refused(value: float) -> None:
    with client_to(1, None) as client, pytest.raises(ValueError, match="stuck_after"):
        client.health(value)


def test_a_subscribe_thread_is_not_at_work_while_it_waits_for_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    since: list[float | None] = []

    def noting(*args: Any) -> tuple[int, bytearray, int, int, int]:
        since.append(client._subscriber.busy_since_s)
        return exchange(*args)

    monkeypatch.setattr("cloudpubsub._subscriber.exchange", noting)
    with Peer() as peer:
        client = cloudpubsub.Client(url(peer.port), client_id="c")
        client.subscribe("t", lambda _: None)
        with client:
            client.wait_subscribed(LIMIT)
            for packet_id in range(1, 6):
                peer.publish(packet_id, "t", b"")
            peer.wait(PUBACK, 5)
    assert set(since) == {None}


@pytest.mark.parametrize("age_ms", [-2, 0, 1500])
@pytest.mark.parametrize("bits", [0, (1 << 32) - 1])
def test_how_long_rounds_have_been_at_work_is_known_over_the_end_of_32_bits(
    age_ms: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = cloudpubsub.Client("mqtt://localhost:1", client_id="c")
    try:
        publisher = client._publisher
        now_s = ((7 << 32) + bits + 1000) / 1000
        noted = (int(now_s * 1000) - age_ms) % (1 << 32)
        monkeypatch.setattr(publisher, "_sender", SimpleNamespace(at_work_ms=noted))
        monkeypatch.setattr(publisher, "_busy_since_s", 0.0)
        with monkeypatch.context() as patch:
            patch.setattr("cloudpubsub._publisher.time", SimpleNamespace(monotonic=lambda: now_s))
            since_s = publisher.busy_since_s
        assert since_s == pytest.approx(now_s - age_ms / 1000, abs=0.01)
    finally:
        monkeypatch.undo()
        client.close(1)

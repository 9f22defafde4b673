"""Messages that the broker refuses or cannot take: tried again or moved to the dead letters, never called delivered."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub import Message
from cloudpubsub._refusal import Refusals, Verdict
from tests.fake_broker import FakeBroker
from tests.packets import Connack, Puback, Publish
from tests.publishing import LIMIT, client_to, publish_numbers, until
from tests.script import WITHHOLD, Event, Script, refuse

QUOTA, UNSPECIFIED, NOT_AUTHORISED, TOPIC_INVALID, FORMAT_INVALID = 0x97, 0x80, 0x87, 0x90, 0x99


class Dead(list[tuple[Message, str]]):
    """What `on_dead_letter` was told."""

    def __call__(self, message: Message, reason: str) -> None:
        self.append((message, reason))


def letters(spool: Path) -> list[dict[str, Any]]:
    path = spool / "dead-letters.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def payloads(script: Script) -> list[int]:
    return [int(publish.payload) for publish in script.publishes]


def refuse_payloads(reason: int, *wanted: bytes, times: int = 1 << 30) -> Any:
    left = dict.fromkeys(wanted, times)

    def instead(event: Event) -> Any:
        packet = event.packet
        if isinstance(packet, Publish) and left.get(packet.payload, 0) > 0:
            left[packet.payload] -= 1
            return Puback(packet.packet_id, reason, {"reason_string": "no"})
        return None

    return instead


@pytest.mark.parametrize("reason", [NOT_AUTHORISED, TOPIC_INVALID, FORMAT_INVALID])
def test_what_is_refused_for_good_goes_to_the_dead_letters_and_the_rest_goes_on(reason: int, tmp_path: Path) -> None:
    dead, acked = Dead(), []  # type: ignore[var-annotated]
    script = Script(refuse_payloads(reason, b"3", b"7"))
    settings: dict[str, Any] = {"on_dead_letter": dead, "on_publish": acked.append}
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, protocol="5", **settings) as client:
        positions = publish_numbers(client, range(10))
        assert client.flush(LIMIT) == 2
        stats = client.stats()
        assert (stats.published, stats.acked, stats.dead_lettered, stats.dropped) == (10, 8, 2, 0)
        assert stats.backlog_messages == 0 and stats.refused_by_broker == 2
        with pytest.raises(cloudpubsub.DeliveryFailed, match="dead letters"):
            client.wait(positions[3], LIMIT)
        client.wait(positions[4], LIMIT)
        until(lambda: len(dead) == 2 and len(acked) == 8)
    assert [message.payload for message, _ in dead] == [b"3", b"7"]
    assert all(f"{reason:#04x}" in why and why.endswith("no") for _, why in dead)
    assert payloads(script) == list(range(10))
    assert [(one["direction"], one["position"], base64.b64decode(one["payload"])) for one in letters(tmp_path)] == [
        ("published", positions[3], b"3"), ("published", positions[7], b"7"),
    ]  # fmt: skip


def test_quota_exceeded_is_tried_again_in_order_until_it_passes(tmp_path: Path) -> None:
    """Sending stops, resumes at the refused message when all others are answered, and those are not sent again."""
    script = Script(refuse_payloads(QUOTA, b"3", times=4), connack=Connack(properties={"receive_maximum": 5}))
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, protocol="5") as client:
        publish_numbers(client, range(20))
        assert client.flush(LIMIT) == 0
        stats = client.stats()
        assert (stats.acked, stats.dead_lettered, stats.refused_by_broker, stats.connects) == (20, 0, 4, 1)
    sent = payloads(script)
    assert sent.count(3) == 5
    assert sorted(sent) == sorted([*range(20), 3, 3, 3, 3])
    last_refused = len(sent) - 1 - sent[::-1].index(3)
    assert all(number <= 7 for number in sent[:last_refused]), "nothing beyond the window went before it"


def test_a_refusal_that_empties_a_full_window_does_not_wait_for_a_ping(tmp_path: Path) -> None:
    """The whole window is answered at once, and nothing comes after that which could wake the sender."""
    ids: list[int] = []

    def instead(event: Event) -> Any:
        if not isinstance(event.packet, Publish) or len(ids) == 5:
            return None
        ids.append(event.packet.packet_id)
        return [Puback(ids[0], QUOTA), *map(Puback, ids[1:])] if len(ids) == 5 else WITHHOLD

    with client_to(1, tmp_path) as client:
        publish_numbers(client, range(20))
    script = Script(instead, connack=Connack(properties={"receive_maximum": 5}))
    settings: dict[str, Any] = {"protocol": "5", "keep_alive": 3600}  # half of that until the ping
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, **settings) as client:
        assert client.flush(LIMIT) == 0
        assert client.stats().connects == 1


def test_a_refusal_that_says_nothing_is_tried_a_few_times(tmp_path: Path) -> None:
    script = Script(refuse_payloads(UNSPECIFIED, b"1"))
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, protocol="5") as client:
        publish_numbers(client, range(3))
        assert client.flush(LIMIT) == 1
        assert client.stats().dead_lettered == 1
    assert payloads(script).count(1) == 6


def test_what_was_refused_when_the_link_broke_is_not_forgotten(tmp_path: Path) -> None:
    """Refused on the first connection, taken on the second."""
    script = Script(refuse(QUOTA, 1))
    with FakeBroker(script) as broker:
        with client_to(broker.port, tmp_path, protocol="5", reconnect_min=3600, reconnect_max=3600) as client:
            publish_numbers(client, range(3))
            until(lambda: client.stats().refused_by_broker == 1)
        with client_to(broker.port, tmp_path, protocol="5") as client:
            assert client.flush(LIMIT) == 0
    assert set(payloads(script)) == {0, 1, 2} and payloads(script)[0] == payloads(script)[3] == 0


def test_the_dead_stay_dead_after_a_reconnect_behind_a_gap(tmp_path: Path) -> None:
    """The head has not passed it yet when the link breaks: it is not sent again, and not counted twice."""

    def instead(event: Event) -> Any:
        if not isinstance(event.packet, Publish):
            return None
        if event.packet.payload == b"0" and event.connection.number == 1:
            return b""
        if event.packet.payload == b"1":
            return Puback(event.packet.packet_id, NOT_AUTHORISED)
        return None

    script = Script(instead)
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, protocol="5", ack_timeout=2.0) as client:
        publish_numbers(client, range(3))
        assert client.flush(LIMIT) == 1
        stats = client.stats()
        assert (stats.acked, stats.dead_lettered, stats.connects) == (2, 1, 2)
    assert payloads(script) == [0, 1, 2, 0]
    assert len(letters(tmp_path)) == 1


def test_what_is_larger_than_the_broker_takes_is_never_sent(tmp_path: Path) -> None:
    dead = Dead()
    script = Script(connack=Connack(properties={"maximum_packet_size": 100}))  # which fails on a larger packet
    with client_to(1, tmp_path) as client:
        client.publish("a", b"x" * 200)
        client.publish("a", b"small")
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, protocol="5", on_dead_letter=dead) as client:
        assert client.flush(LIMIT) == 1
        until(lambda: dead)
        assert (client.stats().acked, client.stats().dead_lettered) == (1, 1)
    assert "Maximum Packet Size of 100" in dead[0][1]
    assert base64.b64decode(letters(tmp_path)[0]["payload"]) == b"x" * 200


def test_retained_messages_are_dead_where_the_broker_keeps_none(tmp_path: Path) -> None:
    script = Script(connack=Connack(properties={"retain_available": 0}))
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, protocol="5") as client:
        client.publish("a", b"1", retain=True)
        client.publish("a", b"2")
        assert client.flush(LIMIT) == 1
    assert letters(tmp_path)[0]["retain"] is True and payloads(script) == [2]


def test_a_flood_of_refusals_is_told_in_full(tmp_path: Path) -> None:
    dead = Dead()
    with FakeBroker(Script(refuse(NOT_AUTHORISED))) as broker:
        settings: dict[str, Any] = {"on_dead_letter": dead, "handler_queue": 10}
        with client_to(broker.port, tmp_path, protocol="5", **settings) as client:
            publish_numbers(client, range(500))
            assert client.flush(LIMIT) == 500
            until(lambda: len(dead) == 500)
        assert client.stats().dead_lettered == 500
    assert [int(message.payload) for message, _ in dead] == list(range(500))


def test_reports_that_nobody_takes_hold_up_sending_and_do_not_fill_memory(tmp_path: Path) -> None:
    taken, go_on = Dead(), threading.Event()

    def on_dead_letter(message: Message, reason: str) -> None:
        go_on.wait(LIMIT)
        taken(message, reason)

    with client_to(1, tmp_path) as client:
        for _ in range(300):
            client.publish("a", b"x" * 200)
    script = Script(connack=Connack(properties={"maximum_packet_size": 100}))
    settings: dict[str, Any] = {"protocol": "5", "handler_queue": 5, "on_dead_letter": on_dead_letter}
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, **settings) as client:
        until(lambda: client.stats().dead_lettered)
        time.sleep(0.3)
        assert client.stats().dead_lettered < 10
        go_on.set()
        assert client.flush(LIMIT) == 300
        until(lambda: len(taken) == 300)


def test_close_tells_of_the_last_dead_letters_too(tmp_path: Path) -> None:
    """The callback is behind, and what it has not heard waits outside of its queue."""
    dead: list[bytes] = []

    def slowly(message: Message, reason: str) -> None:
        time.sleep(0.01)
        dead.append(message.payload)

    settings: dict[str, Any] = {"protocol": "5", "handler_queue": 5, "on_dead_letter": slowly}
    with FakeBroker(Script(refuse(NOT_AUTHORISED))) as broker:
        with client_to(broker.port, tmp_path, **settings) as client:
            publish_numbers(client, range(100))
            assert client.flush(LIMIT) == 100
    assert len(dead) == 100


@pytest.mark.parametrize("callback", ["on_dead_letter", "on_publish"])
def test_the_time_that_a_slow_callback_takes_is_no_silence_of_the_broker(callback: str, tmp_path: Path) -> None:
    """While its reports wait nothing is read, also not the acknowledgements that have come."""
    count = 60 if callback == "on_dead_letter" else 3_000

    def refuse_odd(event: Event) -> Any:
        is_odd = isinstance(event.packet, Publish) and callback == "on_dead_letter" and int(event.packet.payload) % 2
        return Puback(event.packet.packet_id, NOT_AUTHORISED) if is_odd else None

    def slowly(*_: object) -> None:
        time.sleep(100 / count / 30)

    settings: dict[str, Any] = {"protocol": "5", "handler_queue": 5, "ack_timeout": 1.0, callback: slowly}
    with FakeBroker(Script(refuse_odd)) as broker, client_to(broker.port, tmp_path, **settings) as client:
        publish_numbers(client, range(count))
        client.flush(LIMIT)
        assert (client.stats().connects, client.stats().resent) == (1, 0)


class _Blind:
    """The log, which cannot give out single messages for a while: no descriptor is free, or no memory."""

    def __init__(self, log: Any, failures: int) -> None:
        self._log, self.left = log, failures

    def look(self, position: int) -> Message | None:
        self.left -= 1
        return None if self.left >= 0 else self._log.look(position)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


def test_a_message_that_cannot_be_read_now_is_not_given_up_unkept(tmp_path: Path) -> None:
    script = Script(refuse_payloads(NOT_AUTHORISED, b"1"))
    with FakeBroker(script) as broker:
        client = client_to(broker.port, tmp_path, protocol="5")
        blind = client._publisher._spool_log = _Blind(client._log, 2)  # type: ignore[assignment]
        with client:
            publish_numbers(client, range(3))
            assert client.flush(LIMIT) == 1
            assert (client.stats().acked, client.stats().dead_lettered) == (2, 1)
    assert blind.left < 0 and len(letters(tmp_path)) == 1
    assert payloads(script).count(1) == 3


def test_after_a_restart_the_dead_are_still_counted(tmp_path: Path) -> None:
    with FakeBroker(Script(refuse(NOT_AUTHORISED, 2))) as broker:
        with client_to(broker.port, tmp_path, protocol="5") as client:
            publish_numbers(client, range(3))
            assert client.flush(LIMIT) == 1
    with client_to(1, tmp_path) as client:
        stats = client.stats()
        assert (stats.published, stats.acked, stats.dead_lettered, stats.backlog_messages) == (3, 2, 1, 0)


def test_the_table_of_refusals() -> None:
    refusals = Refusals()
    assert [refusals.judge(8, QUOTA) for _ in range(100)] == [Verdict.AGAIN] * 100
    assert [refusals.judge(16, UNSPECIFIED) for _ in range(6)] == [Verdict.AGAIN] * 5 + [Verdict.DEAD]
    assert refusals.judge(24, 0xFF) is Verdict.DEAD
    assert len(refusals) == 1
    refusals.moved(lambda _: 16)
    assert len(refusals) == 0

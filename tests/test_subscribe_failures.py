"""Handlers and callbacks that raise, and what they may not call."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path

import pytest

from cloudpubsub import Client, Message, OptionError, WrongThreadError
from tests.brokers import Broker, Mosquitto
from tests.making import DEADLINE_S, Inbox, eventually, receiver, send, url
from tests.peer import PUBACK, Peer


def fail(*_: object) -> None:
    raise ValueError("no good")


def test_a_handler_that_raises_is_retried_then_dead_lettered_and_acknowledged(broker: Broker, tmp_path: Path) -> None:
    bad, letters, good = Inbox(fail), Inbox(), Inbox()
    settings = {"handler_retries": 2, "on_dead_letter": letters, "spool": tmp_path / "spool"}
    with receiver(broker, ("bad", bad), ("good", good), **settings) as client:
        send(broker, [("bad", b"\0poison"), ("good", b"fine")])
        good.wait(1)
        letters.wait(1)
        assert len(bad.calls) == 3
        assert client.stats().dead_lettered_inbound == 1
        assert client.stats().handler_errors == 3
    message, reason = letters.calls[0]
    assert (message.topic, message.payload) == ("bad", b"\0poison")
    assert "ValueError: no good" in reason
    letter = json.loads((tmp_path / "spool" / "dead-letters.jsonl").read_text())
    assert (letter["topic"], base64.b64decode(letter["payload"]), letter["reason"]) == ("bad", b"\0poison", reason)
    # Acknowledged: it does not come again.
    again = Inbox()
    with receiver(broker, ("bad", again), ("good", good)):
        send(broker, [("good", b"end")])
        good.wait(2)
    assert again.calls == []


def test_a_handler_that_recovers_loses_nothing(mosquitto: Mosquitto) -> None:
    tries = []

    def shaky(message: Message) -> None:
        tries.append(message.payload)
        if tries.count(message.payload) < 2:
            raise ValueError

    inbox = Inbox(shaky)
    with receiver(mosquitto, ("t", inbox), handler_retries=1) as client:
        send(mosquitto, [("t", b"1"), ("t", b"2")])
        inbox.wait(4)
        assert client.stats().dead_lettered_inbound == 0
    assert tries == [b"1", b"1", b"2", b"2"]


def test_a_callback_for_dead_letters_that_raises_holds_nothing_up() -> None:
    with Peer() as peer:
        client = Client(url(peer.port), client_id="c", handler_retries=0, on_dead_letter=fail)
        client.subscribe("t", fail)
        with client:
            client.wait_subscribed(DEADLINE_S)
            for packet_id in (1, 2):
                peer.publish(packet_id, "t", b"")
            assert [packet.id for packet in peer.wait(PUBACK, 2)] == [1, 2]
            assert client.stats().callback_errors == 2


def test_with_disconnect_the_broker_delivers_again(mosquitto: Mosquitto) -> None:
    seen: list[bytes] = []

    def handler(message: Message) -> None:
        seen.append(message.payload)
        if message.payload == b"2" and seen.count(b"2") < 3:
            raise ValueError("not yet")

    inbox = Inbox(handler)
    settings = {"handler_retries": 0, "on_handler_failure": "disconnect"}
    with receiver(mosquitto, ("t", inbox), **settings) as client:
        send(mosquitto, [("t", b"%d" % number) for number in range(1, 6)])
        eventually(lambda: seen and seen[-1] == b"5")
        assert client.stats().reconnects >= 2
        assert client.stats().dead_lettered_inbound == 0
    # Nothing overtakes the one that failed; the one before it may come twice if its acknowledgement was cut off.
    assert [payload for payload in seen if payload != b"1"] == [b"2", b"2", b"2", b"3", b"4", b"5"]


def test_disconnect_needs_a_session_that_stays() -> None:
    with pytest.raises(OptionError, match="on_handler_failure"):
        Client("mqtt://127.0.0.1", client_id="c", clean_session=True, on_handler_failure="disconnect")


def test_a_message_of_qos_0_is_never_worth_a_disconnect(mosquitto: Mosquitto) -> None:
    letters = Inbox()
    settings = {"handler_retries": 0, "on_handler_failure": "disconnect", "on_dead_letter": letters}
    with receiver(mosquitto, ("t", fail), **settings) as client:
        send(mosquitto, [("t", b"gone")], qos=0)
        assert letters.wait(1)[0].payload == b"gone"
        assert client.stats().reconnects == 0


def test_calls_that_wait_for_handlers_are_refused_in_a_handler(mosquitto: Mosquitto) -> None:
    raised: list[str] = []

    def handler(_: Message) -> None:
        for call in (lambda: client.wait(0), client.flush, client.close, client.wait_subscribed):
            with pytest.raises(WrongThreadError) as caught:
                call()
            assert isinstance(caught.value, RuntimeError)
            raised.append(str(caught.value))

    inbox = Inbox(handler)
    with receiver(mosquitto, ("t", inbox)) as client:
        send(mosquitto, [("t", b"")])
        eventually(lambda: len(raised) == 4)
        assert client.stats().handler_errors == 0


def test_callbacks_that_raise_are_counted_and_logged_and_end_nothing(
    mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "cloudpubsub"):
        client = Client(url(mosquitto.port), client_id="c", on_connect=fail, on_publish=fail, on_disconnect=fail)
        with client:
            for _ in range(3):
                client.publish("t", b"")
            assert client.flush(DEADLINE_S) == 0
            eventually(lambda: client.stats().callback_errors == 4)
        assert client.stats().callback_errors == 5
    assert any("fail" in record.message and record.exc_info for record in caplog.records)


def test_dead_letters_are_kept_in_bounded_memory_without_a_spool(mosquitto: Mosquitto) -> None:
    letters = Inbox()
    with receiver(mosquitto, ("t", fail), handler_retries=0, on_dead_letter=letters) as client:
        send(mosquitto, [("t", bytes(200_000))] * 10)
        letters.wait(10)
        assert client.stats().dead_lettered_inbound == 10
        kept = client._dead_letters.lines
        assert 0 < sum(map(len, kept)) <= 1 << 20

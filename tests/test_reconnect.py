"""Connecting again: when, to which address, and what is made of a broker that accepts us and hangs up."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub._connecting import explain, state_after
from tests.brokers import Broker, Mosquitto, Port
from tests.fake_broker import FakeBroker
from tests.fault_relay import FINE, REFUSED, FaultRelay
from tests.packets import Connect, Publish, Subscribe, Unsubscribe
from tests.publishing import client_to, publish_numbers, until
from tests.script import HANG_UP, Event, Script

_held: list[Port] = []


def dead_port() -> int:
    """Where nobody listens, and nobody else will: it stays ours."""
    _held.append(Port())
    return _held[-1].number


def test_news_of_the_network_cut_the_pause_short(broker: Broker) -> None:
    patient: dict[str, Any] = {"reconnect_min": 3600, "reconnect_max": 3600}
    with FaultRelay(broker.port, REFUSED) as relay, client_to(relay.port, None, **patient) as client:
        client.subscribe("a", print)
        until(lambda: relay.accepted >= 2)  # both connections wait for an hour now
        until(lambda: client.stats().last_error)
        relay.set_plan(FINE)
        position = client.publish("b", b"")

        def knock() -> bool:  # again, as an attempt may just be ending
            client.network_changed()
            return client.stats().connected

        until(knock)
        client.wait(position, 60)
        client.wait_subscribed(60)


def test_news_of_the_network_do_not_disturb_a_connection(broker: Broker) -> None:
    with client_to(broker.port, None) as client:
        until(lambda: client.stats().connected)
        for _ in range(100):
            client.network_changed()
        client.wait(client.publish("b", b""), 60)
        assert client.stats().connects == 1


def test_a_broker_that_accepts_and_hangs_up_is_not_hammered(tmp_path: Path) -> None:
    """Each pause may be longer than the last, however long the connection was, until something is acknowledged."""
    with FakeBroker(Script(lambda event: HANG_UP if isinstance(event.packet, Publish) else None)) as broker:
        with client_to(broker.port, tmp_path, min_stable=0) as client:
            client.publish("a", b"1")
            until(lambda: client.stats().connects >= 4)
            assert client._publisher._backoff.attempts >= 3


@pytest.mark.parametrize(("min_stable", "is_reset"), [(0, True), (3600, False)])
def test_pauses_are_short_again_after_a_connection_that_was_long_and_useful(
    min_stable: float, is_reset: bool, tmp_path: Path
) -> None:
    def hang_up_on_every_second(event: Event) -> Any:
        return HANG_UP if isinstance(event.packet, Publish) and event.number % 2 == 0 else None

    with FakeBroker(Script(hang_up_on_every_second)) as broker:
        with client_to(broker.port, tmp_path, min_stable=min_stable, max_inflight=1) as client:
            publish_numbers(client, range(5))
            client.flush(60)
            assert client.stats().connects >= 4
            assert (client._publisher._backoff.attempts <= 1) is is_reset


def test_two_clients_with_one_id_are_told_so(mosquitto: Mosquitto) -> None:
    settings = {"client_id": "twin", "spool": None}
    with client_to(mosquitto.port, **settings) as one, client_to(mosquitto.port, **settings) as other:
        for client in (one, other):
            until(lambda client=client: "does another client use the id 'twin'?" in client.stats().last_error)


def test_an_unsubscription_that_was_lost_with_its_connection_is_repeated() -> None:
    def hang_up_on_the_first(event: Event) -> Any:
        return HANG_UP if isinstance(event.packet, Unsubscribe) and event.number == 1 else None

    script = Script(hang_up_on_the_first)
    with FakeBroker(script, parallel=True) as broker, client_to(broker.port, None, session_expiry=3600) as client:
        client.subscribe("stays", print)
        client.subscribe("goes", print)
        client.wait_subscribed(60)
        client.unsubscribe("goes")
        script.wait(Unsubscribe, 2)
        until(lambda: not client._subscriber._unsubscribing)
    assert [packet.filters for packet in script.of_type(Unsubscribe)] == [("goes",)] * 2
    last = script.of_type(Subscribe)[-1]
    assert [one.filter for one in last.subscriptions] == ["stays"]


def test_the_first_connection_may_be_to_the_second_address(broker: Broker) -> None:
    addresses = [f"mqtt://127.0.0.1:{dead_port()}", f"mqtt://127.0.0.1:{broker.port}"]
    with client_to(0, None, broker=addresses, connect_first=True) as client:
        assert client.stats().connected


def test_the_first_connection_fails_when_every_address_has() -> None:
    addresses = [f"mqtt://127.0.0.1:{dead_port()}" for _ in range(3)]
    client = client_to(0, None, broker=addresses, connect_first=True)
    with pytest.raises(cloudpubsub.ConnectError, match="refused"):
        client.start()


def test_connections_are_counted_once_each() -> None:
    script = Script()
    with FakeBroker(script, parallel=True) as broker, client_to(broker.port, None) as client:
        client.wait(client.publish("a", b""), 60)
    assert len(script.of_type(Connect)) == 1


def test_closing_ends_a_start_that_waits_for_its_first_connection() -> None:
    """Of two addresses one has failed, and the pause before the other is long."""
    addresses = [f"mqtt://127.0.0.1:{dead_port()}" for _ in range(2)]
    patient: dict[str, Any] = {"reconnect_min": 3600, "reconnect_max": 3600, "connect_timeout": 3600}
    client = client_to(0, None, broker=addresses, connect_first=True, **patient)
    ended = threading.Event()

    def start() -> None:
        with pytest.raises(cloudpubsub.Error):
            client.start()
        ended.set()

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    until(lambda: client.stats().last_error)
    client.close(1)
    assert ended.wait(60)
    thread.join(60)


def test_news_that_come_while_a_connection_goes_down_are_heard() -> None:
    """Whoever hears from the log, or in a moment's time, that the link is down may know that it is back already."""
    patient: dict[str, Any] = {"reconnect_min": 3600, "reconnect_max": 3600}

    class Modem(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "closed by the broker" in record.getMessage():
                client.network_changed()

    modem = Modem()
    logging.getLogger("cloudpubsub").addHandler(modem)
    try:
        script = Script(lambda event: HANG_UP if isinstance(event.packet, Publish) and event.number == 1 else None)
        with FakeBroker(script) as broker, client_to(broker.port, None, **patient) as client:
            client.wait(client.publish("a", b""), 60)
            assert client.stats().connects == 2
    finally:
        logging.getLogger("cloudpubsub").removeHandler(modem)


def test_a_subscription_that_comes_while_a_connection_is_set_up_is_made() -> None:
    with FakeBroker(Script(), parallel=True) as broker, client_to(broker.port, None) as client:
        expect_all = client._subscriber._expect_all
        others: list[threading.Thread] = []

        def meanwhile() -> list[str]:
            filters = expect_all()
            if not others:
                others.append(threading.Thread(target=client.subscribe, args=("late", print)))
                others[0].start()
                others[0].join(0.1)  # a lock that is held keeps it until we are through
            return filters

        client._subscriber._expect_all = meanwhile  # type: ignore[method-assign]
        client.subscribe("early", print)
        until(lambda: others and others[0].ident)
        others[0].join(60)
        client.wait_subscribed(60)


@pytest.mark.parametrize("error", [ssl.SSLError("x"), ssl.SSLCertVerificationError("x")])
def test_errors_that_openssl_did_not_make_are_named_too(error: Exception) -> None:
    assert explain(error).startswith("TLS: ")
    assert state_after(error) in ("down", "certificate not accepted")


def test_subscriptions_that_come_and_go_offline_leave_nothing_behind() -> None:
    with client_to(dead_port(), None) as client:
        for _ in range(1_000):
            client.subscribe("a", print)
            client.unsubscribe("a")
        assert len(client._subscriber._requests) <= 1

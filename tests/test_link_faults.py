"""The client on links that delay, drop, tear and fall silent anywhere in the stream: nothing is lost, order is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from tests.brokers import Broker, Mosquitto, TlsFiles
from tests.collector import Collector
from tests.fault_relay import FINE, MUTE, FaultRelay, Faults, Harm, both, in_turn, storm
from tests.publishing import LIMIT, client_to, number_of, publish_numbers, until

CONNACK_BYTES = 4
IMPATIENT: dict[str, Any] = {"connect_timeout": 0.5, "reconnect_min": 0.001, "reconnect_max": 0.002}


def test_a_link_that_stalls_at_any_byte_of_the_answer_to_connect_is_given_up(broker: Broker) -> None:
    stalls = [Faults(down=Harm(after=count, then="stall")) for count in range(CONNACK_BYTES)]
    with FaultRelay(broker.port, in_turn(*stalls, FINE)) as relay:
        with client_to(relay.port, None, **IMPATIENT) as client:
            client.wait(client.publish("a", b""), LIMIT)
            # On a busy machine one that is fine may be too slow too.
            assert client.stats().connects == 1 and relay.accepted > CONNACK_BYTES
            assert client.stats().last_error == "no CONNACK in time"


def test_a_peer_that_accepts_and_says_nothing_is_given_up(broker: Broker) -> None:
    with FaultRelay(broker.port, in_turn(MUTE, MUTE, FINE)) as relay:
        with client_to(relay.port, None, **IMPATIENT) as client:
            client.wait(client.publish("a", b""), LIMIT)
            assert relay.accepted >= 3


def test_a_link_that_breaks_anywhere_in_a_tls_handshake_is_made_again(
    mosquitto: Mosquitto, tls_files: TlsFiles, tmp_path: Path
) -> None:
    with Mosquitto(tmp_path / "tls", tls=tls_files) as tls_broker:
        assert tls_broker.tls_port is not None

        def later_each_time(number: int) -> Faults:
            return Faults(down=Harm(after=211 * number, then="reset"))

        with FaultRelay(tls_broker.tls_port, later_each_time) as relay:
            client = client_to(
                relay.port,
                None,
                broker=f"mqtts://localhost:{relay.port}",
                tls=cloudpubsub.TLS(ca=tls_files.ca),
                reconnect_min=0.001,
                reconnect_max=0.002,
            )
            with client:
                client.wait(client.publish("a", b""), LIMIT)
                assert relay.accepted > 5  # the handshake alone is longer than a kilobyte


def test_a_broker_that_trickles_its_answer_in_time_is_waited_for(broker: Broker) -> None:
    with FaultRelay(broker.port, Faults(down=Harm(chunk=1, interval=0.05))) as relay:
        with client_to(relay.port, None) as client:
            client.wait(client.publish("a", b""), LIMIT)
            assert client.stats().connects == 1


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_a_link_that_silently_swallows_everything_is_noticed(
    broker: Broker, way: str, is_busy: bool, tmp_path: Path
) -> None:
    gone = Harm(then="drop")
    faults = Faults(up=gone) if way == "up" else Faults(down=gone)
    with Collector(broker.port, key=number_of) as collector, FaultRelay(broker.port) as relay:
        with client_to(relay.port, tmp_path, keep_alive=1) as client:
            publish_numbers(client, range(10))
            client.flush(LIMIT)
            relay.change(faults, 1)  # this connection; the next one is fine
            if is_busy:
                publish_numbers(client, range(10, 20))
            until(lambda: client.stats().connects >= 2)
            publish_numbers(client, range(20, 30))
            assert client.flush(LIMIT) == 0
        numbers = [*range(10), *(range(10, 20) if is_busy else ()), *range(20, 30)]
        collector.wait_for(len(numbers), LIMIT)
        assert collector.first_deliveries() == numbers


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_through_a_storm_of_faults_everything_arrives_in_order(broker: Broker, seed: int, tmp_path: Path) -> None:
    count = 0
    with Collector(broker.port, key=number_of) as collector:
        faults = storm(seed, bytes_between=20_000, latency=0.005, fine_share=0)
        with FaultRelay(broker.port, faults, seed=seed) as relay:
            settings: dict[str, Any] = {"keep_alive": 1, "ack_timeout": 0.5, "connect_timeout": 1.0}
            with client_to(relay.port, tmp_path, max_inflight=500, **settings) as client:

                def publishes_through_five_connections() -> bool:
                    nonlocal count
                    publish_numbers(client, range(count, count + 20))
                    count += 20
                    return client.stats().connects >= 5

                until(publishes_through_five_connections)
                relay.set_plan(FINE)
                relay.reset()
                assert client.flush(2 * LIMIT) == 0
                assert client.stats().acked == client.stats().published == count
        collector.wait_for(count, LIMIT)
    assert collector.first_deliveries() == list(range(count))


def test_a_slow_thin_link_is_not_mistaken_for_a_dead_one(broker: Broker, tmp_path: Path) -> None:
    """A window that takes longer than `ack_timeout` to cross: acknowledgements keep coming, so it is left alone."""
    count = 400
    with FaultRelay(broker.port, both(rate=100_000)) as relay:
        with client_to(relay.port, tmp_path, ack_timeout=3.0, keep_alive=3) as client:
            for _ in range(count):
                client.publish("a", bytes(1000))
            assert client.flush(LIMIT) == 0
            assert client.stats().connects == 1 and client.stats().resent == 0

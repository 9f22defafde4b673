"""A message for which the broker hangs up is found and set aside; broker restarts and bad links condemn nobody."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import Message
from cloudpubsub._suspicion import Suspicion
from tests.fake_broker import FakeBroker
from tests.packets import Connack, Disconnect, Publish
from tests.publishing import client_to, publish_numbers, until
from tests.script import HANG_UP, WITHHOLD, Cut, Event, Script

QUICK: dict[str, Any] = {"poison_window": 0.3, "reconnect_min": 0.01, "reconnect_max": 0.02, "min_stable": 0}


class Dead(list[tuple[Message, str]]):
    def __call__(self, message: Message, reason: str) -> None:
        self.append((message, reason))


def hang_up_at(*wanted: int, reset: bool = False) -> Any:
    poison = {b"%d" % number for number in wanted}

    def instead(event: Event) -> Any:
        packet = event.packet
        return Cut(reset=reset) if isinstance(packet, Publish) and packet.payload in poison else None

    return instead


@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
@pytest.mark.parametrize("reset", [False, True])
def test_one_poison_message_among_10_000_is_the_only_one_not_delivered(
    reset: bool, protocol: str, tmp_path: Path
) -> None:
    dead = Dead()
    script = Script(hang_up_at(5_000, reset=reset))
    with FakeBroker(script) as broker:
        with client_to(broker.port, tmp_path, protocol=protocol, on_dead_letter=dead, **QUICK) as client:
            positions = publish_numbers(client, range(10_000))
            assert client.flush(60) == 1
            stats = client.stats()
            assert (stats.acked, stats.dead_lettered, stats.dropped) == (9_999, 1, 0)
            assert stats.connects < 20
            until(lambda: dead)
    assert [(message.payload, message.position) for message, _ in dead] == [(b"5000", positions[5_000])]
    assert "hangs up" in dead[0][1]
    assert set(map(int, (publish.payload for publish in script.publishes))) == set(range(10_000))


@pytest.mark.parametrize("order", ["live_first", "share"])
@pytest.mark.parametrize("poison", [[700], [2000], [1, 2005]])
def test_poison_is_found_in_a_backlog_and_beside_one(poison: list[int], order: Any, tmp_path: Path) -> None:
    """The backlog is of the numbers below 2000."""
    dead = Dead()
    script = Script(hang_up_at(*poison))
    settings: dict[str, Any] = {"order": order, "max_inflight_bytes": 1024, "max_inflight": 50, **QUICK}
    with client_to(1, tmp_path, **settings) as client:
        publish_numbers(client, range(2000))
    with FakeBroker(script) as broker:
        with client_to(broker.port, tmp_path, on_dead_letter=dead, **settings) as client:
            until(lambda: client.stats().connects >= 1)
            publish_numbers(client, range(2000, 2010))
            assert client.flush(60) == len(poison)
            stats = client.stats()
            assert (stats.acked, stats.dead_lettered, stats.dropped) == (2010 - len(poison), len(poison), 0)
            until(lambda: len(dead) == len(poison))
    assert sorted(int(message.payload) for message, _ in dead) == poison
    assert set(map(int, (publish.payload for publish in script.publishes))) == set(range(2010))


def test_several_poison_messages_are_found_one_by_one(tmp_path: Path) -> None:
    """Two of them side by side: neither can stand in for the other."""
    with FakeBroker(Script(hang_up_at(3, 4, 9))) as broker:
        with client_to(broker.port, tmp_path, **QUICK) as client:
            publish_numbers(client, range(12))
            assert client.flush(60) == 3
            assert client.stats().dead_lettered == 3


@pytest.mark.parametrize("limit", ["max_inflight", "receive_maximum"])
def test_poison_is_found_also_where_one_message_may_be_in_flight(limit: str, tmp_path: Path) -> None:
    connack = Connack(properties={"receive_maximum": 1} if limit == "receive_maximum" else {})
    settings: dict[str, Any] = {"protocol": "5", "max_inflight": 1 if limit == "max_inflight" else None}
    script = Script(hang_up_at(2, 3), connack=connack)
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, **settings, **QUICK) as client:
        publish_numbers(client, range(8))
        assert client.flush(60) == 2
    assert script.most_in_flight == 1


def test_a_broker_that_hangs_up_whatever_is_sent_condemns_nobody(tmp_path: Path) -> None:
    with FakeBroker(Script(lambda event: HANG_UP if isinstance(event.packet, Publish) else None)) as broker:
        with client_to(broker.port, tmp_path, **QUICK) as client:
            publish_numbers(client, range(5))
            until(lambda: client.stats().connects >= 20)
            assert client.stats().dead_lettered == 0 and client.stats().backlog_messages == 5


def test_a_lonely_message_is_never_condemned(tmp_path: Path) -> None:
    """There is no other to prove that the link is not to blame; and as soon as there is, it is."""
    with FakeBroker(Script(hang_up_at(0))) as broker:
        with client_to(broker.port, tmp_path, **QUICK) as client:
            publish_numbers(client, range(1))
            until(lambda: client.stats().connects >= 12)
            assert client.stats().dead_lettered == 0
            publish_numbers(client, range(1, 3))
            assert client.flush(60) == 1


def test_links_that_break_at_random_condemn_nobody(tmp_path: Path) -> None:
    """Every few packets, whatever they carry, but never twice in a row with nothing acknowledged."""
    script = Script(lambda event: HANG_UP if isinstance(event.packet, Publish) and event.number % 7 == 0 else None)
    with FakeBroker(script) as broker:
        with client_to(broker.port, tmp_path, **QUICK) as client:
            publish_numbers(client, range(200))
            assert client.flush(60) == 0
            assert client.stats().dead_lettered == 0


@pytest.mark.parametrize("reason", [0x89, 0x8B, 0x8E, 0x96])
def test_a_broker_that_says_why_it_hangs_up_condemns_nobody(reason: int, tmp_path: Path) -> None:
    """Shutting down, taken over and the like, whenever the same message is in flight."""

    def instead(event: Event) -> Any:
        is_suspect = isinstance(event.packet, Publish) and event.packet.payload == b"0"
        return Disconnect(reason) if is_suspect else None

    check_that_nobody_is_condemned(instead, tmp_path, protocol="5", connects=12)


def test_a_link_that_we_give_up_condemns_nobody(tmp_path: Path) -> None:
    """One message is never acknowledged, so that `ack_timeout` ends every connection that carries it, and soon."""

    def instead(event: Event) -> Any:
        is_suspect = isinstance(event.packet, Publish) and event.packet.payload == b"0"
        return WITHHOLD if is_suspect else None

    check_that_nobody_is_condemned(instead, tmp_path, ack_timeout=0.1, connects=8)


def check_that_nobody_is_condemned(instead: Any, spool: Path, *, connects: int, **settings: Any) -> None:
    """With others always there that could stand in for the suspect."""
    with FakeBroker(Script(instead)) as broker, client_to(broker.port, spool, **QUICK, **settings) as client:
        publish_numbers(client, range(5))

        def is_enough() -> bool:
            publish_numbers(client, range(5, 6))
            return client.stats().connects >= connects

        until(is_enough)
        assert client.stats().dead_lettered == 0


def test_without_a_poison_window_nothing_is_ever_condemned(tmp_path: Path) -> None:
    with FakeBroker(Script(hang_up_at(1))) as broker:
        with client_to(broker.port, tmp_path, **{**QUICK, "poison_window": None}) as client:
            publish_numbers(client, range(4))
            until(lambda: client.stats().connects >= 20)
            assert client.stats().dead_lettered == 0


# ---- the rules alone ----


def drop_alone(suspicion: Suspicion, position: int, *, soon: bool = True) -> int | None:
    return suspicion.dropped(position, position + 100, 1, soon)


def test_the_window_is_narrowed_until_the_suspect_is_alone_and_widened_when_it_is_past() -> None:
    suspicion = Suspicion()
    limits = []
    inflight = 10_000
    for _ in range(7):
        assert suspicion.dropped(0, 1_000_000, inflight, True) is None
        limits.append(suspicion.limit)
        inflight = suspicion.limit or inflight
    assert limits == [None, 1_250, 156, 19, 2, 1, 1]
    suspicion.moved(lambda _: 999_999)
    assert suspicion.limit == 1, "somewhere below the end of what was in flight is the culprit"
    suspicion.moved(lambda _: 1_000_000)
    assert suspicion.limit is None


def test_only_quick_drops_with_a_control_between_each_two_convict() -> None:
    suspicion = Suspicion()
    assert [drop_alone(suspicion, 8) for _ in range(2)] == [None, None] and suspicion.is_control
    suspicion.acquit()
    assert drop_alone(suspicion, 8) is None and suspicion.is_control
    suspicion.acquit()
    assert drop_alone(suspicion, 8) == 8


def test_a_drop_that_comes_late_clears_the_suspect() -> None:
    suspicion = Suspicion()
    drop_alone(suspicion, 8)
    for _ in range(2):
        drop_alone(suspicion, 8)
        suspicion.acquit()
    assert drop_alone(suspicion, 8, soon=False) is None
    assert not suspicion.is_control
    for _ in range(2):
        assert drop_alone(suspicion, 8) is None
        suspicion.acquit()
    assert drop_alone(suspicion, 8) == 8


def test_a_large_message_on_a_link_that_breaks_at_random_is_rarely_condemned() -> None:
    """It takes 5 s to send, others next to nothing, and links last 5 s on average."""
    chance = random.Random(1)

    def is_condemned() -> bool:
        suspicion = Suspicion()
        while True:
            left_s = chance.expovariate(1 / 5)
            if suspicion.is_control:
                if left_s < 10:
                    drop_alone(suspicion, 108)
                    continue
                suspicion.acquit()
                left_s -= 10
            if left_s >= 5:
                return False
            if drop_alone(suspicion, 8) is not None:
                return True

    assert sum(is_condemned() for _ in range(2_000)) < 40


def test_a_control_that_drops_too_clears_the_suspect_and_another_stands_in_next() -> None:
    suspicion = Suspicion()
    drop_alone(suspicion, 8)
    drop_alone(suspicion, 8)
    assert suspicion.is_control and suspicion.skipped == 0
    assert drop_alone(suspicion, 108) is None
    assert not suspicion.is_control
    drop_alone(suspicion, 8)
    assert suspicion.is_control and suspicion.skipped == 1


def test_where_none_is_left_to_stand_in_the_first_is_asked_again() -> None:
    """Links that broke had each asked for one further behind, where nothing is any more."""
    suspicion = Suspicion()
    drop_alone(suspicion, 8)
    for _ in range(3):
        drop_alone(suspicion, 8)
        assert suspicion.is_control
        drop_alone(suspicion, 108)
    drop_alone(suspicion, 8)
    assert suspicion.is_control and suspicion.skipped == 3
    suspicion.give_up_control()
    drop_alone(suspicion, 8)
    assert suspicion.is_control and suspicion.skipped == 0


def test_nothing_in_flight_is_nobodys_fault() -> None:
    suspicion = Suspicion()
    for _ in range(10):
        assert suspicion.dropped(None, 0, 0, True) is None
    assert suspicion.limit is None and not suspicion.is_watching

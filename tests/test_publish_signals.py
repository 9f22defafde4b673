"""`publish()` from signal handlers and from callbacks: whatever they interrupt or wait for, nothing waits for ever."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import ClosedError, Drop, Message, Spool, SpoolFull, WaitTimeout
from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker
from tests.collector import Collector
from tests.making import eventually
from tests.publishing import LIMIT, client_to, until

NOBODY = 1
KIB = 1024
SMALL: dict[str, Any] = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}


@contextmanager
def signals(handle: Callable[[], object]) -> Iterator[list[int]]:
    """`handle` runs again and again as a signal handler of this, the main, thread; yields what it counts."""
    handled, ended = [0], threading.Event()
    target = threading.main_thread().ident
    assert target is not None and threading.current_thread() is threading.main_thread()

    def on_signal(*_: object) -> None:
        handle()
        handled[0] += 1

    def send() -> None:
        while not ended.is_set():
            seen = handled[0]
            signal.pthread_kill(target, signal.SIGUSR1)
            while handled[0] == seen and not ended.is_set():
                time.sleep(0.0001)

    before = signal.signal(signal.SIGUSR1, on_signal)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield handled
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("call", ["wait", "flush", "wait_synced", "flush_now", "stats"])
def test_a_signal_handler_publishes_while_it_interrupts_a_wait(call: str, tmp_path: Path) -> None:
    with client_to(NOBODY, tmp_path / "spool", **SMALL) as client:
        position = client.publish("main", b"0")
        sent: list[int] = []
        calls: dict[str, Callable[[], object]] = {
            "wait": lambda: client.wait(position, 0.1),
            "flush": lambda: client.flush(0.1),
            "wait_synced": lambda: client.wait_synced(sent[-1] if sent else position, LIMIT),
            "flush_now": lambda: client.flush_now(LIMIT),
            "stats": client.stats,
        }
        with signals(lambda: sent.append(client.publish("signal", b"0"))):
            while len(sent) < 20:
                if call in ("wait", "flush"):
                    with pytest.raises(WaitTimeout):
                        calls[call]()
                else:
                    calls[call]()
        assert client.stats().published == len(sent) + 1


def test_a_signal_handler_publishes_while_publish_waits_for_room(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {**SMALL, "max_spool_messages": 1, "on_full": "block", "block_timeout": 0.2}
    refused: list[SpoolFull] = []
    with client_to(NOBODY, tmp_path / "spool", **sizes) as client:

        def publish_one() -> None:
            try:
                client.publish("signal", bytes(KIB))
            except SpoolFull as exc:
                refused.append(exc)

        with pytest.raises(SpoolFull):
            for _ in range(10_000):
                client.publish("main", bytes(KIB))
        with signals(publish_one):
            with pytest.raises(SpoolFull):
                client.publish("main", bytes(KIB))
            until(lambda: refused)
        stats = client.stats()
        assert stats.published == stats.backlog_messages


def test_a_signal_handler_appends_while_a_spool_is_read_and_acknowledged(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool", **SMALL) as spool:
        sent: list[int] = []
        seen: list[int] = []
        with signals(lambda: sent.append(spool.append("signal", b"0"))):
            while len(seen) < 200:
                if batch := spool.read(400):
                    seen += [message.position or 0 for message in batch]
                    spool.ack(seen[-1])
        while batch := spool.read():
            seen += [message.position or 0 for message in batch]
        assert seen == sent


def test_every_kind_of_callback_may_publish(broker: Broker, tmp_path: Path) -> None:
    came: list[str] = []
    drops: list[Drop] = []
    with Relay(broker.port) as relay, Collector(broker.port, "from/#", key=lambda topic, _: topic) as collector:

        def say(name: str) -> None:
            client.publish(f"from/{name}", b"")
            came.append(name)

        def on_publish(message: Message) -> None:
            if message.topic == "first":
                say("on_publish")

        def on_drop(drop: Drop) -> None:
            drops.append(drop)
            if len(drops) == 1:
                say("on_drop")

        client = client_to(
            relay.port,
            tmp_path / "spool",
            **SMALL,
            max_spool_messages=100,
            on_publish=on_publish,
            on_connect=lambda _: say("on_connect"),
            on_disconnect=lambda _: say("on_disconnect"),
            on_drop=on_drop,
        )
        client.subscribe("command", lambda _: say("handler"))
        with client:
            client.wait_subscribed(LIMIT)
            client.wait(client.publish("first", b""), LIMIT)
            client.wait(client.publish("command", b""), LIMIT)
            eventually(lambda: {"on_connect", "on_publish", "handler"} <= set(came), "the first callbacks")
            assert client.flush(LIMIT) == 0  # what is on its way now could be dropped below
            eventually(lambda: len(collector.first_deliveries()) >= 3, "arrival of what they published")
            relay.cut()
            eventually(lambda: "on_disconnect" in came, "told of the cut")
            for _ in range(2_000):
                client.publish("many", bytes(100))
            eventually(lambda: drops, "told of a drop")
            relay.restore()
            client.flush(LIMIT)
            eventually(lambda: client.stats().backlog_messages == 0, "everything is sent")
            stats = client.stats()
            assert stats.callback_errors == 0 and stats.handler_errors == 0
        arrived = set(collector.arrivals())
    assert "on_drop" in came  # what it published may have been dropped itself
    assert {"from/on_connect", "from/on_publish", "from/handler"} <= arrived


def test_a_lock_of_the_user_may_be_held_by_publish_and_taken_by_callbacks(broker: Broker, tmp_path: Path) -> None:
    lock, count, seen = threading.Lock(), 5_000, [0]

    def on_publish(_: Message) -> None:
        with lock:
            seen[0] += 1

    sizes: dict[str, Any] = {**SMALL, "handler_queue": 1, "on_publish": on_publish}
    with client_to(broker.port, tmp_path / "spool", **sizes) as client:
        for number in range(count):
            with lock:
                client.publish("numbers", b"%d" % number + bytes(100))
        assert client.flush(LIMIT) == 0
        eventually(lambda: seen[0] == count, "every message reported")


def test_threads_publish_while_a_client_closes_and_each_message_is_kept_or_refused(tmp_path: Path) -> None:
    taken: list[int] = []
    client = client_to(NOBODY, tmp_path / "spool", **SMALL)
    client.start()

    def publish_on() -> None:
        try:
            while True:
                position = client.publish("numbers", b"x" * 50)
                taken.append(position)
        except ClosedError:
            pass

    threads = [threading.Thread(target=publish_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(taken) > 500)
    assert client.close(LIMIT) == 0
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    with Spool(tmp_path / "spool", **SMALL) as spool:
        stored: list[int] = []
        while batch := spool.read():
            stored += [message.position or 0 for message in batch]
    assert stored == sorted(taken)


def test_an_exception_out_of_a_signal_handler_ends_a_wait_and_harms_nothing(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with client_to(NOBODY, tmp_path / "spool", **SMALL) as client:
            position = client.publish("numbers", b"0")
            timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(Interrupted):
                client.wait(position, LIMIT)
            timer.join()
            assert client.publish("numbers", b"1") > position
            assert client.stats().backlog_messages == 2
    finally:
        signal.signal(signal.SIGUSR1, before)

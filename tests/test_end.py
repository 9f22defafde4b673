"""However a program ends, on a live link or a dead one: what it published is on the disk, and it ends in time."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from cloudpubsub import Spool, SpoolLockedError
from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker
from tests.collector import Collector
from tests.making import Child, eventually
from tests.publishing import LIMIT, client_to, number_of

COUNT = 2_000

# Publishes, then ends as it is told.  In flight on a dead link, in the ring and on the disk there is something then.
PROGRAM = """
import atexit, os, signal, sys, time
port, spool, durability, ending = sys.argv[1:5]

def late():
    try:
        client.publish("numbers", b"never")
    except cloudpubsub.ClosedError:
        print("closed", flush=True)

if ending == "atexit":
    atexit.register(late)  # before ours, so after it
import cloudpubsub

client = cloudpubsub.Client(
    "mqtt://127.0.0.1:" + port, client_id="g", spool=spool, durability=durability, ring_bytes=65536, segment_bytes=65536
)
if ending == "handler":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if ending == "closing handler":
    def stop(*_):
        print(client.close(30), flush=True)
        os._exit(0)
    signal.signal(signal.SIGTERM, stop)
client.start()
while not client.stats().connected:
    time.sleep(0.001)
print("connected", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[5])):
    client.publish("numbers", b"%d" % number)
print("published", flush=True)
if ending == "atexit":
    sys.exit(0)
while True:
    time.sleep(1)
"""


def numbers_in(path: Path) -> list[int]:
    with Spool(path) as spool:
        found: list[int] = []
        while batch := spool.read():
            found += [int(message.payload) for message in batch]
        return found


@pytest.mark.parametrize(
    ("ending", "durability", "number", "code"),
    [
        ("handler", "memory", signal.SIGTERM, 0),
        ("closing handler", "memory", signal.SIGTERM, 0),
        ("none", "process", signal.SIGTERM, -signal.SIGTERM),
        ("none", "power", signal.SIGTERM, -signal.SIGTERM),
        ("none", "memory", signal.SIGINT, None),
        ("atexit", "memory", None, 0),
    ],
)
def test_a_program_that_ends_on_a_dead_link_leaves_everything_to_the_next(
    ending: str,
    durability: str,
    number: signal.Signals | None,
    code: int | None,
    mosquitto: Broker,
    tmp_path: Path,
) -> None:
    with Relay(mosquitto.port) as relay, Collector(mosquitto.port, key=number_of) as collector:
        with Child(PROGRAM, relay.port, tmp_path / "spool", durability, ending, COUNT) as child:
            assert child.line() == "connected"
            relay.blackhole()
            child.tell("publish")
            assert child.line() == "published"
            if number is not None:
                child.process.send_signal(number)
            if ending == "closing handler":
                assert child.line() == "0", "something could not be saved"
            if ending == "atexit":
                assert child.line() == "closed"
            ended = child.process.wait(LIMIT)
            assert code is None or ended == code
        relay.unblackhole()
        client = client_to(relay.port, tmp_path / "spool", client_id="g")
        assert client.recovery.records == COUNT
        with client:  # publishes nothing
            collector.wait_for(COUNT, LIMIT)
            assert client.flush(LIMIT) == 0
            stats = client.stats()
            assert (stats.published, stats.acked, stats.backlog_messages, stats.dropped) == (COUNT, COUNT, 0, 0)
        assert collector.first_deliveries() == list(range(COUNT))
    assert numbers_in(tmp_path / "spool") == []


def test_closing_on_a_dead_link_returns_and_loses_nothing(mosquitto: Broker, tmp_path: Path) -> None:
    with Relay(mosquitto.port) as relay:
        client = client_to(relay.port, tmp_path / "spool")
        client.start()
        eventually(lambda: client.stats().connected)
        relay.blackhole()
        for number in range(COUNT):
            client.publish("numbers", b"%d" % number)
        assert client.close(10.0) == 0
    assert numbers_in(tmp_path / "spool") == list(range(COUNT))


def test_closing_without_a_spool_on_a_dead_link_tells_what_is_lost(mosquitto: Broker) -> None:
    with Relay(mosquitto.port) as relay:
        client = client_to(relay.port, None)
        client.start()
        eventually(lambda: client.stats().connected)
        relay.blackhole()
        for number in range(COUNT):
            client.publish("numbers", b"%d" % number)
        assert client.close(0.5) == COUNT


HURRIED = """
import sys, cloudpubsub
client = cloudpubsub.Client("mqtt://127.0.0.1:1", client_id="g", spool=sys.argv[1], durability=sys.argv[2])
client.start()
for number in range(int(sys.argv[4])):
    client.publish("numbers", b"%d" % number)
print(client.close(float(sys.argv[3])), flush=True)
"""


@pytest.mark.parametrize("timeout", [0.0, -1.0, 1e-9])
@pytest.mark.parametrize("durability", ["memory", "process"])
def test_closing_with_no_time_at_all_returns_and_tells_what_is_not_saved(
    durability: str, timeout: float, tmp_path: Path
) -> None:
    with Child(HURRIED, tmp_path / "spool", durability, timeout, COUNT) as child:
        unsaved = int(child.line())
        assert child.process.wait(LIMIT) == 0
    found = numbers_in(tmp_path / "spool")
    assert found == list(range(len(found))) and len(found) >= COUNT - unsaved
    if durability == "process":
        assert len(found) == COUNT, "the ring's file keeps what could not be saved"


def test_a_spool_that_had_no_time_to_close_is_free_when_the_disk_has_done_its_work(tmp_path: Path) -> None:
    client = client_to(1, tmp_path / "spool")
    client.start()
    for number in range(COUNT):
        client.publish("numbers", b"%d" % number)
    client.close(0.0)

    def is_free() -> bool:
        try:
            return numbers_in(tmp_path / "spool") == list(range(COUNT))
        except SpoolLockedError:
            return False

    eventually(is_free, "the spool can be opened again")


def test_several_open_at_exit_are_all_saved(tmp_path: Path) -> None:
    program = """
import sys, cloudpubsub
kept = [cloudpubsub.Spool(sys.argv[1] + str(number), durability="memory") for number in range(5)]
for number in range(500):
    for spool in kept:
        spool.append("numbers", b"%d" % number)
raise SystemExit(3)
"""
    with Child(program, tmp_path / "spool") as child:
        assert child.process.wait(LIMIT) == 3
    for number in range(5):
        assert numbers_in(tmp_path / f"spool{number}") == list(range(500))

"""Memory is the ring and a fixed overhead, whatever the backlog: 1 GB is published without a link, then drained."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.brokers import Broker, Mosquitto, Rumqttd, mosquitto_path
from tests.collector import Collector
from tests.making import Child, eventually, url

MIB, GIB = 1 << 20, 1 << 30
RING_BYTES = 4 * MIB  # the default
COUNT, PAYLOAD_BYTES = 62_500, 16_000  # 1 GB
DRAIN_LIMIT = 90  # seconds
BETWEEN_LOOKS = 0.005  # seconds

# A process of its own, so that nothing else is measured.  Does a step for each line of its standard input, and says
# with a line that it is done.
PUBLISHER = """
import sys
import cloudpubsub
import cloudpubsub._publisher  # making a client would import it: code, paho's above all, is not what is measured

broker, spool, count, size, timeout = *sys.argv[1:3], *map(int, sys.argv[3:])

def step(answer):
    print(answer, flush=True)
    sys.stdin.readline()

step("")
client = cloudpubsub.Client(
    broker, client_id="gateway", spool=spool, max_spool_bytes=4 << 30, reconnect_min=0.02, reconnect_max=0.1
)
client.start()
payload = bytearray(size)
for number in range(count):
    payload[:8] = number.to_bytes(8, "big")
    client.publish("numbers", payload)
stats = client.stats()
step(f"{stats.published} {stats.dropped} {stats.spool_bytes}")
step(client.flush(timeout))
"""


@dataclass(frozen=True)
class Resident:
    """Memory of a process in bytes."""

    own: int  # anonymous and shared
    whole: int  # with mapped files

    def __sub__(self, other: Resident) -> Resident:
        return Resident(self.own - other.own, self.whole - other.whole)

    def __str__(self) -> str:
        return f"{self.own / MIB:.2f} MiB, with files {self.whole / MIB:.2f} MiB"


def resident(pid: int) -> Resident:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    anonymous, shared, files = (int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem", "RssFile"))
    return Resident(anonymous + shared, anonymous + shared + files)


class Watch:
    """The most memory that a process takes while the `with` block runs; a thread looks at it from outside."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory")
        self.looks = 0
        self.most = Resident(0, 0)

    def _look(self) -> None:
        while not self._is_over.wait(BETWEEN_LOOKS):
            now = resident(self._pid)
            self.most = Resident(max(self.most.own, now.own), max(self.most.whole, now.whole))
            self.looks += 1

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


@dataclass(frozen=True)
class Run:
    """What the one run, which all tests look at, has shown."""

    published: int
    dropped: int
    spool_bytes: int  # when all was published
    undelivered: int
    arrivals: list[int]
    publishing: Resident  # the most, against before the client was made
    draining: Resident
    looks: tuple[int, int]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that is on a disk, and empty of everything afterwards."""
    base = tmp_path_factory.mktemp("memory")
    kind = subprocess.run(["stat", "-f", "-c", "%T", base], check=True, capture_output=True, text=True, timeout=60)
    in_memory = kind.stdout.strip() in ("tmpfs", "ramfs")
    directory = Path(tempfile.mkdtemp(prefix="cloudpubsub-", dir="/var/tmp" if in_memory else base))
    try:
        assert shutil.disk_usage(directory).free > 2 * GIB, f"{directory}: 1 GB is to be written there"
        yield directory
    finally:
        shutil.rmtree(directory)


def _broker(directory: Path) -> Broker:
    """Mosquitto where there is one: it passes on a GB in a third of the time, and needs no room to keep all of it."""
    return Mosquitto(directory) if mosquitto_path() is not None else Rumqttd(directory, log_bytes=2 * GIB)


def number_of(topic: str, payload: bytes) -> int:
    return int.from_bytes(payload[:8], "big")


@pytest.fixture(scope="module")
def run(disk: Path) -> Run:
    spool, broker = disk / "spool", _broker(disk / "broker")  # which does not listen yet
    with Child(PUBLISHER, url(broker.port), spool, COUNT, PAYLOAD_BYTES, DRAIN_LIMIT) as publisher:
        assert publisher.line() == ""
        before = resident(publisher.pid)
        with Watch(publisher.pid) as publishing:
            publisher.tell("publish")
            published, dropped, spool_bytes = map(int, publisher.line().split())
        os.kill(publisher.pid, signal.SIGSTOP)  # it would be there before the subscriber
        with broker, Collector(broker.port, "numbers", key=number_of) as collector:
            os.kill(publisher.pid, signal.SIGCONT)
            with Watch(publisher.pid) as draining:
                publisher.tell("flush")
                collector.wait_for(COUNT, DRAIN_LIMIT)
                undelivered = int(publisher.line())
            eventually(lambda: not any((spool / "log").iterdir()), "drained segments are removed")
            publisher.tell("end")
            assert publisher.process.wait(DRAIN_LIMIT) == 0
            grown = publishing.most - before, draining.most - before
            print(f"grown while publishing: {grown[0]}; while draining: {grown[1]}")
            looks = publishing.looks, draining.looks
            return Run(published, dropped, spool_bytes, undelivered, collector.arrivals(), *grown, looks)


def test_nothing_is_dropped_while_there_is_no_link(run: Run) -> None:
    assert (run.published, run.dropped) == (COUNT, 0)
    assert run.spool_bytes + RING_BYTES > COUNT * PAYLOAD_BYTES


def test_publishing_takes_the_ring_and_little_more(run: Run) -> None:
    # At least the ring: else the measure is wrong.
    assert RING_BYTES <= run.publishing.own <= RING_BYTES + 4 * MIB, run.publishing
    assert run.publishing.whole <= RING_BYTES + 16 * MIB, run.publishing


def test_draining_takes_the_ring_and_little_more(run: Run) -> None:
    assert RING_BYTES <= run.draining.own <= RING_BYTES + 4 * MIB, run.draining
    assert run.draining.whole <= RING_BYTES + 16 * MIB, run.draining


def test_memory_was_looked_at_often(run: Run) -> None:
    assert min(run.looks) >= 20


def test_everything_arrives_in_order(run: Run) -> None:
    assert run.undelivered == 0
    assert run.arrivals == list(range(COUNT))

"""A forked child holds nothing of what its parent has open; a spool has one owner."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub import Client, Spool, SpoolLockedError
from cloudpubsub.demo.relay import Relay
from tests.brokers import Rumqttd, TlsFiles
from tests.collector import Collector
from tests.making import Child, Inbox, eventually
from tests.publishing import CLIENT_ID, LIMIT, client_to, number_of, publish_numbers

# From Python 3.12 on: true of any program that forks with a client open, which is what these tests are about.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:This process \(pid=\d+\) is multi-threaded, use of fork:DeprecationWarning"
)

NOBODY = 1  # a port where nobody listens
KIB = 1024
WILL = {"topic": "status", "payload": "gone"}
KEEPS_MAPPINGS = "it does not pass MADV_DONTFORK on, so a child keeps the mapping of the ring, and the lock on its file"
SMALL = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}

# ---- children ----


class Forked:
    """A child of this process, forked at once, that does `act` and lives on until the `with` block ends.

    `answer()` is what `act` returned, through JSON, or the name of the exception that it raised.
    """

    def __init__(self, act: Callable[[], Any]) -> None:
        self._reader, writer = os.pipe()
        told_to_end, self._end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            # Never into the parent's frames: pytest is there.
            try:
                os.close(self._end)
                os.write(writer, json.dumps(_outcome(act)).encode() + b"\n")
                os.read(told_to_end, 1)  # also ends with the parent
            finally:
                os._exit(0)
        os.close(writer)
        os.close(told_to_end)

    def answer(self) -> Any:
        received = b""
        deadline = time.monotonic() + LIMIT
        while not received.endswith(b"\n"):
            poller = select.poll()  # a number above 1023 is too much for select
            poller.register(self._reader, select.POLLIN)
            assert poller.poll(max(0.0, deadline - time.monotonic()) * 1000), "the child hangs"
            data = os.read(self._reader, 65536)
            assert data, "the child has died"
            received += data
        return json.loads(received)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._reader)
        os.close(self._end)


def _outcome(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except BaseException as error:
        return type(error).__name__


def in_child(act: Callable[[], Any]) -> Any:
    """The answer of a child that does `act` and ends."""
    with Forked(act) as child:
        return child.answer()


def offline(spool: Path | None, **settings: Any) -> Client:
    return client_to(NOBODY, spool, **settings)


def numbers_in(path: Path, **settings: Any) -> list[int]:
    """Open the spool and read all that is in it."""
    with Spool(path, **settings) as spool:
        found: list[int] = []
        while messages := spool.read():
            found += [int(message.payload) for message in messages]
        return found


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


# A process with a client, which does what the lines of its standard input say, and answers each with a line; after a
# fork it is the child that answers.  A child holds nothing as soon as it runs, so the tests wait for that.
MASTER = """
import json, os, select, sys
import cloudpubsub

def live_on():  # until the test ends, without taking anything from the input
    poll = select.poll()
    poll.register(0, 0)
    poll.poll()
    os._exit(0)

settings = json.loads(sys.argv[1])
for name, kind in ("will", cloudpubsub.Will), ("tls", cloudpubsub.TLS):
    if name in settings:
        settings[name] = kind(**settings[name])
client = cloudpubsub.Client(**settings)
client.start()
for line in sys.stdin:
    order, _, rest = line.strip().partition(" ")
    answer = "done"
    if order == "publish":
        for number in range(*map(int, rest.split())):
            position = client.publish("numbers", b"%d" % number)
    elif order == "sync":
        client.wait_synced(position, 60)
    elif order == "flush":
        answer = client.flush(60)
    elif order == "fork":
        if os.fork() == 0:
            print(os.getpid(), flush=True)
            exec(rest)
        continue
    elif order == "reap":
        answer = os.waitstatus_to_exitcode(os.waitpid(int(rest), 0)[1])
    print(answer, flush=True)
"""


FORKS_WHILE_OPENING = """
import os, select, sys, threading
import cloudpubsub

opened, children = [], 0
reader, writer = os.pipe()
opening = threading.Thread(target=lambda: opened.append(cloudpubsub.Spool(sys.argv[1])))
opening.start()
while opening.is_alive():
    children += 1
    if os.fork() == 0:
        os.write(writer, b"1")
        poll = select.poll()
        poll.register(0, 0)
        poll.poll()  # until the test ends
        os._exit(0)
while children:
    children -= len(os.read(reader, children))
print("open", flush=True)
sys.stdin.readline()
"""
FORK_IS_MEANT = "ignore::DeprecationWarning"  # for PYTHONWARNINGS


def master(**settings: Any) -> Child:
    settings = {"client_id": CLIENT_ID, "spill_after": 1_000, "reconnect_min": 0.02, "reconnect_max": 0.1, **settings}
    return Child(MASTER, json.dumps(settings), PYTHONWARNINGS=FORK_IS_MEANT)


def order(process: Child, line: str) -> str:
    process.tell(line)
    return process.line()


# ---- what was inherited cannot be used ----

CLIENT_CALLS: dict[str, Callable[[Client], object]] = {
    "start": lambda client: client.start(),
    "publish": lambda client: client.publish("numbers", b"1"),
    "publish_large": lambda client: client.publish("numbers", bytes(100 * KIB)),
    "wait": lambda client: client.wait(0, 1),
    "flush": lambda client: client.flush(1),
    "wait_synced": lambda client: client.wait_synced(0, 1),
    "subscribe": lambda client: client.subscribe("other", print),
    "unsubscribe": lambda client: client.unsubscribe("commands"),
    "wait_subscribed": lambda client: client.wait_subscribed(1),
    "stats": lambda client: client.stats(),
    "with": lambda client: client.__enter__(),
}
SPOOL_CALLS: dict[str, Callable[[Spool], object]] = {
    "append": lambda spool: spool.append("numbers", b"1"),
    "append_large": lambda spool: spool.append("numbers", bytes(100 * KIB)),
    "read": lambda spool: spool.read(),
    "rewind": lambda spool: spool.rewind(),
    "ack": lambda spool: spool.ack(0),
    "sync": lambda spool: spool.sync(1),
    "stats": lambda spool: spool.stats(),
}


@pytest.mark.parametrize("call", CLIENT_CALLS)
def test_an_inherited_client_raises_forked_error(tmp_path: Path, call: str) -> None:
    with offline(tmp_path / "spool") as client:
        client.subscribe("commands", print)
        client.publish("numbers", b"0")
        assert in_child(lambda: CLIENT_CALLS[call](client)) == "ForkedError"
        assert client.stats().published == 1


@pytest.mark.parametrize("call", SPOOL_CALLS)
def test_an_inherited_spool_raises_forked_error(tmp_path: Path, call: str) -> None:
    with Spool(tmp_path / "spool") as spool:
        spool.append("numbers", b"0")
        assert in_child(lambda: SPOOL_CALLS[call](spool)) == "ForkedError"
        assert [message.payload for message in spool.read()] == [b"0"]


def test_an_inherited_client_without_a_spool_raises_forked_error() -> None:
    with offline(None) as client:
        client.publish("numbers", b"0")
        assert in_child(lambda: client.publish("numbers", b"1")) == "ForkedError"
        assert client.stats().backlog_messages == 1
        client.close(0)


def test_forked_error_comes_though_threads_were_publishing_at_the_fork(tmp_path: Path) -> None:
    is_over = threading.Event()

    def publish() -> None:
        while not is_over.is_set():
            client.publish("numbers", bytes(KIB))

    def use_all() -> list[str]:
        return [_outcome(lambda call=call: call(client)) for call in CLIENT_CALLS.values()]

    with offline(tmp_path / "spool", **SMALL) as client:
        threads = [threading.Thread(target=publish) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                assert set(in_child(use_all)) == {"ForkedError"}
        finally:
            is_over.set()
            for thread in threads:
                thread.join()


def test_a_callback_may_fork(rumqttd: Rumqttd, tmp_path: Path) -> None:
    answers = Inbox()
    with client_to(
        rumqttd.port,
        tmp_path / "spool",
        on_publish=lambda message: answers(in_child(lambda: client.publish("numbers", b"1"))),
    ) as client:
        client.publish("numbers", b"0")
        assert answers.wait(1) == ["ForkedError"]
        client.wait(client.publish("numbers", b"1"), LIMIT)


def test_a_child_of_multiprocessing_gets_forked_error(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def work() -> None:
        answers.put(_outcome(lambda: client.publish("numbers", b"1")))

    with offline(tmp_path / "spool") as client:
        client.publish("numbers", b"0")
        process = context.Process(target=work)
        process.start()
        process.join(LIMIT)
        assert process.exitcode == 0
        assert answers.get() == "ForkedError"
        process.close()
    assert numbers_in(tmp_path / "spool") == [0]


# ---- the parent is not harmed ----

ENDINGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "close": lambda held: [thing.close() for thing in held.values()],
    "with": lambda held: [thing.__exit__(None, None, None) for thing in held.values()],
    "collected": lambda held: (held.clear(), gc.collect()),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_closing_in_the_child_does_nothing(rumqttd: Rumqttd, tmp_path: Path, ending: str) -> None:
    held: dict[str, Any] = {"client": client_to(rumqttd.port, tmp_path / "client"), "spool": Spool(tmp_path / "spool")}
    with Collector(rumqttd.port, "numbers", key=number_of) as collector:
        try:
            held["client"].start()
            publish_numbers(held["client"], range(100))
            held["spool"].append("numbers", b"0")
            assert held["client"].flush(LIMIT) == 0
            in_child(lambda: ENDINGS[ending](held) and None)
            publish_numbers(held["client"], range(100, 200))
            assert held["client"].flush(LIMIT) == 0
            assert held["client"].stats().connects == 1
            assert [message.payload for message in held["spool"].read()] == [b"0"]
        finally:
            for thing in held.values():
                thing.close()
        collector.wait_for(200, LIMIT)
        assert collector.arrivals() == list(range(200))


def test_a_child_lets_go_of_tls_without_a_goodbye(tls_files: TlsFiles, tmp_path: Path) -> None:
    with Rumqttd(tmp_path / "rumqttd", tls=tls_files) as broker:
        url = f"mqtts://localhost:{broker.tls_port}"
        tls = cloudpubsub.TLS(ca=tls_files.ca)
        with client_to(broker.tls_port, tmp_path / "spool", broker=url, tls=tls) as client:
            client.wait(client.publish("numbers", b"0"), LIMIT)
            assert in_child(client.close) == 0
            client.wait(client.publish("numbers", b"1"), LIMIT)
            assert client.stats().connects == 1


def test_the_parent_still_owns_its_spool(tmp_path: Path) -> None:
    with offline(tmp_path / "spool") as client:
        with Forked(client.close) as child:
            assert child.answer() == 0
            with pytest.raises(SpoolLockedError):
                Spool(tmp_path / "spool")
            assert in_child(lambda: Spool(tmp_path / "spool")) == "SpoolLockedError"
        assert in_child(lambda: offline(tmp_path / "spool")) == "SpoolLockedError"
        publish_numbers(client, range(10))
    assert numbers_in(tmp_path / "spool") == list(range(10))


def test_a_living_child_does_not_keep_a_spool_that_its_parent_closed(tmp_path: Path) -> None:
    client, spool = offline(tmp_path / "client"), Spool(tmp_path / "spool")
    client.publish("numbers", b"0")
    with Forked(lambda: None) as child:
        child.answer()
        client.close()
        spool.close()
        assert numbers_in(tmp_path / "client") == [0]
        assert numbers_in(tmp_path / "spool") == []


@pytest.mark.parametrize("end", ["os._exit(3)", "sys.exit(3)", "client.close(); sys.exit(3)", "raise SystemExit(3)"])
def test_the_exit_of_a_child_does_not_touch_the_spool(tmp_path: Path, end: str) -> None:
    spool = tmp_path / "spool"
    with master(broker=f"mqtt://127.0.0.1:{NOBODY}", spool=str(spool), **SMALL) as process:
        order(process, "publish 0 2000")
        order(process, "sync")  # these are on the disk,
        order(process, "publish 2000 2010")  # and these in the ring
        before = contents(spool / "log")
        assert before
        assert order(process, f"reap {order(process, f'fork {end}')}") == "3"
        assert contents(spool / "log") == before
        order(process, "publish 2010 2020")
        process.kill()
        assert numbers_in(spool, **SMALL) == list(range(2020))


# ---- a child with its own, and a parent that dies ----


def test_a_child_opens_its_own_beside_the_inherited(rumqttd: Rumqttd, tmp_path: Path) -> None:
    def work() -> int:
        with client_to(rumqttd.port, tmp_path / "child", client_id="child") as own:
            publish_numbers(own, range(100, 200))
            return own.flush(LIMIT)

    with Collector(rumqttd.port, "numbers", key=number_of) as collector:
        with client_to(rumqttd.port, tmp_path / "parent") as client:
            publish_numbers(client, range(50))
            assert in_child(work) == 0
            publish_numbers(client, range(50, 100))
            assert client.flush(LIMIT) == 0
        collector.wait_for(200, LIMIT)
        assert sorted(collector.arrivals()) == list(range(200))


def test_workers_forked_before_anything_is_open_have_a_spool_each(rumqttd: Rumqttd, tmp_path: Path) -> None:
    def work(number: int) -> int:
        with client_to(rumqttd.port, tmp_path / str(number), client_id=f"worker-{number}") as client:
            publish_numbers(client, range(100 * number, 100 * number + 100))
            return client.flush(LIMIT)

    with Collector(rumqttd.port, "numbers", key=number_of) as collector, ExitStack() as stack:
        workers = [stack.enter_context(Forked(partial(work, number))) for number in range(3)]
        assert [worker.answer() for worker in workers] == [0, 0, 0]
        collector.wait_for(300, LIMIT)
        assert sorted(collector.arrivals()) == list(range(300))


@pytest.mark.native(KEEPS_MAPPINGS)
def test_a_child_has_no_file_of_the_spool_and_no_ring(tmp_path: Path) -> None:
    def held() -> list[str]:
        files = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        maps = Path("/proc/self/maps").read_text().splitlines()
        return [line for line in files + maps if str(tmp_path / "spool") in line or ".ring" in line]

    with Spool(tmp_path / "spool", **SMALL) as spool:
        for _ in range(100):
            spool.append("numbers", bytes(KIB))
        eventually(lambda: spool.stats()["spool_segments"])
        assert len(held()) >= 4  # lock, meta, a segment, the ring
        assert in_child(held) == []


def test_a_grandchild_keeps_the_files_of_the_child(tmp_path: Path) -> None:
    def is_closed(file: int) -> bool:
        return not os.path.exists(f"/proc/self/fd/{file}")

    def closed_in_its_child() -> list[int]:
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(16)]  # where the spool's files were
        return in_child(lambda: [file for file in files if is_closed(file)])

    with Spool(tmp_path / "spool", **SMALL) as spool:
        for _ in range(100):
            spool.append("numbers", bytes(KIB))  # a segment is open too
        eventually(lambda: spool.stats()["spool_segments"])
        assert in_child(closed_in_its_child) == []


@pytest.mark.native(KEEPS_MAPPINGS)
@pytest.mark.parametrize("count", [10, 2_000], ids=["in_the_ring", "on_the_disk_too"])
def test_all_is_there_after_kill_9_though_a_child_lives(tmp_path: Path, count: int) -> None:
    spool = tmp_path / "spool"
    with master(broker=f"mqtt://127.0.0.1:{NOBODY}", spool=str(spool), **SMALL) as process:
        order(process, f"publish 0 {count}")
        child = int(order(process, "fork live_on()"))
        order(process, f"publish {count} {2 * count}")
        process.kill()
        assert numbers_in(spool, **SMALL) == list(range(2 * count))
        os.kill(child, 0)  # it lives


@pytest.mark.native(KEEPS_MAPPINGS)
@pytest.mark.parametrize("scheme", ["mqtt", "mqtts"])
def test_the_broker_sees_the_death_of_the_parent_though_a_child_lives(
    tls_files: TlsFiles, tmp_path: Path, scheme: str
) -> None:
    with Rumqttd(tmp_path / "rumqttd", tls=tls_files) as broker, Collector(broker.port, "status") as collector:
        port, tls = (broker.port, {}) if scheme == "mqtt" else (broker.tls_port, {"tls": {"ca": tls_files.ca}})
        with master(broker=f"{scheme}://localhost:{port}", spool=str(tmp_path / "spool"), will=WILL, **tls) as process:
            order(process, "publish 0 10")
            assert order(process, "flush") == "0"
            order(process, "fork live_on()")
            process.kill()
            collector.wait_for(1, LIMIT)
            assert collector.arrivals() == [b"gone"]
        Spool(tmp_path / "spool").close()  # takes the ring away


def test_a_child_forked_during_the_tls_handshake_does_not_keep_the_connection(
    tls_files: TlsFiles, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"will": WILL, "tls": {"ca": tls_files.ca}}
    with Rumqttd(tmp_path / "rumqttd", tls=tls_files) as broker, Collector(broker.port, "status") as collector:
        with Relay(broker.tls_port) as relay:
            relay.blackhole()
            with master(broker=f"mqtts://localhost:{relay.port}", spool=str(tmp_path / "spool"), **settings) as process:
                eventually(lambda: relay.accepted)
                order(process, "fork live_on()")
                relay.unblackhole()
                order(process, "publish 0 10")
                assert order(process, "flush") == "0"
                process.kill()
                collector.wait_for(1, LIMIT)
        Spool(tmp_path / "spool").close()  # takes the ring away


# ---- one owner ----


@pytest.mark.parametrize("second", [offline, Spool], ids=["client", "spool"])
@pytest.mark.parametrize("first", [offline, Spool], ids=["client", "spool"])
def test_a_spool_has_one_owner_in_a_process(
    tmp_path: Path, first: Callable[[Path], Any], second: Callable[[Path], Any]
) -> None:
    with first(tmp_path / "spool") as owner:
        with pytest.raises(SpoolLockedError):
            second(tmp_path / "spool")
        getattr(owner, "publish" if first is offline else "append")("numbers", b"0")
    second(tmp_path / "spool").close()
    assert numbers_in(tmp_path / "spool") == [0]


def test_a_child_forked_while_the_spool_was_closing_does_not_keep_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", ring_bytes=64 << 20, spill_after=1_000)
    for _ in range(25_000):
        spool.append("numbers", bytes(KIB))  # takes a while to write
    closing = threading.Thread(target=spool.close)
    closing.start()
    eventually(lambda: _outcome(spool.stats) == "ClosedError")
    with Forked(lambda: None) as child:
        child.answer()
        closing.join(LIMIT)
        Spool(tmp_path / "spool").close()


def test_a_child_forked_while_a_spool_that_had_no_time_was_being_saved_does_not_keep_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", ring_bytes=64 << 20, spill_after=1_000, durability="memory")
    for _ in range(25_000):
        spool.append("numbers", bytes(KIB))
    assert spool.close(0.0) > 0

    def is_free() -> bool:
        return _outcome(lambda: Spool(tmp_path / "spool").close()) == 0

    with Forked(lambda: None) as child:
        child.answer()
        eventually(is_free, "the spool is saved")
    with Spool(tmp_path / "spool") as spool:
        assert spool.stats()["backlog_messages"] == 25_000


@pytest.mark.native(KEEPS_MAPPINGS)
def test_children_forked_while_the_spool_was_opening_do_not_keep_it(tmp_path: Path) -> None:
    for attempt in range(5):  # a fork falls into the moment that counts in most of them
        with Child(FORKS_WHILE_OPENING, tmp_path / str(attempt), PYTHONWARNINGS=FORK_IS_MEANT) as process:
            assert process.line() == "open"
            process.kill()
            Spool(tmp_path / str(attempt)).close()

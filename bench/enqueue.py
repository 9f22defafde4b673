"""What does one call of `publish()` cost?

64 bytes to a topic of 20, from one Python thread: `Client.publish` without a connection, into a ring with room, the
same beside a Python thread that computes, and with a connection; appending from one and from four native threads.
Beside it `queue.SimpleQueue.put`, a copy into memory, paho's own `publish()` at QoS 1 without and with a connection,
and what keeps a queue on the disk: persist-queue (SQLiteAckQueue and file Queue), diskcache.Deque, sqlite3 in WAL
mode, LMDB, RocksDB, and a file that is appended to and synced each time.  The loop around the call is part of the
time, for all alike.
"""

from __future__ import annotations

import argparse
import os
import queue
import sqlite3
import threading
from itertools import repeat
from pathlib import Path
from typing import Any

import cloudpubsub

from . import _brokers, _harness, _native
from ._harness import TOPIC, Meter, Report, Sample, Subject, check
from ._peers import connected_client, connected_paho, offline_paho, payload_of

_MODULE = _harness.module_name("enqueue")
_BATCH = 10_000  # messages of 64 bytes: less than half a ring of 4 MiB, so none is written to the disk


def publish_offline(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], payload_of(order)
    client = cloudpubsub.Client(
        "mqtt://127.0.0.1:1",
        client_id="bench",
        spool=order["directory"],
        spill_after=3600.0,
        **order.get("settings", {}),
    )
    meter, publish = Meter(), client.publish
    done = position = 0
    fits = max(1, min(_BATCH, client.options.ring_bytes // 3 // (len(payload) + 64)))
    while done < n:
        batch = min(fits, n - done)
        with meter:
            for _ in repeat(None, batch):
                position = publish(TOPIC, payload)
        done += batch
        _empty(client, position, batch)
    check(client.stats().published == n, "not all were published")
    check(client.stats().spilled_bytes == 0, "the ring had no room")
    client.close()
    return meter.sample(n)


def _empty(client: cloudpubsub.Client, position: int, messages: int) -> None:
    """Take the messages out again, as the publisher does when they are acknowledged."""
    found = 0
    while batch := client._log.read(1 << 20):
        found += len(batch)
    check(found == messages, f"{found} messages in the ring instead of {messages}")
    client._log.settle_through(position)


def publish_beside(order: dict[str, Any]) -> Sample:
    """Beside a Python thread that never waits: each wants the interpreter for itself."""
    is_over = threading.Event()
    turns = 0

    def compute() -> None:
        nonlocal turns
        while not is_over.is_set():
            turns += sum(range(100))

    other = threading.Thread(target=compute)
    other.start()
    try:
        sample = publish_offline(order)
    finally:
        is_over.set()
        other.join()
    check(turns > 0, "the other thread did not run")
    return sample


def native_append(threads: int) -> Subject:
    def append(order: dict[str, Any]) -> Sample:
        program = _native.build("append", core=True)
        command = [str(program), str(threads), str(order["messages"]), str(len(payload_of(order)))]
        text, _, cpu_s, peak_bytes = _harness.program(command)
        seconds, done = text.split()
        return Sample(int(done), float(seconds), cpu_s, peak_bytes, peak_bytes)

    return append


def publish_connected(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], payload_of(order)
    client = connected_client(order, order["directory"])
    meter, publish = Meter(), client.publish
    for done in range(0, n, _BATCH):
        with meter:
            for _ in repeat(None, min(_BATCH, n - done)):
                publish(TOPIC, payload)
        check(client.flush(60) == 0, "some were not acknowledged")
    check(client.stats().acked == n, "not all were acknowledged")
    client.close()
    return meter.sample(n)


def simple_queue(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], payload_of(order)
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    meter, put = Meter(), waiting.put
    for _ in range(0, n, _BATCH):
        with meter:
            for _ in repeat(None, _BATCH):
                put(payload)
        check(waiting.qsize() == _BATCH, "not all are in the queue")
        while not waiting.empty():
            waiting.get()
    return meter.sample(-(-n // _BATCH) * _BATCH)


def memory_copy(order: dict[str, Any]) -> Sample:
    n, payload, memory = order["messages"], payload_of(order), bytearray(4 << 20)
    size, meter = len(payload), Meter()
    places = range(0, len(memory) - size, size)
    done = 0
    while done < n:
        with meter:
            for at in places:
                memory[at : at + size] = payload
        done += len(places)
    check(bytes(memory[:size]) == payload, "nothing was copied")
    return meter.sample(done)


def persist_sqlite(order: dict[str, Any]) -> Sample:
    from persistqueue import SQLiteAckQueue

    return _put_all(SQLiteAckQueue(order["directory"]), order)


def persist_file(order: dict[str, Any]) -> Sample:
    from persistqueue import Queue

    return _put_all(Queue(order["directory"]), order)


def _put_all(waiting: Any, order: dict[str, Any]) -> Sample:
    n, payload, meter, put = order["messages"], payload_of(order), Meter(), waiting.put
    with meter:
        for _ in repeat(None, n):
            put(payload)
    check(waiting.qsize() == n, "not all are in the queue")
    return meter.sample(n)


def diskcache_deque(order: dict[str, Any]) -> Sample:
    from diskcache import Deque

    n, payload, waiting = order["messages"], payload_of(order), Deque(directory=order["directory"])
    meter, append = Meter(), waiting.append
    with meter:
        for _ in repeat(None, n):
            append(payload)
    check(len(waiting) == n, "not all are in the queue")
    return meter.sample(n)


def sqlite_wal(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], payload_of(order)
    base = sqlite3.connect(Path(order["directory"]) / "queue.db", isolation_level=None)
    base.execute("pragma journal_mode=wal")
    base.execute("pragma synchronous=normal")  # survives a crash of the process, as our default does
    base.execute("create table queue (id integer primary key, topic text, payload blob)")
    meter, execute = Meter(), base.execute
    with meter:
        for _ in repeat(None, n):
            execute("insert into queue (topic, payload) values (?, ?)", (TOPIC, payload))
    check(base.execute("select count(*) from queue").fetchone() == (n,), "not all are in the table")
    base.close()
    return meter.sample(n)


def lmdb_put(order: dict[str, Any]) -> Sample:
    import lmdb

    n, payload = order["messages"], payload_of(order)
    with lmdb.open(order["directory"], map_size=1 << 30, sync=False) as environment:
        meter = Meter()
        with meter:
            for i in range(n):
                with environment.begin(write=True) as transaction:
                    transaction.put(i.to_bytes(8, "big"), payload, append=True)
        check(environment.stat()["entries"] == n, "not all are in the table")
    return meter.sample(n)


def rocks_put(order: dict[str, Any]) -> Sample:
    import rocksdict

    n, payload = order["messages"], payload_of(order)
    base = rocksdict.Rdict(order["directory"], rocksdict.Options(raw_mode=True))
    meter = Meter()
    with meter:
        for i in range(n):
            base[i.to_bytes(8, "big")] = payload
    kept = sum(1 for _ in base.keys())  # noqa: SIM118 - it has no other iterator
    check(kept == n, "not all are in the table")
    base.close()
    return meter.sample(n)


def synced_file(order: dict[str, Any]) -> Sample:
    n, payload, path = order["messages"], payload_of(order), Path(order["directory"]) / "file"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    meter = Meter()
    with meter:
        for _ in repeat(None, n):
            os.write(fd, payload)
            os.fdatasync(fd)
    os.close(fd)
    check(path.stat().st_size == n * len(payload), "not all are in the file")
    return meter.sample(n)


def paho_offline(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], payload_of(order)
    client = offline_paho()
    meter, publish = Meter(), client.publish
    with meter:
        for _ in repeat(None, n):
            publish(TOPIC, payload, 1)
    # Every message has an id of its own as long as it is queued.
    last = publish(TOPIC, payload, 1).mid
    check(last == n + 1, f"{last} messages in the queue instead of {n + 1}")
    return meter.sample(n)


def paho_connected(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], payload_of(order)
    acked, is_done = 0, threading.Event()

    def count(*_: Any) -> None:
        nonlocal acked
        acked += 1
        if acked == n:
            is_done.set()

    client = connected_paho(order, 1_000, count)
    meter, publish = Meter(), client.publish
    with meter:
        for _ in repeat(None, n):
            publish(TOPIC, payload, 1)
    check(is_done.wait(120), f"{acked} of {n} were acknowledged")
    client.disconnect()
    client.loop_stop()
    return meter.sample(n)


_OWN, _QUEUE = "cloudpubsub publish(), offline", "queue.SimpleQueue.put"
_FOUR, _ONE = "native append, 4 threads", "native append, 1 thread"
_BESIDE = "cloudpubsub publish(), beside a busy Python thread"
SUBJECTS: dict[str, Subject] = {
    _OWN: publish_offline,
    _BESIDE: publish_beside,
    "cloudpubsub publish(), connected": publish_connected,
    _ONE: native_append(1),
    _FOUR: native_append(4),
    _QUEUE: simple_queue,
    "copy into memory": memory_copy,
    "paho publish(), offline": paho_offline,
    "paho publish(), connected": paho_connected,
    "persist-queue SQLiteAckQueue.put": persist_sqlite,
    "persist-queue Queue.put": persist_file,
    "diskcache Deque.append": diskcache_deque,
    "sqlite3, WAL": sqlite_wal,
    "LMDB put, not synced": lmdb_put,
    "RocksDB put, not synced": rocks_put,
    "file, fdatasync each": synced_file,
}
#: The others: so many times fewer messages.
_SLOWNESS = {
    "paho publish(), offline": 10,
    "paho publish(), connected": 10,
    "persist-queue SQLiteAckQueue.put": 800,
    "persist-queue Queue.put": 800,
    "diskcache Deque.append": 800,
    "sqlite3, WAL": 20,
    "LMDB put, not synced": 20,
    "RocksDB put, not synced": 20,
    "file, fdatasync each": 800,
}


def run(arguments: argparse.Namespace) -> Report:
    usual = 4_000 if arguments.quick else 200_000
    rounds = _harness.rounds_of(arguments, 11)
    with _brokers.running(_brokers.default()) as broker:
        same = {**_harness.common_order(arguments), **broker.order, "payload_bytes": arguments.payload_bytes or 64}
        subjects = {
            name: {**same, "messages": max(20, usual // _SLOWNESS.get(name, 1))}
            for name in SUBJECTS
            if not (arguments.own_only and name in _SLOWNESS)
        }
        fewer = {name: min(rounds, 2) for name in _SLOWNESS}
        samples = _harness.in_turns(
            _MODULE, subjects, rounds, _harness.note_to_stderr, fewer=fewer, others=_SLOWNESS
        )
    return {
        "bench": "enqueue",
        "parameters": {
            "payload_bytes": same["payload_bytes"],
            "topic_bytes": len(TOPIC),
            "settings": same["settings"],
            "broker": broker.name,
        },
        "missing": samples.missing,
        "subjects": _harness.summary(samples),
        # Rates: how many times cheaper the call is than that of the other.
        "ratios": {
            **{name: _harness.ratio(samples, _OWN, name) for name in samples if name != _OWN},
            **({f"{_FOUR} / {_ONE}": _harness.ratio(samples, _FOUR, _ONE)} if _FOUR in samples else {}),
        },
    }


def show(report: Report) -> str:
    rows = []
    for name, figures in report["subjects"].items():
        times = report["ratios"].get(name)
        rows.append(
            [
                name,
                _harness.span(figures["ns_per_message"]),
                _harness.span(figures["cpu_s_per_million"], "{:.2f}"),
                "1" if times is None else _harness.span(times, "{:,.2f}"),
            ]
        )
    size = report["parameters"]["payload_bytes"]
    head = [f"one call, {size} B", "ns, median (min-max)", "CPU s per million", "times cloudpubsub's, offline"]
    return _harness.table(head, rows)


def main() -> None:
    _harness.main(_harness.parser(_MODULE, __doc__).parse_args(), SUBJECTS, run, show)


if __name__ == "__main__":
    main()

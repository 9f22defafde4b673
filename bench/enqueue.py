"""What does one call of `publish()` cost?

64 bytes to a topic of 20, from one Python thread: `Client.publish` without a connection, into a ring with room, and
with one, against `queue.SimpleQueue.put`, persist-queue (its SQLiteAckQueue and its file Queue) and paho's own
`publish()` at QoS 1, without and with a connection.  The loop around the call is part of the time, for all alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import queue
import threading
from itertools import repeat
from typing import Any

import cloudpubsub
from bench import _harness
from bench._harness import TOPIC, Meter, Report, Sample, Subject, check
from bench._peers import connected_client, connected_paho, offline_paho

_MODULE = "bench.enqueue"
_BATCH = 10_000  # messages of 64 bytes: less than half a ring of 4 MiB, so none is written to the disk


def publish_offline(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], bytes(64)
    client = cloudpubsub.Client("mqtt://127.0.0.1:1", client_id="bench", spool=order["directory"], spill_after=3600.0)
    meter, publish = Meter(), client.publish
    done = position = 0
    while done < n:
        batch = min(_BATCH, n - done)
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


def publish_connected(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], bytes(64)
    client = connected_client(order["port"], order["directory"])
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
    n, payload = order["messages"], bytes(64)
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


def persist_sqlite(order: dict[str, Any]) -> Sample:
    from persistqueue import SQLiteAckQueue

    return _put_all(SQLiteAckQueue(order["directory"]), order["messages"])


def persist_file(order: dict[str, Any]) -> Sample:
    from persistqueue import Queue

    return _put_all(Queue(order["directory"]), order["messages"])


def _put_all(waiting: Any, n: int) -> Sample:
    payload, meter, put = bytes(64), Meter(), waiting.put
    with meter:
        for _ in repeat(None, n):
            put(payload)
    check(waiting.qsize() == n, "not all are in the queue")
    return meter.sample(n)


def paho_offline(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], bytes(64)
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
    n, payload = order["messages"], bytes(64)
    acked, is_done = 0, threading.Event()

    def count(*_: Any) -> None:
        nonlocal acked
        acked += 1
        if acked == n:
            is_done.set()

    client = connected_paho(order["port"], 1_000, count)
    meter, publish = Meter(), client.publish
    with meter:
        for _ in repeat(None, n):
            publish(TOPIC, payload, 1)
    check(is_done.wait(120), f"{acked} of {n} were acknowledged")
    client.disconnect()
    client.loop_stop()
    return meter.sample(n)


SUBJECTS: dict[str, Subject] = {
    "cloudpubsub publish(), offline": publish_offline,
    "cloudpubsub publish(), connected": publish_connected,
    "queue.SimpleQueue.put": simple_queue,
    "persist-queue SQLiteAckQueue.put": persist_sqlite,
    "persist-queue Queue.put": persist_file,
    "paho publish(), offline": paho_offline,
    "paho publish(), connected": paho_connected,
}
_OWN = "cloudpubsub publish(), offline"


def run(arguments: argparse.Namespace) -> Report:
    quick = arguments.quick
    missing = [] if importlib.util.find_spec("persistqueue") else ["persist-queue"]
    with _harness.running_broker(_harness.default_broker()) as broker:
        subjects = {}
        for name in SUBJECTS:
            if any(name.startswith(package) for package in missing):
                continue
            if name.startswith("persist"):
                messages = 20 if quick else 1_000
            elif name.startswith("paho"):
                messages = 500 if quick else 20_000
            else:
                messages = 2_000 if quick else 200_000
            subjects[name] = {"messages": messages, "port": broker.port}
        samples = _harness.in_turns(_MODULE, subjects, _harness.rounds_of(arguments), _harness.note_to_stderr)
        name = broker.name
    return {
        "bench": "enqueue",
        "parameters": {"payload_bytes": 64, "topic_bytes": len(TOPIC), "rounds": len(samples[_OWN]), "broker": name},
        "missing": missing,
        "subjects": _harness.summary(samples),
        # Rates: how many times cheaper the call is than that of the other.
        "ratios": {name: _harness.ratio(samples, _OWN, name) for name in samples if name != _OWN},
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
    head = ["one call, 64 B", "ns, median (min-max)", "CPU s per million", "times cloudpubsub's, offline"]
    return _harness.table(head, rows)


def _main() -> None:
    _harness.main(_harness.parser(_MODULE, __doc__).parse_args(), SUBJECTS, run, show)


if __name__ == "__main__":
    _main()

"""How long does it take from `publish()` to the first byte on the wire?

Each message carries the time of its publication; the other end, a C program, notes when its bytes came, so the time
includes waking that program up: what a bare socket takes between the same two points is measured beside it.
On an idle link (a message every few milliseconds), the same beside a Python thread that computes (and holds the
interpreter for 5 ms at a time), and under load (20,000 messages a second).
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import _brokers, _harness, _raw
from ._harness import TOPIC, Meter, Report, Sample, Subject, check
from ._peers import busy_thread, connected_client, connected_paho

_MODULE = _harness.module_name("latency")
_PAUSE_S = 0.002
_LOAD_PER_S = 20_000
_BURST = 20
_PARTS = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
_WAYS = ("idle link", "beside a busy thread", "under load")


def _publish_all(order: dict[str, Any], publish: Callable[[bytes], None]) -> None:
    pack, clock, filler = struct.Struct("<q").pack, time.monotonic_ns, bytes(max(0, order["payload_bytes"] - 8))
    if order["way"] == "under load":
        due_s = time.perf_counter()
        for _ in range(order["messages"] // _BURST):
            for _ in range(_BURST):
                publish(pack(clock()) + filler)
            due_s += _BURST / _LOAD_PER_S
            while (left_s := due_s - time.perf_counter()) > 0:
                time.sleep(left_s)
        return
    for _ in range(order["messages"]):
        publish(pack(clock()) + filler)
        time.sleep(_PAUSE_S)


def _measured(order: dict[str, Any], connect: Callable[[dict[str, Any]], tuple[Callable[[bytes], Any], Any]]) -> Sample:
    path = Path(order["directory"]) / "stamps"
    with _brokers.running_peer(stamps=path) as port:
        publish, close = connect({**order, "port": port})
        meter = Meter()
        if order["way"] == "beside a busy thread":
            with busy_thread(), meter:
                _publish_all(order, publish)
        else:
            with meter:
                _publish_all(order, publish)
        close()
        deadline_s = time.monotonic() + 60
        while not path.exists() or path.stat().st_size < 8 * order["messages"]:
            check(time.monotonic() < deadline_s, "not all messages came")
            time.sleep(0.01)
    taken_ns = sorted(struct.unpack(f"<{order['messages']}q", path.read_bytes()))
    check(taken_ns[0] > 0, "a message came before it was published")
    last = len(taken_ns) - 1
    return meter.sample(
        order["messages"], **{f"p{part:g}_us": taken_ns[min(last, int(last * part / 100))] / 1e3 for part in _PARTS}
    )


def cloudpubsub_latency(order: dict[str, Any]) -> Sample:
    def connect(order: dict[str, Any]) -> tuple[Callable[[bytes], Any], Any]:
        client = connected_client(order, str(Path(order["directory"]) / "spool"))

        def close() -> None:
            check(client.flush(60) == 0, "some were lost")
            client.close()

        return (lambda payload: client.publish(TOPIC, payload)), close

    return _measured(order, connect)


def paho_latency(order: dict[str, Any]) -> Sample:
    def connect(order: dict[str, Any]) -> tuple[Callable[[bytes], Any], Any]:
        acked = threading.Semaphore(0)
        client = connected_paho(order, 1_000, lambda *_: acked.release())

        def close() -> None:
            for _ in range(order["messages"]):
                check(acked.acquire(timeout=60), "some were not acknowledged")
            client.disconnect()
            client.loop_stop()

        return (lambda payload: client.publish(TOPIC, payload, 1)), close

    return _measured(order, connect)


def socket_latency(order: dict[str, Any]) -> Sample:
    def connect(order: dict[str, Any]) -> tuple[Callable[[bytes], Any], Any]:
        sock = _raw.connect(order.get("host", _brokers.HOST), order["port"], None)
        sock.setblocking(True)
        head = _raw.packet_head(max(8, order["payload_bytes"])) + b"\x00\x01"

        def publish(payload: bytes) -> None:
            sock.sendall(head + payload)
            with contextlib.suppress(BlockingIOError):
                sock.recv(65536, socket.MSG_DONTWAIT)

        def close() -> None:
            sock.sendall(b"\xe0\x00")
            while sock.recv(65536):
                pass
            sock.close()

        return publish, close

    return _measured(order, connect)


_KINDS: dict[str, Subject] = {
    "cloudpubsub": cloudpubsub_latency,
    "bare socket": socket_latency,
    "paho-mqtt": paho_latency,
}
SUBJECTS = _KINDS


def run(arguments: argparse.Namespace) -> Report:
    quick, rounds = arguments.quick, _harness.rounds_of(arguments, 5)
    subjects = {}
    for way in _WAYS:
        for kind in _KINDS:
            if arguments.own_only and kind != "cloudpubsub":
                continue
            few = 50 if quick else 400
            many = 400 if quick else 20_000
            # At that rate paho only falls behind.
            if way == "under load" and kind == "paho-mqtt":
                continue
            subjects[f"{kind}, {way}"] = {
                **_harness.common_order(arguments),
                "kind": kind,
                "way": way,
                "messages": many if way == "under load" else few,
                "payload_bytes": max(8, arguments.payload_bytes or 64),
            }
    others = [name for name in subjects if name.startswith("paho")]
    samples = _harness.in_turns(_MODULE, subjects, rounds, _harness.note_to_stderr, others=others)
    return {
        "bench": "latency",
        "parameters": {"pause_s": _PAUSE_S, "load_per_second": _LOAD_PER_S, "parts": list(_PARTS)},
        "missing": samples.missing,
        "subjects": _harness.summary(samples),
        "ratios": {},
    }


def show(report: Report) -> str:
    keys = ("p50_us", "p90_us", "p99_us", "p99.9_us")
    rows = [
        [name, *(_harness.span(one[key], "{:,.0f}") for key in keys)] for name, one in report["subjects"].items()
    ]
    return _harness.table(["publish() to the other end, µs", "median", "p90", "p99", "p99.9"], rows)


def main() -> None:
    _harness.main(_harness.parser(_MODULE, __doc__).parse_args(), SUBJECTS, run, show)


if __name__ == "__main__":
    main()

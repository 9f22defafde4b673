"""How fast does a backlog on the disk get to the broker, and how much memory does it take?

A spool is filled without a connection, closed, opened again and connected: messages a second until the last
acknowledgement is there, everything in between included.  Beside it the raw sender (packets that were encoded
beforehand).  The other end is a native sink, which parses and acknowledges and does nothing else.

The same beside a Python thread that computes all the time, and beside a process that does: what the thread costs more
than the process it costs by holding the interpreter.

Memory: a backlog of millions is published without a connection; how far anonymous and shared memory, and all resident
memory, have grown since before the client was made.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import threading
import time
from contextlib import AbstractContextManager
from itertools import repeat
from pathlib import Path
from typing import Any

import cloudpubsub

from . import _brokers, _harness, end_to_end
from ._harness import TOPIC, Meter, Report, Sample, Subject, check
from ._peers import busy_process, busy_thread, payload_of

_MODULE = _harness.module_name("drain")
_OWN, _RAW, _MEMORY = "cloudpubsub", "raw sender", "memory with a backlog"
BESIDE_THREAD, BESIDE_PROCESS = "cloudpubsub, beside a busy Python thread", "cloudpubsub, beside a busy process"
_WAIT_S = 120.0


def _fill(order: dict[str, Any]) -> cloudpubsub.Client:
    """A client that is not started, with all messages published."""
    logging.getLogger("cloudpubsub").setLevel(logging.ERROR)
    n, payload = order["messages"], payload_of(order)
    client = _client(order)
    for _ in repeat(None, n):
        client.publish(TOPIC, payload)
    return client


def _client(order: dict[str, Any], **settings: Any) -> cloudpubsub.Client:
    return cloudpubsub.Client(
        f"mqtt://{order['host']}:{order['port']}",
        client_id="bench-drain",
        spool=order["directory"],
        max_spool_bytes=16 << 30,
        **{**order.get("settings", {}), **settings},
    )


def drain(order: dict[str, Any]) -> Sample:
    return _drain(order, contextlib.nullcontext())


def beside_thread(order: dict[str, Any]) -> Sample:
    return _drain(order, busy_thread())


def beside_process(order: dict[str, Any]) -> Sample:
    return _drain(order, busy_process())


def _drain(order: dict[str, Any], beside: AbstractContextManager[None]) -> Sample:
    n = order["messages"]
    check(_fill(order).close(_WAIT_S) == 0, "not all was saved")
    up_s: list[float] = []
    is_up = threading.Event()

    def note(_: str) -> None:
        up_s.append(time.perf_counter())
        is_up.set()

    client = _client(order, on_connect=note)
    with beside, Meter() as meter:
        client.start()
        check(is_up.wait(_WAIT_S), "no connection")
        lost = client.flush(_WAIT_S)
        end_s = time.perf_counter()
    stats = client.stats()
    check(lost == 0 and stats.acked == n and stats.reconnects == 0, f"{stats.acked} of {n} were acknowledged")
    client.close()
    return meter.sample(n, seconds=end_s - up_s[0])


def memory(order: dict[str, Any]) -> Sample:
    n = order["messages"]
    before = _resident()
    with Meter() as meter:
        client = _fill(order)
    after, stats = _resident(), client.stats()
    check(stats.backlog_messages == n and stats.dropped == 0, f"{stats.backlog_messages} in the backlog")
    ring_bytes = client.options.ring_bytes
    client.close(_WAIT_S)
    held = after["RssAnon"] + after["RssShmem"] - before["RssAnon"] - before["RssShmem"]
    return meter.sample(
        n,
        ring_bytes=ring_bytes,
        anonymous_and_shared_growth_bytes=held,
        resident_growth_bytes=after["VmRSS"] - before["VmRSS"],
    )


def _resident() -> dict[str, int]:
    found = re.findall(r"^(RssAnon|RssShmem|VmRSS):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return {name: int(value) * 1024 for name, value in found}


SUBJECTS: dict[str, Subject] = {
    _OWN: drain,
    BESIDE_THREAD: beside_thread,
    BESIDE_PROCESS: beside_process,
    _RAW: end_to_end.raw,
    _MEMORY: memory,
}


def run(arguments: argparse.Namespace) -> Report:
    quick, rounds = arguments.quick, _harness.rounds_of(arguments, 5)
    payload_bytes = arguments.payload_bytes or 64
    n = arguments.messages or (20_000 if quick else max(10_000, min(2_000_000, 400_000_000 // payload_bytes)))
    with _brokers.running(arguments.broker) as broker:
        same = {**_harness.common_order(arguments), **broker.order, "payload_bytes": payload_bytes, "messages": n}
        subjects = {
            _OWN: same,
            BESIDE_THREAD: same,
            BESIDE_PROCESS: same,
            _RAW: {**same, "window": 20_000, "batch": 2_000, "nap_s": 0.0},
            _MEMORY: {**same, "messages": 50_000 if quick else min(10_000_000, 2_000_000_000 // payload_bytes)},
        }
        samples = _harness.in_turns(
            _MODULE, subjects, rounds, _harness.note_to_stderr, fewer={_MEMORY: 1}
        )
    return {
        "bench": "drain",
        "parameters": {
            "broker": broker.name,
            "payload_bytes": payload_bytes,
            "settings": same["settings"],
        },
        "missing": samples.missing,
        "subjects": _harness.summary(samples),
        "ratios": _harness.ratios(samples, (_RAW, _OWN, BESIDE_PROCESS)),
    }


def show(report: Report) -> str:
    rows = [
        [name, _harness.span(one["per_second"]), _harness.span(one["cpu_s_per_million"], "{:.2f}")]
        for name, one in report["subjects"].items()
        if name != _MEMORY
    ]
    where = f"{report['parameters']['broker']}, {report['parameters']['payload_bytes']} B"
    text = _harness.table([f"from the disk to {where}", "messages/s, median (min-max)", "CPU s per million"], rows)
    alone = report["ratios"][f"{BESIDE_THREAD} / {_OWN}"]
    process = report["ratios"][f"{BESIDE_THREAD} / {BESIDE_PROCESS}"]
    text += (
        f"\n\nBeside a busy Python thread: {_harness.bounds(alone)} of what it is alone; "
        f"{_harness.bounds(process)} of what it is beside a busy process."
    )
    held = report["subjects"].get(_MEMORY)
    if held is not None:
        text += (
            f"\n\nWith a backlog of {held['messages']:,} messages anonymous and shared memory had grown by "
            f"{_harness.mib(held['anonymous_and_shared_growth_bytes']['median'])}, all resident memory by "
            f"{_harness.mib(held['resident_growth_bytes']['median'])}, of which the ring is "
            f"{_harness.mib(held['ring_bytes']['median'])}."
        )
    return text


def parser() -> argparse.ArgumentParser:
    made = _harness.parser(_MODULE, __doc__)
    made.add_argument("--broker", default="sink", help="sink, mosquitto, rumqttd or mqtt://HOST:PORT (default: sink)")
    made.add_argument("--messages", type=int, help="in the backlog that is drained (default: 2 million of 64 B)")
    return made


def main() -> None:
    _harness.main(parser().parse_args(), SUBJECTS, run, show)


if __name__ == "__main__":
    main()

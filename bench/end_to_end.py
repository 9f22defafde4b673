"""How many messages a second does a broker acknowledge?

64 bytes to a topic of 20, QoS 1, nobody subscribed, from one Python thread that publishes as fast as it can, until the
last acknowledgement is there: cloudpubsub (with a spool, and in memory alone), paho-mqtt (`loop_start`, the best of
several `max_inflight`), and as the broker's ceiling a raw sender: PUBLISH packets that were encoded beforehand, on a
plain socket, the best of several windows, batch sizes and pauses before reading, acknowledgements only counted.
"""

from __future__ import annotations

import argparse
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import repeat
from typing import Any

from bench import _harness
from bench._harness import TOPIC, Meter, Report, Sample, Subject, check
from bench._peers import connected_client, connected_paho

_MODULE = "bench.end_to_end"
_PAYLOAD = bytes(range(64))
_FLUSH_S = 120.0
_NAPS_S = (0.0, 0.0005)  # who reads rarely is woken rarely, and wakes the broker rarely
_INFLIGHTS = (20, 100, 1_000)
_WINDOWS = ((1_000, 250), (10_000, 250), (10_000, 1_000), (20_000, 2_000))
_OWN, _OWN_MEMORY, _PAHO, _RAW = "cloudpubsub", "cloudpubsub, memory only", "paho-mqtt", "raw sender"


def cloudpubsub_spool(order: dict[str, Any]) -> Sample:
    return _publish(order, order["directory"])


def cloudpubsub_memory(order: dict[str, Any]) -> Sample:
    return _publish(order, None, on_full="block")


def _publish(order: dict[str, Any], spool: str | None, **settings: Any) -> Sample:
    n = order["messages"]
    client = connected_client(order["port"], spool, **settings)
    publish = client.publish
    with Meter() as meter:
        for _ in repeat(None, n):
            publish(TOPIC, _PAYLOAD)
        lost = client.flush(_FLUSH_S)
    stats = client.stats()
    check(lost == 0 and stats.acked == n, f"{stats.acked} of {n} were acknowledged, {lost} lost")
    check(stats.reconnects == 0, "the connection was lost")
    client.close()
    return meter.sample(n, spilled_bytes=stats.spilled_bytes, resent=stats.resent)


def paho(order: dict[str, Any]) -> Sample:
    n, acked, is_done = order["messages"], 0, threading.Event()

    def count(*_: Any) -> None:
        nonlocal acked
        acked += 1
        if acked == n:
            is_done.set()

    client = connected_paho(order["port"], order["max_inflight"], count)
    publish = client.publish
    with Meter() as meter:
        for _ in repeat(None, n):
            publish(TOPIC, _PAYLOAD, 1)
        is_done.wait(_FLUSH_S)
    check(acked == n, f"{acked} of {n} were acknowledged")
    client.disconnect()
    client.loop_stop()
    return meter.sample(n)


def raw(order: dict[str, Any]) -> Sample:
    n, window, batch = order["messages"], order["window"], order["batch"]
    sock = _connect(order["port"])
    batches = _batches(window, batch, n)
    with Meter() as meter:
        answer = _send_all(sock, batches, window, n, order["nap_s"])
    sock.sendall(b"\xe0\x00")
    sock.close()
    check(len(answer) == 4 * n and answer[0::4] == b"\x40" * n and answer[1::4] == b"\x02" * n, "not n PUBACKs")
    ids = Counter(zip(answer[2::4], answer[3::4], strict=True))
    sent = Counter(divmod(i % window + 1, 256) for i in range(n))
    check(ids == sent, "the ids that were acknowledged are not those that were sent")
    return meter.sample(n)


def _connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    name = b"bench-raw"
    body = b"\x00\x04MQTT\x04\x02\x00\x3c" + len(name).to_bytes(2, "big") + name
    sock.sendall(bytes([0x10, len(body)]) + body)
    answer = b""
    while len(answer) < 4:
        answer += sock.recv(4 - len(answer))
    check(answer == b"\x20\x02\x00\x00", f"CONNACK {answer!r}")
    sock.setblocking(False)
    return sock


def _batches(window: int, batch: int, n: int) -> Iterator[tuple[int, memoryview]]:
    """(messages, their packets), again and again over the packets of one window."""
    check(window % batch == 0, "the window is a multiple of the batch")
    topic = TOPIC.encode()
    size = 2 + len(topic) + 2 + len(_PAYLOAD)
    head = bytes([0x32, size]) + len(topic).to_bytes(2, "big") + topic
    packets = memoryview(b"".join(head + i.to_bytes(2, "big") + _PAYLOAD for i in range(1, window + 1)))
    length = size + 2
    check(size < 128 and len(packets) == window * length, "one byte says the remaining length")
    parts = [packets[at : at + batch * length] for at in range(0, window * length, batch * length)]

    def endless() -> Iterator[tuple[int, memoryview]]:
        left, turn = n, 0
        while left > 0:
            messages = min(batch, left)
            yield messages, parts[turn % len(parts)][: messages * length]
            left, turn = left - messages, turn + 1

    return endless()


def _send_all(
    sock: socket.socket, batches: Iterator[tuple[int, memoryview]], window: int, n: int, nap_s: float
) -> bytearray:
    """Everything sent and `n` PUBACKs received; returns what came."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    answer = bytearray(4 * n + 4)  # a byte too many would show
    room = memoryview(answer)
    sent = received_bytes = 0
    rest, messages = memoryview(b""), 0
    upcoming = next(batches, None)
    while received_bytes < 4 * n:
        is_blocked = False
        while not is_blocked:
            if not rest:
                if upcoming is None or sent + upcoming[0] - received_bytes // 4 > window:
                    break
                messages, rest = upcoming
                sent += messages
                upcoming = next(batches, None)
            try:
                rest = rest[sock.send(rest) :]
            except BlockingIOError:
                is_blocked = True
        poller.modify(sock, select.POLLIN | (select.POLLOUT if is_blocked else 0))
        if nap_s > 0:
            time.sleep(nap_s)
        for _, event in poller.poll(10_000) or [(0, 0)]:
            check(event != 0, "the broker was silent for 10 s")
            if event & ~select.POLLOUT:
                size = sock.recv_into(room[received_bytes:])
                check(size > 0, "the broker closed the connection")
                received_bytes += size
                # A broker that leaves Nagle on sends the next acknowledgements only when these are acknowledged.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    return answer[:received_bytes]


SUBJECTS: dict[str, Subject] = {
    _OWN: cloudpubsub_spool,
    _OWN_MEMORY: cloudpubsub_memory,
    _PAHO: paho,
    _RAW: raw,
}


def run(arguments: argparse.Namespace) -> Report:
    quick, note = arguments.quick, _harness.note_to_stderr
    n = arguments.messages or (2_000 if quick else 200_000)
    with _harness.running_broker(arguments.broker) as broker:
        few = {"messages": max(1, n // 10), "port": broker.port}
        many = {"messages": n, "port": broker.port}
        inflights = [{**few, "max_inflight": size} for size in _INFLIGHTS]
        windows = [
            {**many, "window": size, "batch": batch, "nap_s": nap_s} for size, batch in _WINDOWS for nap_s in _NAPS_S
        ]
        if quick:
            inflights, windows = inflights[:1], windows[:1]
        subjects = {
            _OWN: many,
            _OWN_MEMORY: many,
            _PAHO: _harness.best_of(_MODULE, _PAHO, inflights, note),
            _RAW: _harness.best_of(_MODULE, _RAW, windows, note),
        }
        samples = _harness.in_turns(_MODULE, subjects, _harness.rounds_of(arguments), note)
        chosen = {name: {k: v for k, v in subjects[name].items() if k != "port"} for name in (_PAHO, _RAW)}
        name = broker.name
    return {
        "bench": "end_to_end",
        "parameters": {
            "broker": name,
            "payload_bytes": len(_PAYLOAD),
            "topic_bytes": len(TOPIC),
            "rounds": len(samples[_OWN]),
            "chosen": chosen,
        },
        "subjects": _harness.summary(samples),
        "ratios": {
            f"{of} / {to}": _harness.ratio(samples, of, to) for of in samples for to in (_PAHO, _RAW) if of != to
        },
    }


def show(report: Report) -> str:
    rows = []
    for name, figures in report["subjects"].items():
        to_paho, to_raw = (report["ratios"].get(f"{name} / {to}") for to in (_PAHO, _RAW))
        rows.append(
            [
                name,
                _harness.span(figures["per_second"]),
                "1" if to_paho is None else _harness.span(to_paho, "{:.1f}"),
                "1" if to_raw is None else _harness.span(to_raw, "{:.2f}"),
                _harness.span(figures["cpu_s_per_million"], "{:.2f}"),
                _harness.mib(figures["peak_rss_bytes"]),
            ]
        )
    head = [
        f"acknowledged by {report['parameters']['broker']}, 64 B",
        "messages/s, median (min-max)",
        "times paho",
        "of the raw sender",
        "CPU s per million",
        "peak RSS",
    ]
    chosen = report["parameters"]["chosen"]
    return (
        f"{_harness.table(head, rows)}\n\n"
        f"paho: max_inflight {chosen[_PAHO]['max_inflight']}; raw sender: window {chosen[_RAW]['window']}, "
        f"batches of {chosen[_RAW]['batch']}, {chosen[_RAW]['nap_s'] * 1000:g} ms of sleep before it reads; "
        "best of those tried."
    )


def parser() -> argparse.ArgumentParser:
    made = _harness.parser(_MODULE, __doc__)
    made.add_argument("--broker", choices=("mosquitto", "rumqttd"), default=_harness.default_broker())
    made.add_argument("--messages", type=int, help="per measurement; paho gets a tenth (default: 200000)")
    return made


if __name__ == "__main__":
    _harness.main(parser().parse_args(), SUBJECTS, run, show)

"""How many messages a second reach a handler in Python?

64 bytes at QoS 1, each acknowledged: from a native source (a C program that only sends and takes acknowledgements),
from Mosquitto and from rumqttd, which a raw sender feeds.  cloudpubsub's handler beside paho-mqtt's `on_message`,
aiomqtt's `async for`, and a raw subscriber, which counts and acknowledges bytes and makes no message of them.  The
time is that from the first message to the last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from . import _brokers, _harness, _raw
from ._harness import TOPIC, Meter, Report, Sample, Samples, Subject, check
from ._peers import connected_client, connected_paho, payload_of

_MODULE = _harness.module_name("subscribe")
_WAIT_S = 120.0
_OWN, _PAHO, _AIOMQTT, _RAW = "cloudpubsub", "paho-mqtt", "aiomqtt", "raw subscriber"
_SOURCE = "source"


class _Counter:
    """A handler that counts, with the times of the first and the last message."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.count = 0
        self.first_s = self.last_s = 0.0
        self.is_done = threading.Event()

    def add(self) -> None:
        self.count += 1
        if self.count == 1:
            self.first_s = time.perf_counter()
        elif self.count == self._n:
            self.last_s = time.perf_counter()
            self.is_done.set()

    def sample(self, meter: Meter) -> Sample:
        check(self.count == self._n, f"{self.count} of {self._n} messages came")
        return meter.sample(self._n, seconds=self.last_s - self.first_s)


@contextlib.contextmanager
def _feeding(order: dict[str, Any]) -> Iterator[None]:
    """While somebody publishes to the broker; the source sends by itself."""
    if order["broker"] == _SOURCE:
        yield
        return
    command = [sys.executable, "-m", _MODULE, "--one", json.dumps({**order, "subject": "feed"})]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=_harness.child_directory(_MODULE)) as feeder:
        try:
            yield
        except BaseException:
            feeder.kill()
            raise
        check(feeder.wait(_WAIT_S) == 0, "the raw sender failed")


def feed(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], payload_of(order)
    window, batch = _raw.window_that_fits(5_000, 250, len(payload))
    sock = _raw.connect(order["host"], order["port"], None, "bench-feeder")
    with Meter() as meter:
        _raw.send_all(sock, _raw.batches(window, batch, n, payload), window, n, 0.0)
    sock.close()
    return meter.sample(n)


def cloudpubsub_handler(order: dict[str, Any]) -> Sample:
    counter = _Counter(order["messages"])
    # A session that stays would bring what the others were sent between two rounds.
    client = connected_client(order, None, clean_session=True)
    with Meter() as meter:
        client.subscribe(TOPIC, lambda _: counter.add())
        if order["broker"] != _SOURCE:
            client.wait_subscribed(20)
        with _feeding(order):
            counter.is_done.wait(_WAIT_S)
    client.close()
    return counter.sample(meter)


def paho_handler(order: dict[str, Any]) -> Sample:
    counter, is_subscribed = _Counter(order["messages"]), threading.Event()
    client = connected_paho(order, 1_000, None)
    client.on_message = lambda *_: counter.add()
    client.on_subscribe = lambda *_: is_subscribed.set()
    with Meter() as meter:
        client.subscribe(TOPIC, 1)
        check(is_subscribed.wait(20), "the subscription was not confirmed")
        with _feeding(order):
            counter.is_done.wait(_WAIT_S)
    client.disconnect()
    client.loop_stop()
    return counter.sample(meter)


def aiomqtt_handler(order: dict[str, Any]) -> Sample:
    import aiomqtt

    counter, meter = _Counter(order["messages"]), Meter()

    async def take_all() -> None:
        async with aiomqtt.Client(order["host"], order["port"], identifier="bench-aiomqtt") as client:
            with meter:
                await client.subscribe(TOPIC, 1)
                with _feeding(order):
                    async for _ in client.messages:
                        counter.add()
                        if counter.is_done.is_set():
                            break

    asyncio.run(asyncio.wait_for(take_all(), _WAIT_S))
    return counter.sample(meter)


def raw_subscriber(order: dict[str, Any]) -> Sample:
    sock = _raw.connect(order["host"], order["port"], None)
    topic = TOPIC.encode()
    body = b"\x00\x01" + len(topic).to_bytes(2, "big") + topic + b"\x01"
    sock.send(bytes([0x82, len(body)]) + body)
    suback = _receive_exactly(sock, 5)
    check(suback == b"\x90\x03\x00\x01\x01", f"SUBACK {suback!r}")
    with Meter() as meter, _feeding(order):
        seconds = _count_packets(sock, order["messages"], len(payload_of(order)))
    sock.close()
    return meter.sample(order["messages"], seconds=seconds)


def _wait_readable(sock: socket.socket) -> None:
    check(bool(select.select([sock], [], [], _WAIT_S)[0]), "nothing came")


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        _wait_readable(sock)
        data += sock.recv(size - len(data))
    return data


def _count_packets(sock: socket.socket, n: int, payload_bytes: int) -> float:
    """All packets are of one length, so that ids stand at fixed places.  Returns the seconds from the first on."""
    head = len(_raw.packet_head(payload_bytes))
    length = head + 2 + payload_bytes
    buffer = bytearray(1 << 20)
    view, held, count, first_s = memoryview(buffer), 0, 0, 0.0
    sock.setblocking(True)
    sock.settimeout(_WAIT_S)
    while count < n:
        size = sock.recv_into(view[held:])
        check(size > 0, "the connection was closed")
        first_s = first_s or time.perf_counter()
        held += size
        whole = held // length
        if whole == 0:
            continue
        acks = bytearray(4 * whole)
        acks[0::4] = b"\x40" * whole
        acks[1::4] = b"\x02" * whole
        acks[2::4] = buffer[head : whole * length : length]
        acks[3::4] = buffer[head + 1 : whole * length : length]
        check(buffer[0] & 0xF6 == 0x32 and buffer[(whole - 1) * length] & 0xF6 == 0x32, "another packet")
        count += whole
        sock.sendall(acks)
        rest = held - whole * length
        buffer[:rest] = buffer[whole * length : held]
        held = rest
    return time.perf_counter() - first_s


SUBJECTS: dict[str, Subject] = {
    _OWN: cloudpubsub_handler,
    _PAHO: paho_handler,
    _AIOMQTT: aiomqtt_handler,
    _RAW: raw_subscriber,
    "feed": feed,
}
_USUAL_MESSAGES = {_SOURCE: 400_000, "mosquitto": 60_000, "rumqttd": 100_000}
_SLOWNESS = {_PAHO: 10, _AIOMQTT: 20}


def run(arguments: argparse.Namespace) -> Report:
    quick, rounds = arguments.quick, _harness.rounds_of(arguments, 9)
    payload_bytes = arguments.payload_bytes or 64
    name = arguments.broker
    usual = arguments.messages or (2_000 if quick else _USUAL_MESSAGES.get(name, 20_000))
    messages = {who: max(200, usual // _SLOWNESS.get(who, 1)) for who in (_OWN, _PAHO, _AIOMQTT, _RAW)}
    subjects = {}
    with contextlib.ExitStack() as stack:
        broker = None if name == _SOURCE else stack.enter_context(_brokers.running(name))
        for who, count in messages.items():
            if arguments.own_only and who in _SLOWNESS:
                continue
            if broker is not None:
                where = broker.order
            else:
                peer = _brokers.running_peer(messages=count, window=5_000, payload_bytes=payload_bytes)
                where = _brokers.Target(_SOURCE, _brokers.HOST, stack.enter_context(peer)).order
            subjects[who] = {
                **_harness.common_order(arguments),
                **where,
                "broker": name,
                "payload_bytes": payload_bytes,
                "messages": count,
            }
        fewer = {who: min(rounds, 3) for who in _SLOWNESS}
        samples: Samples = _harness.in_turns(
            _MODULE, subjects, rounds, _harness.note_to_stderr, fewer=fewer, others=_SLOWNESS
        )
    return {
        "bench": "subscribe",
        "parameters": {"broker": name, "payload_bytes": payload_bytes, "settings": _harness.settings_of(arguments)},
        "missing": samples.missing,
        "subjects": _harness.summary(samples),
        "ratios": _harness.ratios(samples, (_RAW, _PAHO)),
    }


def show(report: Report) -> str:
    rows = []
    ratios = report["ratios"]

    def form(name: str, to: str, digits: str) -> str:
        ratio = ratios.get(f"{name} / {to}")
        return "1" if name == to else "" if ratio is None else _harness.span(ratio, digits)

    for name, figures in report["subjects"].items():
        rows.append(
            [
                name,
                _harness.span(figures["per_second"]),
                form(name, _PAHO, "{:.1f}"),
                form(name, _RAW, "{:.2f}"),
                _harness.span(figures["cpu_s_per_million"], "{:.2f}"),
            ]
        )
    head = [
        f"received from {report['parameters']['broker']}, {report['parameters']['payload_bytes']} B",
        "messages/s, median (min-max)",
        "times paho",
        "of the raw subscriber",
        "CPU s per million",
    ]
    text = _harness.table(head, rows)
    ratio = ratios.get(f"{_OWN} / {_RAW}")
    return text + (f"\n\nOf the raw subscriber: {_harness.bounds(ratio)}." if ratio else "")


def parser() -> argparse.ArgumentParser:
    made = _harness.parser(_MODULE, __doc__)
    made.add_argument("--broker", default=_SOURCE, help="source, mosquitto, rumqttd or mqtt://HOST:PORT")
    made.add_argument("--messages", type=int, help="per measurement; slower libraries get a part of it")
    return made


def main() -> None:
    _harness.main(parser().parse_args(), SUBJECTS, run, show)


if __name__ == "__main__":
    main()

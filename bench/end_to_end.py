"""How many messages a second are acknowledged?

Messages of one size to a topic of 20 bytes, QoS 1, nobody subscribed, from one Python thread that publishes as fast
as it can, until the last acknowledgement is there: cloudpubsub (with a spool, and in memory alone), paho-mqtt
(`loop_start`, the best of several `max_inflight`), aiomqtt, awscrt (MQTT 5), Paho C (MQTTAsync) and `mosquitto_pub
-l`; and as the ceiling a raw sender: PUBLISH packets that were encoded beforehand, on a plain socket, the best of
several windows, batch sizes and pauses before reading, acknowledgements only counted.

The broker is Mosquitto, rumqttd, one of yours (`--broker mqtt://HOST:PORT`), or `sink`, a C program that parses and
acknowledges and does nothing else, so that the client is what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import socket
import ssl
import threading
from collections import Counter
from itertools import repeat
from pathlib import Path
from typing import Any

from . import _brokers, _harness, _native, _raw
from ._harness import TOPIC, Meter, Report, Sample, Subject, check
from ._peers import connected_client, connected_paho, payload_of

_MODULE = _harness.module_name("end_to_end")
_FLUSH_S = 120.0
_NAPS_S = (0.0, 0.0005)  # who reads rarely is woken rarely, and wakes the broker rarely
_INFLIGHTS = {"paho-mqtt": (20, 100, 1_000), "aiomqtt": (100,), "awscrt": (1_000,)}
_WAITINGS = (100, 1_000)
_WINDOWS = ((1_000, 250), (10_000, 250), (10_000, 1_000), (20_000, 2_000))
_OWN, _OWN_MEMORY, _PAHO, _RAW = "cloudpubsub", "cloudpubsub, memory only", "paho-mqtt", "raw sender"
_AIOMQTT, _AWSCRT, _PAHO_C, _MOSQUITTO_PUB = "aiomqtt", "awscrt", "Paho C", "mosquitto_pub -l"
#: How many times slower each of the others is, roughly: so many times fewer messages are measured.
_SLOWNESS = {_PAHO: 20, _AIOMQTT: 50, _AWSCRT: 20, _PAHO_C: 50, _MOSQUITTO_PUB: 5}


def cloudpubsub_spool(order: dict[str, Any]) -> Sample:
    return _publish(order, order["directory"])


def cloudpubsub_memory(order: dict[str, Any]) -> Sample:
    order["settings"].pop("durability", None)
    return _publish(order, None, on_full="block")


def _publish(order: dict[str, Any], spool: str | None, **settings: Any) -> Sample:
    n, payload = order["messages"], payload_of(order)
    client = connected_client(order, spool, **settings)
    publish = client.publish
    with Meter() as meter:
        for _ in repeat(None, n):
            publish(TOPIC, payload)
        lost = client.flush(_FLUSH_S)
    stats = client.stats()
    check(lost == 0 and stats.acked == n, f"{stats.acked} of {n} were acknowledged, {lost} lost")
    check(stats.reconnects == 0, "the connection was lost")
    client.close()
    return meter.sample(n, spilled_bytes=stats.spilled_bytes, resent=stats.resent)


def paho(order: dict[str, Any]) -> Sample:
    n, payload, acked, is_done = order["messages"], payload_of(order), 0, threading.Event()

    def count(*_: Any) -> None:
        nonlocal acked
        acked += 1
        if acked == n:
            is_done.set()

    client = connected_paho(order, order["max_inflight"], count)
    publish = client.publish
    with Meter() as meter:
        for _ in repeat(None, n):
            publish(TOPIC, payload, 1)
        is_done.wait(_FLUSH_S)
    check(acked == n, f"{acked} of {n} were acknowledged")
    client.disconnect()
    client.loop_stop()
    return meter.sample(n)


def aiomqtt(order: dict[str, Any]) -> Sample:
    import aiomqtt

    n, payload, meter = order["messages"], payload_of(order), Meter()
    context = ssl.create_default_context(cafile=order["ca"]) if order["ca"] else None

    async def publish_all() -> None:
        left = n

        async def publish_some(client: aiomqtt.Client) -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await client.publish(TOPIC, payload, 1)  # until it is acknowledged

        async with aiomqtt.Client(
            order["host"],
            order["port"],
            identifier="bench-aiomqtt",
            tls_context=context,
            max_inflight_messages=order["max_inflight"],
        ) as client:
            with meter:
                await asyncio.gather(*(publish_some(client) for _ in range(order["max_inflight"])))

    asyncio.run(publish_all())
    return meter.sample(n)


def awscrt(order: dict[str, Any]) -> Sample:
    from awscrt import io, mqtt5

    n, payload, acked, meter = order["messages"], payload_of(order), 0, Meter()
    is_up, is_done, room = threading.Event(), threading.Event(), threading.Semaphore(order["max_inflight"])
    tls = None
    if order["ca"]:
        options = io.TlsContextOptions()
        options.override_default_trust_store_from_path(None, order["ca"])
        tls = io.ClientTlsContext(options)
    client = mqtt5.Client(
        mqtt5.ClientOptions(
            host_name=order["host"],
            port=order["v5_port"],
            tls_ctx=tls,
            connect_options=mqtt5.ConnectPacket(client_id="bench-awscrt", keep_alive_interval_sec=60),
            # Else it keeps to what AWS IoT Core allows, a hundred a second.
            extended_validation_and_flow_control_options=mqtt5.ExtendedValidationAndFlowControlOptions.NONE,
            on_lifecycle_event_connection_success_fn=lambda _: is_up.set(),
        )
    )
    client.start()
    check(is_up.wait(20), "no connection")

    def count(future: Any) -> None:
        nonlocal acked
        check(future.exception() is None, str(future.exception()))
        acked += 1
        room.release()
        if acked == n:
            is_done.set()

    packet = mqtt5.PublishPacket(topic=TOPIC, payload=payload, qos=mqtt5.QoS.AT_LEAST_ONCE)
    with meter:
        for _ in repeat(None, n):
            room.acquire()
            client.publish(packet).add_done_callback(count)
        is_done.wait(_FLUSH_S)
    check(acked == n, f"{acked} of {n} were acknowledged")
    client.stop()
    return meter.sample(n)


def paho_c(order: dict[str, Any]) -> Sample:
    program = _native.build("paho_c", libraries=("paho-mqtt3as",))
    scheme = "ssl" if order["ca"] else "tcp"
    numbers = (order["messages"], order.get("payload_bytes", 64), 1_000, order["waiting"])
    command = [str(program), f"{scheme}://{order['host']}:{order['port']}", *map(str, numbers)]
    text, _, cpu_s, peak_bytes = _harness.program(command + ([order["ca"]] if order["ca"] else []))
    return Sample(order["messages"], float(text), cpu_s, peak_bytes, peak_bytes)


def mosquitto_pub(order: dict[str, Any]) -> Sample:
    path = shutil.which("mosquitto_pub")
    if path is None:
        raise _native.Missing("mosquitto-clients")
    n, lines = order["messages"], Path(order["directory"]) / "lines"
    lines.write_bytes((b"x" * order.get("payload_bytes", 64) + b"\n") * n)
    command = [path, "-h", order["host"], "-p", str(order["port"]), "-t", TOPIC, "-q", "1", "-l"]
    command += ["--cafile", order["ca"]] if order["ca"] else []
    with lines.open("rb") as given:
        _, seconds, cpu_s, peak_bytes = _harness.program(command, stdin=given)
    return Sample(n, seconds, cpu_s, peak_bytes, peak_bytes)


def raw(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], payload_of(order)
    window, batch = _raw.window_that_fits(order["window"], order["batch"], len(payload))
    sock = _raw.connect(order["host"], order["port"], order["ca"])
    batches = _raw.batches(window, batch, n, payload)
    with Meter() as meter:
        answer = _raw.send_all(sock, batches, window, n, order["nap_s"])
    _say_goodbye(sock)
    check(len(answer) == 4 * n and answer[0::4] == b"\x40" * n and answer[1::4] == b"\x02" * n, "not n PUBACKs")
    ids = Counter(zip(answer[2::4], answer[3::4], strict=True))
    sent = Counter(divmod(i % window + 1, 256) for i in range(n))
    check(ids == sent, "the ids that were acknowledged are not those that were sent")
    return meter.sample(n)


def _say_goodbye(sock: socket.socket) -> None:
    sock.setblocking(True)
    sock.settimeout(5)
    sock.sendall(b"\xe0\x00")
    sock.close()


SUBJECTS: dict[str, Subject] = {
    _OWN: cloudpubsub_spool,
    _OWN_MEMORY: cloudpubsub_memory,
    _PAHO: paho,
    _AIOMQTT: aiomqtt,
    _AWSCRT: awscrt,
    _PAHO_C: paho_c,
    _MOSQUITTO_PUB: mosquitto_pub,
    _RAW: raw,
}
_USUAL_MESSAGES = {"mosquitto": 50_000, "rumqttd": 250_000, "sink": 800_000}


def _messages(arguments: argparse.Namespace, payload_bytes: int) -> int:
    if arguments.messages:
        return int(arguments.messages)
    if arguments.quick:
        return 2_000
    usual = _USUAL_MESSAGES.get(arguments.broker, 50_000) // (2 if arguments.tls else 1)
    # As many bytes as those take at 64 bytes and four times that, so that large payloads do not take for ever.
    return max(500, min(usual, usual * 64 * 16 // max(payload_bytes, 1)))


def run(arguments: argparse.Namespace) -> Report:
    quick, note = arguments.quick, _harness.note_to_stderr
    payload_bytes = arguments.payload_bytes or 64
    n = _messages(arguments, payload_bytes)
    rounds = _harness.rounds_of(arguments, 15)
    with _brokers.running(arguments.broker, tls=arguments.tls) as broker:
        same = {**_harness.common_order(arguments), **broker.order, "payload_bytes": payload_bytes, "messages": n}
        given = getattr(arguments, "raw", None)
        windows = [given] if given else [
            {"window": size, "batch": batch, "nap_s": nap_s} for size, batch in _WINDOWS for nap_s in _NAPS_S
        ]
        windows = [{**same, **window} for window in windows]
        subjects = {
            _OWN: same,
            _OWN_MEMORY: same,
            _RAW: _harness.best_of(_MODULE, _RAW, windows[:1] if quick else windows, note, tries=1),
        }
        fewer = {_OWN_MEMORY: min(rounds, 3)}
        if not arguments.own_only:
            for name in (_PAHO, _AIOMQTT, _AWSCRT, _PAHO_C, _MOSQUITTO_PUB):
                few = {**same, "messages": max(200, min(n, 400_000) // _SLOWNESS[name])}
                choices = [few]
                if name in _INFLIGHTS:
                    choices = [{**few, "max_inflight": size} for size in _INFLIGHTS[name]]
                elif name == _PAHO_C:
                    choices = [{**few, "waiting": size} for size in _WAITINGS]
                subjects[name] = _harness.best_of(_MODULE, name, choices[:1] if quick else choices, note, tries=1)
                fewer[name] = min(rounds, 3)
        if given:
            del subjects[_OWN_MEMORY]
        samples = _harness.in_turns(_MODULE, subjects, rounds, note, fewer=fewer, others=_SLOWNESS)
    return {
        "bench": "end_to_end",
        "parameters": {
            "broker": broker.name,
            "tls": arguments.tls,
            "payload_bytes": payload_bytes,
            "topic_bytes": len(TOPIC),
            "settings": same["settings"],
            "chosen": {name: _harness.chosen(parameters) for name, parameters in subjects.items() if name in samples},
        },
        "missing": samples.missing,
        "subjects": _harness.summary(samples),
        "ratios": _harness.ratios(samples, (_RAW, _PAHO, _PAHO_C, _MOSQUITTO_PUB)),
    }


def show(report: Report) -> str:
    parameters = report["parameters"]
    rows = []
    for name, figures in report["subjects"].items():
        to_paho, to_raw = (report["ratios"].get(f"{name} / {to}") for to in (_PAHO, _RAW))
        rows.append(
            [
                name,
                _harness.span(figures["per_second"]),
                _times(to_paho, "{:.1f}", name == _PAHO),
                _times(to_raw, "{:.2f}", name == _RAW),
                _harness.span(figures["cpu_s_per_million"], "{:.2f}"),
                _harness.mib(figures["peak_rss_bytes"]),
            ]
        )
    head = [
        f"acknowledged by {parameters['broker']}{' over TLS' if parameters['tls'] else ''}, "
        f"{parameters['payload_bytes']} B",
        "messages/s, median (min-max)",
        "times paho",
        "of the raw sender",
        "CPU s per million",
        "peak RSS",
    ]
    tried = "; ".join(
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in chosen.items())
        for name, chosen in parameters["chosen"].items()
        if chosen
    )
    text = _harness.table(head, rows)
    ratio = report["ratios"].get(f"{_OWN} / {_RAW}")
    if ratio is not None:
        text += f"\n\nOf the raw sender: {_harness.bounds(ratio)}."
    return text + (f" Best of those tried: {tried}." if tried else "")


def _times(ratio: dict[str, float] | None, form: str, is_itself: bool) -> str:
    return "1" if is_itself else "" if ratio is None else _harness.span(ratio, form)


def parser() -> argparse.ArgumentParser:
    made = _harness.parser(_MODULE, __doc__)
    made.add_argument(
        "--broker",
        default=_brokers.default(),
        help="mosquitto, rumqttd, sink, or mqtt://HOST:PORT (default: %(default)s)",
    )
    made.add_argument("--tls", action="store_true", help="over TLS, with certificates made for it")
    made.add_argument("--messages", type=int, help="per measurement; slower libraries get a part of it")
    return made


def main() -> None:
    _harness.main(parser().parse_args(), SUBJECTS, run, show)


if __name__ == "__main__":
    main()

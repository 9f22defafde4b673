"""What is aimed at, and whether it was met in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import _harness, drain
from ._harness import Report

Verdict = dict[str, Any]
_OWN, _PAHO, _RAW = "cloudpubsub", "paho-mqtt", "raw sender"


class _Reports:
    """The reports of one run, by question and what it was asked of.  KeyError for what was not measured."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self._by_key: dict[tuple[object, ...], Report] = {}
        for report in reports:
            parameters = report["parameters"]
            self._by_key[(report["bench"], parameters.get("broker"), parameters.get("tls", False))] = report

    def get(self, bench: str, broker: str | None = None, *, tls: bool = False) -> Report:
        if broker is None:
            return next(report for key, report in self._by_key.items() if key[0] == bench)
        return self._by_key[(bench, broker, tls)]


def _median(report: Report, subject: str, key: str = "per_second") -> float:
    value: float = report["subjects"][subject][key]["median"]
    return value


def _at_most(value: float, bound: float, form: str) -> tuple[str, bool]:
    return form.format(value), value <= bound


def _at_least(value: float, bound: float, form: str) -> tuple[str, bool]:
    return form.format(value), value >= bound


def _share(ratio: Mapping[str, float], bound: float) -> tuple[str, bool]:
    """Met when the lower bound of its confidence is: chance may not make it so."""
    return _harness.bounds(ratio), ratio["low95"] >= bound


Rule = tuple[str, str, Callable[[_Reports], tuple[str, bool]]]


def _enqueue() -> list[Rule]:
    own, beside = "cloudpubsub publish(), offline", "cloudpubsub publish(), beside a busy Python thread"

    def ns(reports: _Reports, name: str) -> float:
        return _median(reports.get("enqueue"), name, "ns_per_message")

    def times(reports: _Reports, name: str) -> float:
        value: float = reports.get("enqueue")["ratios"][name]["median"]
        return value

    return [
        (
            "publish() of 64 B, ring not full",
            "at most 200 ns",
            lambda r: _at_most(ns(r, own), 200, "{:.0f} ns"),
        ),
        (
            "the same beside queue.SimpleQueue.put",
            "at most 1.5 times as long",
            lambda r: _at_most(1 / times(r, "queue.SimpleQueue.put"), 1.5, "{:.1f} times"),
        ),
        (
            "the same beside paho's publish()",
            "at least 60 times cheaper",
            lambda r: _at_least(times(r, "paho publish(), offline"), 60, "{:.0f} times"),
        ),
        (
            "the same beside a busy Python thread",
            "at most 2.5 times as long as alone",
            lambda r: _at_most(times(r, beside), 2.5, "{:.2f} times"),
        ),
        (
            "publish() while spilling at half the measured rate, p99.9",
            "at most 20 µs",
            lambda r: _at_most(_median(r.get("spill"), "publish at half that rate, 64 B", "p99.9_us"), 20, "{:.1f} µs"),
        ),
        (
            "native append of 64 B",
            "at most 40 ns",
            lambda r: _at_most(ns(r, "native append, 1 thread"), 40, "{:.0f} ns"),
        ),
        (
            "four native threads together beside one",
            "not slower",
            lambda r: _at_least(times(r, "native append, 4 threads / native append, 1 thread"), 1.0, "{:.2f} times"),
        ),
    ]


def _disk() -> list[Rule]:
    def spill(reports: _Reports) -> tuple[str, bool]:
        report = reports.get("spill")
        limits = [f"{way}, 1024 B" for way in ("pwrite", "stores into a fresh mapping")]
        faster = max(limits, key=lambda name: _median(report, name))
        text, met = _share(report["ratios"][f"spill / {faster}"], 0.7)
        return f"{text} of {faster}", met

    def memory(reports: _Reports) -> tuple[str, bool]:
        held = reports.get("drain")["subjects"]["memory with a backlog"]
        ring = held["ring_bytes"]["median"]
        anonymous, resident = (
            held[key]["median"] - ring for key in ("anonymous_and_shared_growth_bytes", "resident_growth_bytes")
        )
        text = f"ring + {_harness.mib(anonymous)}; ring + {_harness.mib(resident)} ({held['messages']:,} messages)"
        return text, anonymous <= 4 << 20 and resident <= 8 << 20

    def healthy(reports: _Reports) -> tuple[str, bool]:
        written = _median(reports.get("wear"), "healthy link, 64 B", "written_bytes")
        return _at_most(written, 0, "{:,.0f} bytes")

    def spilled(size: int) -> Callable[[_Reports], tuple[str, bool]]:
        name = f"spilling, process, {size} B"
        return lambda r: _at_most(_median(r.get("wear"), name, "written_per_message_byte"), 1.1, "{:.3f}")

    return [
        ("spill of 1 KiB records to the page cache", "at least 70 % of the faster of pwrite and stores", spill),
        (
            "replay framing from the disk, 64 B",
            "at least 5 million messages/s",
            lambda r: _at_least(_median(r.get("spill"), "replay, 64 B", "frame_per_second"), 5e6, "{:,.0f}/s"),
        ),
        (
            "backlog on the disk to the native sink, 64 B",
            "at least 4 million messages/s",
            lambda r: _at_least(_median(r.get("drain", "sink"), _OWN), 4e6, "{:,.0f}/s"),
        ),
        (
            "the same beside a busy Python thread, of what it is beside a busy process",
            "at least 80 %",
            lambda r: _share(r.get("drain", "sink")["ratios"][f"{drain.BESIDE_THREAD} / {drain.BESIDE_PROCESS}"], 0.8),
        ),
        ("memory with a backlog of 10 million messages", "ring + 4 MiB, all resident ring + 8 MiB", memory),
        ("device bytes with a healthy link", "0", healthy),
        ("device bytes for each byte of a message, spilling, 64 B", "at most 1.1", spilled(64)),
        ("the same, 1 KiB", "at most 1.1", spilled(1_024)),
    ]


def _network() -> list[Rule]:
    rules: list[Rule] = []

    def of_raw(broker: str, tls: bool, bound: float) -> Callable[[_Reports], tuple[str, bool]]:
        return lambda r: _share(r.get("end_to_end", broker, tls=tls)["ratios"][f"{_OWN} / {_RAW}"], bound)

    def cpu(broker: str, other: str, times: float) -> Callable[[_Reports], tuple[str, bool]]:
        def judge(reports: _Reports) -> tuple[str, bool]:
            report = reports.get("end_to_end", broker)
            own, peer = (_median(report, name, "cpu_s_per_million") for name in (_OWN, other))
            return f"{own:.2f} s beside {peer:.1f} s: 1/{peer / own:.1f}", own * times <= peer

        return judge

    for broker in ("mosquitto", "rumqttd"):
        for tls, bound in ((False, 0.95), (True, 0.8)):
            what = f"end to end on {broker}, 64 B{' over TLS' if tls else ''}, of the raw sender"
            rules.append((what, f"at least {bound:.0%}", of_raw(broker, tls, bound)))
    rules += [
        (
            "end to end to the native sink, 64 B",
            "at least 2 million messages/s",
            lambda r: _at_least(_median(r.get("end_to_end", "sink"), _OWN), 2e6, "{:,.0f}/s"),
        ),
        (
            "the same beside Paho C",
            "at least 5 times",
            lambda r: _at_least(
                r.get("end_to_end", "sink")["ratios"][f"{_OWN} / Paho C"]["median"], 5, "{:.0f} times"
            ),
        ),
        ("CPU on Mosquitto, 64 B, beside paho-mqtt", "at most 1/12", cpu("mosquitto", _PAHO, 12)),
        ("CPU on Mosquitto, 64 B, beside mosquitto_pub", "at most 1/2", cpu("mosquitto", "mosquitto_pub -l", 2)),
        ("CPU on rumqttd, 64 B, beside paho-mqtt", "at most 1/50", cpu("rumqttd", _PAHO, 50)),
        (
            "to a Python handler from the native source, 64 B",
            "at least 700,000 messages/s",
            lambda r: _at_least(_median(r.get("subscribe", "source"), _OWN), 7e5, "{:,.0f}/s"),
        ),
        (
            "the same beside paho-mqtt",
            "at least 25 times",
            lambda r: _at_least(
                r.get("subscribe", "source")["ratios"][f"{_OWN} / {_PAHO}"]["median"], 25, "{:.1f} times"
            ),
        ),
    ]
    for broker in ("mosquitto", "rumqttd"):

        def received(reports: _Reports, broker: str = broker) -> tuple[str, bool]:
            return _share(reports.get("subscribe", broker)["ratios"][f"{_OWN} / raw subscriber"], 0.85)

        rules.append((f"to a Python handler from {broker}, of the raw subscriber", "at least 85 %", received))
    return rules


def _idle() -> list[Rule]:
    def idle(reports: _Reports) -> tuple[str, bool]:
        figures = [one for name, one in reports.get("idle")["subjects"].items() if name.startswith(_OWN)]
        wakeups = max(one["wakeups_per_second_and_connection"]["median"] for one in figures)
        cpu = max(one["cpu_percent"]["median"] for one in figures)
        return f"{wakeups:.2f} a second, {cpu:.3f} %", wakeups <= 2 and cpu <= 0.1

    def latency(reports: _Reports) -> tuple[str, bool]:
        report = reports.get("latency")
        middle, high = (_median(report, f"{_OWN}, idle link", key) for key in ("p50_us", "p99_us"))
        bare = _median(report, "bare socket, idle link", "p50_us")
        text = f"median {middle:.0f} µs, p99 {high:.0f} µs (a bare socket: median {bare:.0f} µs)"
        return text, middle <= 100 and high <= 1_000

    return [
        ("an idle client, for each connection", "at most 2 wake-ups a second, 0.1 % CPU", idle),
        ("publish() to the other end, idle link", "median at most 100 µs, p99 at most 1 ms", latency),
    ]


def judge(reports: Sequence[Report]) -> list[Verdict]:
    """Each target with what was measured; `met` is None where it was not."""
    found = _Reports(reports)
    verdicts: list[Verdict] = []
    for what, target, rule in (*_enqueue(), *_disk(), *_network(), *_idle()):
        try:
            measured, met = rule(found)
        except (KeyError, StopIteration):
            verdicts.append({"what": what, "target": target, "measured": "not measured", "met": None})
        else:
            verdicts.append({"what": what, "target": target, "measured": measured, "met": bool(met)})
    return verdicts


def show(verdicts: Sequence[Verdict]) -> str:
    words = {True: "yes", False: "no", None: ""}
    rows = [[one["what"], one["target"], one["measured"], words[one["met"]]] for one in verdicts]
    return _harness.table(["what", "target", "measured", "met"], rows)

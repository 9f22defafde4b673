"""What does each setting do?

One curve for each knob of docs/tuning.md, everything else as it is by default:

window      acknowledged messages a second and CPU over `max_inflight`, on Mosquitto and rumqttd; bytes do not limit
ring        what a pause of the link brings to the disk at a steady load, and the rate at full speed, over `ring_bytes`
segment     messages a second to the disk, and seconds to open it after a kill, over `segment_bytes`
durability  the levels, and `sync_interval` with "power": messages a second into the spool, the slowest calls at a
            steady load, commits and bytes written a second while there is no link
payload     bytes a second and CPU over the size of payloads, plain and over TLS, to the native sink

Each point is the median of rounds in turns.  Spools lie in --directory, which should be on a real disk.  A full run
takes three minutes, is no part of `python -m bench`, and leaves `knobs.json`, `knobs.md` and `knobs.svg` in
bench/results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import _brokers, _harness, _loads, _plots, _suite, end_to_end, spill
from ._harness import Report, Samples, Subject
from ._native import Missing

_MODULE = _harness.module_name("knobs")
KIB, MIB = 1 << 10, 1 << 20

_WINDOW = 10_000  # the default
_WINDOWS = (10, 20, 100, 1_000, _WINDOW, 20_000)
_WINDOW_BYTES = {"max_inflight_bytes": 4 * MIB, "ring_bytes": 8 * MIB}  # 20,000 messages of 64 B are less
#: Messages for a measurement, with the smallest windows and with the others.
_WINDOW_MESSAGES = {"mosquitto": (30_000, 80_000), "rumqttd": (60_000, 300_000)}
_RINGS = (256 * KIB, MIB, 4 * MIB, 16 * MIB)
_PAUSES_S = (0.1, 0.3, 1.0)
_PAUSES_PER_SECOND, _PAUSES_PAYLOAD_BYTES = 10_000, 200
_SEGMENTS = (256 * KIB, MIB, 4 * MIB, 8 * MIB, 32 * MIB)
_SEGMENT_MESSAGES, _SEGMENT_PAYLOAD_BYTES = 60_000, 1_024
_INTERVALS_S = (10.0, 1.0, 0.1, 0.01)
_LEVELS: dict[str, dict[str, Any]] = {
    "memory": {"durability": "memory"},
    "process": {"durability": "process"},
    **{f"power, {seconds:g} s": {"durability": "power", "sync_interval": seconds} for seconds in _INTERVALS_S},
}
_LEVEL_PAYLOAD_BYTES, _LEVEL_PER_SECOND, _TRICKLE_PER_SECOND = 200, 10_000, 100
_TRICKLE_S = 11.0  # in which the longest interval ends once, and so does `spill_after`
_PAYLOADS = (64, 256, KIB, 4 * KIB, 16 * KIB, 64 * KIB)
_PAYLOAD_BYTES = 200_000_000  # sent in a measurement, but for small payloads

_KINDS: dict[str, Subject] = {
    "publish": end_to_end.cloudpubsub_spool,
    "pauses": _loads.pauses,
    "spill": spill.spill,
    "reopen": _loads.reopened,
    "level": _loads.level,
    "trickle": _loads.trickle,
}


class _Run:
    """What the curves have in common: how to measure, and what has been found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.quick: bool = arguments.quick
        self.rounds = _harness.rounds_of(arguments, 3)
        self.common = _harness.common_order(arguments)
        self.missing: dict[str, str] = {}
        self.subjects: dict[str, Any] = {}
        self.ratios: dict[str, Any] = {}

    def values(self, values: Sequence[Any]) -> list[Any]:
        return [values[0], values[-1]] if self.quick else list(values)

    def order(self, kind: str, settings: Mapping[str, Any], **parameters: Any) -> dict[str, Any]:
        return {**self.common, "kind": kind, "settings": {**self.common["settings"], **settings}, **parameters}

    def measure(self, subjects: Mapping[str, Mapping[str, Any]], *, at_once: bool = False) -> Samples:
        if not subjects:
            return Samples()
        take = self._at_once if at_once else _harness.in_turns
        samples = take(_MODULE, subjects, self.rounds, _harness.note_to_stderr)
        self.subjects.update(_harness.summary(samples))
        return samples

    @staticmethod
    def _at_once(
        module: str, subjects: Mapping[str, Mapping[str, Any]], rounds: int, note: Callable[[str], None]
    ) -> Samples:
        """For what is counted over a long time and takes no processor."""
        samples = Samples()
        with ThreadPoolExecutor(len(subjects)) as pool:
            for turn in range(rounds):
                taken = pool.map(lambda name: _harness.measure(module, name, **subjects[name]), subjects)
                for name, sample in zip(subjects, taken, strict=True):
                    samples.setdefault(name, []).append(sample)
                note(f"round {turn + 1}/{rounds}  {len(subjects)} at once: {', '.join(subjects)}")
        return samples

    @contextlib.contextmanager
    def brokers(self, *wanted: tuple[str, str, bool]) -> Iterator[dict[str, _brokers.Target]]:
        """Those of (label, broker, TLS) that can be had; the others are named."""
        with contextlib.ExitStack() as stack:
            found = {}
            for label, name, tls in wanted:
                try:
                    found[label] = stack.enter_context(_brokers.running(name, tls=tls))
                except Missing as exc:
                    self.missing[label] = f"{exc} is missing"
            yield found


def _line(label: str, key: str, points: Mapping[Any, str]) -> dict[str, Any]:
    """A line of a panel: the figure `key` of a subject for each value of the knob."""
    return {"label": label, "key": key, "points": [[x, name] for x, name in points.items()]}


def _panel(label: str, form: str, *lines: dict[str, Any], log: bool = False) -> dict[str, Any]:
    return {"label": label, "form": form, "lines": list(lines), "log": log}


def _size(size_bytes: int) -> str:
    return f"{size_bytes // MIB} MiB" if size_bytes >= MIB else f"{size_bytes // KIB} KiB"


def window(run: _Run) -> dict[str, Any]:
    sizes = run.values(_WINDOWS)
    rates, times, costs = [], [], []
    subjects: dict[str, dict[str, Any]] = {}
    by_default: dict[str, str] = {}
    with run.brokers(("mosquitto", "mosquitto", False), ("rumqttd", "rumqttd", False)) as brokers:
        for label, broker in brokers.items():
            few, many = _WINDOW_MESSAGES[label]
            points = {size: f"max_inflight {size}, {label}" for size in sizes}
            for size, name in points.items():
                messages = 1_000 if run.quick else few if size < 100 else many
                settings = {**_WINDOW_BYTES, "max_inflight": size}
                subjects[name] = run.order("publish", settings, **broker.order, payload_bytes=64, messages=messages)
            defaults = f"window by default, {label}"
            subjects[defaults] = {**subjects[points[sizes[-1]]], "settings": run.common["settings"]}
            by_default.update(dict.fromkeys(points.values(), defaults))
            rates.append(_line(label, "per_second", points))
            rates.append(_line(f"{label}, by default", "per_second", {_WINDOW: defaults}))
            times.append(_line(label, "times_default", points))
            costs.append(_line(label, "cpu_s_per_million", points))
        samples = run.measure(subjects)
    for name, defaults in by_default.items():
        ratio = run.ratios[f"{name} / {defaults}"] = _harness.ratio(samples, name, defaults)
        run.subjects[name]["times_default"] = ratio
    return {
        "knob": "max_inflight",
        "text": "Messages of 64 B until the last acknowledgement; bytes do not limit, but by default.",
        "default": _WINDOW,
        "panels": [
            _panel("messages/s", "{:,.0f}", *rates, log=True),
            _panel("of the rate by default, in the same round", "{:.2f}", *times),
            _panel("CPU s per million messages", "{:.2f}", *costs, log=True),
        ],
    }


def ring(run: _Run) -> dict[str, Any]:
    steady = {size: f"ring_bytes {_size(size)}, pauses" for size in run.values(_RINGS)}
    full = {size: f"ring_bytes {_size(size)}, full speed" for size in run.values(_RINGS)}
    load = {"payload_bytes": _PAUSES_PAYLOAD_BYTES, "per_second": _PAUSES_PER_SECOND, "pauses_s": _PAUSES_S}
    with run.brokers(("sink", "sink", False)) as brokers:
        subjects = {}
        for broker in brokers.values():
            for size, name in steady.items():
                subjects[name] = run.order("pauses", {"ring_bytes": size}, **load)
            for size, name in full.items():
                messages = 5_000 if run.quick else 600_000
                order = run.order("publish", {"ring_bytes": size}, **broker.order, payload_bytes=64, messages=messages)
                subjects[name] = order
            run.measure(subjects)
    rate = f"{_PAUSES_PER_SECOND:,} messages/s of {_PAUSES_PAYLOAD_BYTES} B"
    shares = [_line(f"pause of {pause:g} s", _loads.pause_share(pause), steady) for pause in _PAUSES_S]
    return {
        "knob": "ring_bytes",
        "text": f"{rate} to a sink that stands still now and then; and 64 B at full speed.",
        "default": 4 * MIB,
        "panels": [
            _panel("% of what a pause brings that is written", "{:.0f}", *shares if subjects else ()),
            _panel("messages/s at full speed", "{:,.0f}", *[_line("sink", "per_second", full)] if subjects else ()),
        ],
    }


def segment(run: _Run) -> dict[str, Any]:
    sizes = run.values(_SEGMENTS)
    written = {size: f"segment_bytes {_size(size)}, written" for size in sizes}
    killed = {size: f"segment_bytes {_size(size)}, killed at once" for size in sizes}
    synced = {size: f"segment_bytes {_size(size)}, killed when synced" for size in sizes}
    same = {"payload_bytes": _SEGMENT_PAYLOAD_BYTES, "messages": 2_000 if run.quick else _SEGMENT_MESSAGES}
    subjects = {}
    for size in sizes:
        subjects[written[size]] = run.order("spill", {"segment_bytes": size}, **same)
        subjects[killed[size]] = run.order("reopen", {"segment_bytes": size}, **same, synced=False)
        subjects[synced[size]] = run.order("reopen", {"segment_bytes": size}, **same, synced=True)
    run.measure(subjects)
    ways = (("killed at once", killed), ("killed when synced", synced))
    megabytes = same["messages"] * _loads.record_bytes(same["payload_bytes"]) / 1e6
    return {
        "knob": "segment_bytes",
        "text": f"{megabytes:.0f} MB in messages of {_SEGMENT_PAYLOAD_BYTES} B; opened with what the page cache holds.",
        "default": 8 * MIB,
        "panels": [
            _panel("messages/s to the disk, with close()", "{:,.0f}", _line("spill", "with_close_per_second", written)),
            _panel("seconds to open", "{:.4f}", *(_line(way, "opening_s", points) for way, points in ways)),
            _panel("MiB read to open", "{:.1f}", *(_line(way, "mib_read", points) for way, points in ways)),
        ],
    }


def durability(run: _Run) -> dict[str, Any]:
    levels = run.values(list(_LEVELS))
    fast = {level: f"{level}, full speed" for level in levels}
    slow = {level: f"{level}, {_TRICKLE_PER_SECOND} messages/s" for level in levels}
    same = {"payload_bytes": _LEVEL_PAYLOAD_BYTES}
    timed = {"per_second": _LEVEL_PER_SECOND, "seconds": 0.1 if run.quick else 0.7}
    messages = 5_000 if run.quick else 400_000
    run.measure({fast[it]: run.order("level", _LEVELS[it], **same, **timed, messages=messages) for it in levels})
    paced = {"per_second": _TRICKLE_PER_SECOND, "seconds": 1.0 if run.quick else _TRICKLE_S}
    run.measure({slow[it]: run.order("trickle", _LEVELS[it], **same, **paced) for it in levels}, at_once=True)
    return {
        "knob": "durability, sync_interval",
        "text": (
            f"{_LEVEL_PAYLOAD_BYTES} B without a link. Calls: at {_LEVEL_PER_SECOND:,} a second. Commits, and what the "
            f"process gave the file system to write (its journal comes on top): at {_TRICKLE_PER_SECOND} a second."
        ),
        "default": "process",
        "panels": [
            _panel("messages/s into the spool", "{:,.0f}", _line("full speed", "per_second", fast)),
            _panel("publish(), p99.9, µs", "{:,.1f}", _line("p99.9", "p99.9_us", fast), log=True),
            _panel("commits/s", "{:.2f}", _line("commits", "syncs_per_second", slow), log=True),
            _panel("bytes written/s", "{:,.0f}", _line("bytes", "written_bytes_per_second", slow), log=True),
        ],
    }


def payload(run: _Run) -> dict[str, Any]:
    sizes = run.values(_PAYLOADS)
    subjects, rates, costs = {}, [], []
    with run.brokers(("plain", "sink", False), ("TLS", "sink", True)) as brokers:
        for label, broker in brokers.items():
            points = {size: f"{size} B, {label}" for size in sizes}
            for size, name in points.items():
                messages = 500 if run.quick else min(400_000, _PAYLOAD_BYTES // size)
                subjects[name] = run.order("publish", {}, **broker.order, payload_bytes=size, messages=messages)
            rates.append(_line(label, "mb_per_second", points))
            costs.append(_line(label, "cpu_s_per_million", points))
        run.measure(subjects)
    for name, order in subjects.items():
        found = run.subjects[name]
        found["mb_per_second"] = {
            key: value * order["payload_bytes"] / 1e6 for key, value in found["per_second"].items()
        }
    return {
        "knob": "bytes of payload",
        "text": "To the native sink, until the last acknowledgement.",
        "default": None,
        "panels": [
            _panel("MB/s of payload", "{:,.1f}", *rates, log=True),
            _panel("CPU s per million messages", "{:.2f}", *costs, log=True),
        ],
    }


CURVES: dict[str, Callable[[_Run], dict[str, Any]]] = {
    "window": window,
    "ring": ring,
    "segment": segment,
    "durability": durability,
    "payload": payload,
}


def _file_system(path: Path) -> str:
    """The kind of the file system that `path` lies on."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, this_kind = line.split()[:3]
        if path.resolve().is_relative_to(mounted) and len(mounted) >= len(best):
            best, kind = mounted, this_kind
    return kind


def run(arguments: argparse.Namespace) -> Report:
    whole = _Run(arguments)
    directory = Path(arguments.directory or tempfile.gettempdir())
    curves = []
    for name in arguments.names or CURVES:
        _harness.note_to_stderr(f"== {name}")
        began_s = time.monotonic()
        curves.append({"name": name, **CURVES[name](whole)})
        _harness.note_to_stderr(f"== {name}: {time.monotonic() - began_s:.0f} s")
    return {
        "bench": "knobs",
        "parameters": {
            "directory": str(directory),
            "file_system": _file_system(directory),
            "rounds": whole.rounds,
            "settings": whole.common["settings"],
        },
        "missing": whole.missing,
        "curves": curves,
        "subjects": whole.subjects,
        "ratios": whole.ratios,
    }


def show(report: Report) -> str:
    kind, directory = report["parameters"]["file_system"], report["parameters"]["directory"]
    where = f"Spools on {kind} ({directory})"
    where += ", which is memory: what is said of the disk means nothing" if kind in ("tmpfs", "ramfs") else ""
    tables = [f"{where}. Medians of {report['parameters']['rounds']} rounds (smallest-largest)."]
    return "\n\n".join([*tables, *(_table(report, curve) for curve in report["curves"])])


def _table(report: Report, curve: Mapping[str, Any]) -> str:
    every = [(panel, line) for panel in curve["panels"] for line in panel["lines"]]
    # One of a single point is a mark in the plot, and a sentence here.
    lines = [(panel, line) for panel, line in every if len(line["points"]) > 1]
    marks = [(panel, line) for panel, line in every if len(line["points"]) == 1]
    values = list(dict.fromkeys(x for _, line in lines for x, _ in line["points"]))
    rows = []
    for x in values:
        shown = x if isinstance(x, str) else _size(x) if curve["knob"].endswith("_bytes") else f"{x:,}"
        row = [f"{shown} (default)" if x == curve["default"] else shown]
        for panel, line in lines:
            name = dict(map(tuple, line["points"])).get(x)
            row.append("" if name is None else _figure(report, panel, line, name))
        rows.append(row)
    head = [f"`{curve['knob']}`", *(_heading(panel, line) for panel, line in lines)]
    text = f"### {curve['name']}\n{curve['text']}\n\n{_harness.table(head, rows)}"
    for panel, line in marks:
        text += f"\n\n{_heading(panel, line)}: {_figure(report, panel, line, line['points'][0][1])}."
    return text


def _figure(report: Report, panel: Mapping[str, Any], line: Mapping[str, Any], subject: str) -> str:
    return _harness.span(report["subjects"][subject][line["key"]], panel["form"])


def _heading(panel: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    return panel["label"] if len(panel["lines"]) == 1 else f"{panel['label']}, {line['label']}"


def _keeper(arguments: argparse.Namespace) -> Callable[[Report, str], None] | None:
    directory: Path | None = arguments.results
    is_whole = not arguments.quick and not arguments.names
    if directory is None and is_whole and (_harness.ROOT / "setup.py").exists():
        directory = _harness.RESULTS
    if directory is None:
        return None

    def keep(report: Report, text: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        kept = _suite.rounded(report)
        (directory / "knobs.json").write_text(json.dumps(kept, indent=1) + "\n")
        links = "".join(f"\n\n![{title}]({name})" for name, title in _plots.draw([kept], directory))
        (directory / "knobs.md").write_text(f"# What each setting does\n`python -m bench.knobs`. {text}{links}\n")

    return keep


def parser() -> argparse.ArgumentParser:
    made = _harness.parser(_MODULE, __doc__)
    made.add_argument("names", nargs="*", metavar="CURVE", help=f"which: {', '.join(CURVES)} (default: all)")
    made.add_argument("--results", type=Path, metavar="DIR", help="for the figures (full run: bench/results)")
    return made


def main() -> None:
    made = parser()
    arguments = made.parse_args()
    wrong = sorted(set(arguments.names) - set(CURVES))
    if wrong:
        made.error(f"no such curve: {', '.join(wrong)}; there are: {', '.join(CURVES)}")
    _harness.main(arguments, _KINDS, run, show, _keeper(arguments))


if __name__ == "__main__":
    main()

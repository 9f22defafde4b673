"""Plots of a run, as SVG, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _harness
from ._harness import Report

_COLOURS = {"cloudpubsub": "#0b6e99", "raw sender": "#8a8a8a", "bare socket": "#8a8a8a", "paho-mqtt": "#d9730d"}
_KNOB_COLOURS = ("#0b6e99", "#d9730d", "#4d8b31", "#8a4fa3")


def draw(reports: Sequence[Report], directory: Path) -> list[tuple[str, str]]:
    """Draw what there is to draw; returns (file name, title) of each."""
    try:
        import matplotlib
    except ImportError:
        _harness.note_to_stderr("matplotlib is missing: no plots")
        return []
    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "cloudpubsub", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    drawn: list[tuple[str, str]] = []
    for name, title, make in (
        ("peers.svg", "Acknowledged end to end", _peers),
        ("throughput.svg", "Throughput over payload size", _throughput),
        ("latency.svg", "Latency of publish()", _latency),
        ("outage.svg", "Timeline of an outage", _outage),
        ("knobs.svg", "What each setting does", _knobs),
    ):
        figure = make(reports)
        if figure is not None:
            figure.savefig(directory / name, metadata={"Date": None})
            drawn.append((name, title))
    return drawn


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _colour(name: str) -> str | None:
    return next((colour for start, colour in _COLOURS.items() if name.startswith(start)), None)


def _peers(reports: Sequence[Report]) -> Any:
    found = [one for one in reports if one["bench"] == "end_to_end" and not one["parameters"]["tls"]]
    if not found:
        return None
    figure, axes = _figure(4.2 * len(found), 3, columns=len(found))
    for axis, report in zip(axes[0], found, strict=True):
        subjects = report["subjects"]
        names = sorted(subjects, key=lambda name: subjects[name]["per_second"]["median"])
        for name in names:
            rate = subjects[name]["per_second"]
            spread = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]]
            axis.barh(name, rate["median"], xerr=spread, color=_colour(name) or "#b8b8b8", ecolor="#444444")
        axis.set_xscale("log")
        axis.set_xlabel(f"messages/s of {report['parameters']['payload_bytes']} B, {report['parameters']['broker']}")
    return figure


def _throughput(reports: Sequence[Report]) -> Any:
    found = [one for one in reports if one["bench"] == "sizes"]
    if not found:
        return None
    figure, axes = _figure(4.2 * len(found), 3, columns=len(found))
    for axis, report in zip(axes[0], found, strict=True):
        sizes = report["parameters"]["sizes"]
        for name in ("cloudpubsub", "raw sender"):
            rates = [report["subjects"][f"{name}, {size} B"]["mb_per_second"] for size in sizes]
            axis.plot(sizes, [rate["median"] for rate in rates], "o-", label=name, color=_colour(name), markersize=3)
            low, high = [rate["min"] for rate in rates], [rate["max"] for rate in rates]
            axis.fill_between(sizes, low, high, color=_colour(name), alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("bytes of payload")
        axis.set_ylabel(f"MB/s of payload, {report['parameters']['broker']}")
        axis.legend()
    return figure


def _latency(reports: Sequence[Report]) -> Any:
    report = next((one for one in reports if one["bench"] == "latency"), None)
    if report is None:
        return None
    ways = list(dict.fromkeys(name.split(", ", 1)[1] for name in report["subjects"]))
    parts = report["parameters"]["parts"]
    figure, axes = _figure(3.2 * len(ways), 3, columns=len(ways), sharey=True)
    for axis, way in zip(axes[0], ways, strict=True):
        for name, one in report["subjects"].items():
            kind, its_way = name.split(", ", 1)
            if its_way == way:
                axis.plot([one[f"p{part:g}_us"]["median"] for part in parts], parts, label=kind, color=_colour(kind))
        axis.set_xscale("log")
        axis.set_xlabel(f"µs, {way}")
        axis.legend()
    axes[0][0].set_ylabel("% of messages not later")
    return figure


def _outage(reports: Sequence[Report]) -> Any:
    report = next((one for one in reports if one["bench"] == "outage"), None)
    if report is None:
        return None
    series = report["series"]
    seconds = series["seconds"]
    figure, axes = _figure(7, 6, rows=3, sharex=True)
    rate, backlog, memory = (row[0] for row in axes)
    for name in ("published", "acked"):
        counts = series[name]
        steps = [
            (b - a) / (later - earlier)
            for a, b, earlier, later in zip(counts, counts[1:], seconds, seconds[1:], strict=False)
        ]
        rate.plot(seconds[1:], steps, label=name)
    rate.set_ylabel("messages/s")
    rate.set_yscale("symlog", linthresh=1_000)
    rate.legend()
    backlog.plot(seconds, series["backlog_messages"], color=_COLOURS["cloudpubsub"])
    backlog.set_ylabel("messages in the backlog")
    for name, label in (("ring_used_bytes", "ring"), ("spool_bytes", "spool")):
        memory.plot(seconds, [value / 2**20 for value in series[name]], label=label)
    memory.set_ylabel("MiB")
    memory.set_xlabel("seconds")
    memory.legend()
    down = [at for at, is_up in zip(seconds, series["link"], strict=True) if not is_up]
    if down:
        for axis in (rate, backlog, memory):
            axis.axvspan(down[0], down[-1], color="#c0392b", alpha=0.1, linewidth=0)
    return figure


def _knobs(reports: Sequence[Report]) -> Any:
    """A row for each knob, or more where it has many panels."""
    report = next((one for one in reports if one["bench"] == "knobs"), None)
    if report is None:
        return None
    panels = [(curve, panel) for curve in report["curves"] for panel in curve["panels"]]
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = _figure(4 * columns, 2.7 * rows, rows=rows, columns=columns)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (curve, panel) in zip(axes.flat, panels, strict=False):
        _knob_panel(axis, curve, panel, report["subjects"])
    return figure


def _knob_panel(axis: Any, curve: dict[str, Any], panel: dict[str, Any], subjects: dict[str, Any]) -> None:
    colours = iter(_KNOB_COLOURS)
    colour = ""
    for line in panel["lines"]:
        places = [x for x, _ in line["points"]]
        found = [subjects[name][line["key"]] for _, name in line["points"]]
        low, high = [one["min"] for one in found], [one["max"] for one in found]
        medians = [one["median"] for one in found]
        if len(places) == 1:  # of the line before it
            error = [[medians[0] - low[0]], [high[0] - medians[0]]]
            axis.errorbar(places, medians, error, fmt="*", color=colour, markersize=8, label=line["label"], zorder=3)
            continue
        colour = next(colours)
        axis.plot(places, medians, "o-", label=line["label"], color=colour, markersize=3)
        axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set_title(panel["label"], fontsize=9)
    axis.set_xlabel(curve["knob"])
    lowest = [subjects[name][line["key"]]["min"] for line in panel["lines"] for _, name in line["points"]]
    _scale(axis, lowest, panel["log"])
    values = list(dict.fromkeys(x for line in panel["lines"] for x, _ in line["points"]))
    if curve["default"] in values:
        axis.axvline(curve["default"], color="#444444", linewidth=0.8, linestyle=":")
    if values and not isinstance(values[0], str):
        is_bytes = "bytes" in curve["knob"]
        axis.set_xscale("log", base=2 if is_bytes else 10)
        axis.set_xticks(values, [_short(x) if is_bytes else f"{x:,}" for x in values], rotation=30)
        axis.minorticks_off()
    else:
        axis.tick_params(axis="x", labelrotation=30)
    if len(panel["lines"]) > 1:
        axis.legend(fontsize=7)


def _scale(axis: Any, lowest: Sequence[float], log: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    above = [value for value in lowest if value > 0]
    if log and len(above) == len(lowest):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        if log and above:
            axis.set_yscale("symlog", linthresh=min(above))  # linear below the smallest that is not 0
        axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda value, _: _number(value))


def _number(value: float) -> str:
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def _short(size_bytes: int) -> str:
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes // factor} {unit}"
    return f"{size_bytes} B"

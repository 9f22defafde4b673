"""What a human sees of the demo: a live panel on a terminal, plain lines elsewhere, and the verdict."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cloudpubsub.demo.checker import Verdict
from cloudpubsub.demo.scene import PHASES, Scene

__all__ = ["LiveScreen", "PlainScreen", "size_text", "verdict_lines"]

_FRAMES_PER_S = 8
_WIDTH_MAX = 100
_EVENTS_SHOWN = 6
_BAR_CELLS = 24
_BLOCKS = "▁▂▃▄▅▆▇█"
_LINE_EVERY_S = 2.0
_GATEWAY = {
    "starting": ("◌", "dim", ""),
    "running": ("●", "green", "pid {pid}, {nth}"),
    "killed": ("✖", "bold red", "no goodbye, no flush"),
    "closing": ("◌", "yellow", "sends what is left, then says goodbye"),
    "ended": ("✓", "green", ""),
}


def size_text(size_bytes: float) -> str:
    """Bytes for people: `512 KiB`, `6.3 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit != "MiB" else f"{size_bytes:.1f} MiB"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"


class PlainScreen:
    """A line for every event, and one every two seconds."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._events = 0
        self._next_s = 0.0

    def __enter__(self) -> PlainScreen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def show(self, scene: Scene) -> None:
        for event in scene.events[self._events :]:
            self._print(f"{event.at_s:5.1f} s  {event.text}")
        self._events = len(scene.events)
        if scene.elapsed_s >= self._next_s and scene.sent:
            self._next_s = scene.elapsed_s + _LINE_EVERY_S
            sent, received = scene.rates()
            self._print(
                f"{scene.elapsed_s:5.1f} s    sent {scene.sent:,} ({sent:,.0f}/s), received {scene.received:,} "
                f"({received:,.0f}/s), backlog {scene.backlog:,}, spool {size_text(scene.report.get('spool_bytes', 0))}"
            )

    def tell(self, lines: list[str], is_good: bool) -> None:
        """The verdict."""
        self._print("\n".join(lines))

    def _print(self, text: str) -> None:
        try:
            print(text, file=self._out, flush=True)
        except OSError:
            pass  # nobody reads; the exit code still tells


class LiveScreen:
    """A panel that is drawn anew eight times a second."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout)
        self._scene: Scene | None = None
        self._live = Live(
            console=self._console, get_renderable=self._render, refresh_per_second=_FRAMES_PER_S, transient=False
        )

    def __enter__(self) -> LiveScreen:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, scene: Scene) -> None:
        self._scene = scene

    def tell(self, lines: list[str], is_good: bool) -> None:
        """The verdict; its last line in colour."""
        for line in lines[:-1]:
            self._console.print(line, markup=False, highlight=False)
        self._console.print(lines[-1], markup=False, highlight=False, style="bold green" if is_good else "bold red")

    def _render(self) -> Panel:
        width = min(self._console.width, _WIDTH_MAX)
        if self._scene is None:
            return Panel(Text("starting broker, subscriber and gateway …", style="dim"), width=width)
        return draw(self._scene, width)


def draw(scene: Scene, width: int) -> Panel:
    """The panel for a scene, `width` cells wide."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", width=9)
    table.add_column(width=_BAR_CELLS)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_row("link", _link(scene), Text(_delay_text(scene), style="dim"))
    mark, style, text = _GATEWAY[scene.gateway]
    text = text.format(pid=scene.gateway_pid, nth="first run" if scene.gateway_run == 1 else "second run, same spool")
    table.add_row("gateway", Text(f"{mark} {scene.gateway}", style=style), Text(text, style="dim"))
    ring, spool = scene.report.get("ring_used_bytes", 0), scene.report.get("spool_bytes", 0)
    table.add_row("ring", _bar(ring / scene.ring_bytes, "cyan"), f"{size_text(ring)} of {size_text(scene.ring_bytes)}")
    segments = scene.report.get("spool_segments", 0)
    table.add_row(
        "spool",
        _bar(spool / scene.spool_bytes_planned, "magenta"),
        f"{size_text(spool)} in {segments} segment{'' if segments == 1 else 's'} on the disk",
    )
    sent_rate, received_rate = scene.rates()
    top = max(scene.rate * 5, sent_rate, received_rate)
    table.add_row("sent", _bar(sent_rate / top, "blue"), f"{sent_rate:8,.0f} /s {scene.sent:12,}")
    table.add_row("received", _bar(received_rate / top, "green"), f"{received_rate:8,.0f} /s {scene.received:12,}")
    backlog_style = "yellow" if scene.backlog > scene.rate else "dim"
    history = Text.assemble(
        ("backlog    ", "bold"),
        (_spark(list(scene.history), width - 32), "yellow"),
        (f" {scene.backlog:,}", backlog_style),
    )
    check = Text.assemble(
        ("checked    ", "bold"),
        ("in order", "green") if not scene.out_of_order else (f"{scene.out_of_order:,} OUT OF ORDER", "bold red"),
        f" and without a gap up to number {max(0, scene.front - 1):,}",
        (f"   ({scene.duplicates:,} came twice)" if scene.duplicates else "", "dim"),
    )
    events = [Text(f"{event.at_s:5.1f} s  {event.text}", overflow="ellipsis", no_wrap=True) for event in scene.events]
    for event in events[:-1]:
        event.stylize("dim")
    shown = events[-_EVENTS_SHOWN:]
    shown += [Text("")] * (_EVENTS_SHOWN - len(shown))
    return Panel(
        Group(_phases(scene), Rule(style="dim"), table, Text(""), history, check, Rule(style="dim"), *shown),
        title=f"[bold]cloudpubsub demo[/]  {scene.elapsed_s:4.1f} of about {scene.planned_s:.0f} s",
        border_style="green" if scene.is_linked and scene.gateway != "killed" else "red",
        width=width,
    )


def _link(scene: Scene) -> Text:
    if not scene.is_linked:
        return Text("✂ cut", style="bold red")
    if scene.gateway == "running" and not scene.report.get("connected"):
        return Text("◌ connecting", style="yellow")
    return Text("● up", style="green")


def _delay_text(scene: Scene) -> str:
    if not scene.is_linked:
        return "nothing gets through"
    return f"newest arrival was read {scene.delay_s * 1000:,.0f} ms before" if scene.received else ""


def _phases(scene: Scene) -> Text:
    parts = []
    for number, phase in enumerate(PHASES):
        if number == scene.phase:
            mark, style = "▶", "bold yellow"
        else:
            mark, style = ("✓", "green") if number < scene.phase else ("·", "dim")
        parts.append(Text(f"{mark} {phase.title}".replace(" ", "\u00a0"), style=style))  # all on one line in 80 cells
    return Text(" ").join(parts)


def _bar(part: float, style: str) -> Text:
    eighths = round(max(0.0, min(1.0, part)) * _BAR_CELLS * 8)
    whole, rest = divmod(eighths, 8)
    filled = "█" * whole + ("" if not rest else "▏▎▍▌▋▊▉"[rest - 1])
    return Text.assemble((filled, style), ("░" * (_BAR_CELLS - len(filled)), "dim"))


def _spark(values: list[int], cells: int) -> str:
    """The course of `values` in `cells` characters, the newest at the right edge of what is filled."""
    cells = max(8, cells)
    if not values:
        return " " * cells
    step = max(1, -(-len(values) // cells))
    # The highest of each group: a backlog of a moment is to be seen.
    columns = [max(values[start : start + step]) for start in range(0, len(values), step)]
    top = max(*columns, 1)
    return "".join(_BLOCKS[value * (len(_BLOCKS) - 1) // top] for value in columns).ljust(cells)


def verdict_lines(verdict: Verdict, figures: dict[str, Any], is_good: bool) -> list[str]:
    """The end of the story, for people.  The last line is the verdict."""
    lines = ["", f"  sent          {verdict.sent:>10,}   messages whose publish() returned"]
    lines.append(f"  received      {verdict.received:>10,}   of them, by a paho subscriber on the broker itself")
    lines.append(f"  lost          {verdict.lost:>10,}")
    lines.append(f"  out of order  {verdict.out_of_order:>10,}")
    lines.append(f"  duplicates    {verdict.duplicates:>10,}   sent again after a cut: not acknowledged")
    if verdict.unexpected:
        lines.append(f"  unexpected    {verdict.unexpected:>10,}   arrivals that nobody sent")
    if verdict.lost_ranges:
        ranges = ", ".join(f"{first:,}-{end - 1:,}" for first, end in verdict.lost_ranges)
        lines.append(f"  lost numbers  {ranges}")
    lines.append("")
    for outage in figures["outages"]:
        drain = f"{outage['drain_s']:.1f} s" if outage["drain_s"] is not None else "not delivered in time"
        waited = f"{outage['backlog']:,} messages waited"
        lines.append(f"  outage of {outage['outage_s']:.1f} s: {waited}; live again after {drain}")
    found = figures["recovery"]
    lines.append(
        f"  kill -9: {found['messages']:,} messages found again in {found['seconds'] * 1000:.0f} ms, "
        f"{found['from_memory']:,} of them only in the ring"
    )
    lines.append(
        f"  disk: {size_text(figures['spilled_bytes'])} spilled; at most {size_text(figures['spool_bytes_peak'])} in "
        f"{figures['spool_segments_peak']} segments"
    )
    if figures["delay_ms"]:
        delay = figures["delay_ms"]
        lines.append(
            f"  good link: from reading to arrival {delay['p50']:.1f} ms at the median, {delay['p99']:.1f} ms at p99"
        )
    lines.append("")
    reasons = [] if figures["is_flushed"] else ["the gateway did not end cleanly"]
    if verdict.lost or verdict.out_of_order or verdict.unexpected or not verdict.sent:
        reasons.append("messages were lost, out of order or made up")
    lines.append("PASSED: nothing lost, nothing out of order" if is_good else f"FAILED: {'; '.join(reasons)}")
    return lines

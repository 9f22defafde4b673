"""Readings of this host, as fast as they are asked for."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any

import psutil

__all__ = ["Reading", "readings"]

Reading = tuple[str, float]


def readings() -> Iterator[Reading]:
    """Topic and value, without end: a sweep over everything that the host tells, then the next.

    Each value is read from the system once and given out once.
    """
    host = _word(socket.gethostname().partition(".")[0]) or "host"
    while True:
        for name, value in _sweep():
            yield f"demo/{host}/{name}", value


def _word(text: str) -> str:
    """`text` as one level of a topic."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_")


def _sweep() -> Iterator[Reading]:
    for number, times in enumerate(psutil.cpu_times(percpu=True)):
        yield from _fields(f"cpu/{number}", times)
    yield from _fields("cpu/all", psutil.cpu_stats())
    yield from _fields("memory", psutil.virtual_memory())
    yield from _fields("swap", psutil.swap_memory())
    for minutes, load in zip((1, 5, 15), psutil.getloadavg(), strict=True):
        yield f"load/{minutes}min", load
    yield from _fields("disk/root", psutil.disk_usage("/"))
    for disk, counters in (psutil.disk_io_counters(perdisk=True) or {}).items():
        if not disk.startswith(("loop", "ram")):
            yield from _fields(f"disk/{_word(disk)}", counters)
    for card, counters in psutil.net_io_counters(pernic=True).items():
        yield from _fields(f"network/{_word(card)}", counters)
    for chip, sensors in _temperatures().items():
        for number, sensor in enumerate(sensors):
            if sensor.current is not None:
                yield f"temperature/{_word(chip)}/{_word(sensor.label) or number}", sensor.current


def _fields(name: str, values: Any) -> Iterator[Reading]:
    for field, value in zip(values._fields, values, strict=True):
        if isinstance(value, (int, float)):
            yield f"{name}/{field}", value


def _temperatures() -> dict[str, list[Any]]:
    # Not on every system, and where there are sensors they may fail.
    try:
        return psutil.sensors_temperatures() or {}
    except (AttributeError, OSError, RuntimeError):
        return {}

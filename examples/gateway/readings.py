"""Readings of this host, out of /proc and /sys: processor, memory, pressure, network, block devices, temperatures.

What a kernel or a board does not have is left out; a file that cannot be read now is left out this time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Readings"]

Values = dict[str, float | int | str]

_MEMORY = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree", "Dirty", "Writeback")
_SECTOR_BYTES = 512  # in /sys/block/*/stat, whatever the device's own are


class Readings:
    """Args: root: where /proc and /sys are; for tests.  `disk`: a path on the file system whose free space counts."""

    def __init__(self, root: str | Path = "/", disk: str | os.PathLike[str] = "/") -> None:
        self._root = Path(root)
        self._disk = disk
        self._cpu_before: tuple[int, int] | None = None

    def sweep(self) -> Iterator[tuple[str, Values]]:
        """Name and values of each group that there is."""
        groups = (self._cpu, self._memory, self._pressure, self._file_system)
        for group in groups:
            yield from self._try(group)
        for path in self._paths("proc/net/dev"):
            yield from self._try(self._network, path)
        for path in self._paths("sys/block/*/stat"):
            yield from self._try(self._block, path)
        for path in self._paths("sys/class/thermal/thermal_zone*/temp"):
            yield from self._try(self._thermal, path)
        for path in self._paths("sys/class/hwmon/hwmon*/temp*_input"):
            yield from self._try(self._hwmon, path)
        for path in self._paths("sys/class/mmc_host/*/*/life_time"):
            yield from self._try(self._flash_life, path)

    def _paths(self, pattern: str) -> list[Path]:
        return sorted(self._root.glob(pattern))

    @staticmethod
    def _try(group: Any, *args: Path) -> Iterator[tuple[str, Values]]:
        try:
            yield from list(group(*args))
        except (OSError, ValueError, LookupError):
            pass  # a sensor that sleeps, a device that was pulled out

    def _cpu(self) -> Iterator[tuple[str, Values]]:
        load = (self._root / "proc/loadavg").read_text().split()
        values: Values = {"load_1min": float(load[0]), "load_5min": float(load[1]), "load_15min": float(load[2])}
        values["uptime_s"] = float((self._root / "proc/uptime").read_text().split()[0])
        ticks = [int(word) for word in (self._root / "proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy, total = sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # idle and waiting for disks are not busy
        before, self._cpu_before = self._cpu_before, (busy, total)
        if before is not None and total > before[1]:
            values["busy_percent"] = round(100 * (busy - before[0]) / (total - before[1]), 1)
        yield "cpu", values

    def _memory(self) -> Iterator[tuple[str, Values]]:
        values: Values = {}
        for line in (self._root / "proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in _MEMORY:
                values[f"{name}_bytes"] = int(rest.split()[0]) * 1024
        yield "memory", values

    def _pressure(self) -> Iterator[tuple[str, Values]]:
        values: Values = {}
        for path in self._paths("proc/pressure/*"):
            for line in path.read_text().splitlines():
                kind, *fields = line.split()
                values[f"{path.name}_{kind}_10s_percent"] = float(dict(field.split("=") for field in fields)["avg10"])
        if values:
            yield "pressure", values

    def _file_system(self) -> Iterator[tuple[str, Values]]:
        facts = os.statvfs(self._disk)
        yield (
            "file_system",
            {
                "free_bytes": facts.f_bavail * facts.f_frsize,
                "total_bytes": facts.f_blocks * facts.f_frsize,
                "free_files": facts.f_favail,
            },
        )

    def _network(self, path: Path) -> Iterator[tuple[str, Values]]:
        for line in path.read_text().splitlines()[2:]:
            name, _, rest = line.partition(":")
            words = rest.split()
            if name.strip() != "lo":
                yield (
                    f"network/{_level(name.strip())}",
                    {
                        "received_bytes": int(words[0]),
                        "receive_errors": int(words[2]),
                        "sent_bytes": int(words[8]),
                        "send_errors": int(words[10]),
                    },
                )

    def _block(self, path: Path) -> Iterator[tuple[str, Values]]:
        """What was written to a device is what wears it."""
        name = path.parent.name
        words = path.read_text().split()
        if not name.startswith(("loop", "ram", "zram")) and int(words[0]) + int(words[4]) > 0:
            yield (
                f"block/{_level(name)}",
                {
                    "reads": int(words[0]),
                    "read_bytes": int(words[2]) * _SECTOR_BYTES,
                    "writes": int(words[4]),
                    "written_bytes": int(words[6]) * _SECTOR_BYTES,
                },
            )

    def _thermal(self, path: Path) -> Iterator[tuple[str, Values]]:
        kind = (path.parent / "type").read_text().strip()
        number = path.parent.name.removeprefix("thermal_zone")
        yield f"temperature/{_level(kind)}_{number}", {"celsius": int(path.read_text()) / 1000}

    def _hwmon(self, path: Path) -> Iterator[tuple[str, Values]]:
        chip = (path.parent / "name").read_text().strip()
        number = path.name.removeprefix("temp").removesuffix("_input")
        yield f"temperature/{_level(chip)}_{path.parent.name}_{number}", {"celsius": int(path.read_text()) / 1000}

    def _flash_life(self, path: Path) -> Iterator[tuple[str, Values]]:
        """eMMC tells its own wear, of two kinds of memory: 1 is up to 10 % of its life used, 10 up to 100 %."""
        kinds = [int(word, 16) for word in path.read_text().split()]
        yield f"flash/{_level(path.parent.name)}", {"life_a": kinds[0], "life_b": kinds[1]}


def _level(name: str) -> str:
    """`name` as one level of a topic."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name) or "_"

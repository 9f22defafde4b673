"""What all benchmarks share: a meter, rounds of child processes in turns, ratios within a round, and the report.

A subject is a function of one module that takes parameters and returns a `Sample`.  It runs in a child process
(`python -m bench.enqueue --one ...`), so CPU time and memory are those of the subject alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.brokers import Broker, Mosquitto, Rumqttd, mosquitto_path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TOPIC = "gateway-17/telemetry"  # 20 bytes
QUIET_LOAD = 0.7
_CHILD_TIMEOUT_S = 300

Subject = Callable[[dict[str, Any]], "Sample"]
Report = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One measurement of one subject, in a process of its own."""

    count: int  # messages
    seconds: float  # wall clock
    cpu_seconds: float  # of this process: user and system, all threads
    peak_rss_bytes: int  # highest while measuring
    rss_growth_bytes: int  # how much that is above the start
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.count / self.seconds

    @property
    def cpu_s_per_million(self) -> float:
        return self.cpu_seconds / self.count * 1e6


class Meter:
    """Context manager around the measured part.  May be entered several times: the times add up."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._peak_bytes = 0
        self._first_bytes: int | None = None

    def __enter__(self) -> Meter:
        gc.collect()
        # The kernel's high-water mark starts anew, where it may be written.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if self._first_bytes is None:
            self._first_bytes = _memory_bytes("VmRSS")
        self._cpu_s, self._at_s = _cpu_s(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._at_s
        self.cpu_seconds += _cpu_s() - self._cpu_s
        self._peak_bytes = max(self._peak_bytes, _memory_bytes("VmHWM"))

    def sample(self, count: int, **extra: float) -> Sample:
        growth = max(0, self._peak_bytes - (self._first_bytes or 0))
        return Sample(count, self.seconds, self.cpu_seconds, self._peak_bytes, growth, extra)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _memory_bytes(name: str) -> int:
    # Not ru_maxrss: that one survives exec and would be the parent's.
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def check(condition: bool, what: str) -> None:
    """A figure whose result is wrong is no figure."""
    if not condition:
        raise RuntimeError(f"the measured part did not do its work: {what}")


# ---- running ----


def measure(module: str, subject: str, **parameters: Any) -> Sample:
    """Run one subject of `module` in a child process.  Raises RuntimeError with what the child said if it failed."""
    with tempfile.TemporaryDirectory(prefix="cloudpubsub-bench-") as directory:
        order = json.dumps({"subject": subject, "directory": directory, **parameters})
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, "--one", order],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=_CHILD_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{module}, {subject}: not done after {_CHILD_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"{module}, {subject}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return Sample(**json.loads(done.stdout.splitlines()[-1]))


def in_turns(
    module: str, subjects: Mapping[str, Mapping[str, Any]], rounds: int, note: Callable[[str], None]
) -> dict[str, list[Sample]]:
    """`rounds` times every subject (name to parameters), each round beginning with another one."""
    names = list(subjects)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            sample = measure(module, name, **subjects[name])
            note(f"round {turn + 1}/{rounds}  {name}: {sample.rate:,.0f}/s")
            samples[name].append(sample)
    return samples


def best_of(
    module: str, subject: str, choices: Sequence[Mapping[str, Any]], note: Callable[[str], None], tries: int = 2
) -> Mapping[str, Any]:
    """The parameters with the highest median rate."""
    if len(choices) == 1:
        return choices[0]
    rates: list[float] = []
    for choice in choices:
        rates.append(statistics.median(measure(module, subject, **choice).rate for _ in range(tries)))
        note(f"choosing  {subject} {_brief(choice)}: {rates[-1]:,.0f}/s")
    return choices[rates.index(max(rates))]


def _brief(parameters: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items() if name not in ("port", "messages"))


# ---- reporting ----


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(samples: Mapping[str, Sequence[Sample]], of: str, to: str) -> dict[str, float]:
    """Spread of the rate of `of` divided by the rate of `to`, each pair from the same round."""
    return spread([a.rate / b.rate for a, b in zip(samples[of], samples[to], strict=True)])


def summary(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """What the report keeps of each subject."""
    kept: dict[str, Any] = {}
    for name, taken in samples.items():
        kept[name] = {
            "messages": taken[0].count,
            "per_second": spread([sample.rate for sample in taken]),
            "ns_per_message": spread([1e9 / sample.rate for sample in taken]),
            "cpu_s_per_million": spread([sample.cpu_s_per_million for sample in taken]),
            "peak_rss_bytes": max(sample.peak_rss_bytes for sample in taken),
            "rss_growth_bytes": max(sample.rss_growth_bytes for sample in taken),
            **{key: spread([sample.extra[key] for sample in taken]) for key in taken[0].extra},
        }
    return kept


def environment() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    versions = {"cloudpubsub": _version("cloudpubsub"), "paho-mqtt": _version("paho-mqtt")}
    for package in ("iotcore", "persist-queue"):
        versions[package] = _version(package)
    mosquitto = mosquitto_path()
    if mosquitto is not None:
        said = subprocess.run([mosquitto, "-h"], capture_output=True, text=True, timeout=10, check=False).stdout
        found = re.search(r"version (\S+)", said)
        versions["mosquitto"] = found[1] if found else "unknown"
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    is_debug = sysconfig.get_config_var("Py_DEBUG")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "machine": platform.machine(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version() + (" (debug build: figures mean nothing)" if is_debug else ""),
        "temporary_files": tempfile.gettempdir(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "cloudpubsub":
            import cloudpubsub

            return cloudpubsub.__version__
        return None


def environment_line(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return (
        f"{found['machine']}, {found['cpu']}, {found['cpus']} CPUs, {found['memory_bytes'] / 2**30:.0f} GiB, "
        f"Linux {found['kernel']}, Python {found['python']}, {versions}; "
        f"load {found['load']} at the start; {found['date']}"
    )


def span(values: Mapping[str, float], form: str = "{:,.0f}") -> str:
    """`median (min-max)`."""
    return f"{form.format(values['median'])} ({form.format(values['min'])}-{form.format(values['max'])})"


def mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- brokers ----


# It logs a line at the level of errors for every packet, through Python's logging: that costs it fifteen times what the
# packet does.
_QUIET_RUMQTTD = (
    "import logging, sys; logging.disable(logging.ERROR); from iotcore import IotCoreBroker; "
    "IotCoreBroker(config_path=sys.argv[1]).run_forever()"
)


class QuietRumqttd(Rumqttd):
    """rumqttd that logs nothing."""

    def _command(self) -> list[str]:
        return [sys.executable, "-c", _QUIET_RUMQTTD, str(self._config)]


def default_broker() -> str:
    """Mosquitto where it is installed."""
    return "mosquitto" if mosquitto_path() is not None else "rumqttd"


@contextlib.contextmanager
def running_broker(name: str) -> Iterator[Broker]:
    directory = Path(tempfile.mkdtemp(prefix="cloudpubsub-bench-broker-"))
    broker = {"mosquitto": Mosquitto, "rumqttd": QuietRumqttd}[name](directory)
    try:
        with broker:
            yield broker
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# ---- command line ----


def parser(module: str, text: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that it runs, not how fast")
    made.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    made.add_argument("--rounds", type=int, help="how often each subject is measured, in turns (default: 5)")
    made.add_argument("--one", help=argparse.SUPPRESS)
    return made


def rounds_of(arguments: argparse.Namespace) -> int:
    return arguments.rounds or (1 if arguments.quick else 5)


def note_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(
    arguments: argparse.Namespace,
    subjects: Mapping[str, Subject],
    run: Callable[[argparse.Namespace], Report],
    show: Callable[[Report], str],
) -> None:
    """Be a child that measures one subject, or run the whole benchmark and print its report."""
    if arguments.one is not None:
        order = json.loads(arguments.one)
        print(json.dumps(asdict(subjects[order["subject"]](order))))
        return
    found = environment()
    warn_if_busy(found)
    report = run(arguments)
    if arguments.json:
        print(json.dumps({"environment": found, **report}, indent=1))
    else:
        print(f"{show(report)}\n\n{environment_line(found)}")


def warn_if_busy(found: Mapping[str, Any]) -> None:
    if found["load"] > QUIET_LOAD:
        note_to_stderr(f"the machine is busy (load {found['load']}): trust the ratios more than the rates")

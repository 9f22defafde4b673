"""What all benchmarks share: a meter, rounds of child processes in turns, ratios within a round, and the report.

A subject is a function of one module that takes parameters and returns a `Sample`.  It runs in a child process
(`python -m bench.enqueue --one ...`), so CPU time and memory are those of the subject alone.  One that needs what is
not installed raises `Missing` and is named in the report.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import _brokers, _flags, _native
from ._native import Missing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
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

    def sample(self, count: int, *, seconds: float | None = None, **extra: float) -> Sample:
        """`seconds`: where only a part of the time is to count."""
        growth = max(0, self._peak_bytes - (self._first_bytes or 0))
        seconds = self.seconds if seconds is None else seconds
        return Sample(count, seconds, self.cpu_seconds, self._peak_bytes, growth, extra)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _memory_bytes(name: str, pid: int | None = None) -> int:
    # Not ru_maxrss: that one survives exec and would be the parent's.
    text = Path(f"/proc/{pid or 'self'}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.M)
    return int(found[1]) * 1024 if found else 0


def check(condition: bool, what: str) -> None:
    """A figure whose result is wrong is no figure."""
    if not condition:
        raise RuntimeError(f"the measured part did not do its work: {what}")


# ---- running ----


#: When rounds are to end (monotonic), after three at least; None: when all are done.
stop_at_s: float | None = None
_ROUNDS_MIN = 3


class Samples(dict[str, list["Sample | None"]]):
    """What was measured of each subject: one entry a round, None where it sat that round out."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: dict[str, str] = {}  # subject to what is not installed for it

    def of(self, name: str) -> list[Sample]:
        return [sample for sample in self[name] if sample is not None]


def child_directory(module: str) -> Path | None:
    """Where a child is to run: `bench` of a source tree is found from its root only."""
    return ROOT if module.startswith("bench.") else None


def measure(module: str, subject: str, **parameters: Any) -> Sample:
    """Run one subject of `module` in a child process.

    Raises Missing, and RuntimeError with what the child said if it failed.
    """
    with tempfile.TemporaryDirectory(prefix="cloudpubsub-bench-", dir=parameters.pop("within", None)) as directory:
        order = json.dumps({"subject": subject, "directory": directory, **parameters})
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, "--one", order],
                cwd=child_directory(module),
                env={**os.environ, _native.DIRECTORY_VARIABLE: str(_native.directory())},
                capture_output=True,
                text=True,
                timeout=_CHILD_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{module}, {subject}: not done after {_CHILD_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"{module}, {subject}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "missing" in answer:
        raise Missing(answer["missing"])
    return Sample(**answer)


def in_turns(
    module: str,
    subjects: Mapping[str, Mapping[str, Any]],
    rounds: int,
    note: Callable[[str], None],
    *,
    fewer: Mapping[str, int] | None = None,
    others: Collection[str] = (),
) -> Samples:
    """`rounds` times every subject (name to parameters), each round beginning with another one.

    Those in `fewer` take part only in so many of the rounds, spread evenly.  `others` are not ours: one that fails is
    named in the report and left out from there on.
    """
    names = list(subjects)
    samples = Samples()
    sample: Sample
    for name in names:
        samples[name] = []
    for turn in range(rounds):
        if stop_at_s is not None and turn >= _ROUNDS_MIN and time.monotonic() > stop_at_s:
            note(f"the time for this is over: {turn} rounds instead of {rounds}")
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in samples.missing or not _takes_part(turn, rounds, (fewer or {}).get(name, rounds)):
                samples[name].append(None)
                continue
            try:
                sample = measure(module, name, **subjects[name])
            except Missing as exc:
                samples.missing[name] = f"{exc} is missing"
            except RuntimeError as exc:
                if name not in others:
                    raise
                samples.missing[name] = str(exc).strip().splitlines()[-1]
            if name in samples.missing:
                note(f"{name}: not measured: {samples.missing[name]}")
                samples[name].append(None)
                continue
            note(f"round {turn + 1}/{rounds}  {name}: {sample.rate:,.0f}/s")
            samples[name].append(sample)
    for name in samples.missing:
        if not samples.of(name):
            del samples[name]
    return samples


def _takes_part(turn: int, rounds: int, times: int) -> bool:
    return turn == 0 or turn * times // rounds != (turn - 1) * times // rounds


def best_of(
    module: str, subject: str, choices: Sequence[Mapping[str, Any]], note: Callable[[str], None], tries: int = 2
) -> Mapping[str, Any]:
    """The parameters with the highest median rate; the first where it cannot be measured."""
    if len(choices) == 1:
        return choices[0]
    rates: list[float] = []
    for choice in choices:
        try:
            rates.append(statistics.median(measure(module, subject, **choice).rate for _ in range(tries)))
        except (Missing, RuntimeError):
            return choices[0]  # it will be seen again when it is measured
        note(f"choosing  {subject} {_brief(choice)}: {rates[-1]:,.0f}/s")
    return choices[rates.index(max(rates))]


_NOT_CHOSEN = ("host", "port", "v5_port", "ca", "messages", "payload_bytes", "settings", "within", "broker")


def _brief(parameters: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in chosen(parameters).items())


def chosen(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen among others: the parameters that are not the same for all."""
    return {name: value for name, value in parameters.items() if name not in _NOT_CHOSEN}


def program(command: Sequence[str], **options: Any) -> tuple[str, float, float, int]:
    """Run another program to its end: (what it printed, seconds, CPU seconds, peak memory in bytes)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began_s = time.perf_counter()
    child = subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    peak_bytes = 0
    deadline_s = began_s + _CHILD_TIMEOUT_S
    with child:
        while time.perf_counter() < deadline_s:
            # Not ru_maxrss: that one survives exec and would be ours.
            peak_bytes = max(peak_bytes, _memory_bytes("VmHWM", child.pid))
            try:
                out, err = child.communicate(timeout=0.05)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            child.kill()
            raise RuntimeError(f"{command[0]}: not done after {_CHILD_TIMEOUT_S} s")
        seconds = time.perf_counter() - began_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode != 0:
        raise RuntimeError(f"{command[0]}: exit code {child.returncode}\n{err[-2000:]}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return out, seconds, cpu_s, peak_bytes


# ---- reporting ----


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(samples: Mapping[str, Sequence[Sample | None]], of: str, to: str) -> dict[str, float]:
    """Spread of the rate of `of` divided by the rate of `to`, each pair from the same round.

    `low95` and `high95` are the bounds of the median with 95 % confidence (bootstrap).
    """
    pairs = [(a, b) for a, b in zip(samples[of], samples[to], strict=True) if a is not None and b is not None]
    values = [a.rate / b.rate for a, b in pairs]
    return {**spread(values), **confidence(values)}


def confidence(values: Sequence[float]) -> dict[str, float]:
    draw = random.Random(1)  # the same figures give the same bounds
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2_000))
    return {"low95": medians[50], "high95": medians[-51]}


def ratios(samples: Samples, to: Sequence[str]) -> dict[str, dict[str, float]]:
    """All against those of `to` that were measured."""
    return {
        f"{of} / {other}": ratio(samples, of, other)
        for other in to
        if other in samples
        for of in samples
        if of != other
    }


def summary(samples: Samples | Mapping[str, Sequence[Sample | None]]) -> dict[str, Any]:
    """What the report keeps of each subject."""
    kept: dict[str, Any] = {}
    for name, all_taken in samples.items():
        taken = [sample for sample in all_taken if sample is not None]
        kept[name] = {
            "rounds": len(taken),
            "messages": taken[0].count,
            "per_second": spread([sample.rate for sample in taken]),
            "ns_per_message": spread([1e9 / sample.rate for sample in taken]),
            "cpu_s_per_million": spread([sample.cpu_s_per_million for sample in taken]),
            "peak_rss_bytes": max(sample.peak_rss_bytes for sample in taken),
            "rss_growth_bytes": max(sample.rss_growth_bytes for sample in taken),
            **{key: spread([sample.extra[key] for sample in taken]) for key in taken[0].extra},
        }
    return kept


_PACKAGES = (
    "cloudpubsub",
    "paho-mqtt",
    "iotcore",
    "aiomqtt",
    "awscrt",
    "persist-queue",
    "diskcache",
    "lmdb",
    "rocksdict",
)


def environment() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    versions = {package: _version(package) for package in _PACKAGES}
    mosquitto = _brokers.mosquitto_path()
    if mosquitto is not None:
        said = subprocess.run([mosquitto, "-h"], capture_output=True, text=True, timeout=10, check=False).stdout
        found = re.search(r"version (\S+)", said)
        versions["mosquitto"] = found[1] if found else "unknown"
    try:
        versions["C compiler"] = _native.compiler_version()
    except Missing:
        versions["C compiler"] = None
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


def missing_line(report: Report) -> str:
    """What was not measured for want of something, as a line of its own; empty if all was."""
    names = report.get("missing") or {}
    return "" if not names else "\n\nNot measured: " + "; ".join(f"{name} ({why})" for name, why in names.items())


def bounds(ratio: Mapping[str, float]) -> str:
    """A ratio with its confidence."""
    return f"{ratio['median']:.2f}, with 95 % confidence between {ratio['low95']:.2f} and {ratio['high95']:.2f}"


def mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- command line ----


def parser(module: str, text: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _flags.add_flags(made)
    made.add_argument("--own-only", action="store_true", help="leave out other libraries")
    made.add_argument("--one", help=argparse.SUPPRESS)
    return made


settings_of = _flags.settings_of


def common_order(arguments: argparse.Namespace) -> dict[str, Any]:
    """Parameters of every subject."""
    within = getattr(arguments, "directory", None)
    return {"settings": settings_of(arguments), **({"within": str(within)} if within else {})}


def rounds_of(arguments: argparse.Namespace, usual: int = 5) -> int:
    return arguments.rounds or (1 if arguments.quick else usual)


def module_name(name: str) -> str:
    """By which a child runs the module `name` of this package."""
    return f"{__package__}.{name}"


def end_like_interrupted() -> None:
    """SIGTERM ends brokers and removes files too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def note_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(
    arguments: argparse.Namespace,
    subjects: Mapping[str, Subject],
    run: Callable[[argparse.Namespace], Report],
    show: Callable[[Report], str],
    keep: Callable[[Report, str], None] | None = None,
) -> None:
    """Be a child that measures one subject, or run the whole benchmark, print its report, and `keep` both."""
    if arguments.one is not None:
        order = json.loads(arguments.one)
        try:
            answer = asdict(subjects[order.get("kind", order["subject"])](order))
        except ModuleNotFoundError as exc:
            answer = {"missing": exc.name}
        except Missing as exc:
            answer = {"missing": str(exc)}
        print(json.dumps(answer))
        return
    end_like_interrupted()
    found = environment()
    warn_if_busy(found)
    try:
        report = run(arguments)
    except Missing as exc:
        raise SystemExit(f"{exc} is missing, without which this cannot be measured") from None
    text = f"{show(report)}{missing_line(report)}\n\n{environment_line(found)}"
    report = {"environment": found, **report}
    print(json.dumps(report, indent=1) if arguments.json else text)
    if keep is not None:
        keep(report, text)


def warn_if_busy(found: Mapping[str, Any]) -> None:
    if found["load"] > QUIET_LOAD:
        note_to_stderr(f"the machine is busy (load {found['load']}): trust the ratios more than the rates")

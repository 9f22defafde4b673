"""The questions in a row, and what comes out of them: `results.json`, `results.md` and plots."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from . import _brokers, _harness, _plots, _targets
from ._harness import Report
from ._native import Missing


@dataclass(frozen=True)
class Part:
    """One run of one question."""

    question: str  # name of the module
    title: str
    rounds: int
    seconds: float  # that it may take before rounds are left out
    arguments: dict[str, Any] = field(default_factory=dict)
    briefly: bool = True  # part of a run in which only this library is measured


def _parts() -> Iterator[Part]:
    yield Part("enqueue", "Cost of publish()", 7, 42)
    for broker, rounds, seconds in (("mosquitto", 15, 65), ("rumqttd", 15, 60), ("sink", 7, 40)):
        yield Part("end_to_end", f"End to end on {broker}", rounds, seconds, {"broker": broker})
    for broker, rounds, seconds in (("mosquitto", 15, 45), ("rumqttd", 15, 40), ("sink", 3, 20)):
        arguments = {"broker": broker, "tls": True, "own_only": True}
        yield Part("end_to_end", f"End to end on {broker} over TLS", rounds, seconds, arguments, briefly=False)
    for broker, rounds in (("mosquitto", 2), ("sink", 3)):
        yield Part("sizes", f"Sizes of payloads, on {broker}", rounds, 32, {"broker": broker}, broker == "sink")
    yield Part("drain", "From the disk to the broker", 5, 35, {"broker": "sink"})
    for broker, rounds, seconds in (("source", 5, 15), ("mosquitto", 7, 22), ("rumqttd", 7, 22)):
        yield Part("subscribe", f"To a handler, from {broker}", rounds, seconds, {"broker": broker}, broker == "source")
    yield Part("spill", "To the disk and back", 5, 35)
    yield Part("recovery", "Opening a spool", 1, 12, {"messages": 1_000_000})
    yield Part("latency", "Latency", 3, 35)
    yield Part("idle", "Idle", 1, 22, {"seconds": 5.0})
    yield Part("wear", "Bytes written", 1, 12)
    yield Part("outage", "An outage", 1, 12, {"rate": 40_000, "seconds": 10.0})


QUESTIONS = tuple(dict.fromkeys(part.question for part in _parts()))
#: What a question takes beside what all take; None: as it decides.
_OWN_FLAGS = {"broker": None, "tls": False, "messages": None, "seconds": None, "rate": None}


def title_of(question: str) -> str:
    """First line of what the module says of itself."""
    text = import_module(f".{question}", __package__).__doc__ or ""
    return text.strip().splitlines()[0]


def run(arguments: argparse.Namespace) -> int:
    """`arguments` as `_flags.add_flags` makes them, and `names`, `peers`, `results`, `broker`, `tls`, `messages`."""
    wrong = sorted(set(arguments.names) - set(QUESTIONS))
    if wrong:
        raise SystemExit(f"no such benchmark: {', '.join(wrong)}; there are: {', '.join(QUESTIONS)}")
    _harness.end_like_interrupted()
    found = _harness.environment()
    _harness.warn_if_busy(found)
    reports: list[Report] = []
    tables, not_run = [], []
    began_s = time.monotonic()
    for part in _chosen(arguments):
        _harness.note_to_stderr(f"== {part.title}")
        part_began_s = time.monotonic()
        _harness.stop_at_s = None if arguments.rounds else part_began_s + part.seconds
        module = import_module(f".{part.question}", __package__)
        try:
            report = module.run(_given(arguments, part))
        except Missing as exc:
            _harness.note_to_stderr(f"{part.title}: not measured: {exc} is missing")
            not_run.append(f"{part.title}: {exc} is missing")
            continue
        report["title"] = part.title
        report["seconds"] = round(time.monotonic() - part_began_s, 1)
        _harness.note_to_stderr(f"== {part.title}: {report['seconds']:.0f} s")
        reports.append(report)
        tables.append(f"## {part.title}\n{module.show(report)}{_harness.missing_line(report)}\n")
    everything = {
        "environment": found,
        "seconds": round(time.monotonic() - began_s, 1),
        "benches": reports,
        "not_run": not_run,
        "targets": _targets.judge(reports) if arguments.peers else [],
    }
    text = _text(everything, tables)
    print(json.dumps(everything, indent=1) if arguments.json else text)
    if arguments.results is not None:
        _keep(arguments.results, everything, text)
    return 0 if reports else 1


def _chosen(arguments: argparse.Namespace) -> Iterator[Part]:
    """Where a broker is given each question is asked of that one, once."""
    seen = set()
    for part in _parts():
        if arguments.names and part.question not in arguments.names:
            continue
        if not arguments.peers and not part.briefly and not arguments.names:
            continue
        if arguments.broker is not None and "broker" in part.arguments:
            if part.question in seen:
                continue
            seen.add(part.question)
            yield Part(part.question, f"{title_of(part.question)} ({arguments.broker})", part.rounds, part.seconds)
            continue
        # Who tunes does not miss one of several brokers; in a comparison it is named as missing.
        if arguments.peers or _brokers.available().get(part.arguments.get("broker", "")) is None:
            yield part


def _given(arguments: argparse.Namespace, part: Part) -> argparse.Namespace:
    given = {**_OWN_FLAGS, "own_only": not arguments.peers, **vars(arguments)}
    for name, value in part.arguments.items():
        if given.get(name) in (None, False):
            given[name] = value
    if given["broker"] is None:
        given["broker"] = "sink"
    if given["seconds"] is None:
        given["seconds"] = 8.0
    if given["rate"] is None:
        given["rate"] = 40_000
    if given["rounds"] is None and not arguments.quick:
        given["rounds"] = part.rounds if arguments.peers else min(part.rounds, 3)
    if arguments.quick and part.question == "recovery":
        given["messages"] = arguments.messages
    return argparse.Namespace(**given)


def _text(everything: dict[str, Any], tables: list[str]) -> str:
    text = "# Results\nOn " + _harness.environment_line(everything["environment"])
    text += f". All of it took {everything['seconds']:.0f} s.\n\n"
    if everything["targets"]:
        text += "## Targets\n" + _targets.show(everything["targets"]) + "\n\n"
    if everything["not_run"]:
        text += "Not measured: " + "; ".join(everything["not_run"]) + "\n\n"
    return text + "\n".join(tables)


def _keep(directory: Path, everything: dict[str, Any], text: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(rounded(everything), indent=1) + "\n")
    pictures = _plots.draw(everything["benches"], directory)
    links = "\n".join(f"![{title}]({name})" for name, title in pictures)
    (directory / "results.md").write_text(text + (f"\n## Plots\n{links}\n" if links else ""))


def rounded(value: Any) -> Any:
    """Six digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value

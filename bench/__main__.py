"""All benchmarks in a row: `python -m bench`.

A full run takes some minutes and leaves its figures in `bench/results/`: `results.json`, and the tables of it in
`results.md`.  With `--quick` it only shows that everything runs, and leaves nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from bench import _harness, end_to_end, enqueue, spill
from bench._harness import Report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    parser.add_argument("--rounds", type=int, help="how often each subject is measured, in turns (default: 5)")
    parser.add_argument(
        "--results", type=Path, help="directory for the figures (default: bench/results, with --quick none)"
    )
    arguments = parser.parse_args()
    found = _harness.environment()
    _harness.warn_if_busy(found)
    reports, tables = [], []
    for title, run, show in _questions(arguments):
        _harness.note_to_stderr(f"== {title}")
        report = run()
        reports.append(report)
        tables.append(f"## {title}\n{show(report)}\n")
    everything = {"environment": found, "benches": reports}
    text = "# Results\n`python -m bench` on " + _harness.environment_line(found) + "\n\n" + "\n".join(tables)
    print(json.dumps(everything, indent=1) if arguments.json else text)
    directory = arguments.results or (None if arguments.quick else _harness.RESULTS)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.json").write_text(json.dumps(_rounded(everything), indent=1) + "\n")
        (directory / "results.md").write_text(text)


def _questions(arguments: argparse.Namespace) -> list[tuple[str, Callable[[], Report], Callable[[Report], str]]]:
    def on(broker: str) -> Callable[[], Report]:
        messages = None if arguments.quick or broker == "mosquitto" else 400_000  # it is the faster one
        given = argparse.Namespace(**vars(arguments), broker=broker, messages=messages)
        return lambda: end_to_end.run(given)

    brokers = ["mosquitto", "rumqttd"] if _harness.default_broker() == "mosquitto" else ["rumqttd"]
    return [
        ("Cost of publish()", lambda: enqueue.run(arguments), enqueue.show),
        *((f"End to end on {broker}", on(broker), end_to_end.show) for broker in brokers),
        ("To the disk and back", lambda: spill.run(arguments), spill.show),
    ]


def _rounded(value: object) -> object:
    """Six digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


if __name__ == "__main__":
    main()

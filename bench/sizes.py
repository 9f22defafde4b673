"""How does throughput depend on the size of the payload?

As `end_to_end`, for payloads from 64 bytes to 64 KiB: cloudpubsub with a spool beside the raw sender.
"""

from __future__ import annotations

import argparse
from typing import Any

from . import _brokers, _harness, end_to_end
from ._harness import Report

_MODULE = _harness.module_name("sizes")
_SIZES = (64, 256, 1_024, 4_096, 16_384, 65_536)
_OWN, _RAW = "cloudpubsub", "raw sender"


def run(arguments: argparse.Namespace) -> Report:
    sizes = [arguments.payload_bytes] if arguments.payload_bytes else list(_SIZES)[:: 3 if arguments.quick else 1]
    subjects: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    missing: dict[str, str] = {}
    rounds = _harness.rounds_of(arguments, 3)
    raw = None  # what is best for the first size is taken for all
    for size in sizes:
        given = {**vars(arguments), "payload_bytes": size, "own_only": True, "rounds": rounds, "tls": False}
        report = end_to_end.run(argparse.Namespace(**{"messages": None, **given, "raw": raw}))
        raw = raw or report["parameters"]["chosen"][_RAW]
        missing.update(report["missing"])
        for name in (_OWN, _RAW):
            figures = report["subjects"][name]
            rate = figures["per_second"]
            figures["mb_per_second"] = {key: value * size / 1e6 for key, value in rate.items()}
            subjects[f"{name}, {size} B"] = figures
        ratios[f"{_OWN} / {_RAW}, {size} B"] = report["ratios"][f"{_OWN} / {_RAW}"]
    return {
        "bench": "sizes",
        "parameters": {"broker": arguments.broker, "sizes": sizes, "settings": _harness.settings_of(arguments)},
        "missing": missing,
        "subjects": subjects,
        "ratios": ratios,
    }


def show(report: Report) -> str:
    rows = []
    for name, figures in report["subjects"].items():
        ratio = report["ratios"].get(name.replace(_OWN, f"{_OWN} / {_RAW}"))
        rows.append(
            [
                name,
                _harness.span(figures["per_second"]),
                _harness.span(figures["mb_per_second"], "{:,.1f}"),
                _harness.span(figures["cpu_s_per_million"], "{:.2f}"),
                "1" if ratio is None else _harness.span(ratio, "{:.2f}"),
            ]
        )
    head = [
        f"acknowledged by {report['parameters']['broker']}",
        "messages/s, median (min-max)",
        "MB/s of payload",
        "CPU s per million",
        "of the raw sender",
    ]
    return _harness.table(head, rows)


def parser() -> argparse.ArgumentParser:
    made = _harness.parser(_MODULE, __doc__)
    made.add_argument(
        "--broker",
        default=_brokers.default(),
        help="mosquitto, rumqttd, sink, or mqtt://HOST:PORT (default: %(default)s)",
    )
    return made


def main() -> None:
    _harness.main(parser().parse_args(), end_to_end.SUBJECTS, run, show)


if __name__ == "__main__":
    main()

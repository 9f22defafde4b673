"""What happens in an outage, and how fast is it over?

A client publishes at a steady rate to a native sink that is killed for a while and comes back on the same port.  A
timeline of what was published and acknowledged, and of how full ring and spool are; and how long after the link was
back the backlog was gone.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from typing import Any

import cloudpubsub

from . import _brokers, _harness
from ._harness import TOPIC, Report, check

_MODULE = _harness.module_name("outage")
_STEP_S = 0.05
_KEPT = ("published", "acked", "backlog_messages", "ring_used_bytes", "spool_bytes")


def run(arguments: argparse.Namespace) -> Report:
    logging.getLogger("cloudpubsub").setLevel(logging.ERROR)
    whole_s = 3.0 if arguments.quick else arguments.seconds
    begin_s, end_s = whole_s * 0.25, whole_s * 0.55
    rate, payload = arguments.rate, bytes(arguments.payload_bytes or 200)
    series: dict[str, list[float]] = {name: [] for name in ("seconds", "link", *_KEPT)}
    settings: dict[str, Any] = {"reconnect_min": 0.1, "reconnect_max": 0.5, **_harness.settings_of(arguments)}
    with tempfile.TemporaryDirectory(prefix="cloudpubsub-bench-", dir=arguments.directory) as directory:
        sink: Any = _brokers.running_peer()
        port = sink.__enter__()
        client = cloudpubsub.Client(f"mqtt://127.0.0.1:{port}", client_id="bench", spool=directory, **settings)
        try:
            client.start()
            client.publish(TOPIC, payload)
            check(client.flush(20) == 0, "no connection")
            published, back_s, caught_up_s = 1, 0.0, 0.0
            began_s = time.perf_counter()
            while (now_s := time.perf_counter() - began_s) < whole_s or not caught_up_s:
                check(now_s < whole_s + 60, "the backlog does not go away")
                if sink is not None and begin_s <= now_s < end_s:
                    sink.__exit__(None, None, None)
                    sink = None
                elif sink is None and now_s >= end_s:
                    sink = _brokers.running_peer(port=port)
                    sink.__enter__()
                    back_s = time.perf_counter() - began_s
                while published < rate * min(now_s, whole_s):
                    client.publish(TOPIC, payload)
                    published += 1
                stats = client.stats()
                series["seconds"].append(now_s)
                series["link"].append(float(stats.connected))
                for name in _KEPT:
                    series[name].append(getattr(stats, name))
                # What is on its way at any moment is no backlog.
                if back_s and not caught_up_s and stats.connected and stats.backlog_messages <= rate * _STEP_S * 2:
                    caught_up_s = time.perf_counter() - began_s
                time.sleep(_STEP_S)
            check(client.flush(60) == 0, "some were lost")
            stats = client.stats()
        finally:
            client.close()
            if sink is not None:
                sink.__exit__(None, None, None)
    check(stats.acked == published and stats.dropped == 0, f"{stats.acked} of {published} were acknowledged")
    return {
        "bench": "outage",
        "parameters": {
            "rate_per_second": rate,
            "payload_bytes": len(payload),
            "seconds": whole_s,
            "outage_s": back_s - begin_s,
            "caught_up_s": caught_up_s - back_s,
            "resent": stats.resent,
            "settings": settings,
        },
        "missing": {},
        "subjects": {},
        "ratios": {},
        "series": series,
    }


def show(report: Report) -> str:
    parameters, series = report["parameters"], report["series"]
    rows = [
        ["published", f"{max(series['published']):,.0f} at {parameters['rate_per_second']:,} a second"],
        ["outage", f"{parameters['outage_s']:.1f} s"],
        ["largest backlog", f"{max(series['backlog_messages']):,.0f} messages"],
        ["ring, at most", _harness.mib(max(series["ring_used_bytes"]))],
        ["spool, at most", _harness.mib(max(series["spool_bytes"]))],
        ["backlog gone after the broker was back", f"{parameters['caught_up_s']:.2f} s"],
        ["sent again", f"{parameters['resent']:,}"],
    ]
    return _harness.table(["an outage", ""], rows)


def parser() -> argparse.ArgumentParser:
    made = _harness.parser(_MODULE, __doc__)
    made.add_argument("--rate", type=int, default=40_000, help="messages a second (default: 40000)")
    made.add_argument("--seconds", type=float, default=10.0, help="of all of it; the outage is 30 %% (default: 10)")
    return made


def main() -> None:
    _harness.main(parser().parse_args(), {}, run, show)


if __name__ == "__main__":
    main()

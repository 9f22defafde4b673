"""What does a client cost that has nothing to do?

Connected to a native sink, nothing published: wake-ups a second (voluntary context switches of all threads) and CPU,
for a client with its publish connection, for one with both connections, and for paho-mqtt with its network thread.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

from . import _brokers, _harness
from ._harness import TOPIC, Meter, Report, Sample, Subject, check
from ._peers import connected_client, connected_paho

_MODULE = _harness.module_name("idle")
_SETTLE_S = 2.0


def _wakeups() -> int:
    """Voluntary context switches of all threads."""
    total = 0
    for path in Path("/proc/self/task").glob("*/status"):
        found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)$", path.read_text(), re.M)
        total += int(found[1]) if found else 0
    return total


def _wait(order: dict[str, Any], connections: int) -> Sample:
    time.sleep(min(_SETTLE_S, order["seconds"]))
    before = _wakeups()
    with Meter() as meter:
        time.sleep(order["seconds"])
    wakeups = max(0, _wakeups() - before - 1)  # one is our own sleep
    return meter.sample(
        1,
        wakeups_per_second=wakeups / meter.seconds,
        wakeups_per_second_and_connection=wakeups / meter.seconds / connections,
        cpu_percent=100 * meter.cpu_seconds / meter.seconds,
    )


def one_connection(order: dict[str, Any]) -> Sample:
    client = connected_client(order, order["directory"])
    client.publish(TOPIC, b"1")
    check(client.flush(20) == 0, "the message was lost")
    sample = _wait(order, 1)
    check(client.stats().connected, "the connection was lost")
    client.close()
    return sample


def both_connections(order: dict[str, Any]) -> Sample:
    client = connected_client(order, order["directory"])
    client.subscribe("nobody/publishes/here", lambda _: None)
    client.wait_subscribed(20)
    sample = _wait(order, 2)
    client.close()
    return sample


def paho(order: dict[str, Any]) -> Sample:
    client = connected_paho(order, 20, None)
    sample = _wait(order, 1)
    check(client.is_connected(), "the connection was lost")
    client.disconnect()
    client.loop_stop()
    return sample


SUBJECTS: dict[str, Subject] = {
    "cloudpubsub, publishing": one_connection,
    "cloudpubsub, both connections": both_connections,
    "paho-mqtt": paho,
}


def run(arguments: argparse.Namespace) -> Report:
    seconds = 1.0 if arguments.quick else arguments.seconds
    with _brokers.running("sink") as broker:
        order = {**_harness.common_order(arguments), **broker.order, "seconds": seconds}
        subjects = {name: order for name in SUBJECTS if not (arguments.own_only and name == "paho-mqtt")}
        samples = _harness.in_turns(_MODULE, subjects, _harness.rounds_of(arguments, 1), _harness.note_to_stderr)
    return {
        "bench": "idle",
        "parameters": {"seconds": seconds},
        "missing": samples.missing,
        "subjects": _harness.summary(samples),
        "ratios": {},
    }


def show(report: Report) -> str:
    rows = [
        [
            name,
            f"{one['wakeups_per_second']['median']:.2f}",
            f"{one['wakeups_per_second_and_connection']['median']:.2f}",
            f"{one['cpu_percent']['median']:.3f} %",
        ]
        for name, one in report["subjects"].items()
    ]
    return _harness.table(["idle", "wake-ups a second", "for each connection", "CPU"], rows)


def parser() -> argparse.ArgumentParser:
    made = _harness.parser(_MODULE, __doc__)
    made.add_argument("--seconds", type=float, default=8.0, help="how long it is watched (default: 8)")
    return made


def main() -> None:
    _harness.main(parser().parse_args(), SUBJECTS, run, show)


if __name__ == "__main__":
    main()

"""A wall clock that jumps ten years back and forth changes nothing: preloaded into processes, see `wrong_clock.c`."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import Rumqttd
from tests.collector import Collector
from tests.making import DEADLINE_S, Child, eventually, url
from tests.preload import preloaded
from tests.publishing import number_of
from tests.trial import MANY, RING_HOLDS, Trial, Worker

YEAR_S = 365 * 86_400.0
SEGMENT_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}-[0-9a-f]{8}\.seg")

# Prints what it was asked, and how long it took by a clock that is right.
CLIENT = """
import json, sys, time
import cloudpubsub

broker, spool, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def say(**facts):
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()

say(wall=time.time())
client = cloudpubsub.Client(broker, client_id="gateway", spool=spool, **settings)
client.start()
positions = [client.publish("numbers", b"%d" % number) for number in range(5_000)]
for wait in (lambda: client.wait(positions[-1], 0.3), lambda: client.flush(0.3)):
    began, timed_out = time.monotonic(), False
    try:
        wait()
    except TimeoutError:
        timed_out = True
    say(timed_out=timed_out, took=time.monotonic() - began)
say(lost=client.flush(60), **{name: getattr(client.stats(), name) for name in ("reconnects", "spilled_bytes")})
client.close()
"""


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on tmpfs, which is fast; rings, those of child processes too, lie in its folder `run`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        (Path(directory) / "run").mkdir(mode=0o700)
        monkeypatch.setenv("RUNTIME_DIRECTORY", f"{directory}/run")
        yield Path(directory)


def start_worker(root: Path) -> Worker:
    return Worker(root, **preloaded("wrong_clock"))


def test_the_clock_of_these_tests_jumps(memory: Path) -> None:
    with start_worker(memory) as worker:
        trial = worker.trial("a")
        wrong = [trial.wall_clock() - time.time() for _ in range(30)]
    assert min(wrong) < -9 * YEAR_S
    assert max(wrong) > 9 * YEAR_S


def test_order_and_recovery_need_no_wall_clock(memory: Path) -> None:
    taken = []
    for round_number in range(3):
        with start_worker(memory) as worker:
            trial = worker.trial("a", count=round_number * MANY)
            trial.put()
            trial.take(MANY // 2)
            taken += trial.taken()
            assert 0 <= trial.stats()["oldest_age_seconds"] < 100
            assert all(SEGMENT_NAME.fullmatch(name) for name in trial.files())
            if round_number % 2:
                assert trial.close() == 0
                assert worker.end() == 0
            # Else it is killed.
    with Trial(memory / "a" / "spool") as trial:
        assert 0 <= trial.stats()["oldest_age_seconds"] < 100
        trial.take()
        assert trial.stats()["dropped"] == 0
    assert taken + trial.taken == list(range(3 * MANY))


def test_the_time_after_which_memory_is_written_out_is_not_of_the_wall_clock(memory: Path) -> None:
    with start_worker(memory) as worker:
        late, soon = worker.trial("late", spill_after=3600), worker.trial("soon", spill_after=0.2)
        for trial in (late, soon):
            trial.put(RING_HOLDS // 4)
        eventually(lambda: soon.stats()["spilled_bytes"] > 0)
        assert late.stats()["spilled_bytes"] == 0


def test_waits_and_links_last_as_long_as_they_should(rumqttd: Rumqttd, memory: Path) -> None:
    def start(spool: str, broker: str, **settings: Any) -> Child:
        child = Child(CLIENT, broker, memory / spool, json.dumps(settings), **preloaded("wrong_clock"))
        json.loads(child.line())
        child.tell("")
        return child

    def next_facts(child: Child) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(child.line())
        child.tell("")
        return facts

    with start("alone", url(1), spill_after=3600) as child:  # where no broker is
        for _ in range(2):
            facts = next_facts(child)
            assert facts["timed_out"]
            assert 0.3 <= facts["took"] < DEADLINE_S
    with Collector(rumqttd.port, key=number_of) as collector, start("linked", url(rumqttd.port), keep_alive=5) as child:
        for _ in range(2):
            next_facts(child)
        assert next_facts(child) == {"lost": 0, "reconnects": 0, "spilled_bytes": 0}
        collector.wait_for(5_000, DEADLINE_S)
        assert child.process.wait(DEADLINE_S) == 0
    assert collector.first_deliveries() == list(range(5_000))

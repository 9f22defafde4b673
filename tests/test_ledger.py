"""The ledger of losses: small whatever happens, its sums exact, and it stays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import Drop, Spool
from cloudpubsub.__main__ import main
from tests.making import Child
from tests.reader import read_meta

KIB = 1024
ENTRIES_MAX = 62
ROUNDS = 90
SMALL: dict[str, Any] = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB, "max_spool_messages": 40}

PROGRAM = """
import sys
from tests.test_ledger import lose_often, open_spool
spool = open_spool(sys.argv[1])
lose_often(spool)
print(spool.stats()["dropped"], flush=True)
sys.stdin.readline()
"""


def open_spool(path: str | Path, **settings: Any) -> Spool:
    return Spool(path, **{**SMALL, **settings})


def drain(spool: Spool) -> None:
    while batch := spool.read():
        spool.ack(batch[-1].position or 0)


def lose_often(spool: Spool, rounds: int = ROUNDS) -> list[Drop]:
    """In as many ranges as there are rounds, with delivered messages between."""
    losses: list[Drop] = []
    for _ in range(rounds):
        for _ in range(150):
            spool.append("t", bytes(600))
        spool.sync(20)
        drain(spool)
        losses += spool.losses()
    return losses


def test_a_full_ledger_merges_its_entries_and_its_sums_stay_exact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_spool(tmp_path / "spool") as spool:
        losses = lose_often(spool)
        stats: dict[str, Any] = spool.stats()
    assert len(losses) >= ROUNDS
    assert sum(drop.count for drop in losses) == stats["dropped"] > 0
    assert sum(drop.bytes for drop in losses) == stats["dropped_bytes"]
    meta = read_meta(tmp_path / "spool" / "meta")
    assert meta is not None and 0 < len(meta.losses) <= ENTRIES_MAX
    assert sum(loss[2] for loss in meta.losses) == sum(total[0] for total in meta.totals) == stats["dropped"]
    assert sum(loss[3] for loss in meta.losses) == sum(total[1] for total in meta.totals) == stats["dropped_bytes"]
    # Every range that was reported lies in one that is kept.
    assert all(any(loss[0] <= drop.first and drop.end <= loss[1] for loss in meta.losses) for drop in losses)
    assert main(["inspect", str(tmp_path / "spool"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert sum(entry["messages"] for entry in document["losses"]["entries"]) == stats["dropped"]


def test_the_ledger_goes_on_over_restarts(tmp_path: Path) -> None:
    dropped = 0
    for _ in range(3):
        with open_spool(tmp_path / "spool") as spool:
            assert spool.stats()["dropped"] == dropped
            dropped += sum(drop.count for drop in lose_often(spool, 5))
            assert spool.stats()["dropped"] == dropped
    meta = read_meta(tmp_path / "spool" / "meta")
    assert meta is not None and sum(total[0] for total in meta.totals) == dropped


@pytest.mark.parametrize("durability", ["process"])
def test_a_kill_leaves_the_ledger_exact(durability: str, tmp_path: Path) -> None:
    with Child(PROGRAM, tmp_path / "spool") as child:
        dropped = int(child.line())
        child.kill()
        assert child.process.returncode == -signal.SIGKILL
    with open_spool(tmp_path / "spool", durability=durability) as spool:
        stats: dict[str, Any] = spool.stats()
        assert stats["dropped"] == dropped and stats["uncertain"] is None
        assert stats["published"] == stats["acked"] + dropped + stats["backlog_messages"]
    meta = read_meta(tmp_path / "spool" / "meta")
    assert meta is not None and sum(total[0] for total in meta.totals) == dropped
    assert 0 < len(meta.losses) <= ENTRIES_MAX


def test_reports_that_nobody_takes_do_not_fill_memory(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool") as spool:
        for _ in range(700):
            for _ in range(60):
                spool.append("t", bytes(1_000))
            drain(spool)
        losses = spool.losses()
        assert sum(drop.count for drop in losses) == spool.stats()["dropped"]
        assert len(losses) <= 300


def test_what_is_kept_is_read_by_a_process_that_never_saw_it(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool") as spool:
        lose_often(spool, 2)
        dropped = spool.stats()["dropped"]
    command = [sys.executable, "-m", "cloudpubsub", "inspect", str(tmp_path / "spool")]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert f"{dropped:,} messages" in said and "oldest dropped" in said

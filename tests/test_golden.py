"""A spool of format version 1, made once and kept: every later version reads it, and so does the oracle.

CLOUDPUBSUB_GOLDEN names a directory with another one, made by tests/data/make_golden.py on another architecture.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloudpubsub import Spool
from cloudpubsub.__main__ import main
from tests.reader import read_spool
from tests.spools import copy, published, read_all, tree, values

DATA = Path(os.environ.get("CLOUDPUBSUB_GOLDEN", Path(__file__).parent / "data"))
GOLDEN = DATA / "spool-v1"
ACKED = 1  # of what is in it


@pytest.fixture(scope="module")
def expected() -> list[tuple[object, ...]]:
    """What was published, as the script that did it noted it down."""
    entries = json.loads((DATA / "spool-v1.json").read_text())
    raw = [(it, base64.b64decode(it["payload"]), base64.b64decode(it["userdata"])) for it in entries]
    return [(it["position"], it["topic"], payload, userdata, it["retain"]) for it, payload, userdata in raw]


def test_the_oracle_reads_it(expected: list[tuple[object, ...]]) -> None:
    read = read_spool(GOLDEN)
    assert values(read.messages) == expected
    assert values(read.pending) == expected[ACKED:]
    sealed, unsealed = read.segments
    assert any(place.message is None for place in sealed.places), "a pad"
    assert sealed.footer is not None and unsealed.footer is None
    assert (sealed.epoch, unsealed.epoch) == (2, 3)


def test_the_oracle_reads_its_meta_file() -> None:
    meta = read_spool(GOLDEN).meta
    assert meta is not None
    assert (meta.epoch, meta.clean, meta.identity) == (3, False, b"gateway-17")
    assert meta.next_position == 2 << 40
    assert meta.totals[3] == (1, 40) and sum(messages for messages, _ in meta.totals) == 1
    assert [loss[:5] for loss in meta.losses] == [(80, 120, 1, 40, 3)]


def test_dump_reads_it(expected: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(GOLDEN)
    assert main(["dump", str(GOLDEN), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["position"], line["topic"]) for line in lines] == [message[:2] for message in expected[ACKED:]]
    assert tree(GOLDEN) == before


def test_verify_and_inspect_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(GOLDEN), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("18 bytes of a torn write" in note for note in notes)
    assert main(["inspect", str(GOLDEN), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["identity"] == "gateway-17"
    assert document["losses"]["by_reason"] == [{"reason": "damaged on disk", "messages": 1, "bytes": 40}]
    assert [it["first"] for it in document["quarantine"]] == [80]


def test_a_copy_of_it_opens_and_goes_on(expected: list[tuple[object, ...]], tmp_path: Path) -> None:
    path = copy(GOLDEN, tmp_path / "spool")
    with Spool(path) as spool:
        assert published(read_all(spool)) == expected[ACKED:]
        assert spool.recovery.torn_bytes > 0 and spool.recovery.damaged_ranges == 0
        position = spool.append("new", b"message")
        assert position >= 2 << 40
        stats = spool.stats()
        assert stats["dropped"] == 1
    with Spool(path) as spool:
        assert published(read_all(spool)) == [*expected[ACKED:], (position, "new", b"message", b"", False)]


def test_today_writes_the_same(tmp_path: Path) -> None:
    """The script that made it still works, for the architectures that it is run on, and every position is as it was."""
    env = {**os.environ, "CLOUDPUBSUB_GOLDEN": str(tmp_path)}
    script = Path(__file__).parent / "data" / "make_golden.py"
    subprocess.run([sys.executable, str(script)], env=env, check=True)
    assert json.loads((tmp_path / "spool-v1.json").read_text()) == json.loads((DATA / "spool-v1.json").read_text())

"""The file of messages that were given up: bounded, private, whole lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cloudpubsub import Message
from cloudpubsub._dead_letters import DeadLetters


def letters(directory: Path) -> list[dict[str, object]]:
    names = ["dead-letters.jsonl.1", "dead-letters.jsonl"]
    text = "".join((directory / name).read_text() for name in names if (directory / name).exists())
    return [json.loads(line) for line in text.splitlines()]


def test_the_latest_are_kept_and_at_most_twice_the_size(tmp_path: Path) -> None:
    store = DeadLetters(tmp_path, file_bytes=10_000)
    for number in range(300):
        store.add(Message(f"t/{number}", bytes(100)), "reason")
    kept = [letter["topic"] for letter in letters(tmp_path)]
    assert kept == [f"t/{number}" for number in range(300 - len(kept), 300)]
    assert 10_000 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    assert store.count == 300


def test_of_a_message_too_large_for_the_file_the_beginning_is_kept(tmp_path: Path) -> None:
    store = DeadLetters(tmp_path, file_bytes=10_000)
    store.add(Message("t", b"x" * 100_000), "reason")
    (letter,) = letters(tmp_path)
    assert letter["payload_bytes"] == 100_000
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000


def test_the_file_is_private(tmp_path: Path) -> None:
    DeadLetters(tmp_path).add(Message("t", b""), "reason")
    assert (tmp_path / "dead-letters.jsonl").stat().st_mode & 0o777 == 0o600


def test_it_stays_where_it_was_when_the_program_changes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spool").mkdir()
    monkeypatch.chdir(tmp_path)
    store = DeadLetters("spool")
    os.chdir("/")
    store.add(Message("t", b""), "reason")
    assert len(letters(tmp_path / "spool")) == 1


def test_a_disk_that_refuses_leaves_them_in_memory(tmp_path: Path) -> None:
    store = DeadLetters(tmp_path / "missing", file_bytes=10_000)
    for _ in range(300):
        store.add(Message("t", bytes(100)), "reason")
    assert 0 < sum(map(len, store.lines)) <= 10_000
    assert store.count == 300

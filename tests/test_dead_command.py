"""`cloudpubsub dead`: what was given up can be looked at, and sent again when the broker has changed its mind."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import pytest

from cloudpubsub.__main__ import main
from cloudpubsub._dead_letters import DeadLetters
from cloudpubsub._message import Message
from tests.fake_broker import FakeBroker
from tests.packets import Publish
from tests.publishing import LIMIT, client_to, publish_numbers
from tests.script import Event, Script, refuse

Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that runs in this process sends the log to what is stderr now; that must not outlast the test."""
    logger = logging.getLogger("cloudpubsub")
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logger, "level", logger.level)


def refused(spool: Path, *numbers: int, count: int = 6) -> None:
    """A spool whose broker refused some of its messages."""
    with FakeBroker(Script(refuse(0x87, *[number + 1 for number in numbers]))) as broker:
        with client_to(broker.port, spool, protocol="5") as client:
            publish_numbers(client, range(count))
            assert client.flush(LIMIT) == len(numbers)


def run(*arguments: str | Path) -> int:
    return main(["dead", *map(str, arguments)])


def test_letters_are_printed_for_people_and_for_programs(tmp_path: Path, capsys: Printed) -> None:
    refused(tmp_path, 2, 4)
    assert run(tmp_path) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split("\t")[1:4] == ["published", "numbers", "2"] and "not authorized (0x87)" in first
    assert second.split("\t")[3] == "4"
    assert run(tmp_path, "--json") == 0
    assert [json.loads(line)["topic"] for line in capsys.readouterr().out.splitlines()] == ["numbers"] * 2


def test_a_spool_without_letters_is_no_error_and_no_spool_is(tmp_path: Path, capsys: Printed) -> None:
    assert run(tmp_path) == 0
    assert capsys.readouterr().out == ""
    assert run(tmp_path / "missing") == 1


def test_what_is_delivered_now_is_no_letter_any_more(tmp_path: Path, capsys: Printed) -> None:
    refused(tmp_path, 1, 3)
    DeadLetters(tmp_path).add(Message("in", b"received"), "handler raised")
    script = Script()
    with FakeBroker(script) as broker:
        assert run(tmp_path, "--republish", "-p", str(broker.port), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["delivered"], told["left"]) == (True, 2, 0)
    assert [(p.topic, p.payload) for p in script.publishes] == [("numbers", b"1"), ("numbers", b"3")]
    (left,) = (tmp_path / "dead-letters.jsonl").read_text().splitlines()
    assert json.loads(left)["direction"] == "received"
    assert not any(name.endswith(".sending") for name in os.listdir(tmp_path))


def test_what_is_refused_again_stays(tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path, 1, 3)
    monkeypatch.setenv("CLOUDPUBSUB_PROTOCOL", "5")
    with FakeBroker(Script(refuse(0x87, 1))) as broker:
        assert run(tmp_path, "--republish", "-p", str(broker.port)) == 1
    assert "1 message delivered, 1 left" in capsys.readouterr().out
    assert run(tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["payload"] == "MQ=="


def test_without_a_broker_nothing_is_lost(tmp_path: Path, capsys: Printed) -> None:
    refused(tmp_path, 1, 3)
    before = (tmp_path / "dead-letters.jsonl").read_bytes()
    assert run(tmp_path, "--republish", "-p", "1", "--timeout", "0.2") == 1
    assert (tmp_path / "dead-letters.jsonl").read_bytes() == before


def test_what_a_run_that_was_killed_had_set_aside_is_sent_by_the_next(tmp_path: Path) -> None:
    refused(tmp_path, 1)
    os.rename(tmp_path / "dead-letters.jsonl", tmp_path / "dead-letters.jsonl.sending")
    refused(tmp_path, 0, count=1)
    script = Script()
    with FakeBroker(script) as broker:
        assert run(tmp_path, "--republish", "-p", str(broker.port)) == 0
    assert [publish.payload for publish in script.publishes] == [b"1", b"0"]
    assert not (tmp_path / "dead-letters.jsonl").exists()


def test_what_a_gateway_wrote_after_its_file_was_set_aside_stays(tmp_path: Path) -> None:
    """It had opened the file under its old name."""
    refused(tmp_path, 1)
    late = (tmp_path / "dead-letters.jsonl").read_bytes().replace(b"MQ==", b"Mg==")

    def write_late(event: Event) -> None:
        if isinstance(event.packet, Publish):
            with (tmp_path / "dead-letters.jsonl.sending").open("ab") as file:
                file.write(late)

    with FakeBroker(Script(write_late)) as broker:
        assert run(tmp_path, "--republish", "-p", str(broker.port)) == 1
    assert (tmp_path / "dead-letters.jsonl").read_bytes() == late


def test_a_second_run_leaves_the_first_alone(tmp_path: Path, capsys: Printed) -> None:
    refused(tmp_path, 1)

    def run_another(event: Event) -> None:
        if isinstance(event.packet, Publish) and event.number == 1:
            assert run(tmp_path, "--republish", "-p", str(broker.port)) == 1

    script = Script(run_another)
    with FakeBroker(script, parallel=True) as broker:
        assert run(tmp_path, "--republish", "-p", str(broker.port)) == 0
    assert "another process" in capsys.readouterr().err
    assert len(script.publishes) == 1


def test_letters_that_do_not_fit_in_memory_do_not_hang_where_there_is_no_broker(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path, file_bytes=16 << 20)
    for _ in range(30):
        letters.add(Message("a", bytes(200_000), 8), "too large")
    began_s = time.monotonic()
    assert run(tmp_path, "--republish", "-p", "1", "--timeout", "1") == 1
    assert time.monotonic() - began_s < 30
    assert len((tmp_path / "dead-letters.jsonl").read_bytes().splitlines()) == 30


def test_half_a_line_and_a_payload_that_was_cut_are_left_alone(tmp_path: Path, capsys: Printed) -> None:
    letters = DeadLetters(tmp_path, file_bytes=4096)
    letters.add(Message("a", b"x" * 10_000, 8), "too large")
    with (tmp_path / "dead-letters.jsonl").open("ab") as file:
        file.write(b'{"direction": "publ')
    with FakeBroker(Script()) as broker:
        assert run(tmp_path, "--republish", "-p", str(broker.port)) == 1
    assert "of its payload were kept" in capsys.readouterr().err
    assert run(tmp_path) == 0

"""Whose spool it is: another client id is refused or adopts it; another broker address changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import Client, IdentityError, Spool
from tests.brokers import Mosquitto
from tests.collector import Collector
from tests.publishing import LIMIT, client_to, number_of, publish_numbers
from tests.spools import COUNT, make, read_all

NOBODY = 1


def offline(spool: Path, client_id: str, **settings: Any) -> Client:
    return client_to(NOBODY, spool, client_id=client_id, **settings)


def leave_messages(spool: Path, count: int = 10) -> None:
    with offline(spool, "gateway-1") as client:
        publish_numbers(client, range(count))


def test_the_spool_of_another_client_is_refused_and_unharmed(tmp_path: Path) -> None:
    leave_messages(tmp_path)
    with pytest.raises(IdentityError, match="'gateway-1', not of 'gateway-2'"):
        offline(tmp_path, "gateway-2")
    with offline(tmp_path, "gateway-1") as client:
        assert client.stats().backlog_messages == 10


def test_adopting_takes_the_messages_and_the_ownership(tmp_path: Path) -> None:
    leave_messages(tmp_path)
    with offline(tmp_path, "gateway-2", adopt=True) as client:
        assert client.stats().backlog_messages == 10
    with offline(tmp_path, "gateway-2") as client:
        assert client.stats().backlog_messages == 10
    with pytest.raises(IdentityError):
        offline(tmp_path, "gateway-1")


def test_an_id_that_was_worked_out_fits_any_spool(tmp_path: Path) -> None:
    leave_messages(tmp_path)
    with Client(f"mqtt://127.0.0.1:{NOBODY}", spool=tmp_path) as client:
        assert client.stats().backlog_messages == 10


def test_without_an_identity_a_spool_is_taken_as_it_is(tmp_path: Path) -> None:
    leave_messages(tmp_path)
    with Spool(tmp_path) as spool:
        assert len(spool.read()) == 10
    with pytest.raises(IdentityError):
        offline(tmp_path, "gateway-2")


def test_a_changed_broker_address_loses_nothing(mosquitto: Mosquitto, tmp_path: Path) -> None:
    leave_messages(tmp_path)
    with Collector(mosquitto.port, key=number_of) as collector:
        with client_to(mosquitto.port, tmp_path, client_id="gateway-1") as client:
            assert client.flush(LIMIT) == 0
        collector.wait_for(10, LIMIT)
        assert collector.arrivals() == list(range(10))


def test_a_stray_file_of_another_spool_does_not_take_over_one_that_lost_its_meta_file(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    make(ours, acked=0)
    make(other, count=3 * COUNT, acked=2 * COUNT)  # its positions, and so its file names, are higher
    stray = max((other / "log").iterdir())
    assert stray.name > max((ours / "log").iterdir()).name
    shutil.copy(stray, ours / "log")
    (ours / "meta").unlink()
    with Spool(ours) as spool:
        assert len(read_all(spool)) == COUNT
    assert (ours / "log" / stray.name).read_bytes() == stray.read_bytes()

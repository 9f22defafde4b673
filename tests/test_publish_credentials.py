"""User names and passwords."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker, Mosquitto, Rumqttd
from tests.publishing import LIMIT, client_to, until

USERS = {"gateway": "correct horse"}


@pytest.fixture(params=["mosquitto", "rumqttd"])
def guarded(request: pytest.FixtureRequest, tmp_path: Path):
    """A broker that lets only USERS in."""
    if request.param == "mosquitto":
        request.getfixturevalue("need_mosquitto")
    kind = {"mosquitto": Mosquitto, "rumqttd": Rumqttd}[request.param]
    with kind(tmp_path / "broker", users=USERS) as broker:
        yield broker


def test_the_right_password_opens(guarded: Broker, tmp_path: Path) -> None:
    with client_to(guarded.port, tmp_path / "spool", username="gateway", password="correct horse") as client:
        client.wait(client.publish("topic", b""), LIMIT)


def test_credentials_in_the_url_open(guarded: Broker, tmp_path: Path) -> None:
    url = f"mqtt://gateway:correct%20horse@127.0.0.1:{guarded.port}"
    with client_to(guarded.port, tmp_path / "spool", broker=url) as client:
        client.wait(client.publish("topic", b""), LIMIT)


@pytest.mark.usefixtures("need_mosquitto")
def test_a_refusal_is_named_and_shows_no_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Mosquitto(tmp_path / "broker", users=USERS) as broker, caplog.at_level(logging.DEBUG):
        with client_to(broker.port, tmp_path / "spool", username="gateway", password="wrong secret") as client:
            client.publish("topic", b"")
            until(lambda: client.stats().last_error)
            assert client.stats().last_error == "refused: not authorised"
            assert client.stats().publish_link == "refused"
            assert client.stats().connects == 0 and client.stats().acked == 0
        assert "wrong secret" not in caplog.text


def test_a_wrong_password_never_connects(guarded: Broker, tmp_path: Path) -> None:
    with client_to(guarded.port, tmp_path / "spool", username="gateway", password="wrong") as client:
        client.publish("topic", b"")
        until(lambda: client.stats().last_error)
        assert client.stats().connects == 0 and client.stats().acked == 0


def test_callables_are_asked_at_every_connection(guarded: Broker, tmp_path: Path) -> None:
    asked: list[str] = []

    def password() -> str:
        asked.append("password")
        return "correct horse"

    def username() -> str:
        asked.append("username")
        return "gateway"

    with Relay(guarded.port) as relay:
        with client_to(relay.port, tmp_path / "spool", username=username, password=password) as client:
            client.wait(client.publish("topic", b""), LIMIT)
            assert asked == ["username", "password"]
            relay.cut()
            relay.restore()
            client.wait(client.publish("topic", b""), LIMIT)
            assert asked.count("password") == asked.count("username") >= 2


@pytest.mark.parametrize("error", [RuntimeError("no token today"), SystemExit("no token today")])
def test_a_callable_that_raises_is_asked_again_later(error: BaseException, mosquitto: Broker, tmp_path: Path) -> None:
    fails = [error, error]

    def password() -> str:
        if fails:
            raise fails.pop()
        return "any"

    with client_to(mosquitto.port, tmp_path / "spool", username="gateway", password=password) as client:
        client.wait(client.publish("topic", b""), LIMIT)
        assert "no token today" in client.stats().last_error

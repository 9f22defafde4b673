"""What a real broker forbids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudpubsub import Client, TopicError
from tests.brokers import Mosquitto
from tests.making import DEADLINE_S, Inbox, send, url

RULES = {
    "defaultACLAccess": {
        "publishClientSend": True,
        "publishClientReceive": True,
        "subscribe": False,
        "unsubscribe": True,
    },
    "anonymousGroup": "everybody",
    "clients": [],
    "groups": [{"groupname": "everybody", "roles": [{"rolename": "reader"}]}],
    "roles": [
        {
            "rolename": "reader",
            "acls": [{"acltype": "subscribePattern", "topic": "allowed/#", "priority": 0, "allow": True}],
        }
    ],
}


@pytest.fixture
def strict(need_mosquitto: None, tmp_path: Path) -> Iterator[Mosquitto]:
    """A Mosquitto that refuses subscriptions; its access file cannot, its plugin of the same package can."""
    plugin = next(Path("/usr/lib").glob("**/mosquitto_dynamic_security.so"), None)
    if plugin is None:
        pytest.skip("this Mosquitto has no mosquitto_dynamic_security.so")
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(RULES))
    rules.chmod(0o600)
    with Mosquitto(tmp_path / "broker", extra=(f"plugin {plugin}", f"plugin_opt_config_file {rules}")) as broker:
        yield broker


def test_a_refusal_names_the_filter_and_leaves_the_others_alone(strict: Mosquitto) -> None:
    inbox = Inbox()
    with Client(url(strict.port), client_id="c") as client:
        client.subscribe("allowed/t", inbox)
        client.subscribe("forbidden/t", inbox)
        with pytest.raises(TopicError, match="forbidden/t"):
            client.wait_subscribed(DEADLINE_S)
        assert "forbidden/t" in client.stats().last_error
        send(strict, [("forbidden/t", b"1"), ("allowed/t", b"2")])
        assert inbox.wait(1)[0].topic == "allowed/t"

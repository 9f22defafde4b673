"""Shared subscriptions: consumers in processes of their own share the messages, and one of them is killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.brokers import Broker, Mosquitto
from tests.publishing import LIMIT, client_to, publish_numbers, until

COUNT = 600
CONSUMER = """
import os
import sys
import cloudpubsub

port, client_id = sys.argv[1:]
client = cloudpubsub.Client(f"mqtt://127.0.0.1:{port}", client_id=client_id, handler_queue=20)
client.subscribe("$share/group/numbers", lambda message: os.write(1, message.payload + b"\\n"))
with client:
    client.wait_subscribed(60)
    os.write(1, b"ready\\n")
    sys.stdin.read()
"""


class Consumer:
    """A process; what it has handled is in `numbers`."""

    def __init__(self, port: int, client_id: str) -> None:
        self.numbers: list[int] = []
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CONSUMER, str(port), client_id],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._ready.wait(LIMIT)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == "ready\n":
                self._ready.set()
            elif line.endswith("\n"):
                self.numbers.append(int(line))

    def kill(self) -> None:
        self._process.kill()
        self._end()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._end()

    def _end(self) -> None:
        self._process.wait(LIMIT)
        self._reader.join(LIMIT)
        assert self._process.stdout is not None and self._process.stdin is not None
        self._process.stdout.close()
        self._process.stdin.close()


def test_consumers_share_the_messages_and_a_kill_loses_none(broker: Broker, tmp_path: Path) -> None:
    """Each is handled by somebody, and twice at most what the killed one had not acknowledged when it died."""
    consumers = [Consumer(broker.port, f"consumer-{n}") for n in range(3)]
    try:
        with client_to(broker.port, tmp_path, max_publish_rate=1_000) as client:
            publish_numbers(client, range(COUNT))
            until(lambda: all(len(one.numbers) >= 20 for one in consumers))
            consumers[0].kill()
            again = Consumer(broker.port, "consumer-0")  # its session has what it had not acknowledged
            consumers.append(again)
            assert client.flush(LIMIT) == 0

        def handled() -> Counter[int]:
            return Counter(number for one in consumers for number in one.numbers)

        until(lambda: len(handled()) == COUNT)
        assert sum(handled().values()) <= COUNT + 100
        if broker.name == "mosquitto":  # rumqttd gives the others what the killed one had, behind what they had got
            assert all(one.numbers == sorted(one.numbers) for one in consumers), "each gets its share in order"
    finally:
        for one in consumers[1:]:
            one.close()


@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
def test_a_shared_subscription_ends_like_any_other(protocol: str, mosquitto: Mosquitto) -> None:
    came: list[bytes] = []
    with client_to(mosquitto.port, None, client_id="c", protocol=protocol) as client:
        client.subscribe("$share/g/a/+", lambda message: came.append(message.payload))
        client.wait_subscribed(LIMIT)
        client.wait(client.publish("a/b", b"1"), LIMIT)
        until(lambda: came)
        client.unsubscribe("$share/g/a/+")
        client.subscribe("other", lambda message: came.append(message.payload))
        client.wait_subscribed(LIMIT)
        client.wait(client.publish("a/b", b"2"), LIMIT)
        client.wait(client.publish("other", b"3"), LIMIT)
        until(lambda: len(came) >= 2)
    assert came == [b"1", b"3"]

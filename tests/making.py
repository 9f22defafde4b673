"""What the tests of client and spool share: waiting with a deadline, a handler that notes, paho as a source."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from cloudpubsub import Client, Message
from tests.brokers import HOST, Broker

DEADLINE_S = 60.0
ROOT = Path(__file__).parent.parent


def url(port: int) -> str:
    return f"mqtt://{HOST}:{port}"


def eventually(is_so: Callable[[], object], what: str = "", deadline_s: float = DEADLINE_S) -> None:
    """Wait until `is_so()`; fail after the deadline."""
    until_s = time.monotonic() + deadline_s
    while not is_so():
        assert time.monotonic() < until_s, f"not within {deadline_s} s: {what or is_so}"
        time.sleep(0.005)


class Inbox:
    """A handler, or a callback of any number of arguments, that notes its calls and can be waited for."""

    def __init__(self, each: Callable[..., object] | None = None) -> None:
        self._changed = threading.Condition()
        self._each = each
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        with self._changed:
            self.calls.append(args)
            self._changed.notify_all()
        if self._each is not None:
            self._each(*args)

    @property
    def first(self) -> list[Any]:
        """The first argument of each call."""
        return [args[0] for args in self.calls]

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.first]

    @property
    def topics(self) -> list[str]:
        return [message.topic for message in self.first]

    def wait(self, count: int, deadline_s: float = DEADLINE_S) -> list[Any]:
        """The first arguments, when there are `count` calls."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= count, deadline_s), (
                f"{len(self.calls)} of {count} calls in {deadline_s} s"
            )
        return self.first


class Gate:
    """A handler that stays inside until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.inbox = Inbox()

    def __call__(self, message: Message) -> None:
        self.entered.set()
        assert self.opened.wait(DEADLINE_S)
        self.inbox(message)


@contextmanager
def receiver(broker: Broker, *handlers: tuple[str, Callable[[Message], object]], **settings: Any) -> Iterator[Client]:
    """A started client, subscribed, and known to be."""
    settings = {"client_id": "receiver", "reconnect_min": 0.05, "reconnect_max": 0.2, **settings}
    with receiving(Client(url(broker.port), **settings), *handlers) as client:
        yield client


@contextmanager
def receiving(client: Client, *handlers: tuple[str, Callable[[Message], object]]) -> Iterator[Client]:
    """The client, which was not started before: started, subscribed, and known to be."""
    for topic_filter, handler in handlers:
        client.subscribe(topic_filter, handler)
    try:
        client.start()
        client.wait_subscribed(DEADLINE_S)
        yield client
    finally:
        client.close()


def send(
    broker: Broker, messages: Iterable[tuple[str, bytes]], *, qos: int = 1, retain: bool = False, name: str = "source"
) -> None:
    """Publish with paho, independent of the package; returns when everything is acknowledged."""
    send_to(broker.port, messages, qos=qos, retain=retain, name=name)


def send_to(
    port: int,
    messages: Iterable[tuple[str, bytes]],
    *,
    qos: int = 1,
    retain: bool = False,
    name: str = "source",
    tls: ssl.SSLContext | None = None,
    protocol: str = "3.1.1",
) -> None:
    """As `send`, to a port, which may speak TLS or MQTT 5."""
    version = MQTTProtocolVersion.MQTTv5 if protocol == "5" else MQTTProtocolVersion.MQTTv311
    source = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=version)
    source.max_inflight_messages_set(1000)
    if tls is not None:
        source.tls_set_context(tls)
    source.connect(HOST, port)
    source.loop_start()
    try:
        for sent in [source.publish(topic, payload, qos=qos, retain=retain) for topic, payload in messages]:
            sent.wait_for_publish(DEADLINE_S)
            assert sent.is_published()
    finally:
        source.disconnect()
        source.loop_stop()


class Child:
    """A Python process running `program`; reads what it prints.  Killed at the end of the `with` block."""

    def __init__(self, program: str, *args: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, args)],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        self.pid = self.process.pid

    def line(self) -> str:
        """The next line that it prints; "" at its end.  The test's own time limit is the deadline."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def tell(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

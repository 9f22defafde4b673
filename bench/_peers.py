"""Clients of this and other libraries, ready to publish, for the subjects of several benchmarks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from paho.mqtt.client import Client as PahoClient
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

import cloudpubsub

from ._harness import check

_CONNECT_S = 20.0


def payload_of(order: dict[str, Any]) -> bytes:
    size: int = order.get("payload_bytes", 64)
    return (bytes(range(256)) * (size // 256 + 1))[:size]


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """A Python thread that never waits."""
    is_over = threading.Event()

    def compute() -> None:
        while not is_over.is_set():
            sum(range(100))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """The same in a process of its own, which takes as much of the processors and nothing of the interpreter."""
    program = "print('.', flush=True)\nwhile True: sum(range(100))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
            yield
        finally:
            process.kill()


def connected_client(order: dict[str, Any], spool: str | None, **settings: Any) -> cloudpubsub.Client:
    """A started client of ours with a live link."""
    is_up = threading.Event()
    ca = order.get("ca")
    client = cloudpubsub.Client(
        f"{'mqtts' if ca else 'mqtt'}://{order.get('host', '127.0.0.1')}:{order['port']}",
        client_id="bench-cloudpubsub",
        spool=spool,
        tls=cloudpubsub.TLS(ca=ca) if ca else None,
        on_connect=lambda _url: is_up.set(),
        **{**order.get("settings", {}), **settings},
    )
    client.start()
    check(is_up.wait(_CONNECT_S), "no connection")
    return client


def offline_paho() -> PahoClient:
    """paho, never connected, that queues without limit."""
    client = PahoClient(CallbackAPIVersion.VERSION2, client_id="bench-paho", protocol=MQTTProtocolVersion.MQTTv311)
    client.max_queued_messages_set(0)
    return client


def connected_paho(order: dict[str, Any], max_inflight: int, on_publish: Callable[..., None] | None) -> PahoClient:
    """paho with a live link and its network thread running."""
    is_up = threading.Event()
    client = offline_paho()
    client.max_inflight_messages_set(max_inflight)
    if order.get("ca"):
        client.tls_set(ca_certs=order["ca"])
    client.on_connect = lambda *_: is_up.set()
    client.on_publish = on_publish
    client.connect(order.get("host", "127.0.0.1"), order["port"])
    client.loop_start()
    check(is_up.wait(_CONNECT_S), "no connection")
    return client

"""Clients of both libraries, ready to publish, for the subjects of several benchmarks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from paho.mqtt.client import Client as PahoClient
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

import cloudpubsub
from bench._harness import check

_CONNECT_S = 10.0


def connected_client(port: int, spool: str | None, **settings: Any) -> cloudpubsub.Client:
    """A started client of ours with a live link."""
    is_up = threading.Event()
    client = cloudpubsub.Client(
        f"mqtt://127.0.0.1:{port}",
        client_id="bench-cloudpubsub",
        spool=spool,
        on_connect=lambda _url: is_up.set(),
        **settings,
    )
    client.start()
    check(is_up.wait(_CONNECT_S), "no connection")
    return client


def offline_paho() -> PahoClient:
    """paho, never connected, that queues without limit."""
    client = PahoClient(CallbackAPIVersion.VERSION2, client_id="bench-paho", protocol=MQTTProtocolVersion.MQTTv311)
    client.max_queued_messages_set(0)
    return client


def connected_paho(port: int, max_inflight: int, on_publish: Callable[..., None]) -> PahoClient:
    """paho with a live link and its network thread running."""
    is_up = threading.Event()
    client = offline_paho()
    client.max_inflight_messages_set(max_inflight)
    client.on_connect = lambda *_: is_up.set()
    client.on_publish = on_publish
    client.connect("127.0.0.1", port)
    client.loop_start()
    check(is_up.wait(_CONNECT_S), "no connection")
    return client

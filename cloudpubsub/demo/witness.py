"""The independent subscriber: paho alone, on the broker itself and not behind the bad link."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from cloudpubsub.demo.checker import Checker

__all__ = ["Witness"]

_CONNECT_S = 10.0
_DELAYS_MAX = 200_000


class Witness:
    """Subscribe to everything on a broker on 127.0.0.1 and give each message to a `Checker`.

    The counters may be read by any thread; `checker.verdict` after `stop` only.
    """

    def __init__(self, port: int) -> None:
        self.checker = Checker()
        #: Arrivals, repeated ones included.
        self.arrivals = 0
        #: Seconds from the reading to its arrival here, of the newest message.
        self.delay_s = 0.0
        #: While True, the delay of every message is kept in `delays_s`.
        self.keeps_delays = False
        self.delays_s: list[float] = []
        self._port = port
        self._is_subscribed = threading.Event()
        self._client = client = Client(
            CallbackAPIVersion.VERSION2, client_id="demo-witness", clean_session=False, reconnect_on_failure=True
        )
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message

    def start(self) -> None:
        """Returns when the subscription stands.  Raises OSError, TimeoutError."""
        self._client.connect("127.0.0.1", self._port)
        self._client.loop_start()
        if not self._is_subscribed.wait(_CONNECT_S):
            raise TimeoutError("the witness was not subscribed in time")

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        client.subscribe("demo/#", qos=1)

    def _on_subscribe(self, client: Client, userdata: Any, mid: int, reasons: Any, properties: Any) -> None:
        if not any(reason.is_failure for reason in reasons):
            self._is_subscribed.set()

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        self.arrivals += 1
        try:
            reading = json.loads(message.payload)
            number, stamp_s = reading["seq"], float(reading["t"])
        except (ValueError, TypeError, KeyError):
            self.checker.take(None)
            return
        self.delay_s = time.monotonic() - stamp_s
        if self.keeps_delays and len(self.delays_s) < _DELAYS_MAX:
            self.delays_s.append(self.delay_s)
        self.checker.take(number)

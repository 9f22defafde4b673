"""The ways to a broker that the end-to-end tests go: to each of four, plain and with TLS, in each version it speaks.

The brokers run as long as the test process and are shared, RabbitMQ because it is slow to start: every test has a word
of its own, which its client ids and topics begin with.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cloudpubsub import TLS, Client, Message
from tests.brokers import HOST, Ability, Broker, Mosquitto, Rumqttd, TlsFiles
from tests.collector import Collector
from tests.making import receiving, send_to
from tests.more_brokers import Nats, RabbitMQ

KINDS: dict[str, type[Broker]] = {"mosquitto": Mosquitto, "rumqttd": Rumqttd, "nats": Nats, "rabbitmq": RabbitMQ}
PACKAGES = {"mosquitto": "mosquitto", "nats": "nats-server", "rabbitmq": "rabbitmq-server"}  # Debian's


class Way(NamedTuple):
    kind: str
    secure: bool = False
    protocol: str = "3.1.1"

    @property
    def name(self) -> str:
        return "-".join([self.kind, *(["tls"] if self.secure else []), *(["5"] if self.protocol == "5" else [])])


WAYS = [
    Way(kind, secure, protocol)
    for kind, broker in KINDS.items()
    for secure in (False, True)
    for protocol in ("3.1.1", "5")
    if protocol != "5" or Ability.VERSION_5 in broker.abilities
]
PLAIN_WAYS = [Way(kind) for kind in KINDS]
SECURE_WAYS = [way for way in WAYS if way.secure]


@dataclass(frozen=True)
class Link:
    """A way to a running broker, and the test's own word."""

    way: Way
    broker: Broker
    word: str
    files: TlsFiles

    def can(self, ability: Ability) -> bool:
        return ability in self.broker.abilities

    def topic(self, rest: str = "x") -> str:
        """A topic, or a filter, below the test's word."""
        return f"{self.word}/{rest}"

    @property
    def port(self) -> int:
        return self.broker.port_for(secure=self.way.secure, protocol=self.way.protocol)

    def settings(self, port: int = 0, name: str = "client") -> dict[str, Any]:
        """Of a client that goes this way; `port` is that of a relay."""
        scheme, tls = ("mqtts", {"tls": TLS(ca=self.files.ca)}) if self.way.secure else ("mqtt", {})
        return {
            "broker": f"{scheme}://{HOST}:{port or self.port}",
            "client_id": f"{self.word}-{name}",
            "protocol": self.way.protocol,
            "reconnect_min": 0.02,
            "reconnect_max": 0.1,
            **tls,
        }

    def client(self, spool: Path | None = None, *, port: int = 0, name: str = "client", **settings: Any) -> Client:
        """Not started."""
        return Client(spool=spool, **{**self.settings(port, name), **settings})

    @contextmanager
    def receiver(
        self, *handlers: tuple[str, Callable[[Message], object]], port: int = 0, name: str = "receiver", **settings: Any
    ) -> Iterator[Client]:
        """A started client, subscribed below the test's word, and known to be."""
        client = self.client(port=port, name=name, **settings)
        with receiving(client, *((self.topic(rest), handler) for rest, handler in handlers)):
            yield client

    # What shares nothing with the package under test goes the plain way where the broker has one.

    def _witness(self) -> tuple[int, ssl.SSLContext | None]:
        if self.broker.has_plain_port:
            return self.broker.port_for(secure=False, protocol=self.way.protocol), None
        return self.broker.tls_port, ssl.create_default_context(cafile=self.files.ca)

    def collector(self, rest: str = "#", name: str = "collector", **settings: Any) -> Collector:
        """Not started."""
        port, tls = self._witness()
        settings = {"client_id": f"{self.word}-{name}", "tls": tls, "protocol": self.way.protocol, **settings}
        return Collector(port, self.topic(rest), **settings)

    def send(self, *messages: tuple[str, bytes], retain: bool = False) -> None:
        """Publish below the test's word; returns when everything is acknowledged."""
        port, tls = self._witness()
        below = ((self.topic(rest), payload) for rest, payload in messages)
        send_to(port, below, retain=retain, name=f"{self.word}-source", tls=tls, protocol=self.way.protocol)

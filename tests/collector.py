"""The independent witness of the end-to-end tests: a paho subscriber at QoS 1 that notes what arrives, in order.

It shares nothing with the package under test.  paho does the protocol; around its socket sits a buffer, because paho
reads a message with three system calls and writes each acknowledgement by itself, and a witness must not be the slowest
of all.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

_READ_BYTES = 256 * 1024
_RETRY_SECONDS = 0.05
_CONNECT_SECONDS = 5.0


class _Buffered:
    """A socket for paho: reads much at once, and writes what paho wrote when asked to."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._taken = b""
        self._offset = 0
        self._unsent = bytearray()

    def fill(self) -> None:
        """Read what is there, if all before it was used.  ``BlockingIOError``: nothing; ``OSError``: closed."""
        if self.pending():
            return
        try:
            self._taken = self._real.recv(_READ_BYTES)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        self._offset = 0
        if not self._taken:
            raise ConnectionResetError("the broker closed the connection")

    def pending(self) -> int:
        return len(self._taken) - self._offset

    def recv(self, size: int) -> bytes:
        if not self.pending():
            raise BlockingIOError
        data = self._taken[self._offset : self._offset + size]
        self._offset += len(data)
        return data

    def send(self, data: bytes) -> int:
        self._unsent += data
        return len(data)

    def flush(self) -> bool:
        """Write what paho wrote; True if all went out."""
        while self._unsent:
            try:
                # TLS repeats a refused write with the same bytes: they stay at the front until they are out.
                del self._unsent[: self._real.send(bytes(self._unsent[:16384]))]
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
        return True

    def fileno(self) -> int:
        return int(self._real.fileno())

    def setblocking(self, flag: bool) -> None:
        self._real.setblocking(flag)

    def close(self) -> None:
        self._real.close()


class _Session(Client):
    """paho over our buffered socket.  TLS is set up here: paho leaves a socket open whose handshake failed."""

    def __init__(self, port: int, tls: ssl.SSLContext | None, **settings: Any) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, **settings)
        self._address, self._context = ("127.0.0.1", port), tls

    def _create_socket(self) -> Any:
        real = socket.create_connection(self._address, timeout=_CONNECT_SECONDS)
        real.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is not None:
            real = self._context.wrap_socket(real, server_hostname=self._address[0])
        return _Buffered(real)


class Collector:
    """Subscribe to ``topic`` on 127.0.0.1 and note every message: connects again, and subscribes again, until stopped.

    The session is persistent (clean session off): a broker that keeps sessions delivers what came in the meantime.

    Args:
        port: the broker's port on 127.0.0.1.
        topic: a topic filter.
        key: what to note of a message, given topic and payload; the payload itself by default.  Messages with equal
            keys count as the same message, so the publisher has to make them different.
        tls: a context for TLS; None for plain TCP.
        protocol: of MQTT, "3.1.1" or "5".
        username, password: for the broker.
        on_key: called with each noted key on the collector's thread, outside its lock; keep it short.

    Thread safety: every method may be called from any thread.
    """

    def __init__(
        self,
        port: int,
        topic: str = "#",
        *,
        client_id: str = "collector",
        key: Callable[[str, bytes], Any] | None = None,
        tls: ssl.SSLContext | None = None,
        protocol: str = "3.1.1",
        username: str | None = None,
        password: str | None = None,
        on_key: Callable[[Any], None] | None = None,
    ) -> None:
        self._port, self._topic, self._client_id = port, topic, client_id
        self._key, self._tls, self._on_key = key, tls, on_key
        self._username, self._password = username, password
        self._is_version_5 = protocol == "5"
        self._changed = threading.Condition()  # guards everything in the next block
        self._arrivals: list[Any] = []
        self._first: dict[Any, None] = {}  # in order of first arrival
        self._awaited = 0
        self._connects = 0
        self._subscribed = False
        self._problem = ""
        # The thread's own.
        self._batch: list[Any] = []
        self._dup_flags = 0
        self._seen: set[Any] = set()
        self._resent = 0
        self._suback = False
        self._stop_reader, self._stop_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    # ---- life

    def start(self, timeout: float = 60.0) -> Collector:
        """Connect, and wait until the subscription stands.  Returns itself; ``TimeoutError`` says what went wrong."""
        self.begin()
        try:
            self.wait_subscribed(timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def begin(self) -> None:
        """Start, and wait for nothing."""
        self._thread.start()

    def stop(self) -> None:
        """Disconnect; the broker keeps the session.  What was noted stays readable."""
        if self._stop_writer.fileno() >= 0:
            self._stop_writer.close()
        if self._thread.ident is not None:
            self._thread.join(60)
        self._stop_reader.close()

    def __enter__(self) -> Collector:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- waiting

    def wait_subscribed(self, timeout: float = 60.0) -> None:
        """Wait until this connection's subscription is acknowledged: from then on nothing published is missed.

        After the restart of a broker that forgets sessions, publish only after this.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._subscribed, timeout):
                raise TimeoutError(f"not subscribed after {timeout} s: {self._problem or 'no answer'}")

    def wait_for(self, count: int, timeout: float) -> None:
        """Wait until ``count`` different messages have arrived; ``TimeoutError`` says how many have."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while len(self._first) < count:
                self._awaited = count
                rest = deadline - time.monotonic()
                if rest <= 0:
                    raise TimeoutError(
                        f"{len(self._first)} of {count} messages in {timeout} s ({len(self._arrivals)} deliveries, "
                        f"{self._connects} connections) {self._problem}"
                    )
                self._changed.wait(rest)

    # ---- what was noted

    @property
    def count(self) -> int:
        """Different messages so far."""
        with self._changed:
            return len(self._first)

    @property
    def duplicates(self) -> int:
        """Deliveries of a message beyond its first."""
        with self._changed:
            return len(self._arrivals) - len(self._first)

    @property
    def problem(self) -> str:
        """What went wrong last; "" if nothing has."""
        with self._changed:
            return self._problem

    @property
    def is_subscribed(self) -> bool:
        """A connection stands, and its subscription is acknowledged."""
        with self._changed:
            return self._subscribed

    @property
    def dup_flags(self) -> int:
        """Deliveries that the broker marked as repeated."""
        return self._dup_flags

    @property
    def resent(self) -> int:
        """Deliveries of a message beyond its first that the broker did not mark as repeated: it got them twice."""
        return self._resent

    @property
    def connects(self) -> int:
        """Connections that the broker accepted."""
        with self._changed:
            return self._connects

    def arrivals(self) -> list[Any]:
        """The keys of all deliveries, in order of arrival."""
        with self._changed:
            return list(self._arrivals)

    def first_deliveries(self) -> list[Any]:
        """The keys of all different messages, in the order of their first arrival."""
        with self._changed:
            return list(self._first)

    # ---- the thread

    def _run(self) -> None:
        while True:
            try:
                self._serve()
            except (OSError, ValueError) as error:
                self._note_problem(f"{type(error).__name__}: {error}")
            self._publish_batch()
            with self._changed:
                self._subscribed = False
            # Readable once stop() was called; until then this is the pause before the next try.
            if select.select([self._stop_reader], [], [], _RETRY_SECONDS)[0]:
                return

    def _note_problem(self, text: str) -> None:
        with self._changed:
            self._problem = text

    def _serve(self) -> None:
        client = _Session(
            self._port,
            self._tls,
            client_id=self._client_id,
            clean_session=None if self._is_version_5 else False,
            protocol=MQTTProtocolVersion.MQTTv5 if self._is_version_5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        if self._username is not None:
            client.username_pw_set(self._username, self._password)
        client.on_connect, client.on_subscribe = self._on_connect, self._on_subscribe
        client.on_message = self._on_message
        # With this set paho keeps what it has to write until loop_write() is called, instead of writing at once.
        client.on_socket_register_write = lambda client, userdata, open_socket: None
        stays: dict[str, Any] = {}
        if self._is_version_5:
            stays = {"clean_start": False, "properties": Properties(PacketTypes.CONNECT)}
            stays["properties"].SessionExpiryInterval = 3600
        client.connect_async("127.0.0.1", self._port, keepalive=30, **stays)
        self._suback = False
        try:
            client.reconnect()
            self._pump(client)
        finally:
            open_socket = client.socket()
            if open_socket is not None:
                open_socket.close()

    def _pump(self, client: Client) -> None:
        buffered: Any = client.socket()
        poll = select.poll()
        poll.register(self._stop_reader, select.POLLIN)
        housekeeping_at = time.monotonic() + 1
        everything_out = _write(client, buffered)
        while client.socket() is not None:
            poll.register(buffered, select.POLLIN | (0 if everything_out else select.POLLOUT))
            if any(descriptor == self._stop_reader.fileno() for descriptor, _ in poll.poll(1000)):
                client.disconnect()
                _write(client, buffered)
                return
            try:
                buffered.fill()
            except BlockingIOError:
                pass  # it woke for something else
            while buffered.pending() and client.socket() is not None:
                client.loop_read()
            self._publish_batch()
            if time.monotonic() > housekeeping_at:
                client.loop_misc()
                housekeeping_at = time.monotonic() + 1
            everything_out = _write(client, buffered)

    def _publish_batch(self) -> None:
        batch, self._batch = self._batch, []
        with self._changed:
            self._arrivals += batch
            self._first.update(dict.fromkeys(batch))
            if self._suback and not self._subscribed:
                self._subscribed = True
                self._changed.notify_all()
            if self._awaited and len(self._first) >= self._awaited:
                self._awaited = 0
                self._changed.notify_all()
        if self._on_key is not None:
            for key in batch:
                self._on_key(key)

    def _on_connect(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._note_problem(f"refused: {reason}")
            return
        with self._changed:
            self._connects += 1
        client.subscribe(self._topic, qos=1)

    def _on_subscribe(self, client: Client, userdata: Any, mid: int, reasons: list[Any], properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._note_problem(f"subscription refused: {reasons}")
        else:
            self._suback = True

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        payload = bytes(message.payload)
        key = payload if self._key is None else self._key(message.topic, payload)
        self._batch.append(key)
        self._dup_flags += message.dup
        self._resent += not message.dup and key in self._seen
        self._seen.add(key)


def _write(client: Client, buffered: _Buffered) -> bool:
    """Let paho write into the buffer, and the buffer to the network; True if all went out."""
    if client.want_write():
        client.loop_write()
    return buffered.flush()

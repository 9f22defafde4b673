"""The subscribe connection: receives at QoS 1, and acknowledges a message only after its handlers have returned.

The stream is parsed natively; messages go to the dispatcher thread, which runs the handlers in order and reports each
one back; acknowledgements leave in that order.  While the dispatcher's queue is full the socket is not read, so that
the broker holds what we cannot take, and the connection is kept alive all the same.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.subscribeoptions import SubscribeOptions

from cloudpubsub._connection import STRETCH_MS, Connection
from cloudpubsub._delivery import BATCH_MAX, PUBACK_BYTES, Handling, Pubacks
from cloudpubsub._dispatcher import Begun, Deliver, Dispatcher, Handler, Outcome
from cloudpubsub._ended import Ended, ended_by
from cloudpubsub._errors import ClosedError
from cloudpubsub._link import Receiver
from cloudpubsub._message import Message
from cloudpubsub._paho import BrokerLimits, Control, Stage, open_control
from cloudpubsub._refusal import reason_name
from cloudpubsub._rounds import exchange
from cloudpubsub._spool import CALL

if TYPE_CHECKING:
    from cloudpubsub._options import Options
    from cloudpubsub._topic import Matcher

__all__ = ["Subscriber"]

_PACKET_MAX = 16 << 20  # the largest message that is taken; a broker with a larger one is disconnected
_TAKE_SHARE = 4  # of the queue that is filled at once
_ACKNOWLEDGE = 1  # added to our eventfd, where a call adds CALL
_FILTERS_A_PACKET = 100
_SUBACK_FAILURE = 0x80
_RECEIVE_MAXIMUM = 65_535
_NO_SHARED, _NO_WILDCARDS = 0x9E, 0xA2  # reason codes of MQTT 5
_ONLY_NEW = 1  # Retain Handling: send what is retained only where the subscription is new
_NO_GENERATION = -1


class _Batch(Deliver):
    """Received messages on their way to the handlers that they have when their turn comes."""

    __slots__ = ("generation", "owner")

    def __init__(self, owner: Subscriber) -> None:
        super().__init__(matcher=owner._matcher, acks=owner._acks, wake=owner._call_to_acknowledge)
        self.owner = owner
        self.generation = owner._generation

    def run(self, handling: Handling) -> Begun | None:
        # When it has failed, each message behind is looked at, whether it is to be abandoned.
        return super().run(handling) if self.generation != self.owner._failed_generation else None

    def handlers_of(self, message: Message, packet_id: int) -> Sequence[Handler] | None:
        owner = self.owner
        if packet_id != 0 and self.generation == owner._failed_generation:
            return None  # it comes again, behind the one that failed
        handlers = owner._matcher.match(message.topic)
        if not handlers:
            owner.unmatched += 1
        return handlers

    def ended(self, message: Message, packet_id: int, outcome: Outcome, error: BaseException | None) -> None:
        try:
            if outcome is not Outcome.DONE and not self.owner._is_over_with(self, message, packet_id, outcome, error):
                packet_id = 0
        finally:
            # Even if the dead letter could not be kept: the messages behind it must not wait for it for ever.
            if packet_id != 0 and outcome is not Outcome.ABANDONED:
                self.acknowledge(packet_id)


class Subscriber(Connection):
    """Owner of the subscribe connection.  See `Connection` for the threads.

    `on_failed(message, error)` is called on the dispatcher thread for a message whose handlers failed for good.
    """

    def __init__(
        self,
        options: Options,
        matcher: Matcher[Handler],
        dispatcher: Dispatcher,
        on_up: Callable[[str], None],
        on_down: Callable[[str], None],
        on_failed: Callable[[Message, BaseException | None], None],
    ) -> None:
        self._receiver = Receiver(_PACKET_MAX, options.protocol_level)
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            super().__init__(
                options, "cloudpubsub-subscribe", options.subscribe_client_id, self._receiver, wake_fd, on_up, on_down
            )
        finally:
            os.close(wake_fd)  # nobody writes to it but `wake`, which has a descriptor of its own
        self._matcher = matcher
        self._dispatcher = dispatcher
        self._on_failed = on_failed
        self._limits = BrokerLimits()
        self._generation = 0  # of the connection; packet ids of an earlier one mean nothing
        self._take_max = max(1, min(BATCH_MAX, options.handler_queue // _TAKE_SHARE))
        self._held: _Batch | None = None  # taken from the stream, not yet by the dispatcher
        # To be sent on this connection, put in by the dispatcher thread.  Each connection has its own: an id of an
        # earlier one would acknowledge another message here.
        self._acks = Pubacks()
        # Of a connection that is to be closed, because a handler failed for good; set by the dispatcher thread.
        self._failed_generation = _NO_GENERATION
        self._failed_topic = ""
        self._is_behind = False  # the stream holds more than was taken
        # Guards the five fields below, which `subscribe` and `wait_subscribed` share with this thread.
        self._changed = threading.Condition()
        # Filters that got their first handler or lost their last one.  Which of the two, the matcher says when it is
        # their turn: two threads may bring their changes here in another order than they made them.
        self._requests: dict[str, None] = {}  # each once, in order
        self._waiting: set[str] = set()  # filters without a SUBACK on this connection
        self._refused: dict[str, int] = {}
        self._is_over = False
        self._packets: dict[int, list[str]] = {}  # SUBSCRIBE packets without SUBACK; this thread's own
        # UNSUBSCRIBE packets without UNSUBACK; this thread's own.
        self._unsubscribing: dict[int, str] = {}
        self._was_answered = False  # a SUBACK or UNSUBACK came on this connection
        self._unacknowledged = 0  # messages of this connection; this thread's own
        self._is_plain = False  # the socket is TCP alone
        #: Read by any thread.
        self.received = 0
        self.unmatched = 0

    # ---- for other threads ----

    def subscribe(self, topic_filter: str) -> None:
        """The filter has its first handler."""
        with self._changed:
            self._waiting.add(topic_filter)
            self._refused.pop(topic_filter, None)
            self._requests[topic_filter] = None
        self.wake()

    def unsubscribe(self, topic_filter: str) -> None:
        """The filter has no handler any more."""
        with self._changed:
            self._waiting.discard(topic_filter)
            self._refused.pop(topic_filter, None)
            self._requests[topic_filter] = None
            self._changed.notify_all()
        self.wake()

    def wait_subscribed(self, timeout_s: float | None) -> bool:
        """Until the broker has answered all.  Returns whether it has.  ClosedError if `stop` comes first."""
        with self._changed:
            answered = self._changed.wait_for(lambda: self._is_over or not self._waiting, timeout_s)
            if self._waiting and self._is_over:
                raise ClosedError("the client is closed")
            return answered

    def refused(self) -> dict[str, int]:
        """Filters that the broker refused, with its reason codes."""
        with self._changed:
            return dict(self._refused)

    def _call_to_acknowledge(self) -> None:
        """On the dispatcher thread: there are acknowledgements to send, and no more than that."""
        self._signal(_ACKNOWLEDGE)

    def stop(self, timeout_s: float) -> bool:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        return super().stop(timeout_s)

    # ---- connection ----

    def _open(self, address_index: int, timeout_s: float, on_stage: Callable[[Stage], None]) -> Control:
        addresses = self._options.addresses
        return open_control(
            self._options,
            addresses[address_index % len(addresses)],
            self._client_id,
            clean_session=self._options.clean_session,
            with_will=False,
            timeout_s=timeout_s,
            packet_max=_PACKET_MAX,
            receive_maximum=min(self._options.handler_queue, _RECEIVE_MAXIMUM),
            on_stage=on_stage,
            on_suback=self._note_suback,
            on_unsuback=self._note_unsuback,
        )

    def _has_carried(self) -> bool:
        return self._was_answered

    def _restart(self) -> None:
        self._receiver.restart()
        self._was_answered = False
        self._generation += 1
        self._held = None
        self._acks = Pubacks()
        self._is_behind = False
        self._packets.clear()
        self._unacknowledged = 0

    def _established(self, control: Control, limits: BrokerLimits) -> None:
        """Subscribe to everything again, whatever the broker says that it remembers."""
        with self._changed:  # in one: a subscription that comes now is either among these or a request for later
            filters = self._expect_all()
            # What has no handler any more may still be in the session that the broker kept.
            dropped = [name for name in self._requests if name not in self._waiting]
            self._requests.clear()
        if limits.maximum_qos < 1:
            self._log.log(logging.WARNING, "qos", "%s: the broker delivers at QoS 0 alone", self._name)
        self._limits = limits
        assert control.tap is not None
        self._is_plain = control.tap.tells_when_empty
        for topic_filter in dropped:
            self._send_unsubscribe(control, topic_filter)
        self._send_subscribe(control, filters, is_again=self._receiver.session_present)

    def _expect_all(self) -> list[str]:
        """No subscription is answered yet.  Returns all filters."""
        with self._changed:
            filters = list(self._matcher.filters())
            self._waiting = set(filters)
            return filters

    def _send_subscribe(self, control: Control, filters: list[str], *, is_again: bool = False) -> None:
        """`is_again`: the broker's session may have these subscriptions, and what is retained has come before."""
        wanted = [topic_filter for topic_filter in filters if not self._is_unavailable(topic_filter)]
        for start in range(0, len(wanted), _FILTERS_A_PACKET):
            some = wanted[start : start + _FILTERS_A_PACKET]
            if self._options.protocol == "5":
                options = SubscribeOptions(qos=1, retainHandling=_ONLY_NEW if is_again else 0)
                _, mid = control.subscribe([(topic_filter, options) for topic_filter in some])
            else:
                _, mid = control.subscribe([(topic_filter, 1) for topic_filter in some])
            if mid is not None:
                self._packets[mid] = some

    def _is_unavailable(self, topic_filter: str) -> bool:
        """Whether the broker said that it has no such subscriptions; it would end the connection for one."""
        code = 0
        if topic_filter.startswith("$share/") and not self._limits.shared_available:
            code = _NO_SHARED
        elif {"+", "#"} & set(topic_filter) and not self._limits.wildcards_available:
            code = _NO_WILDCARDS
        if code:
            self._note_answers([topic_filter], [code])
        return code != 0

    def _send_requests(self, control: Control) -> None:
        while True:
            with self._changed:
                if not self._requests:
                    return
                topic_filter = next(iter(self._requests))
                del self._requests[topic_filter]
                is_wanted = self._matcher.has(topic_filter)
                if is_wanted:
                    self._waiting.add(topic_filter)
                else:
                    self._waiting.discard(topic_filter)
                    self._changed.notify_all()
            if is_wanted:
                self._send_subscribe(control, [topic_filter])
            else:
                self._send_unsubscribe(control, topic_filter)

    def _send_unsubscribe(self, control: Control, topic_filter: str) -> None:
        _, mid = control.unsubscribe(topic_filter)
        if mid is not None:
            self._unsubscribing[mid] = topic_filter

    def _note_unsuback(self, mid: int) -> None:
        """Called by paho, on this thread."""
        self._was_answered = True
        self._unsubscribing.pop(mid, None)

    def _note_suback(self, mid: int, codes: list[int]) -> None:
        """Called by paho, on this thread."""
        self._was_answered = True
        self._note_answers(self._packets.pop(mid, []), codes)

    def _note_answers(self, filters: list[str], codes: list[int]) -> None:
        with self._changed:
            for topic_filter, code in zip(filters, codes, strict=False):
                self._waiting.discard(topic_filter)
                self._refused.pop(topic_filter, None)
                if code >= _SUBACK_FAILURE and self._matcher.has(topic_filter):
                    self._refused[topic_filter] = code
            self._changed.notify_all()
        for topic_filter, code in zip(filters, codes, strict=False):
            if code >= _SUBACK_FAILURE:
                why = reason_name(code, PacketTypes.SUBACK) if self._options.protocol == "5" else f"code {code:#04x}"
                self.last_error = f"subscription to {topic_filter!r} refused: {why}"
                self._log.log(logging.ERROR, self.last_error, "%s: %s", self._name, self.last_error)

    # ---- at a stretch: acknowledgements out, messages in ----

    def _rounds(self, control: Control, now_s: float) -> float:
        """What the connection's loop does, in fewer steps, while there is no more to do than exchange and wait."""
        assert control.tap is not None
        self._excuse_silence(now_s)
        idle_ms = self._idle_ms(now_s)
        until_s = math.inf
        while now_s < until_s and self._is_everyday(control):
            self._busy_since_s = None
            written, unsent, received, wakes, error = exchange(
                self._receiver, self._acks, control.tap.fileno(), self._own_wake_fd, idle_ms
            )
            self._busy_since_s = now_s = time.monotonic()
            until_s = min(until_s, now_s + STRETCH_MS / 1000)
            if written:
                self._alive.sent(now_s)
            self._unacknowledged -= (written + len(unsent)) // PUBACK_BYTES
            if received:
                self._alive.received(now_s)
                self._work_off(control)  # what came before the end, too
            if control.is_closed:
                break
            if error:
                raise OSError(error, os.strerror(error))
            if unsent:
                self._pending, self._pending_is_ping = memoryview(unsent), False
                control.tap.is_writing = True
            if wakes >= CALL:
                self._woken()
                break
            if not (written or received or wakes):
                break
        if control.is_closed:
            raise ended_by(self._inbound)
        return now_s

    def _is_everyday(self, control: Control) -> bool:
        return (
            self._is_plain
            and self._pending is None
            and not (self._stopping or control.is_closed)
            and self._wants_to_read()
            and not control.want_write()
        )

    # ---- out: acknowledgements ----

    def _next_bytes(self) -> memoryview | None:
        if not len(self._acks):
            return None
        packets = self._acks.take()
        self._unacknowledged -= len(packets) // PUBACK_BYTES
        return memoryview(packets)

    def _wrote(self, n: int) -> None:
        """Nothing is kept: a lost acknowledgement costs a duplicate."""

    def _may_sleep(self) -> bool:
        self._excuse_silence(time.monotonic())
        return not self._acks

    def _excuse_silence(self, now_s: float) -> None:
        if self._unacknowledged > 0:
            # A broker whose window to us is full may say nothing more, not even to a ping (rumqttd): it waits for us,
            # and not for longer than the handlers take.
            self._alive.received(now_s)

    def _is_drained(self) -> bool:
        return self._pending is None and not self._acks

    # ---- in: messages ----

    def _take(self) -> tuple[bytearray, bool]:
        room = self._dispatcher.room() if self._hand_over() else 0
        if room == 0:
            self._is_behind = True
            return bytearray(), False
        batch = _Batch(self)
        acknowledged, control, more = self._receiver.take(batch, self._take_max, room)
        self._is_behind = False
        if len(batch) > 0:
            self.received += len(batch)
            self._unacknowledged += acknowledged
            self._held = batch
            self._hand_over()
        return control, more and self._held is None

    def _hand_over(self) -> bool:
        """Give the dispatcher what waits for it.  Returns whether it has all."""
        if self._held is not None and self._dispatcher.put(self._held):
            self._held = None
        return self._held is None

    def _is_over_with(
        self, batch: _Batch, message: Message, packet_id: int, outcome: Outcome, error: BaseException | None
    ) -> bool:
        """On the dispatcher thread: a message did not end well.  Returns whether it is to be acknowledged."""
        if outcome is Outcome.ABANDONED:
            return False
        if packet_id != 0 and self._options.on_handler_failure == "disconnect":
            self._failed_topic = message.topic
            self._failed_generation = batch.generation
            self.wake()
            return False
        self._on_failed(message, error)
        return True

    def _wants_to_read(self) -> bool:
        return self._held is None and not self._is_behind

    def _check(self, now_s: float) -> None:
        if self._failed_generation == self._generation:
            raise Ended(f"a handler failed for good on topic {self._failed_topic!r}")

    def _lost(self) -> None:
        """The acknowledgements that are still to come are told apart by their generation."""
        self._expect_all()
        with self._changed:  # whether the broker has heard of these, nobody knows: the session may outlive the link
            self._requests.update(dict.fromkeys(self._unsubscribing.values()))
        self._unsubscribing.clear()

    def _woken(self) -> None:
        if self._control is None or not self.is_up:
            return
        self._send_requests(self._control)
        if (self._held is not None or self._is_behind) and self._hand_over():
            self._work_off(self._control)

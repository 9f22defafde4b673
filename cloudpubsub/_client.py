"""`Client`: what a program imports.  It puts the pieces together and holds none of their logic."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

from cloudpubsub._append import Producer, append
from cloudpubsub._closing import register, unregister
from cloudpubsub._dispatcher import Call, Dispatcher, Handler
from cloudpubsub._errors import (
    ClosedError,
    ConnectError,
    DeliveryFailed,
    ForkedError,
    TopicError,
    WaitTimeout,
    WrongThreadError,
)
from cloudpubsub._fields import check_seconds
from cloudpubsub._message import Health, Message, Recovery, Stats
from cloudpubsub._open import open_log, recovery_of
from cloudpubsub._options import Options
from cloudpubsub._properties import UserProperties, encode_user_properties
from cloudpubsub._topic import Matcher, check_filter
from cloudpubsub.dedupe import MessageId

__all__ = ["Client"]

_REFUSED_POSITION = 1 << 63
_DRAIN_SLICE_S = 0.1
_DRAIN_STALL_S = 2.0  # at close, give up on a link that acknowledges nothing for so long
_DRAIN_WITH_SPOOL_S = 1.0  # what is not sent then is safe on the disk
_DRAIN_WITHOUT_SPOOL = 0.7  # of the time that close() may take: what is not sent then is lost
_REASON_MAX = 1_000
_TTL_MAX_S = 1e11


class Client(Producer):
    """Reliable MQTT publishing and subscribing over a network that comes and goes.

    `publish` puts a message into a log of bounded memory with a disk behind it; a thread sends the log in order over a
    connection of its own, again and again until the broker has acknowledged each message.  Another thread and
    connection receive what is subscribed to.  Handlers and callbacks run on a third, the dispatcher.

    Args:
        broker: URL, or several in fail-over order: `mqtts://user:secret@broker.example:8883`.
        settings: Any field of `Options`; `CLOUDPUBSUB_*` environment variables fill in what is not given.  Or one
            keyword `options` with an `Options` object.

    Raises OptionError, SpoolLockedError, IdentityError, SpoolError.

    Thread safety: every method from any thread; `wait`, `flush` and `close` not from a handler or callback
    (WrongThreadError there).

    Example:
        >>> client = cloudpubsub.Client("mqtt://broker.example", client_id="gateway-17", spool="/var/lib/gateway/spool")
        >>> with client:
        ...     client.subscribe("gateway-17/cmd/#", print)
        ...     position = client.publish("gateway-17/temp", b"21.5")
        ...     client.wait(position, timeout=30)
    """

    def __init__(
        self, broker: str | Sequence[str] | None = None, *, options: Options | None = None, **settings: Any
    ) -> None:
        if options is not None and (broker is not None or settings):
            raise TypeError("give either options, or broker and settings")
        self.options = options = options if options is not None else Options.build(broker, settings)
        try:
            self._make_parts(options)
        except BaseException:
            if self._log is not None:
                self._log.close(1.0)
            raise
        register(self)

    def _make_parts(self, options: Options) -> None:
        # They bring paho, and it brings more than all the rest together: settings, `Spool` and the tools that look into
        # spools need none of it.  Here, so that nothing is left to be imported by a thread or at exit.
        from cloudpubsub._dead_letters import DeadLetters, dead_letters_bytes
        from cloudpubsub._publisher import Publisher
        from cloudpubsub._subscriber import Subscriber

        # A derived id follows the host name; the spool stays whose it was.
        self._log = open_log(options, identity=None if options.client_id_derived else options.client_id)
        #: What opening the spool found.
        self.recovery: Recovery = recovery_of(self._log)
        self._pid = os.getpid()
        self._may_block = self._is_elsewhere if options.on_full == "block" else None
        self._matcher: Matcher[Handler] = Matcher()
        self._ttl_ms = 0 if options.ttl is None else max(1, int(options.ttl * 1000))
        # Incarnation of the log: what ids begin with.
        self.spool_id: str = (self._log.spool_id if options.spool is not None else os.urandom(16)).hex()
        self._dead_letters = DeadLetters(
            options.spool,
            dead_letters_bytes(options.max_spool_bytes, options.max_payload_bytes),
            is_synced=options.durability == "power",
        )
        self._dispatcher = Dispatcher(
            options.handler_queue,
            handler_retries=options.handler_retries,
            on_drop=options.on_drop,
            on_room=self._room_in_dispatcher,
        )
        self._publisher = Publisher(
            options,
            self._log,
            self._dispatcher,
            self._went_up,
            self._went_down,
            self._dead_letters.add,
            f"{self.spool_id}/".encode(),
            self._payload_of if options.payload_hook is not None else None,
        )
        self._subscriber = Subscriber(
            options, self._matcher, self._dispatcher, self._went_up, self._went_down, self._handler_failed
        )
        # Guards the flags below; held only for looking and setting.
        self._lock = threading.Lock()
        self._started = False
        self._subscriber_started = False
        self._closed = False
        self._closing_thread = 0
        self._unsaved = 0
        self._received_dead = 0
        self._last_stats: Stats | None = None
        self._losses_told = self._lost()
        # Set when close() is through, for whoever called it a second time.
        self._all_over = threading.Event()

    # ---- life ----

    def start(self) -> None:
        """Start connecting; returns at once.  Further calls do nothing.

        With `connect_first` it waits until one of the addresses has accepted the connection, at most `connect_timeout`
        seconds for each and the pauses between them, and raises ConnectError (the client is closed then) if none has.
        """
        self._check_open()
        with self._lock:
            if self._closed:
                raise ClosedError("the client is closed")
            if self._started:
                return
            self._started = True
        self._dispatcher.start()
        self._publisher.start()
        self._start_subscriber()
        if self.options.connect_first:
            many = len(self.options.addresses)
            pauses_s = (many - 1) * self.options.reconnect_max
            self._publisher.first_attempt.wait(many * self.options.connect_timeout + pauses_s + 1)
            if not self._publisher.is_up:
                error = self._publisher.last_error or "timed out"
                self.close(1.0)
                raise ConnectError(f"{', '.join(address.url for address in self.options.addresses)}: {error}")

    def network_changed(self) -> None:
        """Try to connect at once, where a connection is down and waits before its next attempt.

        For whoever knows that the network is back: a modem's script, a hook of the operating system.  Does nothing for
        connections that are up; may be called from any thread, as often as you like, and returns at once.
        """
        self._check_open()
        self._publisher.hurry()
        self._subscriber.hurry()

    def _start_subscriber(self) -> None:
        """The subscribe connection opens with the first subscription."""
        with self._lock:
            if not self._started or self._subscriber_started or self._closed or not self._matcher.filters():
                return
            self._subscriber_started = True
        self._subscriber.start()

    def close(self, timeout: float = 10.0) -> int:
        """Send what can be sent, save the rest to the spool, and end all threads within `timeout` seconds.

        With a live link, messages are sent for up to a second.  Whatever is then not acknowledged is on the disk and is
        sent after the next start.  Without a spool there is no next start: then it waits for most of `timeout`, also
        for a link to come.  The handler that runs may end, and its message is acknowledged; no other is called.

        Returns how many messages could not be saved: 0 unless there is no spool, or the disk fails or hangs.  A second
        call waits for the first and returns the same.  Raises WrongThreadError in a handler or callback.
        """
        if self._pid != os.getpid():
            return 0  # a forked child holds nothing
        if self._dispatcher.is_current_thread():
            raise WrongThreadError("close() waits for the handlers, so a handler or callback cannot call it")
        check_seconds("timeout", timeout)
        with self._lock:
            is_first, self._closed = not self._closed, True
            if is_first:
                self._closing_thread = threading.get_ident()
        if not is_first and self._closing_thread == threading.get_ident():
            return self._unsaved  # a signal handler: the call that it interrupted goes on when it returns
        if not is_first:
            self._all_over.wait(max(0.0, timeout))
            return self._unsaved
        deadline_s = time.monotonic() + max(0.0, timeout)

        def share(part: float) -> float:
            return max(0.0, deadline_s - time.monotonic()) * part

        try:
            self._log.shut()
            self._drain(timeout)
            has_ended = self._publisher.stop(share(0.3))
            # In this order, so that the message of the last handler is acknowledged.
            self._dispatcher.end_deliveries(share(0.3))
            self._subscriber.stop(share(0.3))
            if has_ended:
                # What the ring brings to the disk may drop older messages: before the last look at what was lost.
                self._log.finish(share(0.5))
            self._publisher.report_losses()
            self._dispatcher.start()  # of a client that was never started: there may be drops to report
            if has_ended:
                self._publisher.report_rest(share(0.5))
            self._dispatcher.stop(share(0.5))
            self._last_stats = self._read_stats()
        finally:
            # Whatever interrupts the above (Ctrl-C): the threads end and the ring goes to the disk.
            for part in (self._publisher, self._subscriber, self._dispatcher):
                part.stop(0.0)
            self._unsaved = self._log.close(share(0.95))
            unregister(self)
            self._all_over.set()
        return self._unsaved

    def _drain(self, timeout_s: float) -> None:
        """Let the publisher send on for a while."""
        with_spool = self.options.spool is not None
        limit_s = min(_DRAIN_WITH_SPOOL_S, timeout_s / 4) if with_spool else timeout_s * _DRAIN_WITHOUT_SPOOL
        last, moved_s = -1, time.monotonic()
        deadline_s = moved_s + limit_s
        while self._publisher.is_alive and (now_s := time.monotonic()) < deadline_s:
            self._publisher.acked.clear()
            stats = self._log.stats()
            if stats["backlog_messages"] == 0 or (with_spool and not self._publisher.is_up):
                return
            if stats["backlog_messages"] != last or not self._publisher.is_up:
                last, moved_s = stats["backlog_messages"], now_s
            elif now_s - moved_s > _DRAIN_STALL_S:
                return
            self._publisher.acked.wait(min(_DRAIN_SLICE_S, deadline_s - now_s))

    def __enter__(self) -> Client:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- publishing ----

    def _publish_with(
        self,
        topic: str,
        payload: bytes | bytearray | memoryview | str,
        retain: bool,
        userdata: bytes | bytearray | memoryview,
        ttl: float | None,
        user_properties: UserProperties | None,
        wait: Literal["synced"] | None,
    ) -> int:
        """What `publish` does with a message that is more than topic and payload."""
        if wait not in (None, "synced"):
            raise ValueError(f'wait: {wait!r} is not allowed; "synced" or None')
        ttl_ms = self._ttl_ms
        if ttl is not None:
            check_seconds("ttl", ttl)
            if ttl <= 0:
                raise ValueError(f"ttl: {ttl!r} is not allowed; expected more than 0 seconds, or None")
            ttl_ms = max(1, int(min(ttl, _TTL_MAX_S) * 1000))
        properties = None if user_properties is None else encode_user_properties(user_properties)
        may_block = self._may_block is None or self._may_block()
        position = append(self._log, topic, payload, retain, userdata, properties, ttl_ms, may_block)
        if wait is None:
            return position
        if position >= _REFUSED_POSITION:
            raise DeliveryFailed(position, "full, newest dropped")
        self.wait_synced(position)
        return position

    def _is_elsewhere(self) -> bool:
        # A handler or callback that waited for room would stop the reports, and with them the acknowledgements that
        # make it: it gets SpoolFull at once.
        return not self._dispatcher.is_current_thread()

    def wait(self, position: int, timeout: float | None = None) -> None:
        """Wait until the message at `position` is acknowledged.

        Raises WaitTimeout after `timeout` seconds (None: no limit), DeliveryFailed if it ended without an
        acknowledgement, ClosedError if the client closes first, ValueError for a position that was never issued.
        """
        self._check_thread("wait")
        check_seconds("timeout", timeout, optional=True)
        if _REFUSED_POSITION <= position < _REFUSED_POSITION + 8 * self._log.stats()["refused"]:
            raise DeliveryFailed(position, self._log.outcome(position) or "full, newest dropped")
        if not 0 <= position < self._log.published():
            raise ValueError(f"position: {position} was never returned by publish()")
        self._log.wait_settled(position, timeout)
        reason = self._log.outcome(position)
        if reason is not None:
            raise DeliveryFailed(position, reason)

    def flush(self, timeout: float | None = None) -> int:
        """Wait until everything published so far is settled: acknowledged, or ended without.

        Returns how many messages have ended without an acknowledgement since the last `flush` (or since the client was
        made).  Raises WaitTimeout after `timeout` seconds, ClosedError.
        """
        self._check_thread("flush")
        check_seconds("timeout", timeout, optional=True)
        published = self._log.published()
        if published > 0:
            self._log.wait_settled(published - 1, timeout, True)
        with self._lock:
            lost = self._lost()
            told, self._losses_told = self._losses_told, lost
        return max(0, lost - told)  # what an estimate had counted too much may have been taken back

    def wait_synced(self, position: int, timeout: float | None = None) -> None:
        """Write the log up to and including the message at `position` to the disk and sync it.

        It survives a power cut then.  Raises WaitTimeout, SpoolError (also without a spool), ClosedError.
        """
        check_seconds("timeout", timeout, optional=True)
        if self.options.spool is None:
            raise ValueError("spool: without one nothing can be made durable")
        self._log.wait_synced(position, timeout)

    def flush_now(self, timeout: float | None = None) -> float:
        """Write all that is only in memory to the disk and sync it at once; for the interrupt of a failing supply.

        Returns how long it took, in seconds.  Whatever was published before survives a power cut then.  Raises
        WaitTimeout after `timeout` seconds, SpoolError (disk or limits refuse), ValueError without a spool.
        """
        began_s = time.monotonic()
        published = self._log.published()
        if published > 0:
            self.wait_synced(published - 1, timeout)
        return time.monotonic() - began_s

    def _lost(self) -> int:
        stats = self._log.stats()
        return int(stats["dropped"] + stats["dead_lettered"])

    def set_rate(self, *, messages: float | None = None, bytes: float | None = None) -> None:
        """From now on send at most so many messages, and bytes of packets, a second; None: there is no limit.

        Takes the place of `max_publish_rate` and `max_publish_bytes_rate`.  From any thread; returns at once.  Raises
        OptionError.
        """
        self._check_open()
        check = Options.check_setting
        rates = check("max_publish_rate", messages), check("max_publish_bytes_rate", bytes)
        self._publisher.messages_rate.rate, self._publisher.bytes_rate.rate = rates
        self._publisher.wake()

    # ---- subscribing ----

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Call `handler(message)` for messages whose topic matches; at QoS 1, acknowledged when it has returned.

        Returns at once, also offline and before `start`; `wait_subscribed` waits for the broker.  Subscriptions are
        made again after every reconnect.  Several handlers may have the same filter.  A handler that raises is called
        again up to `handler_retries` times, then `on_handler_failure` decides.

        Subscribe before `start` to whatever a session that the broker kept may bring: it comes as soon as the
        connection is there, and what matches no handler then is acknowledged and gone.

        Raises TopicError for a filter that MQTT does not allow, ClosedError, ForkedError.
        """
        self._check_open()
        check_filter(topic_filter)
        if not callable(handler):
            raise TypeError(f"handler: expected a callable, got {type(handler).__name__}")
        if self._matcher.add(topic_filter, handler):
            self._subscriber.subscribe(topic_filter)
        self._start_subscriber()

    def unsubscribe(self, topic_filter: str, handler: Handler | None = None) -> None:
        """Take back `handler`, or all of them, from a filter; the last one ends the subscription.

        It is not called any more for messages whose turn comes after this.  Raises KeyError if there is no such
        subscription, ClosedError, ForkedError.
        """
        self._check_open()
        if not self._matcher.has(topic_filter, handler):
            raise KeyError(topic_filter)
        if self._matcher.remove(topic_filter, handler):
            self._subscriber.unsubscribe(topic_filter)

    def wait_subscribed(self, timeout: float | None = None) -> None:
        """Wait until the broker has answered every subscription made so far, on the present or the next connection.

        Raises WaitTimeout; TopicError if the broker refused one; ClosedError if the client closes first.
        """
        self._check_thread("wait_subscribed")
        if not self._subscriber.wait_subscribed(timeout):
            raise WaitTimeout(f"not subscribed after {timeout} s")
        refused = self._subscriber.refused()
        if refused:
            raise TopicError(f"refused by the broker: {', '.join(sorted(refused))}")

    # ---- looking ----

    def stats(self) -> Stats:
        """Counters and state now; after `close`, as they were then.  Costs a few microseconds."""
        try:
            return self._last_stats or self._read_stats()
        except ClosedError:
            last = self._last_stats
            if last is None:
                raise
            return last  # closed in between

    def health(self, stuck_after: float = 30.0) -> Health:
        """Whether all threads are alive and none is stuck (at the same thing for `stuck_after` seconds), whether the
        storage works, and whether a connection is refused for a reason that does not pass by itself.

        For a watchdog: costs microseconds, waits for nothing, and may be called from any thread.
        """
        check_seconds("stuck_after", stuck_after)
        if self._closed:
            return Health(("the client is closed",))
        now_s = time.monotonic()
        problems = []
        threads: list[tuple[str, bool, float | None]] = [
            (name, part.was_started and not part.is_alive, part.busy_since_s)
            for name, part in (("publish", self._publisher), ("subscribe", self._subscriber))
        ]
        threads.append(("dispatcher", self._dispatcher.has_ended, self._dispatcher.busy_since_s))
        for name, has_ended, since_s in threads:
            if has_ended:
                problems.append(f"the {name} thread has ended")
            elif since_s is not None and now_s - since_s >= stuck_after:
                what = "a handler or callback runs" if name == "dispatcher" else f"the {name} thread is stuck"
                problems.append(f"{what} for {now_s - since_s:.0f} s")
        needs_restart = bool(problems)  # what comes below passes by itself, or not by a restart either
        stats = self.stats()
        if stats.storage not in ("ok", "memory"):
            problems.append(f"storage: {stats.storage}")
        for name, state in (("publish", stats.publish_link), ("subscribe", stats.subscribe_link)):
            if state not in ("up", "idle", "down"):
                problems.append(f"{name} connection: {state}: {stats.last_error}")
        return Health(tuple(problems), needs_restart)

    def _read_stats(self) -> Stats:
        s = self._log.stats()
        pub, sub = self._publisher, self._subscriber
        error = os.strerror(s["storage_error"]) if s["storage_error"] else ""
        return Stats(
            published=s["published"],
            published_bytes=s["published_bytes"],
            acked=s["acked"],
            acked_bytes=s["acked_bytes"],
            dropped=s["dropped"],
            dropped_bytes=s["dropped_bytes"],
            expired=s["expired"],
            dead_lettered=s["dead_lettered"],
            dead_lettered_bytes=s["dead_lettered_bytes"],
            backlog_messages=s["backlog_messages"],
            backlog_bytes=s["backlog_bytes"],
            drain_seconds=pub.drain.seconds(
                time.monotonic(), s["published"], s["published"] - s["backlog_messages"]
            ),
            resent=pub.resent,
            refused_by_broker=pub.refused,
            inflight=pub.inflight,
            oldest_age_seconds=s["oldest_age_seconds"],
            ring_used_bytes=s["ring_used_bytes"],
            spool_bytes=s["spool_bytes"],
            spool_segments=s["spool_segments"],
            spilled_bytes=s["spilled_bytes"],
            storage=f"failed: {error}" if s["storage"] == "failed" else s["storage"],
            damaged_ranges=s["damaged_ranges"],
            damaged_bytes=s["damaged_bytes"],
            uncertain=s["uncertain"],
            connected=pub.is_up,
            publish_link=pub.state,
            subscribe_link=sub.state,
            connects=pub.connects + sub.connects,
            reconnects=max(0, pub.connects - 1) + max(0, sub.connects - 1),
            last_error=pub.last_error or sub.last_error,
            unknown_acks=pub.unknown_acks,
            malformed=pub.malformed + sub.malformed,
            received=sub.received,
            unmatched=sub.unmatched,
            dead_lettered_inbound=self._received_dead,
            handler_errors=self._dispatcher.handler_errors,
            callback_errors=self._dispatcher.callback_errors,
        )

    # ---- called by the threads ----

    def _went_up(self, url: str) -> None:
        if self.options.on_connect is not None:
            self._dispatcher.put_always(Call(self.options.on_connect, url))

    def _went_down(self, reason: str) -> None:
        if self.options.on_disconnect is not None:
            self._dispatcher.put_always(Call(self.options.on_disconnect, reason))

    def _room_in_dispatcher(self) -> None:
        if self._publisher.waits_for_room:
            self._publisher.wake()
        self._subscriber.wake()

    def _handler_failed(self, message: Message, error: BaseException | None) -> None:
        try:
            reason = f"handler raised {type(error).__name__}: {error}"[:_REASON_MAX]
        except Exception:  # its __str__ is user code too
            reason = f"handler raised {type(error).__name__}"
        self._dead_letters.add(message, reason)
        self._received_dead += 1
        if self.options.on_dead_letter is not None:
            self._dispatcher.call(self.options.on_dead_letter, message, reason)

    def _payload_of(self, message: Message, end: int, after: int) -> bytes:
        assert self.options.payload_hook is not None and message.position is not None
        try:
            payload = self.options.payload_hook(message, MessageId(self.spool_id, message.position, end, after))
            if not isinstance(payload, bytes):
                raise TypeError(f"payload_hook returned {type(payload).__name__}; expected bytes")
            return payload
        except BaseException as exc:
            self._dispatcher.note_error(self.options.payload_hook, exc)
            return message.payload

    # ---- checks ----

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise ForkedError("opened before a fork: the child process must open a client of its own")
        if self._closed:
            raise ClosedError("the client is closed")

    def _check_thread(self, method: str) -> None:
        self._check_open()
        if self._dispatcher.is_current_thread():
            raise WrongThreadError(f"{method}() cannot be called by a handler or callback: it would wait for itself")

"""The publish connection: sends the log, in order, and settles what the broker acknowledges.

Messages never become Python objects on their way out: the `Sender` frames batches of records natively into one buffer,
this thread hands the buffer to the socket, and the acknowledgements go natively back into the log.  The session is
clean: the broker keeps nothing for a publisher, the log is the session.

What cannot be delivered is another's to judge: `Refusals` (the broker said no), `Suspicion` (it hangs up).
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import struct
import termios
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloudpubsub._backoff import Backoff
from cloudpubsub._connection import STRETCH_MS, Connection
from cloudpubsub._dispatcher import Call, CallEach, Dispatcher
from cloudpubsub._ended import Ended, Refused, ended_by
from cloudpubsub._errors import ClosedError, SpoolError
from cloudpubsub._message import Message
from cloudpubsub._notices import Notices
from cloudpubsub._overdue import Overdue
from cloudpubsub._paho import BrokerLimits, Control, Stage, open_control
from cloudpubsub._rate import Bucket, Drain
from cloudpubsub._refusal import Refusals, Verdict, reason_name
from cloudpubsub._rounds import rounds
from cloudpubsub._sender import ANY_BYTES, Sender
from cloudpubsub._suspicion import Suspicion

if TYPE_CHECKING:
    from cloudpubsub._options import Options
    from cloudpubsub._spool import Log

__all__ = ["Publisher"]

_PACKET_MAX = 1 << 20  # what a broker has to say to a publisher is tiny
_PUBLISH_MIN = 8  # bytes of the smallest PUBLISH of QoS 1: a topic of one letter and no payload
_ANY_MESSAGES = 0xFFFFFFFF
_READ_RETRY_S = 1.0
_BACKLOG_S = 10.0  # how old it is when a connection comes up
_BACKLOGS_MAX = 6  # CPS_AHEAD_MAX
_UNSENT_BYTES = 16 * 1024  # that the kernel may hold before it sends them
# With much in flight acknowledgements are left alone for so long.
_PATIENCE_S = 0.0005
_REFILL_S = 0.002  # of silence, after which a window is refilled that is not yet an eighth empty
_QUEUE_S = 0.005  # that what was seen of the kernel's queue may be old
_AHEAD_MS = 1_000  # that what a thread noted of the clock may seem to be in the future
_REPORTED = 1024  # acknowledged messages that the Sender reports at once
# Reasons of a DISCONNECT that no single message gives: busy, shutting down, keep-alive, taken over, Receive Maximum,
# rate, quota, administrative, another server (twice), connection rate, maximum connect time.
_NOBODYS_FAULT = {0x89, 0x8B, 0x8D, 0x8E, 0x93, 0x96, 0x97, 0x98, 0x9C, 0x9D, 0x9F, 0xA0}


def _boot_ms() -> int:
    """The clock by which messages are stamped and expire; it goes on while the machine sleeps."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000)


class Publisher(Connection):
    """Owner of the publish connection and only reader of the log.  See `Connection` for the threads.

    `keep_dead(message, reason)` is called on this thread for a message that the broker will not take, before it is
    settled.
    """

    def __init__(
        self,
        options: Options,
        log: Log,
        dispatcher: Dispatcher,
        on_up: Callable[[str], None],
        on_down: Callable[[str], None],
        keep_dead: Callable[[Message, str], None],
        id_prefix: bytes,
        hook: Callable[[Message, int, int], bytes] | None = None,
    ) -> None:
        # Per cent of what is sent; 0: there is one stream.
        self._live_share = {"strict": 0, "live_first": 100, "share": options.live_share}[options.order]
        self._sender = Sender(
            log,
            options.max_inflight,
            options.max_inflight_bytes,
            _PACKET_MAX,
            options.protocol_level,
            id_prefix,
            options.message_ids,
            hook,
            self._live_share,
        )
        super().__init__(
            options, "cloudpubsub-publish", options.client_id, self._sender, log.wake_fd, on_up, on_down
        )
        self._spool_log = log
        self._dispatcher = dispatcher
        self._keep_dead = keep_dead
        self._notices = Notices(log, dispatcher, self._log)
        self._reports = options.on_publish is not None
        self._held: CallEach | None = None  # a report for which the dispatcher had no room
        self._oldest: int | None = None  # position of the oldest message in flight,
        self._oldest_s = 0.0  # and when it was framed
        self._overdue = Overdue(options.ack_timeout)
        self._has_swept = False
        self._read_again_s = 0.0
        self._queue_noted_s = -math.inf
        self._was_acked = False  # on this connection
        self._was_established = False
        self._is_plain = False  # the socket is TCP alone, and messages go as they are
        self._window = 0  # messages in flight that options and broker allow
        # A full window is refilled by the eighth, in one packet of the network rather than in fifty; or when some time
        # is over: perhaps the broker waits for more, as we do.
        self._full = 0  # messages that were in flight when it was full; 0: it was not, or is small
        self._refill_by_s = 0.0
        self._waits_to_refill = False  # that, and nothing else, is why nothing is sent
        self._limits = BrokerLimits()
        #: Messages and bytes a second; the rates may be set by any thread.
        self.messages_rate = Bucket(options.max_publish_rate)
        self.bytes_rate = Bucket(options.max_publish_bytes_rate)
        self._refusals = Refusals()
        self._refused_pause = Backoff(options.reconnect_min, options.reconnect_max)
        self._again_s: float | None = None  # sending stands still for a refused message, and goes on then
        self._suspicion = Suspicion()
        self._blamed: list[int] = []  # with two streams: the oldest in flight of each when the link dropped last
        self._control_s: float | None = None  # since when a message stands in for the suspect
        self._control_acked_s: float | None = None
        self._sleep_until_s = math.inf  # for what holds sending up
        self.drain = Drain()
        #: Set whenever acknowledgements came.
        self.acked = threading.Event()
        #: Read by any thread.
        self.inflight = 0
        self.resent = 0
        self.unknown_acks = 0
        self.refused = 0

    @property
    def busy_since_s(self) -> float | None:
        since_s, at_work_ms, now_s = self._busy_since_s, self._sender.at_work_ms, time.monotonic()
        if since_s is None or at_work_ms == 0:
            return None
        age_ms = (int(now_s * 1000) - at_work_ms + _AHEAD_MS) % (1 << 32) - _AHEAD_MS
        return max(since_s, now_s - age_ms / 1000)

    # ---- connection ----

    def _open(self, address_index: int, timeout_s: float, on_stage: Callable[[Stage], None]) -> Control:
        addresses = self._options.addresses
        return open_control(
            self._options,
            addresses[address_index % len(addresses)],
            self._client_id,
            clean_session=True,
            with_will=True,
            timeout_s=timeout_s,
            packet_max=_PACKET_MAX,
            on_stage=on_stage,
        )

    def _has_carried(self) -> bool:
        return self._was_acked

    def _restart(self) -> None:
        self._sender.restart()
        self._was_acked = False
        self._full = 0
        self._again_s = None
        self._control_s = self._control_acked_s = None
        self._overdue.restart(time.monotonic())
        self._note_inflight()

    def _established(self, control: Control, limits: BrokerLimits) -> None:
        if limits.maximum_qos < 1:
            raise Refused("the broker takes no QoS 1, without which nothing is certain to arrive")
        if limits.maximum_packet_size < _PUBLISH_MIN:  # then it is not the messages that are too large
            size = limits.maximum_packet_size
            raise Refused(f"the broker's Maximum Packet Size of {size} bytes is too small for any message")
        self._limits = limits
        self._window = min(self._options.max_inflight, limits.receive_maximum)
        self._sender.broker(
            limits.receive_maximum, limits.maximum_packet_size, limits.topic_alias_maximum, limits.retain_available
        )
        if self._live_share:
            self._part_streams(control)
        if self._suspicion.is_control:
            self._begin_control()
        self._narrow()
        assert control.tap is not None
        looked_at = self._reports or self._options.payload_hook is not None or self._live_share > 0
        self._is_plain = control.tap.tells_when_empty and not looked_at
        self._was_established = True
        self._spool_log.link(True)

    def _part_streams(self, control: Control) -> None:
        """What is published from now on is not to wait for a long backlog."""
        if control.tap is not None:
            control.tap.limit_unsent(_UNSENT_BYTES)  # else live data waits there, behind the backlog
        # What is suspected or refused may be of the live stream, and is not to become a part of the backlog.
        may_begin = self._suspicion.suspect is None and not self._refusals
        if self._sender.split(int(_BACKLOG_S * 1000), may_begin):
            self._log.log(
                logging.WARNING, "split", "%s: there are backlogs of %d outages: that of one more is sent in order",
                self._name, _BACKLOGS_MAX,
            )  # fmt: skip

    def _lost(self) -> None:
        try:
            if self._was_established:
                self._was_established = False
                self._suspect()
            # Nothing is in flight without a link, and may be dropped where that is the policy.
            self._restart()
            self._spool_log.link(False)
        except ClosedError:
            pass  # closed while we hung; there is nothing to tell any more

    def _idle(self) -> bool:
        """While there is no link: what expires makes room."""
        try:
            if not self._has_swept or self._spool_log.ttl_seen:
                self._has_swept = True
                if self._sender.expire(_boot_ms()):
                    self.report_losses()
                    return True
        except (ClosedError, SpoolError):
            pass
        return False

    def _rounds(self, control: Control, now_s: float) -> float:
        # One after the other: the connection's loop asks the system several times, each time giving the GIL away, and
        # beside a busy thread it gets it back only after 5 ms.
        while self._is_everyday(now_s) and not control.want_write() and not self._alive.ping_is_due(now_s):
            now_s, is_over = self._stretch(control, now_s)
            if is_over:
                break
            self._check_alive(now_s)
        return now_s

    def _stretch(self, control: Control, now_s: float) -> tuple[float, bool]:
        """Returns the time, and whether there is something that only the connection's loop knows what to do with."""
        assert control.tap is not None
        written, received, settled, queued, error, is_called, is_over = rounds(
            self._sender, control.tap.fileno(), self._own_wake_fd, STRETCH_MS, self._idle_ms(now_s),
            int(_PATIENCE_S * 1e6),
        )  # fmt: skip
        now_s = time.monotonic()
        if written:
            self._alive.sent(now_s)
            self._overdue.wrote(written, now_s)
        if received:
            self._alive.received(now_s)
        self._overdue.queue(queued, now_s)
        self._queue_noted_s = now_s
        if self._sender.has_unsent():
            self._pending, self._pending_is_ping = self._sender.unsent(), False
            control.tap.is_writing = True
        if self._sender.unsendable is not None:
            self._bury_unsendable(*self._sender.unsendable)
        self._note_inflight(settled > 0)
        if settled:
            self._note_acked()
        if is_called:
            self._woken()
        if self._inbound.waiting_bytes():
            self._work_off(control)  # what the broker said before the end, too
        if control.is_closed:
            raise ended_by(self._inbound)
        if error:
            raise OSError(error, os.strerror(error))
        return now_s, is_over

    def _is_everyday(self, now_s: float) -> bool:
        """Whether nothing that is sent or acknowledged now needs to be looked at one by one, or held back."""
        return (
            self._is_plain
            and self._pending is None
            and not (self._stopping or self._notices.wait or self._refusals or self._suspicion.is_watching)
            and self._again_s is None
            and self._control_s is None
            and now_s >= self._read_again_s
            and self.messages_rate.rate is None
            and self.bytes_rate.rate is None
        )

    # ---- out ----

    def _next_bytes(self) -> memoryview | None:
        now_s = time.monotonic()
        self._waits_to_refill = False
        if self._stopping or self._notices.wait or now_s < self._read_again_s or not self._may_send(now_s):
            return None
        if self._live_share:
            self._focus()
        if self.inflight > self._full - self._full // 8 > 0 and now_s < self._refill_by_s:
            self._waits_to_refill = True
            return None
        messages, size = self.messages_rate.available(now_s), self.bytes_rate.available(now_s)
        if messages < 1 or size <= 0:
            return None
        room = _ANY_MESSAGES if messages == math.inf else int(messages)
        if self._control_s is not None:
            room = 1
        before = self._sender.framed_bytes
        try:
            framed = self._sender.frame(
                int(now_s * 1000), _boot_ms(), room, ANY_BYTES if size == math.inf else max(1, int(size))
            )
        except SpoolError as exc:
            self._read_again_s = now_s + _READ_RETRY_S
            self._log.log(logging.ERROR, "read", "the spool cannot be read (tried again every second): %s", exc)
            return None
        self.messages_rate.take(framed)
        self.bytes_rate.take(self._sender.framed_bytes - before)
        if self._sender.unsendable is not None:
            self._bury_unsendable(*self._sender.unsendable)
        self._note_inflight()
        self._full = self.inflight if self._sender.window_full and self._sender.has_much_in_flight() else 0
        self._refill_by_s = now_s + _REFILL_S
        if self._control_s is not None and self._control_acked_s is None and self.inflight == 0:
            self._suspicion.give_up_control()  # there is no other to stand in for the suspect
            self._end_control()
        return self._sender.unsent() if self._sender.has_unsent() else None

    def _focus(self) -> None:
        """While a message is suspected or refused, its stream alone is sent, so that it comes to its turn."""
        position = None
        if self._suspicion.is_watching or self._refusals:
            self._note_fronts()  # what was dropped moves them too, and nothing else may come to tell
            position = self._suspicion.suspect
            if position is None:
                position = self._refusals.newest
        self._sender.focus(position, self._control_s is not None)

    def _may_send(self, now_s: float) -> bool:
        """Whether something new may be sent, for all that is known of refused and suspected messages."""
        if self._again_s is not None:
            if self.inflight > 0 or now_s < self._again_s:
                return False
            self._again_s = None
            self._send_again()
        if self._control_s is None:
            return True
        if self._control_acked_s is not None:
            if now_s < self._control_acked_s + self._poison_window_s():
                return False
            self._suspicion.acquit()
        else:
            return self.inflight == 0
        self._end_control()
        return True

    def _send_again(self) -> None:
        """From the oldest unsettled message on."""
        self._sender.again()
        self._overdue.restart(time.monotonic())
        self._note_inflight()

    def _wrote(self, n: int) -> None:
        self._sender.sent(n)
        self._overdue.wrote(n, time.monotonic())

    def _may_sleep(self) -> bool:
        if self._stopping or self._notices.wait:
            return True
        if self._is_everyday(time.monotonic()):
            return False  # it is `_rounds` that waits
        next_send_s = self._next_send_s()
        if next_send_s > time.monotonic():
            self._sleep_until_s = next_send_s
            return True
        # The window was full when it was last looked at; only what is in flight can wake us.
        return (self._sender.window_full and self.inflight > 0) or self._sender.arm()

    def _next_send_s(self) -> float:
        """When sending may go on, where something other than the window and the log holds it up."""
        times = [self._read_again_s, self.messages_rate.due_s(), self.bytes_rate.due_s(1.0)]
        if self._again_s is not None:
            times.append(math.inf if self.inflight > 0 else self._again_s)
        if self._control_acked_s is not None:
            times.append(self._control_acked_s + self._poison_window_s())
        elif self._control_s is not None and self.inflight > 0:
            times.append(math.inf)
        return max(times)

    def _patience_s(self) -> float:
        return _PATIENCE_S if self._sender.has_much_in_flight() else 0.0

    def _next_deadline_s(self) -> float | None:
        times = [math.inf]
        if self._oldest is not None and self._wants_to_read():
            self._note_queue(time.monotonic())
            due_s = self._overdue.due_s(self._oldest_s)
            # While the peer's TCP has not taken it, nothing tells us when it does: look now and then.
            times.append(due_s if due_s < math.inf else time.monotonic() + self._options.ack_timeout / 4)
        # What `_may_sleep` found a moment ago, even if it has passed since.
        times.append(self._sleep_until_s)
        self._sleep_until_s = math.inf
        if self._waits_to_refill and self.inflight < self._full:
            times.append(self._refill_by_s)
        first_s = min(times)
        return None if first_s == math.inf else first_s

    def _is_drained(self) -> bool:
        return self.inflight == 0 and self._pending is None

    # ---- in ----

    def _take(self) -> tuple[bytearray, bool]:
        if self._held is not None and self.is_up:
            return bytearray(), False
        reported, settled, control = self._sender.take(self._reports)
        self._note_inflight(settled > 0)
        if settled:
            self._note_acked()
        for refusal in self._sender.take_refusals():
            self._note_refused(*refusal)
        if reported:
            assert self._options.on_publish is not None
            self._held = CallEach(self._options.on_publish, reported)
            self._report_held()
        return control, self._reports and settled >= _REPORTED and self._held is None

    def _note_acked(self) -> None:
        now_s = time.monotonic()
        self._was_acked = True
        self._refill_by_s = now_s + _REFILL_S
        self._overdue.acked(now_s)
        self.acked.set()
        if self.drain.is_due(now_s):
            self._note_drain(now_s)
        if self._control_s is not None and self._control_acked_s is None:
            self._control_acked_s = now_s
        if self._again_s is None:
            self._refused_pause.reset()
        if self._suspicion.is_watching or self._refusals:
            self._note_fronts()

    def _note_fronts(self) -> None:
        def front(position: int) -> int:
            return self._sender.front(position)[0]

        self._refusals.moved(front)
        self._suspicion.moved(front)
        self._narrow()

    def _note_drain(self, now_s: float) -> None:
        stats = self._spool_log.stats()
        published, backlog = stats["published"], stats["backlog_messages"]
        left_s = self.drain.seconds(now_s, published, published - backlog)
        if self.drain.covers(now_s) and backlog > self._window and left_s == math.inf:
            self._log.log(
                logging.WARNING, "drain", "%s: the backlog of %d messages does not shrink", self._name, backlog
            )
        self.drain.note(now_s, published, published - backlog)

    @property
    def waits_for_room(self) -> bool:
        """Whether the dispatcher had none for a report.  Read by any thread."""
        return not self._wants_to_read()

    def _report_held(self) -> bool:
        """Give the dispatcher the report that waits.  Returns whether none waits now."""
        if self._held is not None and self._dispatcher.put(self._held):
            self._held = None
        return self._held is None

    def _wants_to_read(self) -> bool:
        return self._held is None and not self._notices.wait

    def _check(self, now_s: float) -> None:
        if self._oldest is None or not self._wants_to_read():
            return
        self._note_queue(now_s)
        if now_s >= self._overdue.due_s(self._oldest_s):
            raise Ended(f"no acknowledgement for {self._options.ack_timeout:g} s")

    def _note_queue(self, now_s: float) -> None:
        """What of ours the peer's TCP has not acknowledged, with TLS's own bytes."""
        if self._control is None or self._control.tap is None or not self._overdue.waits:
            return
        if now_s < self._queue_noted_s + _QUEUE_S:
            return
        try:
            answer = fcntl.ioctl(self._control.tap.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        except OSError:
            answer = b"\0\0\0\0"  # not a socket that can tell: what was written counts as taken
        self._overdue.queue(struct.unpack("i", answer)[0], now_s)

    def _note_inflight(self, was_acked: bool = False) -> None:
        self.inflight, self._oldest, oldest_ms, _ = self._sender.inflight()
        self._oldest_s = oldest_ms / 1000
        self._overdue.oldest(self._oldest, time.monotonic(), was_acked)
        self.resent = self._sender.resent
        self.unknown_acks = self._sender.unknown_acks()

    # ---- what the broker will not take ----

    def _note_refused(self, position: int, code: int, said: str) -> None:
        self.refused += 1
        reason = reason_name(code) + (f": {said}" if said else "")
        verdict = self._refusals.judge(position, code)
        self._log.log(
            logging.WARNING, f"refused {code}", "%s: the broker refused the message at position %d: %s; %s",
            self._name, position, reason, "it is sent again" if verdict is Verdict.AGAIN else "it is given up",
        )  # fmt: skip
        self._narrow()
        if verdict is Verdict.DEAD:
            self._bury(position, f"refused by the broker: {reason}")
        elif self._again_s is None:
            self._again_s = time.monotonic() + self._refused_pause.next_s()

    def _bury_unsendable(self, position: int, why: str) -> None:
        if why == "retained":
            reason = "retained, and the broker keeps no retained messages"
        else:
            reason = f"larger than the broker's Maximum Packet Size of {self._limits.maximum_packet_size} bytes"
        self._log.log(logging.WARNING, reason, "%s: the message at position %d: %s", self._name, position, reason)
        self._bury(position, reason)

    def _bury(self, position: int, reason: str) -> bool:
        """The message at `position`, which is held or in flight, goes to the dead letters.

        False: it cannot be read now, so it stays in the log and is tried again; if it is damaged, reading will tell.
        """
        message = self._spool_log.look(position)
        if message is None:
            self._log.log(logging.ERROR, "bury", "the message at position %d cannot be read now, and stays", position)
            if self.is_up and self._again_s is None:
                self._again_s = time.monotonic() + self._refused_pause.next_s()
            return False
        self._keep_dead(message, reason)
        if self._options.on_dead_letter is not None:
            self._notices.add(Call(self._options.on_dead_letter, message, reason))
        self._sender.end(position)
        self.acked.set()  # `close` may wait for the last one
        return True

    def _poison_window_s(self) -> float:
        return self._options.poison_window or 0.0

    def _begin_control(self) -> None:
        self._sender.hold(1 + self._suspicion.skipped)
        self._control_s = time.monotonic()

    def _end_control(self) -> None:
        self._control_s = self._control_acked_s = None
        self._send_again()

    def _narrow(self) -> None:
        """What was refused is tried alone, so that as few as can be overtake it."""
        limit = 1 if self._refusals else self._suspicion.limit
        self._sender.limit(self._window if limit is None else min(limit, self._window))

    def _suspect(self) -> None:
        """The link was lost: does a message in flight have to do with it?"""
        if self._options.poison_window is None or self._stopping:
            return
        self._note_inflight()
        # Where it was we who gave the link up, or the broker says what else it was, no message is to blame.
        hung_up = self._was_closed and self._inbound.disconnect not in _NOBODYS_FAULT
        soon = hung_up and time.monotonic() - self._oldest_s < self._options.poison_window
        oldest = self._oldest
        if self._live_share:
            # Of two streams, whatever is to blame is the oldest in flight of its own each time.
            candidates = self._sender.oldest()
            again = [position for position in candidates if position in self._blamed]
            self._blamed = candidates
            if again and oldest not in again:
                oldest = again[-1]
        sent_end = 0 if oldest is None else self._sender.front(oldest)[1]
        culprit = self._suspicion.dropped(oldest, sent_end, self.inflight, soon)
        if culprit is None:
            return
        reason = "the broker hangs up whenever it is sent, and takes others"
        self._log.log(
            logging.ERROR, "poison", "%s: the message at position %d is given up: %s", self._name, culprit, reason
        )
        if self._bury(culprit, reason):
            self._suspicion.convicted()

    # ---- on request ----

    def _woken(self) -> None:
        wanted_to_read = self._wants_to_read()
        if self._held is not None and self._report_held() and self._control is not None:
            self._work_off(self._control)  # what waited behind the report
        self.report_losses()
        if not wanted_to_read:
            self._overdue.read_again(time.monotonic())

    def report_losses(self) -> None:
        """Tell what there is to tell since the last call; see `Notices`."""
        self._notices.give()

    def report_rest(self, timeout_s: float) -> None:
        """When the thread has ended: what still waits to be told, at most `timeout_s` seconds."""
        self._notices.give_rest(timeout_s)

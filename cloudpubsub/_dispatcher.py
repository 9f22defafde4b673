"""The one thread on which handlers and callbacks run.

Network threads put work in and never wait for it.  The queue is bounded: a network thread that finds it full stops
reading and is told when there is room again.  No lock is held while user code runs, nothing that user code raises ends
the thread, and everything it raises is logged (not more often than once a minute each) and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

from cloudpubsub._delivery import Batch, Handling
from cloudpubsub._errors import WrongThreadError
from cloudpubsub._message import Drop, Message
from cloudpubsub._report import DropReports, RateLimitedLog

__all__ = ["Call", "CallEach", "Deliver", "Dispatcher", "Handler", "Outcome", "Work"]

_RETRY_DELAY_MAX_S = 2.0
_ALWAYS_MAX = 1_000  # changes of state that may wait beyond the capacity


Handler = Callable[[Message], object]
#: Handlers of a message, which of them is next, and what that one raised when it was tried.
Begun = tuple[Sequence[Handler], int, BaseException | None]


class Outcome(Enum):
    """How a delivery ended."""

    #: Every handler returned (also when there was none).
    DONE = "done"
    #: A handler raised at the first try and at every further one.
    FAILED = "failed"
    #: Some handler was not called, or not to its end: the dispatcher stopped first, or `begin` said that nobody wants
    #: the message any more.  Not to be acknowledged.
    ABANDONED = "abandoned"


class Call:
    """Call a callback once; what it raises is logged and counted."""

    __slots__ = ("args", "fn")
    weight = 1

    def __init__(self, fn: Callable[..., object], *args: object) -> None:
        self.fn = fn
        self.args = args


class CallEach:
    """Call a callback once for each of several values, in order; counts as so many items."""

    __slots__ = ("fn", "values", "weight")

    def __init__(self, fn: Callable[[Any], object], values: Iterable[object]) -> None:
        self.fn = fn
        self.values: Sequence[object] = tuple(values)
        self.weight = max(1, len(self.values))


class Deliver(Batch):
    """Messages to be given to their handlers, one after the other.

    A handler that raises is tried again, the others are not.  For every message of what `put` accepted that `run` has
    not seen to the end, `ended` is called once, on the dispatcher thread and in order; only what a `stop` that ran out
    of time abandons is reported on the thread that stopped.  It must be quick.
    """

    __slots__ = ()

    def handlers_of(self, message: Message, packet_id: int) -> Sequence[Handler] | None:
        """On the dispatcher thread, when the turn of this message has come: its handlers, or None to abandon it."""
        raise NotImplementedError

    def ended(self, message: Message, packet_id: int, outcome: Outcome, error: BaseException | None) -> None:
        """How it ended; `error` is the last exception that a handler raised."""
        raise NotImplementedError


Work = Call | CallEach | Deliver


class Dispatcher:
    """A bounded queue and the daemon thread that works it off.

    Args:
        capacity: Messages and callbacks that may wait, by weight; `put` accepts while fewer do.
        handler_retries: Further tries for a handler that raised.
        on_drop: Gets the reports of `report_drop`.
        on_room: Called (on the dispatcher thread) when a `put` was refused and the queue is half empty again; for
            waking a network thread that stopped reading.
        retry_delay_s: Seconds before the first further try; doubles up to 2 s.
        logger: Where exceptions go.

    Thread safety: every method from any thread; `stop` and `wait_idle` not from the dispatcher thread itself.
    The counters are written by the dispatcher thread alone and may be read by any.
    """

    def __init__(
        self,
        capacity: int = 1_000,
        *,
        handler_retries: int = 3,
        on_drop: Callable[[Drop], object] | None = None,
        on_room: Callable[[], object] | None = None,
        retry_delay_s: float = 0.1,
        logger: logging.Logger | None = None,
        name: str = "cloudpubsub-dispatcher",
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity!r}")
        self._capacity = capacity
        self._retries = handler_retries
        self._on_drop = on_drop
        self._on_room = on_room
        self._retry_delay_s = retry_delay_s
        self._log = RateLimitedLog(logger or logging.getLogger("cloudpubsub"))
        self._drops = DropReports()
        # One lock guards the fields below; each condition has its own kind of sleeper.
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # the dispatcher thread
        self._room = threading.Condition(self._lock)  # put() with a timeout
        self._idle = threading.Condition(self._lock)  # wait_idle() and end_deliveries()
        self._queue: deque[Work] = deque()
        self._load = 0  # sum of the weights in the queue
        self._refused = False  # since on_room was last called
        self._busy = False
        self._delivering = False
        self._stopping = False
        self._deadline_s: float | None = None  # with _stopping: the end of the time for callbacks
        self._started = False
        # No handler is called any more; also wakes a retry, which sleeps without the lock.
        self._interrupt = threading.Event()
        # The same, and that drops wait to be told, where it is looked at between two messages.
        self._handling = Handling()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        #: Exceptions out of handlers (each try counts) and out of callbacks.
        self.handler_errors = 0
        self.callback_errors = 0

    def start(self) -> None:
        """Start the thread; what was put in before is worked off now.  Further calls do nothing."""
        with self._lock:
            if self._started or self._stopping:
                return
            self._started = True
        try:
            self._thread.start()
        except RuntimeError:  # no thread may be started any more: the interpreter exits
            self._started = False

    def note_error(self, fn: Callable[..., object], exc: BaseException) -> None:
        """A callback that runs on another thread raised."""
        with self._lock:
            self.callback_errors += 1
        self._log.log(logging.ERROR, f"callback {_name(fn)}", "callback %s raised", _name(fn), exc_info=exc)

    @property
    def busy_since_s(self) -> float | None:
        """Since when the same handler or callback has been running (monotonic); None: none runs."""
        return self._handling.busy_since_s

    @property
    def has_ended(self) -> bool:
        """Whether the thread was started and is no more."""
        return self._started and self._thread.ident is not None and not self._thread.is_alive()

    def is_current_thread(self) -> bool:
        """Whether the caller is a handler or callback."""
        return threading.get_ident() == self._thread.ident

    def room(self) -> int:
        """How much may be put now, by weight.  A 0 also asks for `on_room`."""
        with self._lock:
            if self._load < self._capacity:
                return 0 if self._stopping else self._capacity - self._load
            self._refused = True
            return 0

    def put(self, item: Work, timeout_s: float | None = 0.0) -> bool:
        """Queue an item.  Returns False if the queue stayed full or the dispatcher stops; the item is not kept then.

        Blocks at most `timeout_s` (0: not at all; None: until there is room or the dispatcher stops), and never on the
        dispatcher thread itself, which would wait for itself.
        """
        with self._lock:
            if self._load >= self._capacity and not self._stopping:
                if timeout_s != 0 and not self.is_current_thread():
                    self._room.wait_for(lambda: self._stopping or self._load < self._capacity, timeout_s)
                if self._load >= self._capacity:
                    self._refused = True
                    return False
            if self._stopping:
                return False
            self._queue.append(item)
            self._load += item.weight
            if not self._busy:
                self._work.notify()
            return True

    def put_always(self, item: Call) -> None:
        """Queue a rare item (a change of state) even when the queue is full.

        Dropped when the dispatcher stops, and, with a note in the log, behind a handler that has been hanging for a
        thousand of them.
        """
        with self._lock:
            if self._stopping:
                return
            if self._load < self._capacity + _ALWAYS_MAX:
                self._queue.append(item)
                self._load += item.weight
                self._work.notify()
                return
        self._log.log(logging.ERROR, "always", "the handlers hang: a call of %s was dropped", _name(item.fn))

    def call(self, fn: Callable[..., object], *args: object) -> None:
        """Run a callback at once; for use on the dispatcher thread.  What it raises is logged and counted."""
        self._call(fn, args)

    def report_drop(self, drop: Drop) -> None:
        """Queue a report for `on_drop`, always, in bounded memory: see `DropReports`.  Never blocks for long."""
        if self._on_drop is None:
            return
        self._drops.add(drop)
        self._handling.has_drops = True
        with self._lock:
            self._work.notify()

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is queued and nothing runs, at most `timeout_s` seconds.  Returns whether it is so."""
        if self.is_current_thread():
            raise WrongThreadError("a handler or callback cannot wait for the handlers to finish")
        with self._lock:
            return self._idle.wait_for(lambda: not (self._busy or self._queue or len(self._drops)), timeout_s)

    def end_deliveries(self, timeout_s: float = 5.0) -> bool:
        """Call no handler any more: the one that runs may end, a retry gives up, all other deliveries are abandoned.

        Callbacks go on.  Waits for the handler that runs, at most `timeout_s` seconds; returns whether it ended.
        Raises WrongThreadError on the dispatcher thread.
        """
        if self.is_current_thread():
            raise WrongThreadError("a handler or callback cannot wait for the handlers to finish")
        with self._lock:
            self._no_more_handlers()
            return self._idle.wait_for(lambda: not self._delivering, timeout_s)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Accept nothing more, finish, and end the thread.  Returns whether it ended within `timeout_s` seconds.

        What runs may end; a handler that waits for its next try gives up; deliveries not begun are abandoned; queued
        callbacks and drop reports are still called until the time is over.  A handler that does not return is left
        behind on its daemon thread: if it ever returns, `done` of its delivery is called then, and nothing else.
        Idempotent.  Raises WrongThreadError on the dispatcher thread.
        """
        if self.is_current_thread():
            raise WrongThreadError("a handler or callback cannot stop the dispatcher")
        with self._lock:
            self._deadline_s = time.monotonic() + timeout_s
            self._stopping = True
            self._no_more_handlers()
            self._work.notify_all()
            self._room.notify_all()
            started = self._started
        if not started:
            self._abandon_queue()
            return True
        self._thread.join(timeout_s)
        ended = not self._thread.is_alive()
        if not ended:
            self._abandon_queue()
        self._log.flush()
        return ended

    def _no_more_handlers(self) -> None:
        self._handling.is_interrupted = True
        self._interrupt.set()

    def _run(self) -> None:
        while True:
            self._handling.ends()
            with self._lock:
                self._busy = False
                if self._delivering:
                    self._delivering = False
                    self._idle.notify_all()
                while not (self._queue or len(self._drops) or self._stopping):
                    self._idle.notify_all()
                    self._work.wait()
                if self._stopping and (self._is_late() or not (self._queue or len(self._drops))):
                    break
                self._busy = True
                item = self._queue.popleft() if self._queue else None
                self._delivering = isinstance(item, Deliver)
                has_room = self._took(item) if item is not None else False
            if has_room and self._on_room is not None:
                self._call(self._on_room, ())
            # One report for each item, so that neither of the two kinds can starve the other.
            self._tell_a_drop()
            if item is not None:
                self._work_off(item)
                # Else the last message would be kept alive while the queue is empty.
                del item
        self._abandon_queue()

    def _took(self, item: Work) -> bool:
        """Account for an item taken out, with the lock held.  Returns whether `on_room` is due."""
        self._load -= item.weight
        if self._load < self._capacity:
            # All, because a notice to a sleeper whose time ran out at this moment would be lost for the others.
            self._room.notify_all()
        if self._refused and self._load <= self._capacity // 2:
            self._refused = False
            return True
        return False

    def _is_late(self) -> bool:
        return self._deadline_s is not None and time.monotonic() >= self._deadline_s

    def _abandon_queue(self) -> None:
        """Every accepted delivery hears how it ended, also when that is not at all; the rest has run out of time."""
        while self._drops.take() is not None:
            pass
        while True:
            with self._lock:
                item = self._queue.popleft() if self._queue else None
                if item is None:
                    self._load = 0
                    self._idle.notify_all()
                    return
            if isinstance(item, Deliver):
                while (turn := item.next()) is not None:
                    item.step()
                    self._call(item.ended, (*turn, Outcome.ABANDONED, None))

    def _work_off(self, item: Work) -> None:
        self._handling.begins()
        if isinstance(item, Deliver):
            self._deliver(item)
        elif isinstance(item, CallEach):
            for value in item.values:
                if self._interrupt.is_set() and self._is_late():
                    break
                self._handling.begins()
                self._call(item.fn, (value,))
        else:
            self._call(item.fn, item.args)

    def _deliver(self, item: Deliver) -> None:
        """What every received message goes through; most of them no further than `run`."""
        while item.next() is not None:
            begun = None
            try:
                begun = item.run(self._handling)
            except BaseException as exc:
                self._note_raised(item.run, exc)
            if begun is None:
                self._tell_a_drop()  # it need not wait for the rest of the batch
            if item.next() is not None:
                self._deliver_one(item, begun)
                self._tell_a_drop()

    def _deliver_one(self, item: Deliver, begun: Begun | None) -> None:
        """The next message of a batch, whatever happens to it.  `begun`: what `run` says of it."""
        turn = item.next()
        assert turn is not None
        message, packet_id = turn
        outcome, error = Outcome.DONE, None
        try:
            if begun is None:
                # Also where there is no handler: nothing may be acknowledged behind a message that was abandoned.
                found = None if self._interrupt.is_set() else item.handlers_of(message, packet_id)
                if found is None:
                    outcome = Outcome.ABANDONED
                begun = (found or (), 0, None)
            handlers, first, raised = begun
            for handler in handlers[first:]:
                if raised is None:
                    if self._interrupt.is_set():
                        outcome = Outcome.ABANDONED
                        break
                    raised = self._try(handler, message)
                if raised is not None:
                    ended, error = self._try_again(handler, message, raised)
                    raised = None
                    if ended is not Outcome.DONE:
                        outcome = ended
                    if ended is Outcome.ABANDONED:
                        break
        except BaseException as exc:
            # Handlers are compared to find them, which is user code too.
            self.handler_errors += 1
            outcome, error = Outcome.FAILED, exc
            self._log.log(logging.ERROR, "begin", "the handlers of a message cannot be told", exc_info=exc)
        item.step()
        try:
            item.ended(message, packet_id, outcome, error)
        except BaseException as exc:
            self._note_raised(item.ended, exc)

    def _tell_a_drop(self) -> None:
        self._handling.has_drops = False  # first, so that one which comes now is seen next time
        if len(self._drops) == 0:
            return
        drop = self._drops.take()
        if len(self._drops) > 0:
            self._handling.has_drops = True
        if drop is not None and self._on_drop is not None:
            self._call(self._on_drop, (drop,))

    def _try_again(
        self, handler: Handler, message: Message, error: BaseException
    ) -> tuple[Outcome, BaseException]:
        """A handler raised.  Returns how it ended, and the last exception."""
        delay_s = self._retry_delay_s
        for tries_left in range(self._retries, -1, -1):
            self.handler_errors += 1
            self._log.log(
                logging.ERROR,
                f"handler {_name(handler)}",
                "handler %s raised on a message of topic %r; %d further tries",
                _name(handler),
                message.topic,
                tries_left,
                exc_info=error,
            )
            if not tries_left:
                break
            if self._interrupt.wait(delay_s):
                return Outcome.ABANDONED, error
            delay_s = min(_RETRY_DELAY_MAX_S, delay_s * 2)
            raised = self._try(handler, message)
            if raised is None:
                return Outcome.DONE, error
            error = raised
        return Outcome.FAILED, error

    def _try(self, handler: Handler, message: Message) -> BaseException | None:
        """Call a handler.  Returns what it raised, if it did."""
        self._handling.begins()
        try:
            handler(message)
        except BaseException as exc:
            return exc
        return None

    def _call(self, fn: Callable[..., object], args: tuple[object, ...]) -> None:
        try:
            fn(*args)
        except BaseException as exc:
            # SystemExit and KeyboardInterrupt too: raised here they are a mistake in a callback, not the end of the
            # process.
            self._note_raised(fn, exc)

    def _note_raised(self, fn: Callable[..., object], exc: BaseException) -> None:
        self.callback_errors += 1
        self._log.log(logging.ERROR, f"callback {_name(fn)}", "callback %s raised", _name(fn), exc_info=exc)


def _name(fn: Callable[..., object]) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__

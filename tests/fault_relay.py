"""A link that misbehaves as a test tells it: a relay on 127.0.0.1 whose every connection has faults of its own.

`FaultRelay` forwards like `cloudpubsub.demo.relay.Relay`, whose thread, commands and listening socket it inherits.
What is done to a connection is a value, `Faults`: one `Harm` for each direction.  A plan, a function from the
connection's number (from 1) to its `Faults`, decides for new connections; `change`, `set_faults` and `heal` decide
while they are open.

Bytes are taken from the source at the pace that `rate`, `chunk` and `interval` allow, wait in a bounded line until
`latency` has passed, and are then forwarded, at most `after` of them: then `then` happens.  All that is random is drawn
from the seed, the connection's number, the direction and the place in the stream, never from the time or from how the
bytes happened to be read: the same seed and the same bytes give the same faults.

Not even a fault is exact to less than a millisecond; where bytes are counted, they are counted exactly.
"""

from __future__ import annotations

import fcntl
import random
import selectors
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from types import TracebackType
from typing import Any, Literal, get_args

from cloudpubsub.demo.relay import (
    _CHUNK_BYTES,
    _PORTION_SECONDS,
    _SOCKET_BUFFER_BYTES,
    Relay,
    _Connection,
    _read_away,
    _Way,
)

Action = Literal["stall", "drop", "reset", "end"]
Welcome = Literal["forward", "reset", "silence"]

LIMIT = 60.0  # seconds that a wait may take
_LINE_BYTES = 1 << 20  # what may wait in one direction of a connection
_LINE_PIECES = 4096
_SEGMENT_BYTES = 1460  # jitter is drawn anew for each
_REMEMBERED = 1024  # connections whose `Seen` is kept
_ACK_POLL_SECONDS = 0.001


@dataclass(frozen=True)
class Harm:
    """What is done to one direction of a connection.  The default is nothing.

    Args:
        latency: seconds that every byte is late, the end of the stream too.
        jitter: up to so many seconds more, drawn for each 1460 bytes; order is kept.
        rate: bytes a second, at least 1; ``None``: no limit.  The sender feels it: bytes above it are not even read.
        chunk: forward at most so many bytes at once (1: byte by byte); ``None``: as they come.
        ragged: draw the size of each chunk from 1 to ``chunk``.
        interval: seconds between chunks, needs ``chunk``.  ``chunk=1, interval=1`` is a trickle.
        after: so many bytes are forwarded, counted from when this harm was set, and then
        then: nothing (``None``), or
            ``"stall"``: nothing moves this way any more, and nothing is read: the sender's buffers fill up;
            ``"drop"``: everything is read and vanishes, the end of the stream and a reset too;
            ``"reset"``: both sides get a reset, once ``after`` bytes are with the receiver's kernel;
            ``"end"``: the receiver gets the end of the stream; what is sent on vanishes, the other direction works.
    """

    latency: float = 0.0
    jitter: float = 0.0
    rate: float | None = None
    chunk: int | None = None
    ragged: bool = False
    interval: float = 0.0
    after: int = 0
    then: Action | None = None

    def __post_init__(self) -> None:
        for name in ("latency", "jitter", "interval", "after"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        for name in ("rate", "chunk"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < inf:
                raise ValueError(f"{name} is {value}, must be at least 1 or None")
        if self.chunk is None and (self.interval or self.ragged):
            raise ValueError("interval and ragged need chunk")
        if self.then is not None and self.then not in get_args(Action):
            raise ValueError(f"then is {self.then!r}, must be one of {get_args(Action)} or None")
        if self.then is None and self.after:
            raise ValueError("after needs then")


@dataclass(frozen=True)
class Faults:
    """What is done to a connection: ``up`` is from the client to the target, ``down`` the way back.

    ``welcome`` says how a new connection is met: ``"reset"`` at once and unseen by the target, or with ``"silence"``:
    it is accepted, what it sends is read, the target never hears of it, and no later change brings it to life.  (The
    kernel accepts before the relay is asked; a port that refuses to connect is `FaultRelay.cut`.)  For a connection
    that is open already they are the same as `RESET` and `LOST`.
    """

    up: Harm = Harm()
    down: Harm = Harm()
    welcome: Welcome = "forward"

    def __post_init__(self) -> None:
        if self.welcome not in get_args(Welcome):
            raise ValueError(f"welcome is {self.welcome!r}, must be one of {get_args(Welcome)}")


Plan = Callable[[int], Faults]


def both(**harm: Any) -> Faults:
    """The same harm in both directions."""
    return Faults(Harm(**harm), Harm(**harm))


FINE = Faults()
FROZEN = both(then="stall")
LOST = both(then="drop")
RESET = both(then="reset")
REFUSED = Faults(welcome="reset")
MUTE = Faults(welcome="silence")


def in_turn(*faults: Faults) -> Plan:
    """The first connection gets the first, and so on; all after the last one get the last."""
    return lambda number: faults[min(number, len(faults)) - 1]


def storm(seed: int, *, bytes_between: int = 20_000, latency: float = 0.05, fine_share: float = 0.25) -> Plan:
    """Random faults for each connection, the same ones for the same seed.

    A share of ``fine_share`` is merely slow.  Some are not served at all, and the others are struck in one direction,
    after up to twice ``bytes_between`` bytes.  Latency, rate and chunks vary.
    """

    def harm(draw: random.Random, fine: bool) -> Harm:
        calm = Harm(
            latency=draw.choice([0.0, draw.uniform(0, latency)]),
            jitter=draw.choice([0.0, draw.uniform(0, latency)]),
            rate=draw.choice([None, None, draw.uniform(50_000, 5_000_000)]),
            chunk=draw.choice([None, None, draw.randint(1, 2000)]),
        )
        calm = replace(calm, ragged=calm.chunk is not None)
        then = draw.choice(get_args(Action))
        return calm if fine else replace(calm, after=draw.randint(0, 2 * bytes_between), then=then)

    def plan(number: int) -> Faults:
        draw = random.Random(f"{seed}/{number}")
        if draw.random() < fine_share:
            return Faults(harm(draw, True), harm(draw, True))
        if draw.random() < 0.1:
            return draw.choice([REFUSED, MUTE])
        struck_up = draw.random() < 0.5
        return Faults(harm(draw, not struck_up), harm(draw, struck_up))

    return plan


@dataclass(frozen=True)
class Seen:
    """What has become of a connection: bytes forwarded and bytes that vanished, per direction."""

    number: int
    faults: Faults
    open: bool
    up: int
    down: int
    dropped_up: int
    dropped_down: int
    struck_up: Action | None  # what `then` has done
    struck_down: Action | None


class _FaultyWay(_Way):
    """One direction: taken from the source, waiting, forwarded to the sink."""

    __slots__ = (
        "blocked", "chunk_left", "counted", "draw_chunk", "draw_jitter", "dropped", "forwarded", "harm", "last_due",
        "late", "line", "segment_left", "struck", "take_at", "waiting",
    )  # fmt: skip

    def __init__(self, source: socket.socket, sink: socket.socket, now: float, seed: str) -> None:
        super().__init__(source, sink, now)
        # Apart, so that what one draws does not depend on when the other did.
        self.draw_chunk, self.draw_jitter = random.Random(seed + "/chunk"), random.Random(seed + "/jitter")
        self.line: deque[tuple[float, bytes]] = deque()  # when it is due, and what; b"" is the end of the stream
        self.waiting = 0  # bytes in the line
        self.blocked = False  # the sink takes no more for now
        self.last_due = 0.0
        self.forwarded = self.dropped = 0
        self.set_harm(Harm(), now)

    def set_harm(self, harm: Harm, now: float) -> None:
        self.harm = harm
        self.counted = 0
        self.struck: Action | None = None
        self.tokens, self.refilled_at = 0.0, now
        self.take_at = now
        self.segment_left, self.late = 0, 0.0
        self.chunk_left = self._next_chunk()

    def _next_chunk(self) -> int:
        chunk = self.harm.chunk or _CHUNK_BYTES
        return self.draw_chunk.randint(1, chunk) if self.harm.ragged else chunk

    def is_shut(self) -> bool:
        """Whether nothing is to be read, whatever the time."""
        full = self.waiting >= _LINE_BYTES or len(self.line) >= _LINE_PIECES
        return self.ended or self.struck == "stall" or full

    def _needed_tokens(self, rate: float) -> float:
        return max(1.0, min(self.chunk_left, rate * _PORTION_SECONDS / 2))

    def may_take(self, now: float) -> int:
        """How many bytes may be read now."""
        if self.is_shut() or now < self.take_at:
            return 0
        size = min(_CHUNK_BYTES, _LINE_BYTES - self.waiting)
        if self.harm.chunk is not None:
            size = min(size, self.chunk_left)
        if self.harm.rate is not None:
            self.refill(self.harm.rate, now)
            size = min(size, int(self.tokens)) if self.tokens >= self._needed_tokens(self.harm.rate) else 0
        return size

    def take_next_at(self) -> float:
        """When something may be read, if that is a matter of time."""
        if self.is_shut():
            return inf
        if self.harm.rate is None:
            return self.take_at
        missing = self._needed_tokens(self.harm.rate) - self.tokens
        return max(self.take_at, self.refilled_at + missing / self.harm.rate)

    def take(self, data: bytes, now: float) -> None:
        """Put what was read into the line."""
        if not data:
            self.ended = True
            self._enter(b"", now)
            return
        if self.harm.rate is not None:
            self.tokens -= len(data)
        if self.harm.chunk is not None:
            self.chunk_left -= len(data)
            if not self.chunk_left:
                self.take_at = now + self.harm.interval
                self.chunk_left = self._next_chunk()
        while self.harm.jitter and data:
            if not self.segment_left:
                self.segment_left = _SEGMENT_BYTES
                self.late = self.draw_jitter.uniform(0, self.harm.jitter)
            part, data = data[: self.segment_left], data[self.segment_left :]
            self.segment_left -= len(part)
            self._enter(part, now)
        if data:
            self._enter(data, now)

    def _enter(self, data: bytes, now: float) -> None:
        self.last_due = max(self.last_due, now + self.harm.latency + self.late)
        self.line.append((self.last_due, data))
        self.waiting += len(data)

    def leave(self, size: int) -> None:
        """Take so many bytes off the front piece of the line, which has at least as many."""
        due, data = self.line.popleft()
        self.waiting -= size
        if size < len(data):
            self.line.appendleft((due, data[size:]))

    def strikes(self) -> bool:
        """Whether `then` is due."""
        return self.struck is None and self.harm.then is not None and self.counted >= self.harm.after

    def vanishes(self) -> bool:
        """Whether what comes is thrown away."""
        return self.finished or self.struck == "drop"


class _Link(_Connection):
    """A connection with its faults."""

    __slots__ = ("faults", "is_lost", "is_mute", "is_open", "number", "wake_at")
    up: _FaultyWay
    down: _FaultyWay

    def __init__(self, client: socket.socket, server: socket.socket, now: float, number: int, seed: int) -> None:
        super().__init__(client, server, now)
        self.number = number
        self.faults = FINE
        self.is_open = True
        self.is_lost = False  # one side is gone, and the other was not told
        self.is_mute = False
        self.wake_at = now
        self.up = _FaultyWay(client, server, now, f"{seed}/{number}/up")
        self.down = _FaultyWay(server, client, now, f"{seed}/{number}/down")

    def seen(self) -> Seen:
        up, down = self.up, self.down
        return Seen(
            self.number, self.faults, self.is_open, up.forwarded, down.forwarded, up.dropped, down.dropped, up.struck,
            down.struck,
        )  # fmt: skip


class FaultRelay(Relay):
    """Forward from a port on 127.0.0.1 to ``target_port`` there, with faults.  A context manager.

    Args:
        target_port: where to forward to; nothing need listen there yet.
        plan: the faults of each connection: a function of its number, called on the relay's thread, or one value for
            all.  What it raises resets the connection and fails the test when the relay is stopped.
        listen_port: 0 takes a free port.
        seed: for all that is random.

    As with `Relay`, every method may be called from any thread and returns when it is done.  `cut` resets everything
    and makes the port refuse, `restore` mends that.
    """

    def __init__(self, target_port: int, plan: Plan | Faults = FINE, listen_port: int = 0, *, seed: int = 0) -> None:
        super().__init__(target_port, listen_port)
        self._plan = _as_plan(plan)
        self._seed = seed
        self._changed = threading.Condition()
        self._links: dict[int, _Link] = {}  # the newest ones, open or not; guarded by _changed
        self._error: BaseException | None = None

    # ---- what tests call

    def set_plan(self, plan: Plan | Faults) -> None:
        """From now on, new connections get these faults; their numbers go on."""
        self._call(lambda: self._do_set_plan(_as_plan(plan)))

    def change(self, faults: Faults, *numbers: int) -> None:
        """Set the faults of the open connections with these numbers, or of all; those not open are passed over."""
        self._call(lambda: self._do_change(faults, numbers))

    def set_faults(self, faults: Faults) -> None:
        """Set the faults of all open connections and of all that will be."""

        def do() -> None:
            self._do_set_plan(_as_plan(faults))
            self._do_change(faults, ())

        self._call(do)

    def heal(self) -> None:
        """No faults any more.  What was held back goes on; what vanished stays away."""
        self.set_faults(FINE)

    def reset(self, *numbers: int) -> None:
        """Reset the open connections with these numbers, or all; the port goes on accepting."""
        self._call(lambda: self._do_change(None, numbers))

    def blackhole(self) -> None:
        """The same as ``set_faults(FROZEN)``."""
        self.set_faults(FROZEN)

    def unblackhole(self) -> None:
        """The same as `heal`."""
        self.heal()

    def set_rate(self, bytes_per_second: float | None) -> None:
        """The same as ``set_faults(both(rate=bytes_per_second))``: there are no other faults then."""
        self.set_faults(both(rate=bytes_per_second))

    def seen(self, number: int | None = None) -> Seen:
        """What has become of a connection, by default the newest one.  ``KeyError`` if there was none."""
        with self._changed:
            return self._links[self.accepted if number is None else number].seen()

    def wait(self, holds: Callable[[Seen], object], number: int | None = None, timeout: float = LIMIT) -> Seen:
        """Wait until it holds for a connection, which may be still to come; by default the newest.  TimeoutError."""
        last: Seen | None = None

        def look() -> bool:
            nonlocal last
            link = self._links.get(self.accepted if number is None else number)
            last = None if link is None else link.seen()
            return last is not None and bool(holds(last))

        with self._changed:
            if not self._changed.wait_for(look, timeout):
                raise TimeoutError(f"not after {timeout} s: {last}")
        assert last is not None
        return last

    def start(self) -> FaultRelay:
        with self._changed:
            if self._thread is None:
                self._links.clear()
        super().start()
        return self

    def stop(self) -> None:
        """Reset all connections and end.  Raises what a plan has raised."""
        super().stop()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> FaultRelay:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except Exception:
            if kind is None:
                raise

    # ---- commands, on the relay's thread

    def _do_set_plan(self, plan: Plan) -> None:
        self._plan = plan

    def _do_change(self, faults: Faults | None, numbers: tuple[int, ...]) -> None:
        now = time.monotonic()
        for link in self._open_links():
            if numbers and link.number not in numbers:
                continue
            if faults is None or faults.welcome == "reset":
                self._reset(link)
            else:
                self._apply(link, faults, now)
                self._serve(link, now)

    def _apply(self, link: _Link, faults: Faults, now: float) -> None:
        link.faults = faults
        if link.is_mute or faults.welcome == "silence":
            faults = LOST
        elif link.is_lost and None in (faults.up.then, faults.down.then):
            self._reset(link)  # the first packet over the mended link would bring it to light
            return
        link.up.set_harm(faults.up, now)
        link.down.set_harm(faults.down, now)

    # ---- the relay's thread

    def _run(self, wake_reader: socket.socket) -> None:
        try:
            while not self._stopping:
                self._round(wake_reader)
                self._obey()
                with self._changed:
                    self._changed.notify_all()
        finally:
            self._close_down(wake_reader)

    def _round(self, wake_reader: socket.socket) -> None:
        due: set[_Link] = set()
        for key, _ in self._selector.select(self._pause()):
            if key.fileobj is wake_reader:
                _read_away(wake_reader)
            elif key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.fileobj, socket.socket):
                link = self._connections.get(key.fileobj)
                if isinstance(link, _Link):  # not reset by an earlier event of this round
                    due.add(link)
                    if link.connecting and key.fileobj is link.server:
                        self._connected(link)
        now = time.monotonic()
        due.update(link for link in self._open_links() if link.wake_at <= now)
        for link in due:
            self._serve(link, now)

    def _open_links(self) -> list[_Link]:
        return [link for link in set(self._connections.values()) if isinstance(link, _Link)]

    def _pause(self) -> float | None:
        wake_at = min((link.wake_at for link in self._open_links()), default=inf)
        return None if wake_at == inf else max(0.0, wake_at - time.monotonic())

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # it went away again, or there are no descriptors: it stays in the backlog
        try:
            faults = self._plan(self._accepted + 1)
        except Exception as error:
            self._error = self._error or error
            faults = REFUSED
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for each in (client, server):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
        now = time.monotonic()
        link = _Link(client, server, now, self._accepted + 1, self._seed)
        self._connections[client] = self._connections[server] = link
        with self._changed:
            self._accepted += 1
            self._links[link.number] = link
            self._links.pop(link.number - _REMEMBERED, None)
        link.is_mute = faults.welcome == "silence"
        self._apply(link, faults, now)
        if faults.welcome == "reset":
            self._reset(link)
        elif link.is_mute:
            link.connecting = False
        else:
            server.connect_ex(self._target)  # its result comes with the socket's first event
        self._watch(link)

    def _connected(self, link: _Link) -> None:
        try:
            self._finish_connect(link)
        except OSError:
            self._reset(link)

    def _serve(self, link: _Link, now: float) -> None:
        """Move what can be moved now, in both directions."""
        if link.is_open and not link.connecting:
            for way in (link.up, link.down):
                self._forward(link, way, now)  # strikes, where that is due before anything is read
            for way in (link.up, link.down):
                self._draw(link, way, now)
                self._forward(link, way, now)
            if link.is_open and link.up.finished and link.down.finished:
                self._close(link)
            elif link.is_open and link.is_mute and link.up.ended:
                self._reset(link)
        self._watch(link)

    def _draw(self, link: _Link, way: _FaultyWay, now: float) -> None:
        size = way.may_take(now) if link.is_open and not (link.is_mute and way is link.down) else 0
        if size < 1:
            return
        try:
            way.take(way.source.recv(size), now)
        except BlockingIOError:
            pass
        except OSError:
            self._broken(link, way, link.down if way is link.up else link.up)

    def _forward(self, link: _Link, way: _FaultyWay, now: float) -> None:
        while link.is_open:
            if way.strikes() and not self._strike(link, way):
                return
            if way.struck == "stall" or not way.line:
                return
            due, data = way.line[0]
            if way.vanishes():
                way.leave(len(data))
                way.dropped += len(data)
            elif due > now:
                return
            elif not data:
                way.leave(0)
                self._end(way)
            elif not self._send(link, way, data):
                return

    def _send(self, link: _Link, way: _FaultyWay, data: bytes) -> bool:
        """Forward the beginning of the line; whether all that may go went."""
        if way.harm.then is not None:
            data = data[: way.harm.after - way.counted]
        try:
            sent = way.sink.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._broken(link, link.down if way is link.up else link.up, way)
            return False
        way.leave(sent)
        way.counted += sent
        way.forwarded += sent
        if way is link.up:
            self._bytes_up += sent
        else:
            self._bytes_down += sent
        way.blocked = sent < len(data)
        return not way.blocked

    def _strike(self, link: _Link, way: _FaultyWay) -> bool:
        """Let `then` happen; False if it has to wait."""
        if way.harm.then == "reset":
            if _unacknowledged(way.sink):
                return False  # a reset would throw away what is to arrive first
            way.struck = "reset"
            self._reset(link)
            return True
        way.struck = way.harm.then
        if way.struck == "end" and not way.finished:
            self._end(way)
        return True

    def _end(self, way: _FaultyWay) -> None:
        way.finished = True
        try:
            way.sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # reset in the meantime: its own event comes

    def _broken(self, link: _Link, out: _FaultyWay, into: _FaultyWay) -> None:
        """The socket that `out` comes from was reset.  The other side hears of it, unless that way is dead."""
        if out.struck not in ("drop", "stall"):
            self._reset(link)
            return
        link.is_lost = True
        out.ended = True
        into.struck = "drop"

    # ---- which events are wanted, and when to look without one

    def _watch(self, connection: _Connection) -> None:
        link = connection
        assert isinstance(link, _Link)
        link.wake_at = inf
        if not link.is_open:
            return
        if link.connecting:
            self._want(link.server, selectors.EVENT_WRITE)
            return
        now = time.monotonic()
        client = self._look_after(link, link.up, now)
        server = self._look_after(link, link.down, now)
        client |= selectors.EVENT_WRITE if link.down.blocked and not link.down.struck else 0
        server |= selectors.EVENT_WRITE if link.up.blocked and not link.up.struck else 0
        self._want(link.client, client)
        self._want(link.server, 0 if link.is_mute else server)

    def _look_after(self, link: _Link, way: _FaultyWay, now: float) -> int:
        """The event wanted of the way's source; notes when time alone will let something happen."""
        if way.strikes():
            link.wake_at = min(link.wake_at, now + _ACK_POLL_SECONDS)
        elif way.line and not way.blocked and way.struck != "stall":
            link.wake_at = min(link.wake_at, way.line[0][0])
        if link.is_mute and way is link.down:
            return 0
        if way.may_take(now):
            return selectors.EVENT_READ
        link.wake_at = min(link.wake_at, way.take_next_at())
        return 0

    def _reset(self, connection: _Connection) -> None:
        if connection.client in self._connections:
            super()._reset(connection)
            self._over(connection)

    def _close(self, connection: _Connection) -> None:
        super()._close(connection)
        self._over(connection)

    def _over(self, connection: _Connection) -> None:
        link = connection
        assert isinstance(link, _Link)
        link.is_open, link.wake_at = False, inf
        link.up.line.clear()
        link.down.line.clear()
        with self._changed:
            self._changed.notify_all()


def _as_plan(plan: Plan | Faults) -> Plan:
    return in_turn(plan) if isinstance(plan, Faults) else plan


def _unacknowledged(which: socket.socket) -> int:
    """Bytes that were sent and that the other side's kernel does not have yet."""
    (count,) = struct.unpack("i", fcntl.ioctl(which, termios.TIOCOUTQ, bytes(4)))
    return int(count)


__all__ = [
    "FINE", "FROZEN", "LOST", "MUTE", "REFUSED", "RESET", "Action", "FaultRelay", "Faults", "Harm", "Plan", "Seen",
    "Welcome", "both", "in_turn", "storm",
]  # fmt: skip

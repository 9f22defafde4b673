"""A TCP relay on 127.0.0.1 that plays the bad link between a client and a broker.

Connections to :attr:`Relay.port` are forwarded byte for byte to a port of the same machine.  The link can be cut
(everything is reset, new connections are refused), turned into a black hole (everything stays open and nothing moves,
as behind a NAT that forgot the connection), and slowed down.  One thread owns all sockets; every public method may be
called from any thread.  Memory is bounded: each direction of a connection holds at most one chunk, and stops reading
until it is forwarded, so that a slow receiver slows the sender through TCP itself.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

__all__ = ["Relay"]

_HOST = "127.0.0.1"
_CHUNK_BYTES = 64 * 1024
# Socket buffers are kept small, so that a slow link is felt by the sender and not swallowed by the kernel.
_SOCKET_BUFFER_BYTES = 128 * 1024
_LINGER_RESET = struct.pack("ii", 1, 0)
# A link with a rate forwards in portions of about this many seconds.
_PORTION_SECONDS = 0.02
_COMMAND_TIMEOUT_SECONDS = 10.0


class _Way:
    """One direction of a connection: at most one chunk between its two sockets."""

    __slots__ = ("ended", "finished", "held", "refilled_at", "sink", "source", "tokens")

    def __init__(self, source: socket.socket, sink: socket.socket, now: float) -> None:
        self.source = source
        self.sink = sink
        self.held = b""
        self.ended = False  # the source has sent its end
        self.finished = False  # and the sink was told
        self.tokens = 0.0  # bytes that may be read now, where a rate is set
        self.refilled_at = now

    def refill(self, rate: float, now: float) -> None:
        burst = max(rate * _PORTION_SECONDS * 2, 1.0)
        self.tokens = min(burst, self.tokens + (now - self.refilled_at) * rate)
        self.refilled_at = now


class _Connection:
    """An accepted socket, its partner at the target, and the two directions between them."""

    __slots__ = ("client", "connecting", "down", "server", "up")

    def __init__(self, client: socket.socket, server: socket.socket, now: float) -> None:
        self.client = client
        self.server = server
        self.connecting = True
        self.up = _Way(client, server, now)
        self.down = _Way(server, client, now)


class Relay:
    """Forward TCP connections from a port on 127.0.0.1 to ``target_port`` there, over a link that can be harmed.

    Args:
        target_port: the port on 127.0.0.1 to forward to, 1 to 65535; nothing need listen there yet.
        listen_port: the port to listen on; 0 takes a free one, kept until :meth:`stop` also while the link is cut.

    Thread safety: every method may be called from any thread.  Each blocks until the relay's thread has done it, which
    takes milliseconds; ``RuntimeError`` if the relay is not running.
    """

    def __init__(self, target_port: int, listen_port: int = 0) -> None:
        for name, value, least in (("target_port", target_port, 1), ("listen_port", listen_port, 0)):
            if not least <= value <= 65535:
                raise ValueError(f"{name} is {value}, must be {least} to 65535")
        self._target = (_HOST, target_port)
        self._listen_port = listen_port
        self._port = 0
        self._lock = threading.Lock()  # guards _thread, _commands and the counting of generations
        self._thread: threading.Thread | None = None
        self._commands: deque[tuple[Callable[[], None], threading.Event, list[BaseException]]] = deque()
        self._wake: socket.socket | None = None
        # Everything below belongs to the relay's thread alone; the counters are read by others.
        self._selector: selectors.BaseSelector
        self._reserved: socket.socket
        self._listener: socket.socket | None = None
        self._connections: dict[socket.socket, _Connection] = {}
        self._interest: dict[socket.socket, int] = {}
        self._rate: float | None = None
        self._silent = False
        self._stopping = False
        self._bytes_up = 0
        self._bytes_down = 0
        self._accepted = 0

    # ---- what users call

    @property
    def port(self) -> int:
        """The port that clients connect to; 0 before :meth:`start`."""
        return self._port

    @property
    def bytes_up(self) -> int:
        """Bytes forwarded from clients to the target since :meth:`start`."""
        return self._bytes_up

    @property
    def bytes_down(self) -> int:
        """Bytes forwarded from the target to clients since :meth:`start`."""
        return self._bytes_down

    @property
    def accepted(self) -> int:
        """Connections accepted since :meth:`start`."""
        return self._accepted

    def start(self) -> Relay:
        """Listen and forward.  Returns itself.  ``OSError`` if the port is taken, ``RuntimeError`` if running."""
        with self._lock:
            if self._thread is not None:
                raise RuntimeError("the relay is running already")
            self._reserved = _bound_socket(self._port or self._listen_port)
            self._port = int(self._reserved.getsockname()[1])
            self._selector = selectors.DefaultSelector()
            wake_reader, self._wake = socket.socketpair()
            wake_reader.setblocking(False)
            self._wake.setblocking(False)
            self._selector.register(wake_reader, selectors.EVENT_READ)
            self._rate, self._silent, self._stopping = None, False, False
            self._bytes_up = self._bytes_down = self._accepted = 0
            self._open_listener()
            self._thread = threading.Thread(target=self._run, args=(wake_reader,), name="relay", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Reset all connections, stop listening and end the thread.  Does nothing if it is not running."""
        with self._lock:
            thread = self._thread
        if thread is None:
            return
        try:
            self._call(self._do_stop)
        except RuntimeError:
            pass  # another thread stopped it in the meantime
        thread.join(_COMMAND_TIMEOUT_SECONDS)

    def cut(self) -> None:
        """Break the link: reset every connection (bytes on the way are lost) and refuse new ones."""
        self._call(self._do_cut)

    def restore(self) -> None:
        """Mend a cut link: listen again on the same port.  Does nothing if the link is not cut."""
        self._call(self._open_listener)

    def blackhole(self) -> None:
        """Forward nothing more, in silence: connections stay open, new ones are accepted, no byte arrives."""
        self._call(lambda: self._set_silent(True))

    def unblackhole(self) -> None:
        """Forward again.  What was held back in a connection that is still open goes on where it stopped."""
        self._call(lambda: self._set_silent(False))

    def set_rate(self, bytes_per_second: float | None) -> None:
        """Limit each direction of each connection to this many bytes a second, at least 1; ``None`` lifts the limit."""
        if bytes_per_second is not None and not bytes_per_second >= 1:
            raise ValueError(f"bytes_per_second is {bytes_per_second}, must be at least 1 or None")
        self._call(lambda: self._do_set_rate(bytes_per_second))

    def __enter__(self) -> Relay:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- commands, carried to the relay's thread

    def _call(self, command: Callable[[], None]) -> None:
        done = threading.Event()
        errors: list[BaseException] = []
        with self._lock:
            if self._thread is None or self._wake is None:
                raise RuntimeError("the relay is not running")
            self._commands.append((command, done, errors))
            try:
                self._wake.send(b"\0")
            except BlockingIOError:
                pass  # full of wake-ups already: the thread will come
        if not done.wait(_COMMAND_TIMEOUT_SECONDS):
            raise TimeoutError("the relay's thread did not answer")
        if errors:
            raise errors[0]

    def _obey(self) -> None:
        while True:
            try:
                command, done, errors = self._commands.popleft()
            except IndexError:
                return
            try:
                command()
            except Exception as error:
                errors.append(error)
            done.set()

    def _do_stop(self) -> None:
        self._do_cut()
        self._stopping = True

    def _do_cut(self) -> None:
        if self._listener is not None:
            self._drain_backlog(self._listener)
            self._forget(self._listener)
            self._listener.close()
            self._listener = None
        for connection in set(self._connections.values()):
            self._reset(connection)

    def _drain_backlog(self, listener: socket.socket) -> None:
        # A client may have been connected by the kernel and not yet seen here: it is to be reset like the others.
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            _reset_socket(client)

    def _set_silent(self, silent: bool) -> None:
        self._silent = silent
        self._watch_all()

    def _do_set_rate(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        now = time.monotonic()
        for connection in set(self._connections.values()):
            for way in (connection.up, connection.down):
                way.tokens, way.refilled_at = 0.0, now
        self._watch_all()

    def _open_listener(self) -> None:
        if self._listener is not None:
            return
        listener = _bound_socket(self._port)
        try:
            listener.listen(128)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._want(listener, selectors.EVENT_READ)

    # ---- the relay's thread

    def _run(self, wake_reader: socket.socket) -> None:
        try:
            while not self._stopping:
                for key, events in self._selector.select(self._pause()):
                    if key.fileobj is wake_reader:
                        _read_away(wake_reader)
                    elif key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket):
                        self._move(key.fileobj, events)
                self._obey()
                if self._rate is not None:
                    self._watch_all()
        finally:
            self._close_down(wake_reader)

    def _close_down(self, wake_reader: socket.socket) -> None:
        self._do_cut()
        with self._lock:
            self._thread = None
            if self._wake is not None:
                self._wake.close()
            self._wake = None
            while self._commands:
                _, done, errors = self._commands.popleft()
                errors.append(RuntimeError("the relay is not running"))
                done.set()
            wake_reader.close()
            self._reserved.close()
            self._selector.close()
            self._interest.clear()

    def _pause(self) -> float | None:
        if self._rate is None or self._silent or not self._connections:
            return None
        return max(_PORTION_SECONDS, 1.0 / self._rate)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # it went away again, or there are no descriptors: it stays in the backlog
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for each in (client, server):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
        self._accepted += 1
        connection = _Connection(client, server, time.monotonic())
        self._connections[client] = self._connections[server] = connection
        server.connect_ex(self._target)  # its result comes with the socket's first event
        self._watch(connection)

    def _move(self, ready: socket.socket, events: int) -> None:
        connection = self._connections.get(ready)
        if connection is None:
            return  # reset by an earlier event of this round
        try:
            if connection.connecting:
                self._finish_connect(connection)
            else:
                if events & selectors.EVENT_WRITE:
                    self._push(connection.down if ready is connection.client else connection.up)
                if events & selectors.EVENT_READ:
                    self._pull(connection.up if ready is connection.client else connection.down)
        except OSError:
            self._reset(connection)  # one side was reset: so is the other
            return
        if connection.up.finished and connection.down.finished:
            self._close(connection)
        else:
            self._watch(connection)

    def _finish_connect(self, connection: _Connection) -> None:
        error = connection.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, "the target refused")
        connection.connecting = False

    def _pull(self, way: _Way) -> None:
        if way.held or way.ended or self._silent:
            return
        size = _CHUNK_BYTES
        if self._rate is not None:
            way.refill(self._rate, time.monotonic())
            size = min(size, int(way.tokens))
            if size < 1:
                return
        try:
            way.held = way.source.recv(size)
        except BlockingIOError:
            return
        way.tokens -= len(way.held)
        way.ended = not way.held
        self._push(way)

    def _push(self, way: _Way) -> None:
        if way.held:
            try:
                sent = way.sink.send(way.held)
            except BlockingIOError:
                return
            way.held = way.held[sent:]
            if way is self._connections[way.sink].up:
                self._bytes_up += sent
            else:
                self._bytes_down += sent
        if way.ended and not way.held and not way.finished:
            way.finished = True
            way.sink.shutdown(socket.SHUT_WR)

    # ---- which events are wanted

    def _watch_all(self) -> None:
        for connection in set(self._connections.values()):
            self._watch(connection)

    def _watch(self, connection: _Connection) -> None:
        if self._silent:
            self._want(connection.client, 0)
            self._want(connection.server, 0)
        elif connection.connecting:
            self._want(connection.client, 0)
            self._want(connection.server, selectors.EVENT_WRITE)
        else:
            self._want(connection.client, self._wanted(connection.up, connection.down))
            self._want(connection.server, self._wanted(connection.down, connection.up))

    def _wanted(self, out: _Way, into: _Way) -> int:
        events = 0
        if not out.held and not out.ended and self._may_read(out):
            events |= selectors.EVENT_READ
        if into.held:
            events |= selectors.EVENT_WRITE
        return events

    def _may_read(self, way: _Way) -> bool:
        if self._rate is None:
            return True
        way.refill(self._rate, time.monotonic())
        return way.tokens >= max(1.0, self._rate * _PORTION_SECONDS / 2)

    def _want(self, which: socket.socket, events: int) -> None:
        had = self._interest.get(which, 0)
        if events == had:
            return
        if not events:
            self._forget(which)
            return
        self._interest[which] = events
        if had:
            self._selector.modify(which, events)
        else:
            self._selector.register(which, events)

    def _forget(self, which: socket.socket) -> None:
        if self._interest.pop(which, 0):
            self._selector.unregister(which)

    def _reset(self, connection: _Connection) -> None:
        for each in (connection.client, connection.server):
            self._forget(each)
            del self._connections[each]
            _reset_socket(each)

    def _close(self, connection: _Connection) -> None:
        for each in (connection.client, connection.server):
            self._forget(each)
            del self._connections[each]
            each.close()


def _bound_socket(port: int) -> socket.socket:
    """A socket bound to the port and not listening: it keeps the port from others, and connecting there is refused."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
        bound.bind((_HOST, port))
    except OSError:
        bound.close()
        raise
    return bound


def _reset_socket(which: socket.socket) -> None:
    """Close so that the other side gets a reset, and what was not sent is thrown away."""
    try:
        which.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    except OSError:
        pass  # gone already; close() is still due
    which.close()


def _read_away(reader: socket.socket) -> None:
    try:
        while reader.recv(4096):
            pass
    except BlockingIOError:
        pass

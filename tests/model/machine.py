"""A machine with weak memory, explored in every order.

A program is a generator: it yields operations and is sent their results.  The machine runs a few of them at once and
visits every state that they can come to, where

- an atomic place keeps all values that were ever stored in it.  A load takes any of them that is not older than what
  its thread has seen of that place: loads are satisfied as early as coherence permits, and each thread in an order of
  its own;
- a store waits in its thread's buffer, where only that thread sees it, and leaves it at any later time, in any order
  but for those of the same place, and for a release, before which everything older must have left;
- a release takes along what its thread had seen; an acquire that reads it has seen that too.  Nothing else makes one
  thread see what another did, but for the kernel (locks, conditions, eventfds, files);
- a plain place is read and written by one thread at a time, in an order that these make; all else is a data race,
  which is an error even where the value would be right;
- a process may be killed at any moment.  What its threads' buffers hold is lost, so whatever the order of two stores
  is not forbidden to change may be torn apart.

The one thing that C11 allows and that is left out is a relaxed load that comes later than a relaxed store behind
it.  A program where that could matter is refused (see `Late`).  There are no fences, and no orderings but relaxed,
acquire and release, because what the C core does needs none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = [
    "Counterexample", "Late", "Model", "Result", "Violation", "add", "await_", "broadcast", "cas", "change", "explore",
    "load", "lock", "peek", "read", "signal", "store", "unlock", "wait", "write",
]  # fmt: skip

Program = Generator[Any, Any, Any]
_View = tuple[int, ...]


class Violation(AssertionError):
    """What a program says when its promise is broken."""


class Late(ValueError):
    """A relaxed store behind a relaxed load, which could come first: say that it depends on it, or order them."""


class Counterexample(AssertionError):
    """A promise was broken; the text says by which steps."""


# ---- operations ----


class _Read(NamedTuple):  # of a plain place
    place: str


class _Write(NamedTuple):
    place: str
    value: Any


class _Load(NamedTuple):
    place: str
    tag: str


class _Store(NamedTuple):
    place: str
    value: Any
    tag: str
    depends: bool  # on all relaxed loads before it


class _Rmw(NamedTuple):
    place: str
    new: Callable[[Any], Any]  # None: compared, and not equal
    tag: str


class _Enter(NamedTuple):  # the kernel, or a lock
    what: str
    names: tuple[str, ...]
    step: Callable[[tuple[Any, ...], int], tuple[tuple[Any, ...], Any] | None]  # None: not now


class _Peek(NamedTuple):  # a clock: takes part in no order
    name: str


def read(place: str) -> _Read:
    return _Read(place)


def write(place: str, value: Any) -> _Write:
    return _Write(place, value)


def load(place: str, tag: str) -> _Load:
    return _Load(place, tag)


def store(place: str, value: Any, tag: str, depends: bool = False) -> _Store:
    return _Store(place, value, tag, depends)


def cas(place: str, expected: Any, value: Any, tag: str) -> _Rmw:
    """Gives what was there; it is `value` now if that was `expected`."""
    return _Rmw(place, lambda there: value if there == expected else None, tag)


def add(place: str, n: int, tag: str) -> _Rmw:
    return _Rmw(place, lambda there: there + n, tag)


def lock(name: str) -> _Enter:
    return _Enter(f"lock {name}", (name,), lambda now, me: ((me,), None) if now[0] is None else None)


def _free(now: tuple[Any, ...], me: int) -> tuple[tuple[Any, ...], Any]:
    if now[0] != me:
        raise Violation("unlocked by somebody else")
    return (None,), None


def unlock(name: str) -> _Enter:
    return _Enter(f"unlock {name}", (name,), _free)


def wait(condition: str, mutex: str) -> Program:
    """Of a condition, until it is signalled: never for no reason or up to a time limit, so nothing rests on either."""

    def sleep(now: tuple[Any, ...], me: int) -> tuple[tuple[Any, ...], Any]:
        if now[1] != me:
            raise Violation("waits without the lock")
        return ((*now[0], me), None), None

    yield _Enter(f"sleep on {condition}", (condition, mutex), sleep)
    yield _Enter(f"awake from {condition}", (condition,), lambda now, me: None if me in now[0] else (now, None))
    yield lock(mutex)


def signal(condition: str) -> _Enter:
    return _Enter(f"signal {condition}", (condition,), lambda now, _: ((now[0][1:],), None))


def broadcast(condition: str) -> _Enter:
    return _Enter(f"broadcast {condition}", (condition,), lambda now, _: (((),), None))


def change(name: str, new: Callable[[Any], Any]) -> _Enter:
    """A system call that changes something of the kernel's: a file, an eventfd.  Gives what was there."""
    return _Enter(f"change {name}", (name,), lambda now, _: ((new(now[0]),), now[0]))


def await_(name: str, until: Callable[[Any], bool]) -> _Enter:
    """A system call that sleeps until something of the kernel's is so.  Gives it."""
    return _Enter(f"await {name}", (name,), lambda now, _: (now, now[0]) if until(now[0]) else None)


def peek(name: str) -> _Peek:
    return _Peek(name)


# ---- what is explored ----


@dataclass(frozen=True)
class Model:
    """Programs that run at once, on places and kernel objects that begin as given.

    `lives` are processes, each a list of programs: all but the last are killed at some moment, and the next begins
    with the memory, and the kernel objects named in `files`, that the one before left.
    """

    lives: Sequence[Sequence[Callable[[], Program]]]
    places: Mapping[str, Any]
    kernel: Mapping[str, Any] = field(default_factory=dict)
    files: frozenset[str] = frozenset()
    #: Looks at the memory and at what each program of the last life returned when all are through.
    end: Callable[[Mapping[str, Any], Sequence[Any]], None] = lambda memory, results: None


@dataclass(frozen=True)
class Result:
    states: int
    tags: frozenset[tuple[str, str]]  # the atomic operations that were done: tag, and load, store or rmw


class _Ended(NamedTuple):
    value: Any


class _Failed(NamedTuple):
    why: str


class _Waiting(NamedTuple):  # a store in the buffer
    place: int
    value: Any
    seen: _View  # by its thread when it was made
    is_plain: bool
    is_release: bool


class _Thread(NamedTuple):
    history: tuple[Any, ...]  # results of all operations so far: they determine where the program stands
    view: _View
    buffer: tuple[_Waiting, ...]


class _State(NamedTuple):
    life: int
    threads: tuple[_Thread, ...]
    memory: tuple[tuple[tuple[Any, _View | None], ...], ...]  # of each place, all values: with what they take along
    reads: tuple[int, ...]  # of each place by each thread, where it is plain
    kernel: tuple[tuple[Any, _View], ...]


def _join(a: _View, b: _View) -> _View:
    return tuple(map(max, a, b))


def _at(view: _View, index: int, value: int) -> _View:
    return (*view[:index], value, *view[index + 1 :])


class _Explorer:
    def __init__(self, model: Model, orders: Mapping[str, str], strict: bool) -> None:
        self.model, self.orders, self.strict = model, orders, strict
        self.places = {name: i for i, name in enumerate(model.places)}
        self.kernel = {name: i for i, name in enumerate(model.kernel)}
        self.width = max(map(len, model.lives))
        self.done: dict[tuple[int, int, tuple[Any, ...]], Any] = {}
        self.tags: set[tuple[str, str]] = set()
        self.empty: _View = (0,) * (len(self.places) * (1 + self.width))

    # ---- programs ----

    def next(self, life: int, me: int, history: tuple[Any, ...]) -> Any:
        """What the program does next, which only depends on the results that it was given."""
        key = (life, me, history)
        if key not in self.done:
            self.done[key] = self.run(life, me, history)
        return self.done[key]

    def run(self, life: int, me: int, history: tuple[Any, ...]) -> Any:
        program = self.model.lives[life][me]()
        is_loose = False
        try:
            op = next(program)
            for result in history:
                if isinstance(op, _Load | _Rmw):
                    is_loose = is_loose or self.orders[op.tag] == "relaxed"
                elif isinstance(op, _Enter) and not op.what.startswith("lock "):
                    is_loose = False
                op = program.send(result)
        except StopIteration as end:
            return _Ended(end.value)
        except Violation as exc:
            return _Failed(str(exc))
        if isinstance(op, _Store) and is_loose and not op.depends and self.orders[op.tag] == "relaxed" and self.strict:
            raise Late(f"{op.tag} could come before a load that stands before it")
        if isinstance(op, _Load | _Store | _Rmw):
            self.tags.add((op.tag, type(op).__name__[1:].lower()))
        return op

    def begin(self, life: int, memory: Sequence[Any], kernel: Sequence[Any]) -> _State:
        threads = tuple(_Thread((), self.empty, ()) for _ in self.model.lives[life])
        return _State(
            life,
            threads,
            tuple(((value, None),) for value in memory),
            self.empty[len(self.places) :],
            tuple((value, self.empty) for value in kernel),
        )

    # ---- steps ----

    def is_last(self, state: _State) -> bool:
        return state.life == len(self.model.lives) - 1

    def steps(self, state: _State) -> Iterator[tuple[str, _State]]:
        """Every step that is possible, as what it is and where it leads."""
        ops = [self.next(state.life, i, thread.history) for i, thread in enumerate(state.threads)]
        for i, op in enumerate(ops):
            if isinstance(op, _Failed):
                raise Violation(op.why)
            if self.is_private(state, i, op):  # to nobody's notice, so in one order for all
                yield from self.step(state, i, op)
                return
        if self.is_last(state):
            for i, thread in enumerate(state.threads):
                for n, entry in enumerate(thread.buffer):
                    if entry.is_plain and all(older.place != entry.place for older in thread.buffer[:n]):
                        yield self.leave(state, i, n)  # who looks at it at the wrong moment makes a race all the same
                        return
        moved = False
        for i, op in enumerate(ops):
            for step in self.step(state, i, op):
                moved = True
                yield step
            buffer = state.threads[i].buffer
            for n, entry in enumerate(buffer):
                if not (entry.is_release and n) and all(older.place != entry.place for older in buffer[:n]):
                    moved = True
                    yield self.leave(state, i, n)
        if not self.is_last(state):
            yield from self.kill(state)
        elif not moved:
            if not all(isinstance(op, _Ended) for op in ops):
                raise Violation("all sleep, and nobody is there to wake them")
            memory = {name: state.memory[i][-1][0] for name, i in self.places.items()}
            self.model.end(memory, [op.value for op in ops])

    def is_private(self, state: _State, me: int, op: Any) -> bool:
        buffer = state.threads[me].buffer
        if isinstance(op, _Store | _Write | _Read):
            return True
        if isinstance(op, _Load):
            return any(entry.place == self.places[op.place] for entry in buffer)
        return isinstance(op, _Enter) and op.what.startswith("unlock ") and not buffer

    def step(self, state: _State, me: int, op: Any) -> Iterator[tuple[str, _State]]:
        thread = state.threads[me]
        if isinstance(op, _Ended):
            return
        if isinstance(op, _Peek):
            value = state.kernel[self.kernel[op.name]][0]
            yield f"{me}: {op.name} is {value}", self.put(state, me, thread, value)
        elif isinstance(op, _Enter):
            yield from self.enter(state, me, op)
        else:
            place = self.places[op.place]
            if isinstance(op, _Write | _Store):
                is_plain = isinstance(op, _Write)
                is_release = isinstance(op, _Store) and self.orders[op.tag] == "release"
                # A relaxed store takes nothing along, so what was seen before it does not matter.
                seen = thread.view if is_plain or is_release else self.empty
                entry = _Waiting(place, op.value, seen, is_plain, is_release)
                yield (
                    f"{me}: {op.place} := {op.value}, into the buffer",
                    self.put(state, me, thread._replace(buffer=(*thread.buffer, entry)), None),
                )
            elif all(entry.place != place for entry in thread.buffer):
                yield from self.access(state, me, op, place)
            elif not isinstance(op, _Rmw):
                value = [entry.value for entry in thread.buffer if entry.place == place][-1]
                yield f"{me}: {op.place} is {value}, from the buffer", self.put(state, me, thread, value)

    def access(self, state: _State, me: int, op: Any, place: int) -> Iterator[tuple[str, _State]]:
        thread, values = state.threads[me], state.memory[place]
        latest = len(values) - 1
        if isinstance(op, _Read):
            if thread.view[place] != latest:
                raise Violation(f"thread {me} reads {op.place} while it is written")
            at = place * self.width + me
            n = state.reads[at] + 1
            thread = thread._replace(view=_at(thread.view, len(self.places) + at, n))
            after = self.put(state, me, thread, values[latest][0])
            yield f"{me}: reads {op.place}: {values[latest][0]}", after._replace(reads=_at(state.reads, at, n))
        elif isinstance(op, _Load):
            for i in range(thread.view[place], latest + 1):
                value, along = values[i]
                view = _at(thread.view, place, i)
                if along is not None and self.orders[op.tag] == "acquire":
                    view = _join(view, along)
                yield f"{me}: {op.place} is {value}", self.put(state, me, thread._replace(view=view), value)
        else:
            value, along = values[latest]
            new = op.new(value)
            view = _at(thread.view, place, latest if new is None else latest + 1)
            after = self.put(state, me, thread._replace(view=view), value)
            if new is not None:  # what stood there is passed on with it
                after = after._replace(memory=_with(state.memory, place, (*values, (new, along))))
            yield f"{me}: {op.place} was {value}, becomes {new}", after

    def enter(self, state: _State, me: int, op: _Enter) -> Iterator[tuple[str, _State]]:
        thread = state.threads[me]
        if thread.buffer:
            return
        at = [self.kernel[name] for name in op.names]
        done = op.step(tuple(state.kernel[i][0] for i in at), me)
        if done is None:
            return
        view = thread.view
        for i in at:
            view = _join(view, state.kernel[i][1])
        kernel = list(state.kernel)
        for i, value in zip(at, done[0], strict=True):
            kernel[i] = (value, view)
        after = self.put(state, me, thread._replace(view=view), done[1])
        yield f"{me}: {op.what}", after._replace(kernel=tuple(kernel))

    def leave(self, state: _State, me: int, n: int) -> tuple[str, _State]:
        """The store at `n` leaves the buffer."""
        thread = state.threads[me]
        place, value, seen, is_plain, is_release = thread.buffer[n]
        values = state.memory[place]
        name = list(self.places)[place]
        if is_plain:
            self.check_written(state, me, place, seen, name)
        index = len(values)
        along = _at(seen, place, index) if is_release else None
        younger = tuple(
            entry._replace(seen=_at(entry.seen, place, index)) if entry.is_plain or entry.is_release else entry
            for entry in thread.buffer[n + 1 :]
        )
        left = _Thread(thread.history, _at(thread.view, place, index), (*thread.buffer[:n], *younger))
        memory = _with(state.memory, place, (*values, (value, along)))
        return f"{me}: {name} becomes {value}", state._replace(threads=_with(state.threads, me, left), memory=memory)

    def check_written(self, state: _State, me: int, place: int, seen: _View, name: str) -> None:
        if seen[place] != len(state.memory[place]) - 1:
            raise Violation(f"thread {me} writes {name} while it is written")
        for other in range(self.width):
            at = place * self.width + other
            if other != me and seen[len(self.places) + at] != state.reads[at]:
                raise Violation(f"thread {me} writes {name} while thread {other} reads it")

    def kill(self, state: _State) -> Iterator[tuple[str, _State]]:
        memory = [values[-1][0] for values in state.memory]
        kernel = [
            state.kernel[i][0] if name in self.model.files else self.model.kernel[name]
            for name, i in self.kernel.items()
        ]
        yield "killed", self.begin(state.life + 1, memory, kernel)

    def put(self, state: _State, me: int, thread: _Thread, result: Any) -> _State:
        """The thread's operation is done."""
        return state._replace(threads=_with(state.threads, me, thread._replace(history=(*thread.history, result))))


def _with(all_: tuple[Any, ...], index: int, one: Any) -> tuple[Any, ...]:
    return (*all_[:index], one, *all_[index + 1 :])


def explore(model: Model, orders: Mapping[str, str], *, strict: bool = True) -> Result:
    """Visit every state.  `orders` says what each tag means: relaxed, acquire or release.

    Raises Counterexample, with one of the shortest ways to where a promise is broken.  `strict=False` is for
    orderings that were weakened on purpose, for which `Late` is no objection.
    """
    explorer = _Explorer(model, orders, strict)
    first = explorer.begin(0, list(model.places.values()), list(model.kernel.values()))
    came_from: dict[_State, tuple[_State, str] | None] = {first: None}
    todo = deque([first])
    while todo:
        state = todo.popleft()
        try:
            for what, after in explorer.steps(state):
                if after not in came_from:
                    came_from[after] = (state, what)
                    todo.append(after)
        except Violation as exc:
            way: list[str] = []
            at = came_from[state]
            while at is not None:
                way.append(at[1])
                at = came_from[at[0]]
            raise Counterexample("\n".join([str(exc), *reversed(way)])) from None
    return Result(len(came_from), frozenset(explorer.tags))

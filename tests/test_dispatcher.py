"""The thread on which handlers and callbacks run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from cloudpubsub import Client
from cloudpubsub._dispatcher import Call, CallEach, Deliver, Dispatcher, Handler, Outcome
from cloudpubsub._errors import WrongThreadError
from cloudpubsub._message import Drop, Message

DEADLINE_S = 60.0
MESSAGE = Message("a/b", b"x")
Make = Callable[..., Dispatcher]


class One(Deliver):
    """A single message; `done(self)` is called when it has ended."""

    def __init__(self, message: Message, handlers: Sequence[Handler], done: Callable[[One], object]) -> None:
        super().__init__([(message, 0)], 1)
        self.message, self.handlers, self.done = message, handlers, done
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None

    def handlers_of(self, message: Message, packet_id: int) -> Sequence[Handler]:
        return self.handlers

    def ended(self, message: Message, packet_id: int, outcome: Outcome, error: BaseException | None) -> None:
        self.outcome, self.error = outcome, error
        self.done(self)


class Batch(Deliver):
    """Messages 0, 1, … (their packet ids too) for one handler; of some nobody may know the handlers."""

    def __init__(self, count: int, handler: Handler, unwanted: int | None = None) -> None:
        super().__init__([(Message(f"a/{number}", b""), number) for number in range(count)], count)
        self.handler, self.unwanted = handler, unwanted
        self.ends: list[tuple[int, Outcome]] = []

    def handlers_of(self, message: Message, packet_id: int) -> Sequence[Handler] | None:
        return None if packet_id == self.unwanted else [self.handler]

    def ended(self, message: Message, packet_id: int, outcome: Outcome, error: BaseException | None) -> None:
        self.ends.append((packet_id, outcome))


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Dispatcher] = []

    def start(*args: int, **settings: object) -> Dispatcher:
        dispatcher = Dispatcher(*args, **{"retry_delay_s": 0.001, **settings})  # type: ignore[arg-type]
        made.append(dispatcher)
        dispatcher.start()
        return dispatcher

    yield start
    assert all([dispatcher.stop(DEADLINE_S) for dispatcher in made])


class Gate:
    """A callback that holds the dispatcher thread until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        assert self.opened.wait(DEADLINE_S)


def test_items_run_in_order_on_one_thread(make: Make) -> None:
    dispatcher, seen, threads = make(), list[object](), set[int]()

    def note(value: object) -> None:
        seen.append(value)
        threads.add(threading.get_ident())
        assert dispatcher.is_current_thread()

    for number in range(100):
        assert dispatcher.put(Call(note, number))
    assert dispatcher.put(CallEach(note, range(100, 103)))
    assert dispatcher.put(One(MESSAGE, [note], note))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert seen[:104] == [*range(103), MESSAGE]
    assert isinstance(seen[104], One)
    assert len(threads) == 1
    assert not dispatcher.is_current_thread()


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_no_exception_ends_the_thread(make: Make, kind: type[BaseException]) -> None:
    dispatcher, seen = make(handler_retries=0), list[object]()

    def bad(*_: object) -> None:
        raise kind("bad")

    dispatcher.put(Call(bad))
    dispatcher.put(CallEach(bad, [1, 2]))
    dispatcher.put(One(MESSAGE, [bad], bad))
    dispatcher.put(Call(seen.append, 1))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert seen == [1]
    assert dispatcher.callback_errors == 4
    assert dispatcher.handler_errors == 1


def test_exceptions_are_logged_once_with_their_traceback(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    def bad() -> None:
        raise ValueError("the reason")

    dispatcher = make()
    for _ in range(20):
        dispatcher.put(Call(bad))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert [record.exc_info is not None for record in caplog.records] == [True]
    assert "bad" in caplog.text
    assert "the reason" in caplog.text
    dispatcher.stop()
    assert "19 more" in caplog.text


@pytest.mark.parametrize(("failures", "outcome"), [(0, Outcome.DONE), (3, Outcome.DONE), (4, Outcome.FAILED)])
def test_a_handler_is_tried_again_so_many_times(make: Make, failures: int, outcome: Outcome) -> None:
    dispatcher, calls, good, done = make(handler_retries=3), list[int](), list[Message](), list[One]()

    def flaky(message: Message) -> None:
        calls.append(1)
        if len(calls) <= failures:
            raise ValueError(len(calls))

    dispatcher.put(One(MESSAGE, [flaky, good.append], done.append))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert [item.outcome for item in done] == [outcome]
    assert len(calls) == min(failures + 1, 4)
    assert good == [MESSAGE]
    assert dispatcher.handler_errors == min(failures, 4)
    assert (done[0].error is None) == (failures == 0)


def test_nothing_waits_after_the_last_try(make: Make) -> None:
    dispatcher, done = make(handler_retries=0, retry_delay_s=60.0), list[Outcome]()

    def bad(message: Message) -> None:
        raise ValueError

    dispatcher.put(One(MESSAGE, [bad], lambda item: done.append(item.outcome)))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert done == [Outcome.FAILED]


def test_waiting_for_idle_ends_when_a_stop_ran_out_of_time(make: Make) -> None:
    gate, reports = Gate(), list[Drop]()
    dispatcher = make(on_drop=reports.append)
    dispatcher.put(Call(gate))
    assert gate.entered.wait(DEADLINE_S)
    dispatcher.report_drop(Drop(0, 40, 1, 40, "quota"))
    assert not dispatcher.stop(0.01)
    assert not dispatcher.wait_idle(0.01)
    gate.opened.set()
    assert dispatcher.wait_idle(DEADLINE_S)
    assert reports == []


def test_a_message_without_handlers_is_done_in_its_turn(make: Make) -> None:
    dispatcher, done = make(handler_retries=2), list[tuple[str, Outcome]]()

    def note(item: One) -> None:
        done.append((item.message.topic, item.outcome))

    def bad(message: Message) -> None:
        raise ValueError

    dispatcher.put(One(Message("first", b""), [bad], note))
    dispatcher.put(One(Message("second", b""), [], note))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert done == [("first", Outcome.FAILED), ("second", Outcome.DONE)]


def test_a_full_queue_refuses_and_says_when_there_is_room(make: Make) -> None:
    gate, room = Gate(), threading.Event()
    dispatcher = make(4, on_room=room.set)
    dispatcher.put(Call(gate))
    assert gate.entered.wait(DEADLINE_S)
    assert [dispatcher.put(Call(int)) for _ in range(6)] == [True] * 4 + [False] * 2
    assert dispatcher.room() == 0
    assert not room.is_set()
    gate.opened.set()
    assert room.wait(DEADLINE_S)
    assert dispatcher.room() > 0


def test_a_batch_counts_as_many(make: Make) -> None:
    gate = Gate()
    dispatcher = make(4)
    dispatcher.put(Call(gate))
    assert gate.entered.wait(DEADLINE_S)
    assert dispatcher.put(CallEach(int, range(5)))
    assert not dispatcher.put(Call(int))
    gate.opened.set()


def test_room_is_not_announced_when_nobody_was_refused(make: Make) -> None:
    room = threading.Event()
    dispatcher = make(1_000, on_room=room.set)
    for _ in range(100):
        dispatcher.put(Call(int))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert not room.is_set()


def test_put_waits_for_room(make: Make) -> None:
    gate = Gate()
    dispatcher = make(1)
    dispatcher.put(Call(gate))
    assert gate.entered.wait(DEADLINE_S)
    assert dispatcher.put(Call(int))
    assert not dispatcher.put(Call(int), timeout_s=0.01)
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(dispatcher.put(Call(int), timeout_s=None)))
    thread.start()
    gate.opened.set()
    thread.join(DEADLINE_S)
    assert results == [True]


def test_put_on_the_dispatcher_thread_never_waits(make: Make) -> None:
    dispatcher, results = make(1), list[bool]()

    def put_two() -> None:
        results.extend(dispatcher.put(Call(int), timeout_s=None) for _ in range(2))

    dispatcher.put(Call(put_two))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert results == [True, False]


def test_waiting_and_stopping_on_the_dispatcher_thread_is_an_error(make: Make) -> None:
    dispatcher, kinds = make(), list[type[BaseException]]()

    def misuse() -> None:
        for call in (dispatcher.stop, dispatcher.wait_idle):
            try:
                call()
            except WrongThreadError as exc:
                kinds.append(type(exc))

    dispatcher.put(Call(misuse))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert kinds == [WrongThreadError] * 2


def test_each_message_of_a_batch_ends_as_it_deserves(make: Make) -> None:
    dispatcher, seen = make(handler_retries=1), list[str]()

    def handle(message: Message) -> None:
        seen.append(message.topic)
        if message.topic == "a/1" or (message.topic == "a/2" and seen.count("a/2") == 1):
            raise ValueError

    batch = Batch(5, handle, unwanted=3)
    assert dispatcher.put(batch)
    assert dispatcher.wait_idle(DEADLINE_S)
    assert seen == ["a/0", "a/1", "a/1", "a/2", "a/2", "a/4"]
    done, failed, abandoned = Outcome.DONE, Outcome.FAILED, Outcome.ABANDONED
    assert batch.ends == [(0, done), (1, failed), (2, done), (3, abandoned), (4, done)]
    assert dispatcher.handler_errors == 3


def test_the_end_of_deliveries_comes_between_two_messages_of_a_batch(make: Make) -> None:
    dispatcher, gate = make(), Gate()
    batch = Batch(3, gate)
    dispatcher.put(batch)
    assert gate.entered.wait(DEADLINE_S)
    assert not dispatcher.end_deliveries(0.01)
    gate.opened.set()
    assert dispatcher.end_deliveries(DEADLINE_S)
    assert dispatcher.wait_idle(DEADLINE_S)
    assert batch.ends == [(0, Outcome.DONE), (1, Outcome.ABANDONED), (2, Outcome.ABANDONED)]


def test_stop_interrupts_a_retry_and_abandons_the_rest(make: Make) -> None:
    dispatcher = make(handler_retries=5, retry_delay_s=60.0)
    failed, done, called = threading.Event(), list[Outcome](), list[object]()

    def bad(message: Message) -> None:
        failed.set()
        raise ValueError

    for _ in range(3):
        dispatcher.put(One(MESSAGE, [bad], lambda item: done.append(item.outcome)))
    dispatcher.put(Call(called.append, 1))
    assert failed.wait(DEADLINE_S)
    started = time.monotonic()
    assert dispatcher.stop(DEADLINE_S)
    assert time.monotonic() - started < DEADLINE_S
    assert done == [Outcome.ABANDONED] * 3
    assert dispatcher.handler_errors == 1
    assert called == [1]
    assert not dispatcher.put(Call(called.append, 2))
    assert dispatcher.room() == 0


def test_stop_returns_in_time_although_a_handler_does_not(make: Make) -> None:
    gate, done, called = Gate(), list[Outcome](), list[object]()
    dispatcher = make()
    dispatcher.put(One(MESSAGE, [gate], lambda item: done.append(item.outcome)))
    dispatcher.put(One(MESSAGE, [called.append], lambda item: done.append(item.outcome)))
    dispatcher.put(Call(called.append, 1))
    assert gate.entered.wait(DEADLINE_S)
    assert not dispatcher.stop(0.05)
    assert done == [Outcome.ABANDONED]
    gate.opened.set()
    assert dispatcher.stop(DEADLINE_S)
    assert done == [Outcome.ABANDONED, Outcome.DONE]
    assert called == []


def test_stop_wakes_a_waiting_put(make: Make) -> None:
    gate, results = Gate(), list[bool]()
    dispatcher = make(1)
    dispatcher.put(Call(gate))
    assert gate.entered.wait(DEADLINE_S)
    dispatcher.put(Call(int))
    thread = threading.Thread(target=lambda: results.append(dispatcher.put(Call(int), timeout_s=None)))
    thread.start()
    dispatcher.stop(0.01)
    thread.join(DEADLINE_S)
    assert results == [False]
    gate.opened.set()


def test_stop_before_start_abandons_what_was_put() -> None:
    dispatcher, done = Dispatcher(), list[Outcome]()
    dispatcher.put(One(MESSAGE, [], lambda item: done.append(item.outcome)))
    assert dispatcher.stop()
    dispatcher.start()
    assert done == [Outcome.ABANDONED]
    assert not dispatcher.is_current_thread()


def test_every_drop_is_reported_in_bounded_memory(make: Make) -> None:
    gate, reports = Gate(), list[Drop]()
    dispatcher = make(on_drop=reports.append)
    dispatcher.put(Call(gate))
    assert gate.entered.wait(DEADLINE_S)
    for number in range(10_000):
        dispatcher.report_drop(Drop(number * 40, number * 40 + 40, 1, 40, "quota"))
    gate.opened.set()
    assert dispatcher.wait_idle(DEADLINE_S)
    assert len(reports) <= 256
    assert sum(drop.count for drop in reports) == 10_000
    assert (reports[0].first, reports[-1].end) == (0, 400_000)


def test_no_lock_is_held_while_a_callback_runs(make: Make) -> None:
    dispatcher, results = make(), list[bool]()

    def use_it_from_another_thread() -> None:
        def use() -> None:
            results.append(dispatcher.room() == 1_000)
            results.append(dispatcher.put(Call(int)))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join(DEADLINE_S)

    dispatcher.put(Call(use_it_from_another_thread))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert results == [True, True]


def test_many_producers_lose_nothing(make: Make) -> None:
    dispatcher, seen = make(16), list[int]()

    def produce(base: int) -> None:
        for number in range(500):
            assert dispatcher.put(Call(seen.append, base + number), timeout_s=DEADLINE_S)

    threads = [threading.Thread(target=produce, args=(base * 500,)) for base in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert dispatcher.wait_idle(DEADLINE_S)
    assert sorted(seen) == list(range(2_000))
    assert [n for n in seen if n < 500] == list(range(500))


def test_room_wakes_the_publish_connection_only_where_a_report_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    client, woken = Client("mqtt://127.0.0.1", client_id="c", on_publish=print), list[str]()
    monkeypatch.setattr(client._publisher, "wake", lambda: woken.append("publish"))
    monkeypatch.setattr(client._subscriber, "wake", lambda: woken.append("subscribe"))
    client._room_in_dispatcher()
    assert woken == ["subscribe"]
    client._publisher._held = CallEach(print, [1])
    client._room_in_dispatcher()
    client._publisher._held = None
    client._publisher._notices._dead.append(Call(print))
    client._room_in_dispatcher()
    client._publisher._notices._dead.clear()
    assert woken == ["subscribe", "publish", "subscribe", "publish", "subscribe"]
    monkeypatch.undo()
    client.close()

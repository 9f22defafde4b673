"""Batches of received messages: what runs natively ends as it does one message at a time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest

from cloudpubsub import Message
from cloudpubsub._delivery import BATCH_MAX, Pubacks
from cloudpubsub._dispatcher import Call, Deliver, Dispatcher, Handler, Outcome
from cloudpubsub._link import Receiver
from cloudpubsub._message import Drop
from cloudpubsub._topic import Matcher
from tests.making import DEADLINE_S, Gate
from tests.packets import Publish, build

Make = Callable[..., Dispatcher]


class Stream:
    """What batches of one connection share: handlers, acknowledgements, and how messages ended one by one."""

    def __init__(self, *topics: str) -> None:
        self.matcher: Matcher[Handler] = Matcher()
        self.acks = Pubacks()
        self.wakes = 0
        self.ended: list[tuple[int, Outcome]] = []
        self.topics = topics

    def on(self, topic_filter: str, handler: Handler) -> None:
        """Handlers are looked up once now, as if messages had come before."""
        self.matcher.add(topic_filter, handler)
        for topic in self.topics:
            self.matcher.match(topic)

    def wake(self) -> None:
        self.wakes += 1

    def batch(self, messages: Iterable[tuple[str, int]], *, one_by_one: bool = False) -> Batch:
        made = [(Message(topic, b"%d" % packet_id), packet_id) for topic, packet_id in messages]
        return Batch(self, made, one_by_one)

    def acknowledged(self) -> list[int]:
        packets = bytes(self.acks.take())
        assert {packets[at : at + 2] for at in range(0, len(packets), 4)} <= {b"\x40\x02"}
        return [int.from_bytes(packets[at : at + 2], "big") for at in range(2, len(packets), 4)]


class Batch(Deliver):
    def __init__(self, stream: Stream, messages: Sequence[tuple[Message, int]], one_by_one: bool) -> None:
        matcher = None if one_by_one else stream.matcher
        super().__init__(messages, len(messages), matcher=matcher, acks=stream.acks, wake=stream.wake)
        self.stream = stream

    def handlers_of(self, message: Message, packet_id: int) -> Sequence[Handler]:
        return self.stream.matcher.match(message.topic)

    def ended(self, message: Message, packet_id: int, outcome: Outcome, error: BaseException | None) -> None:
        self.stream.ended.append((packet_id, outcome))
        if packet_id and outcome is not Outcome.ABANDONED:
            self.acknowledge(packet_id)


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Dispatcher] = []

    def start(**settings: object) -> Dispatcher:
        dispatcher = Dispatcher(**{"retry_delay_s": 0.001, **settings})  # type: ignore[arg-type]
        made.append(dispatcher)
        dispatcher.start()
        return dispatcher

    yield start
    assert all([dispatcher.stop(DEADLINE_S) for dispatcher in made])


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_goes_as_one_message_after_the_other(make: Make, seed: int) -> None:
    """Handlers that raise, for a while or for ever, that come and go, and messages that nobody wants."""
    topics = ["a/1", "a/2", "b/1", "b/22", "c"]
    draw = random.Random(seed)
    script = [(draw.choice(topics), draw.choice([0, packet_id])) for packet_id in range(1, 201)]

    def run(one_by_one: bool) -> tuple[object, ...]:
        stream, calls, draw = Stream(*topics), list[tuple[int, bytes]](), random.Random(-seed)
        dispatcher = make(handler_retries=1, retry_delay_s=0.0)

        def handler_of(name: int) -> Handler:
            def handle(message: Message) -> None:
                calls.append((name, message.payload))
                match draw.randrange(12):
                    case 0 | 1:
                        raise ValueError
                    case 2:
                        stream.matcher.remove(draw.choice(["a/+", "#", "b/1"]), handle)
                    case 3:
                        stream.on(draw.choice(["a/+", "#", "b/1"]), handlers[draw.randrange(3)])

            return handle

        handlers = [handler_of(name) for name in range(3)]
        for topic_filter, handler in zip(["a/+", "#", "b/1"], handlers, strict=True):
            stream.on(topic_filter, handler)
        for start in range(0, len(script), 50):
            assert dispatcher.put(stream.batch(script[start : start + 50], one_by_one=one_by_one))
        assert dispatcher.wait_idle(DEADLINE_S)
        failed = [end for end in stream.ended if end[1] is not Outcome.DONE]
        return calls, stream.acknowledged(), failed, dispatcher.handler_errors

    natively = run(False)
    assert natively == run(True)
    assert natively[1] == [packet_id for _, packet_id in script if packet_id]


def test_a_message_is_acknowledged_when_its_handler_has_returned_and_before_the_next_is_called(make: Make) -> None:
    stream, dispatcher, before = Stream("t"), make(), list[int]()
    stream.on("t", lambda _: before.append(len(stream.acks)))
    dispatcher.put(stream.batch(("t", packet_id) for packet_id in (7, 1, 0, 65535)))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert before == [0, 1, 2, 2]
    assert stream.acknowledged() == [7, 1, 65535]
    assert stream.ended == []  # natively, or this file tests nothing


def test_who_acknowledges_is_woken_once_until_all_are_taken(make: Make) -> None:
    stream, dispatcher, taken = Stream("t"), make(), list[int]()

    def take_the_third(message: Message) -> None:
        if message.payload == b"3":
            taken.extend(stream.acknowledged())

    stream.on("t", take_the_third)
    dispatcher.put(stream.batch(("t", packet_id) for packet_id in range(1, 6)))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert (taken, stream.acknowledged()) == ([1, 2], [3, 4, 5])
    assert stream.wakes == 2


def test_one_who_cannot_be_woken_holds_nothing_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, dispatcher, seen = Stream("t"), make(), list[Message]()

    def fail() -> None:
        raise OSError

    monkeypatch.setattr(stream, "wake", fail)
    stream.on("t", seen.append)
    dispatcher.put(stream.batch(("t", packet_id) for packet_id in range(1, 6)))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert [message.payload for message in seen] == [b"1", b"2", b"3", b"4", b"5"]
    assert stream.acknowledged() == [1, 2, 3, 4, 5]
    assert dispatcher.callback_errors == 1


def test_a_handler_replaced_within_a_batch_gets_what_is_behind(make: Make) -> None:
    stream, dispatcher, calls = Stream("t"), make(), list[tuple[str, bytes]]()

    def first(message: Message) -> None:
        calls.append(("first", message.payload))
        if message.payload == b"2":
            stream.matcher.remove("t")
            stream.on("t", second)

    def second(message: Message) -> None:
        calls.append(("second", message.payload))
        if message.payload == b"4":
            stream.matcher.remove("t")

    stream.on("t", first)
    dispatcher.put(stream.batch(("t", packet_id) for packet_id in range(1, 7)))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert calls == [("first", b"1"), ("first", b"2"), ("second", b"3"), ("second", b"4")]
    assert stream.acknowledged() == [1, 2, 3, 4, 5, 6]


def test_only_the_handler_that_raised_is_called_again(make: Make) -> None:
    stream, dispatcher, calls = Stream("t"), make(handler_retries=2), list[tuple[int, bytes]]()

    def note(number: int) -> Handler:
        def handle(message: Message) -> None:
            calls.append((number, message.payload))
            if number == 1 and message.payload == b"2" and calls.count((1, b"2")) < 3:
                raise ValueError

        return handle

    for number in range(3):
        stream.on("t", note(number))
    dispatcher.put(stream.batch(("t", packet_id) for packet_id in range(1, 4)))
    assert dispatcher.wait_idle(DEADLINE_S)
    of_second = [(0, b"2"), (1, b"2"), (1, b"2"), (1, b"2"), (2, b"2")]
    assert calls == [*((n, b"1") for n in range(3)), *of_second, *((n, b"3") for n in range(3))]
    assert (stream.acknowledged(), dispatcher.handler_errors) == ([1, 2, 3], 2)


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_no_exception_of_a_handler_ends_the_thread(make: Make, kind: type[BaseException]) -> None:
    stream, dispatcher = Stream("t"), make(handler_retries=0)

    def bad(message: Message) -> None:
        raise kind

    stream.on("t", bad)
    dispatcher.put(stream.batch(("t", packet_id) for packet_id in range(1, 4)))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert stream.ended == [(packet_id, Outcome.FAILED) for packet_id in range(1, 4)]
    assert dispatcher.handler_errors == 3


def test_the_end_of_deliveries_comes_between_two_handlers(make: Make) -> None:
    stream, dispatcher, gate, called = Stream("t"), make(), Gate(), list[Message]()
    stream.on("t", gate)
    stream.on("t", called.append)
    dispatcher.put(stream.batch(("t", packet_id) for packet_id in range(1, 4)))
    assert gate.entered.wait(DEADLINE_S)
    assert not dispatcher.end_deliveries(0.01)
    gate.opened.set()
    assert dispatcher.end_deliveries(DEADLINE_S)
    assert dispatcher.wait_idle(DEADLINE_S)
    assert stream.ended == [(packet_id, Outcome.ABANDONED) for packet_id in range(1, 4)]
    assert (called, stream.acknowledged()) == ([], [])


def test_drops_are_told_between_two_messages_and_each_once(make: Make) -> None:
    order = list[object]()
    stream, dispatcher = Stream("t"), make(on_drop=order.append)

    def drop_three(message: Message) -> None:
        order.append(message.payload)
        if message.payload == b"2":
            for number in range(3):
                dispatcher.report_drop(Drop(number, number + 1, 1, 1, f"reason {number}"))

    stream.on("t", drop_three)
    dispatcher.put(stream.batch(("t", packet_id) for packet_id in range(1, 6)))
    assert dispatcher.wait_idle(DEADLINE_S)
    drops = [Drop(number, number + 1, 1, 1, f"reason {number}") for number in range(3)]
    assert order == [b"1", b"2", drops[0], b"3", drops[1], drops[2], b"4", b"5"]
    assert stream.acknowledged() == [1, 2, 3, 4, 5]


def test_drops_reported_from_another_thread_all_come(make: Make) -> None:
    drops, seen = list[Drop](), list[Message]()
    stream, dispatcher = Stream("t"), make(on_drop=drops.append)
    stream.on("t", seen.append)

    def report() -> None:
        for number in range(2_000):
            dispatcher.report_drop(Drop(number, number + 1, 1, 1, "quota"))

    thread = threading.Thread(target=report)
    thread.start()
    for _ in range(100):
        while not dispatcher.put(stream.batch(("t", packet_id) for packet_id in range(1, 21)), timeout_s=DEADLINE_S):
            pass
    thread.join(DEADLINE_S)
    assert dispatcher.wait_idle(DEADLINE_S)
    assert (sum(drop.count for drop in drops), len(seen)) == (2_000, 2_000)


def test_while_a_handler_runs_it_is_seen_since_when(make: Make) -> None:
    stream, dispatcher, gate = Stream("t"), make(), Gate()
    assert dispatcher.busy_since_s is None
    stream.on("t", gate)
    before_s = time.monotonic()
    dispatcher.put(stream.batch([("t", 1)]))
    assert gate.entered.wait(DEADLINE_S)
    since_s = dispatcher.busy_since_s
    assert since_s is not None
    assert before_s - 0.1 <= since_s <= time.monotonic()
    gate.opened.set()
    assert dispatcher.wait_idle(DEADLINE_S)
    assert dispatcher.put(Call(int))
    assert dispatcher.wait_idle(DEADLINE_S)
    assert dispatcher.busy_since_s is None


def test_a_batch_has_a_bound() -> None:
    message = (Message("t", b""), 1)
    assert len(Deliver([message] * BATCH_MAX)) == BATCH_MAX
    with pytest.raises(ValueError, match="256"):
        Deliver([message] * (BATCH_MAX + 1))


def feed(receiver: Receiver, data: bytes) -> None:
    view = receiver.space()
    view[: len(data)] = data
    receiver.received(len(data))


def test_topics_are_told_apart_whatever_they_have_in_common() -> None:
    """Of equal length, beginnings of one another, of equal characters in other bytes, and again the first."""
    topics = ["a/b/1", "a/b/2", "b/a/1", "a/b", "a/b/1/", "ä/1", "aä1", "ä/1", "a/b/1", "a/b/1", "t" * 300, "t" * 299]
    receiver = Receiver(1 << 20)
    feed(receiver, b"".join(build(Publish(topic, b"%d" % at, at + 1, qos=1), 4) for at, topic in enumerate(topics)))
    batch = Deliver()
    acknowledged, control, more = receiver.take(batch, BATCH_MAX, 1_000)
    assert (acknowledged, control, more) == (len(topics), b"", False)
    seen = []
    while (turn := batch.next()) is not None:
        seen.append((turn[0].topic, turn[0].payload, turn[1]))
        batch.step()
    assert seen == [(topic, b"%d" % at, at + 1) for at, topic in enumerate(topics)]
    assert batch.weight == len(topics)

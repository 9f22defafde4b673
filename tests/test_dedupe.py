"""The consumer's side: each message once, and what is missing."""

from __future__ import annotations

import itertools
import json
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloudpubsub
from cloudpubsub import Message, MessageId
from cloudpubsub.dedupe import Filter, Gap
from tests.brokers import Mosquitto
from tests.fake_broker import FakeBroker
from tests.packets import Publish
from tests.publishing import LIMIT, client_to, publish_numbers
from tests.script import HANG_UP, Script


def chain(count: int, *, spool: str = "s", start: int = 0, size: int = 10) -> list[MessageId]:
    return [MessageId(spool, start + n * size, start + (n + 1) * size, start + n * size) for n in range(count)]


def test_each_passes_once_however_often_it_comes() -> None:
    seen, ids = Filter(), chain(100)
    shuffled = ids * 3
    random.Random(1).shuffle(shuffled)
    passed = [one for one in shuffled if seen.accept(str(one))]
    assert sorted(passed) == ids
    assert (seen.accepted, seen.duplicates) == (100, 200)


def test_a_gap_is_told_when_the_message_behind_it_comes() -> None:
    gaps: list[Gap] = []
    seen = Filter(on_gap=gaps.append)
    ids = chain(10)
    for one in [*ids[:3], *ids[5:8], *ids[9:]]:
        assert seen.accept(one)
    assert gaps == [Gap("s", 30, 50), Gap("s", 80, 90)]
    assert seen.accept(ids[4]), "a late one is let through"


def test_padding_is_no_gap_and_a_jump_that_no_padding_explains_is_one() -> None:
    gaps: list[Gap] = []
    seen = Filter(on_gap=gaps.append)
    seen.accept(MessageId("s", 0, 100, 0))
    seen.accept(MessageId("s", 164, 200, 100))
    assert gaps == []
    seen.accept(MessageId("s", 1 << 40, (1 << 40) + 8, 200))
    assert gaps == [Gap("s", 200, 1 << 40)]


def test_spools_are_apart_and_the_first_message_of_one_is_no_gap() -> None:
    gaps: list[Gap] = []
    seen = Filter(on_gap=gaps.append)
    for one, other in zip(chain(5, spool="a", start=1000), chain(5, spool="b"), strict=True):
        assert seen.accept(one) and seen.accept(other)
    assert gaps == []


def test_memory_is_bounded_and_what_is_older_counts_as_seen() -> None:
    seen, ids = Filter(remember=10, spools=2), chain(100)
    assert all(seen.accept(one) for one in ids)
    assert seen.state()["s"] == [[0, 1000]], "all that came in order is one run"
    assert not any(seen.accept(one) for one in ids)
    for one in (sparse := chain(100, start=2000)[::2]):
        assert seen.accept(one)
    assert 2 < len(seen.state()["s"]) <= 10
    assert not seen.accept(chain(100, start=2000)[1]), "what was missing so long ago"
    assert seen.accept(MessageId("s", 1500, 1510, 1490)), "the widest hole is the last to be closed"
    assert seen.accept(chain(100, start=2000)[97])
    assert not any(seen.accept(one) for one in sparse)
    for spool in "abcd":
        seen.accept(MessageId(spool, 0, 8, 0))
    assert list(seen.state()) == ["c", "d"]


def test_live_data_ahead_of_a_long_backlog_are_no_reason_to_take_it_for_seen() -> None:
    seen = Filter(remember=3)
    backlog, live = chain(100_000), chain(100_000, start=1_000_000)
    passed = 0
    for old, new in zip(backlog, live, strict=True):
        passed += seen.accept(new) + seen.accept(old) + seen.accept(new)
    assert (passed, seen.duplicates) == (200_000, 100_000)
    assert seen.state()["s"] == [[0, 2_000_000]]


def test_who_gets_a_part_of_the_live_data_still_gets_the_backlog() -> None:
    seen = Filter(remember=100)
    live = chain(20_000, start=1_000_000)[::2]
    assert all(seen.accept(one) for one in live)
    assert seen.accept(MessageId("s", 200, 210, 190)), "the backlog's first"
    assert seen.accept(MessageId("s", 500_000, 500_010, 499_990))
    assert len(seen.state()["s"]) <= 100


def test_a_message_that_could_not_be_stored_is_new_when_it_comes_again() -> None:
    stored: list[MessageId] = []

    def store(one: MessageId) -> None:
        stored.append(one)
        if len(stored) == 1:
            raise OSError

    def handle(one: MessageId) -> None:
        if not seen.has(one):
            store(one)
            assert seen.accept(one)

    seen, (one,) = Filter(), chain(1)
    with pytest.raises(OSError):
        handle(one)
    handle(one)
    handle(one)
    assert stored == [one, one]


def test_a_gap_that_could_not_be_told_is_told_again() -> None:
    gaps: list[Gap] = []

    def tell(gap: Gap) -> None:
        gaps.append(gap)
        if len(gaps) == 1:
            raise OSError

    seen, ids = Filter(on_gap=tell), chain(3)
    seen.accept(ids[0])
    with pytest.raises(OSError):
        seen.accept(ids[2])
    assert seen.accept(ids[2])
    assert gaps == [Gap("s", 10, 20)] * 2


def test_an_id_that_lies_hides_no_other() -> None:
    seen = Filter()
    assert seen.accept("s/0/99999999999999999999/0")
    assert seen.accept("s/1000000000000/1000000000010/0")
    assert all(seen.accept(one) for one in chain(10, start=1000))
    assert Filter(state={"s": [[50, 60], [0, 10], [5, 20]]}).state() == {"s": [[0, 20], [50, 60]]}


@given(st.lists(st.integers(0, 40), max_size=200))
def test_the_filter_knows_exactly_what_has_come(order: list[int]) -> None:
    seen, ids, known = Filter(), chain(41), set[int]()
    for number in order:
        assert seen.accept(ids[number]) == (number not in known)
        known.add(number)
    runs = seen.state().get("s", [])
    assert [at for start, end in runs for at in range(start, end, 10)] == [number * 10 for number in sorted(known)]
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(runs)), "runs that touch are one"


def test_a_filter_goes_on_where_another_ended() -> None:
    gaps: list[Gap] = []
    first, ids = Filter(), chain(10)
    for one in ids[:6]:
        first.accept(one)
    second = Filter(state=json.loads(json.dumps(first.state())), on_gap=gaps.append)
    assert [second.accept(one) for one in ids[4:]] == [False, False, True, True, True, True]
    assert gaps == []


@pytest.mark.parametrize("text", ["", "a", "s/1/2", "s/1/2/3/4", "s/x/2/3", "s/-1/2/3", "/1/2/3", "s/١/2/3"])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no message id"):
        Filter().accept(text)


@pytest.mark.parametrize("settings", [{"remember": 0}, {"spools": 0}, {"remember": 1.5}])
def test_wrong_sizes_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        Filter(**settings)


# ---- with a client


def test_ids_stay_the_same_over_reconnects_and_restarts_and_have_no_gap(tmp_path: Path) -> None:
    """A payload hook carries them under 3.1.1; the broker hangs up now and then, the client is closed in between."""

    def put_id(message: Message, message_id: MessageId) -> bytes:
        return b"%s %s" % (str(message_id).encode(), message.payload)

    def hang_up_now_and_then(event: object) -> object:
        return HANG_UP if isinstance(event.packet, Publish) and event.number % 40 == 0 else None  # type: ignore[attr-defined]

    gaps: list[Gap] = []
    script, seen = Script(hang_up_now_and_then), Filter(on_gap=gaps.append)  # type: ignore[arg-type]
    with FakeBroker(script) as broker:
        for part in range(3):
            with client_to(broker.port, tmp_path, payload_hook=put_id, poison_window=None) as client:
                publish_numbers(client, range(100 * part, 100 * part + 100))
                client.flush(LIMIT) if part == 2 else None
    kept, ids = [], {}
    for publish in script.publishes:
        text, _, number = publish.payload.decode().partition(" ")
        assert ids.setdefault(number, MessageId.parse(text)[:3]) == MessageId.parse(text)[:3]
        if seen.accept(text):
            kept.append(int(number))
    assert kept == list(range(300)) and len(script.publishes) > 300
    assert gaps == []
    assert {one[0] for one in ids.values()} == {client.spool_id}


def test_what_a_limit_dropped_is_a_gap(tmp_path: Path) -> None:
    gaps: list[Gap] = []
    seen = Filter(on_gap=gaps.append)

    def put_id(message: Message, message_id: MessageId) -> bytes:
        return str(message_id).encode()

    script = Script()
    with FakeBroker(script) as broker:
        with client_to(broker.port, tmp_path, payload_hook=put_id) as client:
            client.publish("a", b"0")
            client.flush(LIMIT)
        with client_to(1, tmp_path, ttl=0.001) as client:
            publish_numbers(client, range(5))
        with client_to(broker.port, tmp_path, payload_hook=put_id) as client:
            client.publish("a", b"last")
            client.flush(LIMIT)
    for publish in script.publishes:
        seen.accept(publish.payload.decode())
    assert len(gaps) == 1 and seen.accepted == 2


def test_a_payload_hook_that_raises_is_counted_and_stops_nothing(tmp_path: Path) -> None:
    def hook(message: Message, message_id: MessageId) -> bytes:
        if message.payload == b"1":
            raise ValueError("no")
        return "text" if message.payload == b"2" else b"hooked"  # type: ignore[return-value]

    script = Script()
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, payload_hook=hook) as client:
        publish_numbers(client, range(4))
        assert client.flush(LIMIT) == 0
        assert client.stats().callback_errors == 2
    assert [publish.payload for publish in script.publishes] == [b"hooked", b"1", b"2", b"hooked"]


def test_the_filter_with_a_real_broker(mosquitto: Mosquitto, tmp_path: Path) -> None:
    seen, kept, done = Filter(), [], threading.Event()

    def on_message(message: Message) -> None:
        if seen.accept(dict(message.user_properties)["cloudpubsub-id"]):
            kept.append(int(message.payload))
            if len(kept) == 300:
                done.set()

    with client_to(mosquitto.port, None, client_id="consumer", protocol="5") as consumer:
        consumer.subscribe("numbers", on_message)
        consumer.wait_subscribed(LIMIT)
        with client_to(mosquitto.port, tmp_path, protocol="5", message_ids=True) as client:
            publish_numbers(client, range(300))
            client.flush(LIMIT)
        assert done.wait(LIMIT)
    assert kept == list(range(300))


def test_ids_need_a_protocol_that_carries_them() -> None:
    with pytest.raises(cloudpubsub.OptionError, match="message_ids"):
        cloudpubsub.Options(broker="mqtt://h", message_ids=True)

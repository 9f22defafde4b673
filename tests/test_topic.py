"""Topics, filters, and which handler gets which topic."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from cloudpubsub._errors import TopicError
from cloudpubsub._topic import Matcher, check_filter, check_topic, encode_topic

level = st.sampled_from(["", "a", "b", "$x", "ä"])
topics = st.lists(level, min_size=1, max_size=5).map("/".join).filter(bool)
filters = st.builds(
    lambda levels, end: "/".join(levels + end),
    st.lists(st.one_of(level, st.just("+")), max_size=5),
    st.sampled_from([[], ["#"]]),
).filter(bool)


@pytest.mark.parametrize("topic", ["a", "/", "a//b", "$SYS/x", "grüße/温度", " ", "a" * 65_535, "ä" * 32_767])
def test_valid_topics_become_utf8(topic: str) -> None:
    assert check_topic(topic) == encode_topic(topic) == encode_topic(topic) == topic.encode()


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a+b", "a#", "a\0b", "a" * 65_536, "ä" * 32_768, "a\ud800"])
def test_invalid_topics_are_refused(topic: str) -> None:
    for check in (check_topic, encode_topic, encode_topic):
        with pytest.raises(TopicError):
            check(topic)


@pytest.mark.parametrize("value", [None, 3, b"a", ["a"], bytearray(b"a")])
def test_a_topic_of_another_type_is_a_type_error(value: object) -> None:
    for check, what in ((encode_topic, "topic"), (check_topic, "topic"), (check_filter, "filter")):
        with pytest.raises(TypeError, match=f"{what} must be a str, not {type(value).__name__}"):
            check(value)  # type: ignore[arg-type]


def test_the_topic_cache_is_bounded() -> None:
    from cloudpubsub import _topic

    for number in range(10_000):
        assert encode_topic(f"t/{number}") == b"t/%d" % number
    encode_topic("x" * 60_000)
    assert 0 < len(_topic._cache) <= 4_096
    assert max(map(len, _topic._cache)) <= 256


@pytest.mark.parametrize("topic_filter", ["a", "+", "#", "+/+", "a/#", "/#", "$SYS/#", "$share/g/a/#", "$share/g//a"])
def test_valid_filters_become_utf8(topic_filter: str) -> None:
    assert check_filter(topic_filter) == topic_filter.encode()


@pytest.mark.parametrize(
    "topic_filter",
    ["", "a+", "a/+b", "#/a", "a#", "a/#/", "\0", "$share/g", "$share", "$share//a", "$share/g/", "$share/+/a",
     "$share/g/a#", "a\udfff", "a" * 65_536],
)  # fmt: skip
def test_invalid_filters_are_refused(topic_filter: str) -> None:
    with pytest.raises(TopicError):
        check_filter(topic_filter)
    with pytest.raises(TopicError):
        Matcher[int]().add(topic_filter, 1)


@given(st.lists(filters, max_size=8), topics, st.data())
def test_matching_agrees_with_paho(registered: list[str], topic: str, data: st.DataObject) -> None:
    matcher: Matcher[int] = Matcher()
    for number, topic_filter in enumerate(registered):
        shared = data.draw(st.booleans())
        matcher.add(("$share/group/" if shared and topic_filter != "" else "") + topic_filter, number)
    expected = tuple(n for n, name in enumerate(registered) if topic_matches_sub(name, topic))
    assert matcher.match(topic) == expected
    assert matcher.match(topic) == expected


@given(st.lists(st.tuples(st.booleans(), filters, st.integers(0, 2)), max_size=25), topics)
def test_adding_and_removing_agrees_with_a_plain_list(changes: list[tuple[bool, str, int]], topic: str) -> None:
    matcher: Matcher[int] = Matcher()
    model: list[tuple[str, int]] = []
    for adds, name, handler in changes:
        if adds:
            assert matcher.add(name, handler) == (name not in [known for known, _ in model])
            if (name, handler) not in model:
                model.append((name, handler))
        else:
            had = name in [known for known, _ in model]
            model = [entry for entry in model if entry != (name, handler)]
            assert matcher.remove(name, handler) == (had and name not in [known for known, _ in model])
        expected = dict.fromkeys(handler for name, handler in model if topic_matches_sub(name, topic))
        assert matcher.match(topic) == tuple(expected)
        assert set(matcher.filters()) == {name for name, _ in model}


def test_removing_everything_leaves_an_empty_trie() -> None:
    matcher: Matcher[int] = Matcher()
    for name in ("a/b/c", "a/#", "+/b", "$share/g/a/b/c"):
        matcher.add(name, 1)
        matcher.add(name, 2)
    for name in matcher.filters():
        assert matcher.remove(name)
        assert not matcher.remove(name)
    assert not matcher._state.root.children
    assert matcher.match("a/b/c") == ()


def test_a_bound_method_is_one_handler() -> None:
    class Device:
        def on_message(self) -> None: ...

    device, matcher = Device(), Matcher[object]()
    assert matcher.add("a/+", device.on_message)
    assert not matcher.add("a/+", device.on_message)
    assert not matcher.add("a/+", Device().on_message)
    matcher.add("a/b", device.on_message)
    assert len(matcher.match("a/b")) == 2
    assert not matcher.remove("a/+", device.on_message)
    assert len(matcher.match("a/c")) == 1


def test_thirty_thousand_levels_need_no_recursion() -> None:
    matcher: Matcher[int] = Matcher()
    deep = "/".join("a" * 30_000)
    matcher.add(deep + "/#", 1)
    assert matcher.match(deep) == (1,)
    assert matcher.remove(deep + "/#")


def test_matching_goes_on_while_filters_change() -> None:
    matcher: Matcher[int] = Matcher()
    matcher.add("a/#", 0)
    stop, wrong = threading.Event(), list[tuple[int, ...]]()

    def ask() -> None:
        while not stop.is_set():
            answer = matcher.match("a/b")
            if answer not in ((0,), (0, 1)):
                wrong.append(answer)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(2_000):
        matcher.add("+/b", 1)
        matcher.remove("+/b", 1)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    assert wrong == []
    assert matcher.match("a/b") == (0,)

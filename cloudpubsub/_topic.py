"""Topics and topic filters: what MQTT allows, and which filter matches which topic.

Checks are pure functions.  `Matcher` may be changed and asked from any thread; asking takes no lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from cloudpubsub._errors import TopicError

__all__ = ["Matcher", "check_filter", "check_topic", "encode_topic"]

_TOPIC_MAX = 65_535
_CACHE_ENTRIES_MAX = 4_096
_CACHED_TOPIC_MAX = 256
_SHARE = "$share/"

_cache: dict[str, bytes] = {}


def check_topic(topic: str) -> bytes:
    """The UTF-8 bytes (1 to 65,535) of a topic to publish to.

    Raises:
        TopicError: It is empty, has a wildcard (+ or #) or a NUL, is too long or no valid Unicode.
        TypeError: It is no str.
    """
    encoded = _encode("topic", topic)
    if b"+" in encoded or b"#" in encoded:
        raise TopicError(f"topic {_shown(topic)} has a wildcard (+ or #), which only subscriptions may have")
    return encoded


def encode_topic(topic: str) -> bytes:
    """`check_topic`, remembering up to 4,096 short topics: a known one costs one dictionary look-up."""
    try:
        return _cache[topic]
    except (KeyError, TypeError):
        pass
    encoded = check_topic(topic)
    if len(encoded) <= _CACHED_TOPIC_MAX:
        if len(_cache) >= _CACHE_ENTRIES_MAX:
            _cache.clear()
        _cache[topic] = encoded
    return encoded


def check_filter(topic_filter: str) -> bytes:
    """The UTF-8 bytes of a topic filter to subscribe to: `+` is a whole level, `#` the whole last one;
    `$share/<group>/<filter>` shares its messages among the subscribers of the group.

    Raises TopicError or TypeError as `check_topic` does.
    """
    encoded = _encode("filter", topic_filter)
    levels = topic_filter.split("/")
    if topic_filter == "$share" or topic_filter.startswith(_SHARE):
        if len(levels) < 3 or not levels[1] or "+" in levels[1] or "#" in levels[1] or levels[2:] == [""]:
            raise TopicError(f"filter {_shown(topic_filter)} is not of the form $share/<group>/<filter>")
        levels = levels[2:]
    for index, level in enumerate(levels):
        if ("+" in level and level != "+") or ("#" in level and level != "#"):
            raise TopicError(f"filter {_shown(topic_filter)}: a wildcard must be a whole level")
        if level == "#" and index != len(levels) - 1:
            raise TopicError(f"filter {_shown(topic_filter)}: # must be the last level")
    return encoded


def _encode(what: str, text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {type(text).__name__}")
    if not text:
        raise TopicError(f"{what} is empty")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise TopicError(f"{what} {_shown(text)} is not valid Unicode (lone surrogate)") from None
    if len(encoded) > _TOPIC_MAX:
        raise TopicError(f"{what} {_shown(text)} has {len(encoded)} bytes, at most {_TOPIC_MAX} are allowed")
    if b"\0" in encoded:
        raise TopicError(f"{what} {_shown(text)} has a NUL character")
    return encoded


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= 80 else ascii(text[:77]) + "…"


T = TypeVar("T")
_Entries = tuple[tuple[int, str, T], ...]  # (order of registration, filter as given, handler)


class _Node(Generic[T]):
    """One level of the trie.  Never changed once it can be reached from a state: changes copy the way to the root."""

    __slots__ = ("children", "entries")

    def __init__(self, children: dict[str, _Node[T]], entries: _Entries[T]) -> None:
        self.children = children
        self.entries = entries


class _State(Generic[T]):
    """What `match` looks at: a trie and the answers it has given, replaced as one."""

    __slots__ = ("cache", "root")

    def __init__(self, root: _Node[T]) -> None:
        self.root = root
        self.cache: dict[str, tuple[T, ...]] = {}


class Matcher(Generic[T]):
    """Which handlers want a topic.

    MQTT's rules: `+` matches one level (also an empty one), `#` the rest and the level above it (`a/#` matches `a`);
    a wildcard in the first level does not match topics that begin with `$`.  `$share/<group>/` plays no part in
    matching.  Handlers come in order of registration; one that is registered under several matching filters comes once.

    Thread safety: all methods from any thread; `match` takes no lock and sees the last completed change.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held by changes only: guards _order, _by_filter and the swap of _state
        self._order = 0
        self._by_filter: dict[str, int] = {}
        self._state: _State[T]
        #: What `match` has found since the last change, by topic; to be looked up, not to be changed.
        self.found: dict[str, tuple[T, ...]]
        self._swap(_Node({}, ()))

    def add(self, topic_filter: str, handler: T) -> bool:
        """Register a handler; the same one twice under one filter counts once.

        Returns whether this is the first handler of that filter, so that a SUBSCRIBE is due.
        Raises TopicError or TypeError for a bad filter.
        """
        check_filter(topic_filter)
        with self._lock:
            first = topic_filter not in self._by_filter
            entries = self._find(topic_filter).entries if not first else ()
            if any(name == topic_filter and known == handler for _, name, known in entries):
                return False
            self._order += 1
            entry = (self._order, topic_filter, handler)
            self._change(topic_filter, lambda old: (*old, entry))
            self._by_filter[topic_filter] = self._by_filter.get(topic_filter, 0) + 1
            return first

    def remove(self, topic_filter: str, handler: T | None = None) -> bool:
        """Take one handler of a filter out, or all of them.

        Returns whether the filter had handlers and now has none, so that an UNSUBSCRIBE is due.
        """
        with self._lock:
            if topic_filter not in self._by_filter:
                return False
            kept = 0

            def without(old: _Entries[T]) -> _Entries[T]:
                nonlocal kept
                new = tuple(
                    entry
                    for entry in old
                    if entry[1] != topic_filter or (handler is not None and entry[2] != handler)
                )
                kept = sum(entry[1] == topic_filter for entry in new)
                return new

            self._change(topic_filter, without)
            if kept:
                self._by_filter[topic_filter] = kept
                return False
            del self._by_filter[topic_filter]
            return True

    def has(self, topic_filter: str, handler: T | None = None) -> bool:
        """Whether the filter has this handler, or any."""
        with self._lock:
            if topic_filter not in self._by_filter:
                return False
            return handler is None or any(
                name == topic_filter and known == handler for _, name, known in self._find(topic_filter).entries
            )

    def filters(self) -> tuple[str, ...]:
        """The filters that have handlers, in order of their first registration."""
        with self._lock:
            return tuple(self._by_filter)

    def match(self, topic: str) -> tuple[T, ...]:
        """The handlers that want `topic`.  A topic asked for lately costs one dictionary look-up."""
        state = self._state
        try:
            return state.cache[topic]
        except KeyError:
            pass
        handlers = _match(state.root, topic)
        if len(topic) <= _CACHED_TOPIC_MAX:
            if len(state.cache) >= _CACHE_ENTRIES_MAX:
                state.cache.clear()
            state.cache[topic] = handlers
        return handlers

    def _find(self, topic_filter: str) -> _Node[T]:
        node = self._state.root
        for level in _levels(topic_filter):
            node = node.children[level]
        return node

    def _change(self, topic_filter: str, change: Callable[[_Entries[T]], _Entries[T]]) -> None:
        """Publish a new state in which the entries of one filter are changed; branches left empty are gone."""
        levels = _levels(topic_filter)
        way: list[_Node[T] | None] = [self._state.root]
        for level in levels:
            above = way[-1]
            way.append(above.children.get(level) if above is not None else None)
        last = way.pop()
        entries = change(last.entries if last is not None else ())
        node: _Node[T] = _Node(last.children if last is not None else {}, entries)
        for level, above in zip(reversed(levels), reversed(way), strict=True):
            children = dict(above.children) if above is not None else {}
            if node.entries or node.children:
                children[level] = node
            else:
                children.pop(level, None)
            node = _Node(children, above.entries if above is not None else ())
        self._swap(node)

    def _swap(self, root: _Node[T]) -> None:
        self._state = _State(root)
        self.found = self._state.cache


def _levels(topic_filter: str) -> list[str]:
    levels = topic_filter.split("/")
    return levels[2:] if topic_filter.startswith(_SHARE) else levels


def _match(root: _Node[T], topic: str) -> tuple[T, ...]:
    """Level by level, so that a topic of 30,000 levels needs no recursion."""
    found: list[tuple[int, str, T]] = []
    frontier = [root]
    wildcards = not topic.startswith("$")
    for level in topic.split("/"):
        following: list[_Node[T]] = []
        for node in frontier:
            if wildcards and (rest := node.children.get("#")) is not None:
                found += rest.entries
            if (exact := node.children.get(level)) is not None:
                following.append(exact)
            if wildcards and (any_level := node.children.get("+")) is not None:
                following.append(any_level)
        wildcards = True
        frontier = following
        if not frontier:
            break
    for node in frontier:
        found += node.entries
        if (rest := node.children.get("#")) is not None:
            found += rest.entries
    found.sort(key=lambda entry: entry[0])
    handlers: list[T] = []
    for _, _, handler in found:
        # Compared by ==, because a bound method is a new object each time it is looked up.
        if handler not in handlers:
            handlers.append(handler)
    return tuple(handlers)

"""Messages, reports, figures and errors."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudpubsub import _errors
from cloudpubsub._errors import DeliveryFailed, OptionError, SpoolError, WaitTimeout
from cloudpubsub._message import Drop, Message, Will
from cloudpubsub._report import DropReports, RateLimitedLog


def test_message_holds_what_it_was_given() -> None:
    message = Message("a", b"p", 7, b"u", True, True, 0)
    assert (message.topic, message.payload, message.position, message.userdata) == ("a", b"p", 7, b"u")
    assert (message.retain, message.duplicate, message.qos) == (True, True, 0)
    assert Message("a", b"").position is None
    with pytest.raises(AttributeError):
        message.other = 1  # type: ignore[attr-defined]


def test_messages_compare_by_value_and_survive_pickling() -> None:
    message = Message("a", b"p", 7, b"u")
    assert message == Message("a", b"p", 7, b"u") != Message("a", b"p", 8, b"u")
    assert message != "a"
    assert {message: 1}[pickle.loads(pickle.dumps(message))] == 1
    assert copy.deepcopy(message) == message


class Marked(Message):
    pass


def test_a_subclass_stays_what_it_is_and_none_is_no_text() -> None:
    assert type(copy.copy(Marked("a", b"p"))) is Marked
    for args in ((None, b""), ("a", None), ("a", b"", None, None)):
        with pytest.raises(TypeError):
            Message(*args)  # type: ignore[arg-type]


def test_repr_of_a_large_message_is_short() -> None:
    assert len(repr(Message("a", b"x" * 1_000_000, 3, retain=True))) < 200


def test_will_keeps_bytes() -> None:
    assert Will("a", "grün").payload_bytes == "grün".encode()
    assert Will("a", bytearray(b"x")).payload == b"x"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "field"),
    [(("a/#",), "will.topic"), ((None,), "will.topic"), (("a", 5), "will.payload"),
     (("a", b"x" * 65_536), "will.payload"),
     (("a", "\ud800"), "will.payload"), (("a", b"", 1), "will.retain")],
)  # fmt: skip
def test_a_wrong_will_is_refused_by_name(args: tuple[object, ...], field: str) -> None:
    with pytest.raises(OptionError) as caught:
        Will(*args)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_every_error_is_an_error_of_the_package() -> None:
    for name in _errors.__all__:
        assert issubclass(getattr(_errors, name), _errors.Error)
        assert getattr(_errors, name).__doc__


def test_errors_keep_their_parts_through_pickling() -> None:
    failed = pickle.loads(pickle.dumps(DeliveryFailed(5, "quota")))
    assert (failed.position, failed.reason) == (5, "quota")
    assert "5" in str(failed)
    assert "quota" in str(failed)
    option = pickle.loads(pickle.dumps(OptionError("f", "v", "w")))
    assert (option.field, str(option)) == ("f", "f: v is not allowed; w")
    spool = SpoolError(28, "No space left on device", "/x")
    assert isinstance(spool, OSError)
    assert (spool.errno, spool.filename) == (28, "/x")
    assert isinstance(WaitTimeout("late"), TimeoutError)


drops = st.builds(
    lambda first, size, count, reason: Drop(first, first + size, count, count * 40, reason),
    st.integers(0, 1_000), st.integers(1, 100), st.integers(1, 9), st.sampled_from(["quota", "disk", "messages"]),
)  # fmt: skip


@given(st.lists(drops, max_size=60), st.integers(1, 8))
def test_drop_reports_are_bounded_and_their_sums_exact(reported: list[Drop], capacity: int) -> None:
    reports = DropReports(capacity)
    for drop in reported:
        reports.add(drop)
        assert len(reports) <= capacity + 3
    taken = []
    while (drop_or_none := reports.take()) is not None:
        taken.append(drop_or_none)
    for reason in ("quota", "disk", "messages"):
        had = [drop for drop in reported if drop.reason == reason]
        got = [drop for drop in taken if drop.reason == reason]
        assert sum(drop.count for drop in had) == sum(drop.count for drop in got)
        assert sum(drop.bytes for drop in had) == sum(drop.bytes for drop in got)
        assert all(any(g.first <= h.first and h.end <= g.end for g in got) for h in had)
    if len(reported) <= capacity:
        assert taken == reported


def test_a_drop_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Drop(0, 1, 1, 1, "quota").count = 2  # type: ignore[misc]


def test_a_repeated_log_line_comes_at_once_and_then_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = RateLimitedLog(logging.getLogger("test-limit"), 60.0, lambda: now[0])
    with caplog.at_level(logging.INFO, "test-limit"):
        assert [log.log(logging.ERROR, "k", "bad %s", n) for n in range(5)] == [True, False, False, False, False]
        assert log.log(logging.ERROR, "other", "else")
        now[0] = 59.9
        assert not log.log(logging.ERROR, "k", "bad %s", 5)
        now[0] = 60.0
        assert log.log(logging.ERROR, "k", "bad %s", 6)
        assert not log.log(logging.INFO, "k", "bad %s", 7)
        log.flush()
        log.flush()
    assert caplog.messages == [
        "bad 0", "else", "bad 6 (and 5 more like it since the last report)", "k: 1 more since the last report",
    ]  # fmt: skip


def test_log_keys_are_bounded_and_a_forgotten_one_tells_its_count(caplog: pytest.LogCaptureFixture) -> None:
    log = RateLimitedLog(logging.getLogger("test-limit"), 60.0, lambda: 0.0)
    log.log(logging.ERROR, "first", "x")
    log.log(logging.ERROR, "first", "x")
    for number in range(1_000):
        log.log(logging.ERROR, str(number), "x")
    assert len(log._series) == 256
    assert "first: 1 more since the last report" in caplog.messages


def test_a_logging_handler_that_raises_harms_nobody() -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("disk full")

    logger = logging.getLogger("test-broken")
    logger.propagate = False
    logger.addHandler(Broken())
    assert RateLimitedLog(logger).log(logging.ERROR, "k", "x")

"""The fault relay: every fault does what it says, to the byte where bytes are counted, and nothing else."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.fault_relay import (
    FINE,
    FROZEN,
    LOST,
    MUTE,
    REFUSED,
    RESET,
    FaultRelay,
    Faults,
    Harm,
    Plan,
    _FaultyWay,
    both,
    in_turn,
    storm,
)
from tests.test_relay import Echo, receive, round_trip

LIMIT = 60.0
SILENCE = 0.1  # seconds in which nothing arrives, where nothing must
DATA = bytes(range(256)) * 4


class Pair:
    """A client and a target with the relay between them, both driven by the test."""

    def __init__(self, plan: Plan | Faults, seed: int = 0) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(LIMIT)
        self.relay = FaultRelay(self.listener.getsockname()[1], plan, seed=seed).start()

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.relay.port), timeout=LIMIT)

    def connect(self) -> tuple[socket.socket, socket.socket]:
        client = self.dial()
        target, _ = self.listener.accept()
        target.settimeout(LIMIT)
        return client, target


@contextmanager
def pair(plan: Plan | Faults = FINE, seed: int = 0) -> Iterator[tuple[Pair, socket.socket, socket.socket]]:
    """A pair with one connection."""
    ends = Pair(plan, seed)
    try:
        client, target = ends.connect()
        with client, target:
            yield ends, client, target
    finally:
        ends.relay.stop()
        ends.listener.close()


@contextmanager
def echoed(plan: Plan | Faults = FINE) -> Iterator[FaultRelay]:
    echo = Echo()
    try:
        with FaultRelay(echo.port, plan) as relay:
            yield relay
    finally:
        echo.close()


def dial(relay: FaultRelay) -> socket.socket:
    return socket.create_connection(("127.0.0.1", relay.port), timeout=LIMIT)


def all_from(peer: socket.socket) -> bytes:
    """What comes until the end or a reset."""
    got = bytearray()
    try:
        while data := peer.recv(65536):
            got += data
    except ConnectionResetError:
        pass
    return bytes(got)


def assert_silent(peer: socket.socket) -> None:
    peer.settimeout(SILENCE)
    with pytest.raises(TimeoutError):
        peer.recv(1)
    peer.settimeout(LIMIT)


def assert_reset(peer: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        peer.recv(1)


def one_way(way: str, harm: Harm) -> Faults:
    return Faults(up=harm) if way == "up" else Faults(down=harm)


def seconds(action: Callable[[], object]) -> float:
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


# ---- without faults


def test_without_faults_it_forwards_unchanged_and_counts() -> None:
    data = os.urandom(4 << 20)
    with echoed() as relay, dial(relay) as peer:
        sender = threading.Thread(target=peer.sendall, args=(data,))
        sender.start()
        assert receive(peer, len(data)) == data
        sender.join(LIMIT)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        seen = relay.wait(lambda seen: not seen.open)
    assert (seen.up, seen.down, seen.dropped_up, seen.dropped_down) == (len(data), len(data), 0, 0)
    assert (relay.bytes_up, relay.bytes_down, relay.accepted) == (len(data), len(data), 1)


def test_resets_and_ends_pass_through() -> None:
    with pair() as (ends, client, target):
        client.shutdown(socket.SHUT_WR)
        assert target.recv(1) == b""
        target.sendall(b"still")
        assert receive(client, 5) == b"still"
        target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        target.close()
        assert_reset(client)
        ends.relay.wait(lambda seen: not seen.open)


# ---- slow


@pytest.mark.parametrize("way", ["up", "down"])
def test_latency_delays_one_direction_and_its_end(way: str) -> None:
    with pair(one_way(way, Harm(latency=0.15))) as (_, client, target):
        sender, receiver = (client, target) if way == "up" else (target, client)
        begin = time.monotonic()
        sender.sendall(DATA)
        sender.shutdown(socket.SHUT_WR)
        assert all_from(receiver) == DATA
        assert 0.14 < time.monotonic() - begin < LIMIT
        receiver.sendall(b"back")
        assert receive(sender, 4) == b"back"


def test_latency_does_not_limit_what_is_under_way() -> None:
    with pair(both(latency=0.2)) as (_, client, target):

        def many() -> None:
            for _ in range(20):
                client.sendall(DATA)
                time.sleep(0.005)  # apart, so that they cross one after the other

            assert receive(target, 20 * len(DATA)) == 20 * DATA

        assert 0.2 < seconds(many) < 20 * 0.2


def test_jitter_keeps_order_and_is_of_the_seed() -> None:
    data = os.urandom(100_000)
    with pair(Faults(up=Harm(jitter=0.1)), seed=1) as (_, client, target):
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert all_from(target) == data


def test_rate_limits_and_heal_frees() -> None:
    with echoed(both(rate=100_000)) as relay, dial(relay) as peer:
        slow = seconds(lambda: round_trip(peer, bytes(30_000)))
        assert 0.2 < slow < LIMIT
        relay.heal()
        assert seconds(lambda: round_trip(peer, bytes(60_000))) < slow * 2, "twice the bytes, far less time"


def test_rate_is_felt_by_the_sender() -> None:
    with pair(Faults(up=Harm(rate=1000))) as (ends, client, _):
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(32 << 20))
        assert ends.relay.seen().up < 10_000


def test_byte_by_byte() -> None:
    with pair(Faults(down=Harm(chunk=1, interval=0.003))) as (_, client, target):
        target.sendall(DATA[:40])
        pieces: list[bytes] = []
        while sum(len(piece) for piece in pieces) < 40:
            pieces.append(client.recv(100))
    assert b"".join(pieces) == DATA[:40]
    assert len(pieces) > 20, "all but few alone"


def test_byte_by_byte_without_a_pause_is_quick() -> None:
    with echoed(both(chunk=1)) as relay, dial(relay) as peer:
        round_trip(peer, DATA * 4)


def test_ragged_chunks_lose_nothing() -> None:
    data = os.urandom(50_000)
    with pair(both(chunk=100, ragged=True)) as (_, client, target):
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        assert receive(target, len(data)) == data
        sender.join(LIMIT)


def test_trickle() -> None:
    with pair(Faults(down=Harm(chunk=1, interval=0.05))) as (ends, client, target):
        target.sendall(b"abcdef")
        assert 0.2 < seconds(lambda: receive(client, 6)) < LIMIT
        ends.relay.change(both(chunk=1, interval=3600))
        target.sendall(b"gh")
        assert receive(client, 1) == b"g"
        assert_silent(client)
        ends.relay.heal()
        assert receive(client, 1) == b"h"


# ---- after exactly so many bytes


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("then", ["stall", "drop", "reset", "end"])
@pytest.mark.parametrize("after", [0, 1, 2, 17, len(DATA) - 1])
def test_exactly_so_many_bytes_arrive(way: str, then: Any, after: int) -> None:
    faults = one_way(way, Harm(after=after, then=then))
    with pair() as (ends, client, target):
        sender, receiver = (client, target) if way == "up" else (target, client)
        ends.relay.change(faults)
        noticed = False
        try:
            sender.sendall(DATA)
        except OSError:
            noticed = True
        if then in ("stall", "drop"):
            assert receive(receiver, after) == DATA[:after]
            ends.relay.wait(lambda seen: then in (seen.struck_up, seen.struck_down))
            if then == "drop":
                ends.relay.wait(lambda seen: seen.dropped_up + seen.dropped_down == len(DATA) - after)
            assert ends.relay.seen().open
        else:
            assert all_from(receiver) == DATA[:after]
        if then == "reset":
            if not noticed:  # an error is told once
                assert_reset(sender)
            assert not ends.relay.wait(lambda seen: not seen.open).open
        else:  # the other direction works
            assert not noticed
            receiver.sendall(b"back")
            assert receive(sender, 4) == b"back"
        seen = ends.relay.seen()
        assert (seen.up if way == "up" else seen.down) == after
        assert (seen.struck_up, seen.struck_down) == ((then, None) if way == "up" else (None, then))


@pytest.mark.parametrize("then", ["reset", "end"])
def test_every_cut_of_a_conversation(then: Any) -> None:
    """From the first connection on, by the plan: the n-th is cut after n bytes."""
    with echoed(lambda number: Faults(down=Harm(after=number, then=then))) as relay:
        for number in range(1, 60):
            with dial(relay) as peer:
                peer.sendall(DATA)
                assert all_from(peer) == DATA[:number]


def test_latency_and_rate_do_not_disturb_the_count() -> None:
    with pair(Faults(up=Harm(latency=0.02, rate=100_000, chunk=7, after=100, then="reset"))) as (_, client, target):
        client.sendall(DATA)
        assert all_from(target) == DATA[:100]


def test_bytes_before_a_reset_arrive_at_a_slow_reader() -> None:
    data = os.urandom(4 << 20)
    after = len(data) - 5
    with pair(Faults(down=Harm(after=after, then="reset"))) as (_, client, target):
        sender = threading.Thread(target=target.sendall, args=(data,))
        sender.start()
        got = receive(client, 1 << 20)
        got += all_from(client)
        sender.join(LIMIT)
    assert got == data[:after]


def test_the_count_begins_when_the_harm_is_set() -> None:
    with pair() as (ends, client, target):
        client.sendall(b"12345")
        assert receive(target, 5) == b"12345"
        ends.relay.change(Faults(up=Harm(after=2, then="stall")))
        client.sendall(b"abcdef")
        assert receive(target, 2) == b"ab"
        ends.relay.change(Faults(up=Harm(after=3, then="stall")))
        assert receive(target, 3) == b"cde"
        ends.relay.heal()
        assert receive(target, 1) == b"f"


# ---- silence


def test_frozen_holds_everything_and_thaws() -> None:
    with pair() as (ends, client, target):
        ends.relay.set_faults(FROZEN)
        client.sendall(b"up")
        target.sendall(b"down")
        target.shutdown(socket.SHUT_WR)
        assert_silent(client)
        assert_silent(target)
        with ends.dial() as late, ends.listener.accept()[0] as late_target:
            late.sendall(b"late")
            assert_silent(late_target)
            ends.relay.heal()
            assert receive(late_target, 4) == b"late"
        assert receive(target, 2) == b"up"
        assert all_from(client) == b"down"


@pytest.mark.parametrize("way", ["up", "down"])
def test_what_is_dropped_stays_away(way: str) -> None:
    with pair(one_way(way, Harm(then="drop"))) as (ends, client, target):
        sender, receiver = (client, target) if way == "up" else (target, client)
        sender.sendall(bytes(8 << 20))  # is read, however much it is
        receiver.sendall(b"back")
        assert receive(sender, 4) == b"back"
        ends.relay.wait(lambda seen: seen.dropped_up + seen.dropped_down == 8 << 20)
        ends.relay.heal()
        sender.sendall(b"again")
        assert receive(receiver, 5) == b"again"


@pytest.mark.parametrize("faults", [LOST, FROZEN], ids=["lost", "frozen"])
@pytest.mark.parametrize("reset", [True, False])
def test_over_a_dead_link_nobody_hears_of_an_end(faults: Faults, reset: bool) -> None:
    with pair(faults) as (ends, client, target):
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        target.sendall(b"are you there?")
        assert_silent(target)
        assert ends.relay.seen().open
        ends.relay.heal()
        if reset:
            assert_reset(target)
        elif faults is FROZEN:
            assert all_from(target) == b""


def test_accepted_and_told_nothing() -> None:
    ends = Pair(in_turn(MUTE, FINE))
    try:
        with ends.dial() as client:
            client.sendall(DATA)
            ends.relay.wait(lambda seen: seen.dropped_up == len(DATA))
            assert_silent(client)
            ends.relay.heal()
            client.sendall(b"more")
            ends.relay.wait(lambda seen: seen.dropped_up == len(DATA) + 4)
        ends.relay.wait(lambda seen: not seen.open)
        with ends.dial() as client, ends.listener.accept()[0] as target:
            target.sendall(b"the first that the target hears of")
            receive(client, 34)
    finally:
        ends.relay.stop()
        ends.listener.close()


# ---- endings


def test_reset_now() -> None:
    with pair() as (ends, client, target):
        second, second_target = ends.connect()
        with second, second_target:
            ends.relay.reset(1)
            assert_reset(client)
            assert_reset(target)
            second.sendall(b"alive")
            assert receive(second_target, 5) == b"alive"
            ends.relay.change(RESET, 2)
            assert_reset(second)
            assert_reset(second_target)


def test_refused_by_the_plan_and_by_the_port() -> None:
    with echoed(in_turn(REFUSED, REFUSED, FINE)) as relay:
        for number in (1, 2):
            # The reset may come before connect() has returned.
            with pytest.raises(ConnectionResetError), dial(relay) as peer:
                peer.recv(1)
            relay.wait(lambda seen: not seen.open, number)
        with dial(relay) as peer:
            round_trip(peer, DATA)
            relay.cut()
            assert_reset(peer)
        with pytest.raises(ConnectionRefusedError):
            dial(relay).close()
        relay.restore()
        with dial(relay) as peer:
            round_trip(peer, DATA)
        assert relay.seen().number == 4, "what the port refuses is not counted"


def test_a_target_that_refuses_resets() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with FaultRelay(unused.getsockname()[1]) as relay, pytest.raises(ConnectionResetError), dial(relay) as peer:
            peer.recv(1)


# ---- plans and changes


def test_the_plan_numbers_connections_and_can_be_replaced() -> None:
    asked: list[int] = []

    def plan(number: int) -> Faults:
        asked.append(number)
        return FINE

    with echoed(plan) as relay:
        for _ in range(3):
            with dial(relay) as peer:
                round_trip(peer, b"x")
        relay.set_plan(Faults(down=Harm(after=2, then="end")))
        with dial(relay) as peer:
            peer.sendall(DATA)
            assert all_from(peer) == DATA[:2]
    assert asked == [1, 2, 3]


def test_a_change_concerns_the_named_and_set_faults_all() -> None:
    with echoed() as relay, dial(relay) as first, dial(relay) as second:
        for peer in (first, second):
            round_trip(peer, b"x")
        relay.change(LOST, 1, 99)
        round_trip(second, b"fine")
        first.sendall(b"gone")
        assert_silent(first)
        with dial(relay) as third:
            round_trip(third, b"fine")
            relay.set_faults(LOST)
            with dial(relay) as fourth:
                for peer in (second, third, fourth):
                    peer.sendall(b"gone")
                assert_silent(fourth)
        assert [relay.wait(lambda seen: seen.dropped_up == 4, number).dropped_up for number in (1, 2, 3, 4)] == [4] * 4


def test_what_relay_offers_works_here_too() -> None:
    with echoed() as relay, dial(relay) as peer:
        round_trip(peer, b"before")
        relay.blackhole()
        peer.sendall(b"held")
        assert_silent(peer)
        relay.unblackhole()
        assert receive(peer, 4) == b"held"
        relay.set_rate(50_000)
        assert seconds(lambda: round_trip(peer, bytes(5000))) > 0.05


def test_an_error_of_the_plan_reaches_the_test() -> None:
    def plan(number: int) -> Faults:
        raise LookupError(f"no faults for {number}")

    with pytest.raises(LookupError, match="no faults for 1"), FaultRelay(1, plan) as relay:
        with pytest.raises(ConnectionResetError), dial(relay) as peer:
            peer.recv(1)
        relay.wait(lambda seen: not seen.open)


def test_waiting_in_vain_tells_what_was_seen() -> None:
    with echoed() as relay:
        with pytest.raises(TimeoutError, match="None"):
            relay.wait(lambda seen: True, 1, timeout=0.01)
        with dial(relay) as peer:
            round_trip(peer, b"x")
            with pytest.raises(TimeoutError, match="up=1"):
                relay.wait(lambda seen: seen.up > 1, timeout=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        {"latency": -1}, {"jitter": float("nan")}, {"rate": 0}, {"rate": float("nan")}, {"chunk": 0}, {"interval": 1},
        {"ragged": True}, {"after": -1, "then": "drop"}, {"after": 1}, {"then": "explode"},
    ],
)  # fmt: skip
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Harm(**wrong)


# ---- replay


class Noting(_FaultyWay):
    """A direction that notes how late each of its bytes is to be."""

    def __init__(self, source: socket.socket, sink: socket.socket, now: float, seed: str) -> None:
        self.noted: list[float] = []
        super().__init__(source, sink, now, seed)

    def _enter(self, data: bytes, now: float) -> None:
        self.noted += [self.late] * len(data)


def drawn(seed: str, most: int) -> tuple[list[int], list[float]]:
    """Where chunks end, and how late each byte is, in a stream that is read at most so many bytes at a time."""
    with socket.socket() as unused:
        way = Noting(unused, unused, 0.0, seed)
        way.set_harm(Harm(chunk=400, ragged=True, jitter=1.0), 0.0)
        ends: list[int] = []
        while len(way.noted) < 10_000:
            left = way.chunk_left
            size = min(way.may_take(0.0), most)
            way.take(bytes(size), 0.0)
            if size == left:
                ends.append(len(way.noted))
        return [end for end in ends if end <= 9_000], way.noted[:9_000]


def test_chunks_and_jitter_are_of_the_seed_and_the_place_alone() -> None:
    one = drawn("1", 1)
    assert one == drawn("1", 7) == drawn("1", 333) == drawn("1", 100_000)
    assert len(one[0]) > 20 and len(set(one[1])) > 5
    other = drawn("2", 333)
    assert one[0] != other[0] and one[1] != other[1]


def test_a_storm_is_of_its_seed() -> None:
    one, same, other = (list(map(storm(seed), range(1, 300))) for seed in (1, 1, 2))
    assert one == same != other
    assert {"forward", "reset", "silence"} == {faults.welcome for faults in one}
    assert {None, "stall", "drop", "reset", "end"} == {faults.up.then for faults in one}


def test_a_storm_delivers_prefixes_or_nothing() -> None:
    quick = storm(3, bytes_between=500, latency=0.002)
    with echoed(quick) as relay:
        for number in range(1, 80):
            try:
                with dial(relay) as peer:
                    peer.settimeout(0.02)
                    peer.sendall(DATA)
                    got = bytearray()
                    while len(got) < len(DATA) and (data := peer.recv(65536)):
                        got += data
            except OSError:
                continue
            finally:
                assert relay.wait(lambda seen: True, number).faults == quick(number)
            assert DATA.startswith(got)


# ---- itself


def test_memory_is_bounded() -> None:
    with pair(both(latency=3600)) as (ends, client, _):
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 << 20))
        assert ends.relay.seen().up == 0
        (link,) = ends.relay._links.values()
        assert link.up.waiting <= 1 << 20


def test_it_idles_without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the faults, a relay where nothing moves does not spin."""
    for faults in (FINE, LOST, FROZEN, MUTE, both(rate=1000), both(chunk=1, interval=0.001), both(then="end"),
                   both(latency=3600), both(after=5, then="reset")):  # fmt: skip
        with echoed(faults) as relay, dial(relay) as peer:
            peer.sendall(b"abc")
            relay.wait(lambda seen: True, 1)
            rounds = 0
            pause = relay._pause

            def counted(pause: Callable[[], float | None] = pause) -> float | None:
                nonlocal rounds
                rounds += 1
                return pause()

            monkeypatch.setattr(relay, "_pause", counted)
            time.sleep(0.05)  # what would spin makes thousands of rounds in this time
            assert rounds < 200, faults


def test_stop_frees_everything_and_start_works_again() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with echoed(in_turn(MUTE, LOST, FROZEN, FINE)) as relay:
        peers = [dial(relay) for _ in range(5)]
        relay.wait(lambda seen: True, 5)
        relay.stop()
        relay.stop()
        for peer in peers:
            assert_reset(peer)
            peer.close()
        relay.start()
        with pytest.raises(KeyError):
            relay.seen()
        with dial(relay) as peer:
            peer.sendall(b"x")
            assert relay.wait(lambda seen: seen.dropped_up == 1, 1).faults is MUTE
    assert len(os.listdir("/proc/self/fd")) == before


def test_changes_from_many_threads_leave_it_working() -> None:
    with echoed() as relay:

        def harm(step: int) -> None:
            for number in range(40):
                faults = (FROZEN, LOST, FINE, both(rate=1000), both(chunk=1), RESET, MUTE)[(number + step) % 7]
                relay.set_faults(faults)
                try:
                    with dial(relay) as peer:
                        peer.sendall(b"x")
                except OSError:
                    pass  # some are refused

        threads = [threading.Thread(target=harm, args=(step,)) for step in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert not any(thread.is_alive() for thread in threads)
        relay.heal()
        with dial(relay) as peer:
            round_trip(peer, DATA)


def test_faults_are_values() -> None:
    assert both(latency=1) == Faults(Harm(latency=1), Harm(latency=1))
    assert in_turn(LOST, FINE)(1) is LOST and in_turn(LOST, FINE)(2) is in_turn(LOST, FINE)(9) is FINE
    with pytest.raises(dataclasses.FrozenInstanceError):
        FINE.up = Harm()  # type: ignore[misc]

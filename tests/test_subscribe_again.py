"""Subscriptions are made again after every loss, whatever the broker says that it remembers."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from cloudpubsub import Client, ClosedError, TopicError, WaitTimeout
from tests.making import DEADLINE_S, Inbox, eventually, url
from tests.peer import CONNECT, DISCONNECT, PUBACK, SUBSCRIBE, UNSUBSCRIBE, Peer
from tests.publishing import until

QUICK = {"reconnect_min": 0.02, "reconnect_max": 0.05}


@pytest.mark.parametrize("session_present", [False, True])
def test_everything_is_subscribed_again_after_a_loss(session_present: bool) -> None:
    filters = ["a/#", "b/+", "c"]
    with Peer(session_present=session_present) as peer, Client(url(peer.port), client_id="c", **QUICK) as client:
        for topic_filter in filters:
            client.subscribe(topic_filter, print)
        client.wait_subscribed(DEADLINE_S)
        before = len(peer.of_type(SUBSCRIBE))
        peer.hang_up()
        again = peer.wait(SUBSCRIBE, before + 1)[-1]
        assert again.filters == filters
        client.wait_subscribed(DEADLINE_S)


@pytest.mark.parametrize(("settings", "clean"), [({"session_expiry": 60}, False), ({"clean_session": True}, True)])
def test_only_the_subscribe_connection_asks_for_a_session_that_stays(settings: dict[str, int], clean: bool) -> None:
    with Peer() as peer, Client(url(peer.port), client_id="c", **settings, **QUICK) as client:
        client.subscribe("t", print)
        client.wait_subscribed(DEADLINE_S)
        by_id = {packet.body[12:]: packet.is_clean for packet in peer.wait(CONNECT, 2)}
    assert by_id == {b"c": True, b"c-sub": clean}


def test_a_filter_taken_back_and_given_again_offline_is_subscribed() -> None:
    with Peer() as peer, Client(url(peer.port), client_id="c", **QUICK) as client:
        client.subscribe("stays", print)
        client.subscribe("goes", print)
        client.wait_subscribed(DEADLINE_S)
        client._subscriber._matcher.remove("stays")  # so that both requests below wait for the next connection
        client._matcher.add("stays", print)
        with client._subscriber._changed:
            client._subscriber._requests.update({"stays": None, "goes": None})
            client._matcher.remove("goes")
        peer.hang_up()
        # A connection made before "goes" went may have subscribed to both, late on a busy machine.
        until(lambda: [packet.filters for packet in peer.of_type(SUBSCRIBE)][-1:] == [["stays"]])
        # A wake that was under way may have sent it on the old connection too.
        assert {tuple(packet.filters) for packet in peer.wait(UNSUBSCRIBE, 1)} == {("goes",)}


def test_many_filters_go_in_packets_of_a_bounded_size() -> None:
    filters = [f"t/{number}" for number in range(250)]
    with Peer() as peer:
        client = Client(url(peer.port), client_id="c", **QUICK)
        for topic_filter in filters:
            client.subscribe(topic_filter, print)
        with client:
            client.wait_subscribed(DEADLINE_S)
            packets = peer.wait(SUBSCRIBE, 3)
    assert [len(packet.filters) for packet in packets] == [100, 100, 50]
    assert [name for packet in packets for name in packet.filters] == filters


def test_a_refused_subscription_is_named() -> None:
    with Peer(suback=0x80) as peer, Client(url(peer.port), client_id="c", **QUICK) as client:
        client.subscribe("forbidden/#", print)
        with pytest.raises(TopicError, match="forbidden/#"):
            client.wait_subscribed(DEADLINE_S)
        assert "forbidden/#" in client.stats().last_error
        # The broker may think better of it.
        peer.suback = 1
        peer.hang_up()
        eventually(lambda: client._subscriber.connects == 2)
        client.wait_subscribed(DEADLINE_S)


def test_waiting_for_a_subscription_ends_with_the_time_limit_and_with_close() -> None:
    client = Client("mqtt://127.0.0.1:1", client_id="c", **QUICK)
    client.subscribe("t", print)
    client.start()
    with pytest.raises(WaitTimeout):
        client.wait_subscribed(0.01)
    closing = threading.Thread(target=client.close)
    closing.start()
    with pytest.raises(ClosedError):
        client.wait_subscribed(DEADLINE_S)
    closing.join(DEADLINE_S)


def test_what_is_asked_for_while_messages_stream_is_done_and_the_end_is_a_goodbye() -> None:
    seen, over = Inbox(), threading.Event()

    def is_answered(sent: int) -> bool:
        return over.is_set() or len(peer.of_type(PUBACK)) >= sent

    def stream() -> None:
        sent = 0
        while not over.is_set():
            for _ in range(20):
                sent += 1
                peer.publish(sent % 60_000 + 1, "t", b"")
            eventually(partial(is_answered, sent))

    with Peer() as peer:
        client = Client(url(peer.port), client_id="c", **QUICK)
        client.subscribe("t", seen)
        client.start()
        client.wait_subscribed(DEADLINE_S)
        streaming = threading.Thread(target=stream)
        streaming.start()
        seen.wait(100)
        client.subscribe("other", print)
        client.wait_subscribed(DEADLINE_S)
        client.unsubscribe("other")
        assert [packet.filters for packet in peer.wait(UNSUBSCRIBE, 1)] == [["other"]]
        over.set()
        client.close()
        peer.wait(DISCONNECT, 2)
        streaming.join(DEADLINE_S)
    assert peer.connections == 2

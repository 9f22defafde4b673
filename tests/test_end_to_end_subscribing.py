"""Subscribing, the same on every way to every broker; what a broker is known not to do is seen too."""

from __future__ import annotations

import pytest

from cloudpubsub import Message
from cloudpubsub.demo.relay import Relay
from tests.brokers import Ability
from tests.links import PLAIN_WAYS, Link
from tests.making import Child, Inbox, eventually
from tests.publishing import LIMIT, publish_numbers

COUNT = 1_200

HANGS = """
import sys, threading, cloudpubsub
broker, topic, client_id = sys.argv[1:]
client = cloudpubsub.Client(broker, client_id=client_id)

def handler(message):
    print(message.payload.decode(), flush=True)
    if message.payload == b"2":
        threading.Event().wait()

client.subscribe(topic, handler)
client.start()
client.wait_subscribed(60)
print("ready", flush=True)
threading.Event().wait()
"""


def test_messages_come_in_the_order_of_publishing(link: Link) -> None:
    inbox, numbers = Inbox(), [b"%d" % number for number in range(COUNT)]
    with link.receiver(("#", inbox)):
        link.send(*((f"t/{number[-1:].decode()}", number) for number in numbers))
        inbox.wait(COUNT)
    assert inbox.payloads == numbers
    assert {(message.qos, message.retain) for message in inbox.first} == {(1, False)}


def test_one_client_publishes_and_receives(link: Link) -> None:
    inbox = Inbox()
    with link.receiver(("x", inbox)) as client:
        publish_numbers(client, range(COUNT), link.topic())
        assert client.flush(LIMIT) == 0
        inbox.wait(COUNT)
    assert [int(payload) for payload in inbox.payloads] == list(range(COUNT))


def test_payloads_and_topics_are_not_touched(link: Link) -> None:
    inbox = Inbox()
    payloads = [bytes(range(256)) * 4_400, b"", b"\0", "grün".encode()]
    with link.receiver(("u/+", inbox)):
        link.send(*(("u/x", payload) for payload in payloads))
        inbox.wait(len(payloads))
    assert inbox.payloads == payloads
    assert set(inbox.topics) == {link.topic("u/x")}


def test_topics_and_filters_may_be_any_unicode(link: Link) -> None:
    inbox = Inbox()
    with link.receiver(("grün/+/🌡", inbox)):
        link.send(("grün/東京/🌡", b"1"))
        assert inbox.wait(1)[0].topic == link.topic("grün/東京/🌡")


def test_handlers_get_what_their_filters_match(link: Link) -> None:
    one, rest, exact, other = Inbox(), Inbox(), Inbox(), Inbox()
    with link.receiver(("a/+/c", one), ("a/#", rest), ("a/b/c", exact), ("z", other)):
        link.send(("a/b/c", b"1"), ("a/x/c", b"2"), ("a", b"3"), ("a/b/c/d", b"4"), ("z", b"5"))
        # Where filters overlap, a broker may send a message once, or once for each of them: rumqttd does the latter.
        eventually(lambda: [len(set(box.payloads)) for box in (one, rest, exact, other)] == [2, 4, 1, 1])
    assert set(one.payloads) == {b"1", b"2"}
    assert set(rest.payloads) == {b"1", b"2", b"3", b"4"}
    assert set(exact.payloads) == {b"1"}
    assert other.payloads == [b"5"]


def test_a_handler_may_publish(link: Link) -> None:
    inbox = Inbox()

    def answer(message: Message) -> None:
        client.publish(link.topic("answer/" + message.topic.rpartition("/")[2]), message.payload)

    with link.receiver(("ask/+", answer), ("answer/#", inbox)) as client:
        link.send(*((f"ask/{number}", b"%d" % number) for number in range(100)))
        inbox.wait(100)
    assert inbox.topics == [link.topic(f"answer/{number}") for number in range(100)]


def test_unsubscribed_handlers_are_not_called(link: Link) -> None:
    stays, goes, sentinel = Inbox(), Inbox(), Inbox()
    with link.receiver(("t", stays), ("t", goes), ("u", goes), ("end", sentinel)) as client:
        client.unsubscribe(link.topic("t"), goes)
        client.unsubscribe(link.topic("u"))
        link.send(("t", b"1"), ("u", b"2"), ("end", b"3"))
        sentinel.wait(1)
        stays.wait(1)
        with pytest.raises(KeyError):
            client.unsubscribe(link.topic("u"))
    assert (stays.payloads, goes.payloads) == ([b"1"], [])


@pytest.mark.parametrize("stays", [True, False], ids=["stays", "clean"])
def test_subscriptions_are_made_again_after_a_cut_and_a_session_that_stays_has_the_rest(
    stays: bool, link: Link
) -> None:
    inbox = Inbox()
    with Relay(link.port) as relay:
        with link.receiver(("t", inbox), port=relay.port, clean_session=not stays) as client:
            link.send(("t", b"before"))
            inbox.wait(1)
            relay.cut()
            eventually(lambda: client._subscriber._waiting)  # for the subscription of the next connection
            if stays:  # else the broker may still believe in the connection, and that it delivers to it
                link.send(("t", b"meanwhile"))
            relay.restore()
            client.wait_subscribed(LIMIT)
            link.send(("t", b"after"))
            eventually(lambda: b"after" in inbox.payloads)
    # The acknowledgement of the first may have been cut off; then a session that stays repeats it.
    assert list(dict.fromkeys(inbox.payloads)) == [b"before", *([b"meanwhile"] if stays else []), b"after"]


def test_a_session_that_stays_keeps_what_comes_while_the_client_is_away(link: Link) -> None:
    inbox = Inbox()
    with link.receiver(("x", inbox)):
        pass
    link.send(*(("x", b"%d" % number) for number in range(200)))
    with link.receiver(("x", inbox)):
        inbox.wait(200)
    assert inbox.payloads == [b"%d" % number for number in range(200)]


def test_a_session_that_does_not_stay_is_forgotten(link: Link) -> None:
    inbox = Inbox()
    with link.receiver(("x", inbox), clean_session=True):
        pass
    link.send(("x", b"meanwhile"))
    with link.receiver(("x", inbox), clean_session=True):
        link.send(("x", b"live"))
        inbox.wait(1)
    assert inbox.payloads == [b"live"]


# NATS repeats it not when the next connection comes, but after its `ack_wait` of a minute.
@pytest.mark.parametrize(
    "link",
    [pytest.param(way, id=way.name, marks=[pytest.mark.slow_brokers] * (way.kind == "nats")) for way in PLAIN_WAYS],
    indirect=True,
)
def test_a_message_whose_handler_was_killed_is_delivered_again(link: Link) -> None:
    settings = link.settings(name="killed")
    with Child(HANGS, settings["broker"], link.topic(), settings["client_id"]) as child:
        assert child.line() == "ready"
        link.send(("x", b"1"), ("x", b"2"), ("x", b"3"))
        assert [child.line(), child.line()] == ["1", "2"]
        child.kill()
    inbox = Inbox()
    with link.receiver(("x", inbox), name="killed"):
        eventually(lambda: b"3" in inbox.payloads, deadline_s=180)
    # The first was acknowledged, or it is repeated if the kill came before its acknowledgement was out.
    assert inbox.payloads[-2:] == [b"2", b"3"]
    assert inbox.payloads[:-2] in ([], [b"1"])


@pytest.mark.parametrize("wildcard", [False, True], ids=["exact", "wildcard"])
def test_retained_messages(wildcard: bool, link: Link) -> None:
    with link.client() as client:
        client.wait(client.publish(link.topic(), b"kept", retain=True), LIMIT)
    inbox = Inbox()
    with link.receiver(("#" if wildcard else "x", inbox)):
        if wildcard and not link.can(Ability.RETAINED_FOR_WILDCARDS):  # it looks for one of just the filter's name
            link.send(("x", b"live"))
            assert inbox.wait(1)[0].payload == b"live"
        else:
            inbox.wait(1)
            link.send(("x", b"live"))
            kept, live = inbox.wait(2)
            assert (kept.topic, kept.payload, kept.retain) == (link.topic(), b"kept", True)
            assert (live.payload, live.retain) == (b"live", False)


def test_a_shared_subscription(link: Link) -> None:
    """Where there are none they are granted like any other, and then nothing comes."""
    shared, plain = Inbox(), Inbox()
    with link.client(name="shared") as client, link.receiver(("#", plain)):
        client.subscribe(f"$share/group/{link.topic('#')}", shared)
        client.wait_subscribed(LIMIT)
        link.send(*(("x", b"%d" % number) for number in range(100)))
        plain.wait(100)
        if link.can(Ability.SHARED_SUBSCRIPTIONS):
            shared.wait(100)
        assert len(shared.calls) == (100 if link.can(Ability.SHARED_SUBSCRIPTIONS) else 0)

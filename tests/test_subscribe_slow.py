"""A slow handler: the queue is full, reading stops, the link lives, nothing is lost."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from cloudpubsub import Message
from tests.brokers import Broker
from tests.making import DEADLINE_S, Gate, Inbox, eventually, receiver, send


def test_a_handler_slower_than_two_keep_alives_costs_neither_link_nor_messages(broker: Broker) -> None:
    """Whether the queue is full soon or never."""
    count, gates = 3000, {10: Gate(), 10_000: Gate()}
    with ExitStack() as stack:
        settings = {queue: {"client_id": f"r{queue}", "handler_queue": queue, "keep_alive": 2} for queue in gates}
        clients = [
            stack.enter_context(receiver(broker, ("t", gate), **settings[queue])) for queue, gate in gates.items()
        ]
        send(broker, [("t", b"%d" % number) for number in range(count)])
        assert all(gate.entered.wait(DEADLINE_S) for gate in gates.values())
        # The broker would end the link after one and a half keep-alives without a ping, and we after as long without
        # an answer to it (which rumqttd does not give while its window is full).
        threading.Event().wait(4.5)
        for gate in gates.values():
            gate.opened.set()
        for gate in gates.values():
            gate.inbox.wait(count)
        assert [one.stats().reconnects for one in clients] == [0, 0]
    assert all(gate.inbox.payloads == [b"%d" % number for number in range(count)] for gate in gates.values())


def test_a_full_queue_stops_reading_until_half_of_it_is_empty(broker: Broker) -> None:
    gate, count = Gate(), 2000
    with receiver(broker, ("t", gate), handler_queue=5) as client:
        send(broker, [("t", bytes(1000))] * count)
        assert gate.entered.wait(DEADLINE_S)
        eventually(lambda: not client._subscriber._wants_to_read(), "the queue is full")
        gate.opened.set()
        gate.inbox.wait(count)


def test_large_messages_fill_the_queue_sooner(broker: Broker) -> None:
    sizes: list[int] = []
    gate = Gate()

    def note(message: Message) -> None:
        sizes.append(client._dispatcher._load)
        gate(message)

    with receiver(broker, ("t", note), handler_queue=100) as client:
        send(broker, [("t", bytes(100_000))] * 50)
        assert gate.entered.wait(DEADLINE_S)
        eventually(lambda: not client._subscriber._wants_to_read(), "the queue is full")
        # 25 each, so four made it full; the first of them may have been taken out since.
        assert 75 <= client._dispatcher._load <= 125
        gate.opened.set()
        gate.inbox.wait(50)


def test_slow_callbacks_lose_no_report(broker: Broker) -> None:
    inbox = Inbox()
    with receiver(broker, on_publish=inbox, handler_queue=3) as client:
        positions = [client.publish("t", b"", userdata=b"%d" % number) for number in range(3000)]
        inbox.wait(3000)
    assert [message.position for message in inbox.first] == positions
    assert [message.userdata for message in inbox.first] == [b"%d" % number for number in range(3000)]

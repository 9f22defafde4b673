"""`close()`: whatever interrupts it or is given to it, the ring reaches the disk and no thread stays."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import TLS, Client, Message, Spool, SpoolFull
from cloudpubsub._delivery import Batch
from tests.brokers import Broker, Mosquitto, TlsFiles
from tests.fake_broker import FakeBroker
from tests.making import Child, Inbox, eventually, send
from tests.packets import Disconnect, Puback
from tests.publishing import LIMIT, client_to
from tests.script import Script

NOBODY = 1
KIB = 1024

EXITING = """
import sys
from cloudpubsub import Client, Spool
if sys.argv[1] == "spool":
    kept = Spool(sys.argv[2], durability="memory")
    put = kept.append
else:
    kept = Client("mqtt://127.0.0.1:1", client_id="g", spool=sys.argv[2], durability="memory")
    put = kept.publish
    if sys.argv[1] == "started":
        kept.start()
for number in range(1000):
    put("numbers", b"%d" % number)
print("done", flush=True)
"""


def offline(spool: Path | None, **settings: Any) -> Client:
    return client_to(NOBODY, spool, durability="memory", **settings)


def records_in(spool: Path) -> int:
    with Spool(spool) as opened:
        return opened.recovery.records


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cloudpubsub")]


def test_the_last_acknowledgement_is_not_waited_behind() -> None:
    script = Script()
    with FakeBroker(script, parallel=True) as broker:
        client = client_to(broker.port, None)
        client.subscribe("t", print)
        with client:
            client.wait_subscribed(LIMIT)
            subscriber = client._subscriber
            # As when the last handler has just returned; the thread finds it only when it is told to end.
            Batch(acks=subscriber._acks, wake=lambda: None).acknowledge(7)
            stopping = threading.Thread(target=subscriber.stop, args=(60.0,))
            stopping.start()
            assert script.wait(Puback)[0].packet_id == 7
            script.wait(Disconnect)
            stopping.join(LIMIT)
            assert not stopping.is_alive()


@pytest.mark.parametrize("timeout", [None, "1", float("nan"), True])
def test_a_timeout_that_is_none_is_refused_and_nothing_is_closed(tmp_path: Path, timeout: Any) -> None:
    with offline(tmp_path) as client, pytest.raises(ValueError, match="timeout: "):
        client.publish("t", b"0")
        client.close(timeout)
    assert records_in(tmp_path) == 1
    with Spool(tmp_path) as spool, pytest.raises(ValueError, match="timeout: "):
        spool.close(timeout)


@pytest.mark.parametrize("call", ["wait", "flush", "flush_now", "wait_synced"])
def test_other_time_limits_are_checked_too(tmp_path: Path, call: str) -> None:
    with offline(tmp_path) as client:
        position = client.publish("t", b"0")
        arguments = (position,) if call in ("wait", "wait_synced") else ()
        with pytest.raises(ValueError, match="timeout: 'x' is not allowed"):
            getattr(client, call)(*arguments, timeout="x")


def test_ctrl_c_in_close_ends_the_threads_and_saves_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = offline(tmp_path)
    client.start()
    for _ in range(100):
        client.publish("t", b"0")

    def interrupt(_: float) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(client, "_drain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.close()
    eventually(lambda: not threads_of_ours(), "the threads end")
    assert records_in(tmp_path) == 100


def test_a_signal_handler_may_close_what_is_being_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = offline(tmp_path)
    client.start()
    client.publish("t", b"0")
    before = signal.signal(signal.SIGUSR1, lambda *_: client.close(LIMIT))
    try:
        monkeypatch.setattr(client, "_drain", lambda _: signal.raise_signal(signal.SIGUSR1))
        assert client.close(LIMIT) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert records_in(tmp_path) == 1


@pytest.mark.parametrize("what", ["spool", "client", "started"])
def test_what_is_open_at_exit_is_saved(tmp_path: Path, what: str) -> None:
    with Child(EXITING, what, tmp_path) as child:
        assert child.process.wait(LIMIT) == 0
    assert records_in(tmp_path) == 1000


def test_a_callback_is_not_blocked_by_a_full_spool(broker: Broker, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def publish_much(_: Message) -> None:
        try:
            for _ in range(200):
                client.publish("copy", bytes(KIB))
        except SpoolFull as exc:
            errors.append(exc)

    sizes: dict[str, Any] = {"ring_bytes": 64 * KIB, "max_spool_messages": 1, "on_full": "block", "handler_queue": 3}
    with client_to(broker.port, tmp_path / "spool", on_publish=publish_much, **sizes) as client:
        for _ in range(50):
            client.publish("t", bytes(KIB))
        eventually(lambda: errors, "the callback got SpoolFull")


def test_arguments_of_the_wrong_kind_are_named(tmp_path: Path) -> None:
    with offline(tmp_path) as client:
        for payload in (5, None, ["x"]):
            with pytest.raises(TypeError, match="payload: a "):
                client.publish("t", payload)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="payload: "):
            client.publish("t", "\ud800")
        with pytest.raises(TypeError, match="userdata: a str is not allowed"):
            client.publish("t", b"", userdata="x")  # type: ignore[arg-type]
        assert client.stats().published == 0


def test_the_subscribe_connection_speaks_tls_too(tls_files: TlsFiles, tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "broker", tls=tls_files) as broker:
        inbox = Inbox()
        settings = {"broker": f"mqtts://localhost:{broker.tls_port}", "tls": TLS(ca=tls_files.ca)}
        with client_to(broker.port, None, **settings) as client:
            client.subscribe("t", inbox)
            client.wait_subscribed(LIMIT)
            send(broker, [("t", b"%d" % number) for number in range(1000)])
            inbox.wait(1000)
        assert inbox.payloads == [b"%d" % number for number in range(1000)]

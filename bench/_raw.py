"""The client that does nothing but send and receive: what a broker, or this machine, takes at best."""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Iterator

from ._harness import TOPIC, check

_MAX_PACKETS_BYTES = 64 << 20  # of a window
_SILENT_MS = 20_000


def connect(host: str, port: int, ca: str | None, name: str = "bench-raw") -> socket.socket:
    """A non-blocking socket behind an accepted CONNECT of MQTT 3.1.1."""
    sock = socket.create_connection((host, port), timeout=20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if ca is not None:
        sock = ssl.create_default_context(cafile=ca).wrap_socket(sock, server_hostname=host)
    client_id = name.encode()
    body = b"\x00\x04MQTT\x04\x02\x00\x3c" + len(client_id).to_bytes(2, "big") + client_id
    sock.sendall(bytes([0x10, len(body)]) + body)
    answer = b""
    while len(answer) < 4:
        part = sock.recv(4 - len(answer))
        check(bool(part), "the broker closed the connection")
        answer += part
    check(answer == b"\x20\x02\x00\x00", f"CONNACK {answer!r}")
    sock.setblocking(False)
    return sock


def packet_head(payload_bytes: int) -> bytes:
    """What stands before the packet id of a PUBLISH at QoS 1."""
    topic = TOPIC.encode()
    rest = 2 + len(topic) + 2 + payload_bytes
    head = b"\x32"
    while True:
        head += bytes([rest & 127 | (128 if rest > 127 else 0)])
        rest >>= 7
        if not rest:
            return head + len(topic).to_bytes(2, "big") + topic


def window_that_fits(window: int, batch: int, payload_bytes: int) -> tuple[int, int]:
    """The same, but smaller where packets are so large that a window of them would take too much memory."""
    most = max(1, _MAX_PACKETS_BYTES // (len(packet_head(payload_bytes)) + 2 + payload_bytes))
    batch = max(1, min(batch, most // 4))
    return max(batch, min(window, most) // batch * batch), batch


def batches(window: int, batch: int, n: int, payload: bytes) -> Iterator[tuple[int, memoryview]]:
    """(messages, their packets), again and again over the packets of one window, with the ids 1..window."""
    check(window % batch == 0, "the window is a multiple of the batch")
    head = packet_head(len(payload))
    packets = memoryview(b"".join(head + i.to_bytes(2, "big") + payload for i in range(1, window + 1)))
    length = len(head) + 2 + len(payload)
    parts = [packets[at : at + batch * length] for at in range(0, window * length, batch * length)]

    def endless() -> Iterator[tuple[int, memoryview]]:
        left, turn = n, 0
        while left > 0:
            messages = min(batch, left)
            yield messages, parts[turn % len(parts)][: messages * length]
            left, turn = left - messages, turn + 1

    return endless()


def send_all(
    sock: socket.socket, upcoming: Iterator[tuple[int, memoryview]], window: int, n: int, nap_s: float
) -> bytearray:
    """Everything sent and `n` PUBACKs received; returns what came."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    answer = bytearray(4 * n + 4)  # a byte too many would show
    room = memoryview(answer)
    sent = received_bytes = 0
    rest, messages = memoryview(b""), 0
    following = next(upcoming, None)
    while received_bytes < 4 * n:
        is_blocked = False
        while not is_blocked:
            if not rest:
                if following is None or sent + following[0] - received_bytes // 4 > window:
                    break
                messages, rest = following
                sent += messages
                following = next(upcoming, None)
            try:
                rest = rest[sock.send(rest) :]
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                is_blocked = True
        poller.modify(sock, select.POLLIN | (select.POLLOUT if is_blocked else 0))
        if nap_s > 0:
            time.sleep(nap_s)
        events = poller.poll(_SILENT_MS)
        check(bool(events), f"the broker was silent for {_SILENT_MS // 1000} s")
        if events[0][1] & ~select.POLLOUT:
            received_bytes += receive(sock, room[received_bytes:])
            # A broker that leaves Nagle on sends the next acknowledgements only when these are acknowledged.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    return answer[:received_bytes]


def receive(sock: socket.socket, room: memoryview) -> int:
    """What is there, at most what fits.  TLS holds some that no poll tells of, so it is asked until it is empty."""
    size = 0
    while size < len(room):
        try:
            n = sock.recv_into(room[size:])
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            break
        check(n > 0, "the broker closed the connection")
        size += n
        if not isinstance(sock, ssl.SSLSocket):
            break
    return size

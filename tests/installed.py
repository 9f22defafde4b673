"""A smoke test of what is installed, with nothing but that: run as a script, from anywhere.

    python tests/installed.py

A process publishes without a broker and is killed with SIGKILL; another one opens the same spool, finds a broker (a few
lines of one, below) and delivers everything, in order.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

COUNT = 3000  # several times what the ring holds
SETTINGS = {"client_id": "installed", "ring_bytes": 65536, "segment_bytes": 65536}
LIMIT_S = 120

PUBLISH = """
import os, signal, sys
import cloudpubsub
sizes = {"ring_bytes": 65536, "segment_bytes": 65536}
client = cloudpubsub.Client(sys.argv[1], spool=sys.argv[2], client_id="installed", **sizes)
client.start()
for number in range(int(sys.argv[3])):
    client.publish("installed", b"%d" % number)
os.kill(os.getpid(), signal.SIGKILL)
"""


def packet(stream: socket.SocketIO) -> tuple[int, bytes]:
    """First byte and body of the next MQTT packet; EOFError."""
    first, length, shift = read(stream, 1)[0], 0, 0
    while True:
        byte = read(stream, 1)[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return first, read(stream, length)


def read(stream: socket.SocketIO, size: int) -> bytes:
    data = stream.read(size)
    if data is None or len(data) < size:
        raise EOFError
    return data


def serve(listener: socket.socket, received: list[int]) -> None:
    """The least of a broker: says yes to every CONNECT, acknowledges every PUBLISH, answers every PINGREQ."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, connection.makefile("rb") as stream:
            try:
                while True:
                    first, body = packet(stream)
                    if first >> 4 == 1:
                        connection.sendall(b"\x20\x02\x00\x00")
                    elif first >> 4 == 3:
                        topic = int.from_bytes(body[:2], "big")
                        received.append(int(body[4 + topic :]))
                        connection.sendall(b"\x40\x02" + body[2 + topic : 4 + topic])
                    elif first >> 4 == 12:
                        connection.sendall(b"\xd0\x00")
            except (EOFError, OSError):
                pass


def main() -> None:
    import cloudpubsub
    import cloudpubsub._link
    import cloudpubsub._spool

    source = Path(__file__).resolve().parent.parent
    for module in (cloudpubsub, cloudpubsub._spool, cloudpubsub._link):
        place = Path(module.__file__ or "").resolve()
        assert source / "cloudpubsub" not in place.parents, f"{place} is the source, not what is installed"
    received: list[int] = []
    with tempfile.TemporaryDirectory() as directory, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # refuses until it listens
        url, spool = f"mqtt://127.0.0.1:{listener.getsockname()[1]}", f"{directory}/spool"
        command = [sys.executable, "-c", PUBLISH, url, spool, str(COUNT)]
        killed = subprocess.run(command, cwd=directory, timeout=LIMIT_S, check=False)
        assert killed.returncode == -signal.SIGKILL, killed
        listener.listen()
        threading.Thread(target=serve, args=(listener, received), daemon=True).start()
        with cloudpubsub.Client(url, spool=spool, **SETTINGS) as client:
            assert client.stats().backlog_messages == COUNT
            left = client.flush(LIMIT_S)
        assert left == 0, f"{left} messages were not acknowledged"
    assert list(dict.fromkeys(received)) == list(range(COUNT)), "not all, or not in order"
    command = [str(Path(sys.executable).parent / "cloudpubsub"), "--help"]
    assert b"inspect" in subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S).stdout
    print(
        f"installed: {Path(cloudpubsub.__file__ or '').parent}, {COUNT} messages over a kill -9, {os.uname().machine}"
    )


if __name__ == "__main__":
    main()

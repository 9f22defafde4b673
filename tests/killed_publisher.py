"""A publisher that is there to be killed, and the process that starts it again and again.

`Publisher` starts a process that has everything imported; for each round it forks a child (before any client was made),
which opens the spool, publishes "round:number" to `topic` until it is killed, and notes in a shared file how many
`publish()` calls have returned, what the last one returned, and whether it has been connected.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_NOTE = struct.Struct("=QQQ")  # publish() calls that returned, last position + 1, connections


def _publish_until_killed(settings: dict[str, Any], number: int, note: mmap.mmap) -> None:
    import cloudpubsub

    def note_connection(_url: str) -> None:
        note[16:24] = struct.pack("=Q", 1)

    topic = settings.pop("topic", "rounds")
    if "tls" in settings:
        settings["tls"] = cloudpubsub.TLS(**settings["tls"])
    if "will" in settings:
        settings["will"] = cloudpubsub.Will(**settings["will"])
    client = cloudpubsub.Client(**settings, on_connect=note_connection)
    client.start()
    done = 0
    while True:
        for _ in range(20):
            position = client.publish(topic, b"%d:%d" % (number, done))
            done += 1
            # One after the other, each a single store: the count never runs ahead of what was returned.
            note[8:16] = struct.pack("=Q", position + 1)
            note[0:8] = struct.pack("=Q", done)
        time.sleep(0.001)


def _serve() -> None:
    import cloudpubsub  # so that a child has it at once

    assert cloudpubsub.Client is not None
    path = sys.argv[1]
    with open(path, "r+b") as file:
        note = mmap.mmap(file.fileno(), _NOTE.size)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                _publish_until_killed(order["settings"], order["number"], note)
            finally:
                os._exit(1)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(status, flush=True)


class Publisher:
    """Starts a publisher, kills it, and tells what it had published.  A context manager."""

    def __init__(self) -> None:
        directory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
            file.write(bytes(_NOTE.size))
        self._path = file.name
        with open(self._path, "r+b") as shared:
            self._note = mmap.mmap(shared.fileno(), _NOTE.size)
        root = str(Path(__file__).parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.killed_publisher", self._path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": root},
        )
        self._pid = 0

    @property
    def done(self) -> int:
        """How many calls of publish() have returned in this round."""
        return int(_NOTE.unpack(self._note[:])[0])

    @property
    def last_position(self) -> int:
        return int(_NOTE.unpack(self._note[:])[1]) - 1

    @property
    def was_connected(self) -> bool:
        return _NOTE.unpack(self._note[:])[2] > 0

    def start(self, number: int, **settings: Any) -> None:
        self._note[:] = bytes(_NOTE.size)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"number": number, "settings": settings}) + "\n")
        self._process.stdin.flush()
        self._pid = int(self._process.stdout.readline())

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        os.kill(self._pid, signal.SIGKILL)
        assert self._process.stdout is not None
        assert int(self._process.stdout.readline()) == signal.SIGKILL, "it had ended before"
        self._pid = 0

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
        self._process.communicate(timeout=60)
        self._note.close()
        os.unlink(self._path)


if __name__ == "__main__":
    _serve()

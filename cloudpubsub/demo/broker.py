"""The demo's broker: rumqttd, from the wheel `iotcore`, in a process of its own on 127.0.0.1.

Run as a module this is that process.  rumqttd keeps messages in a log in memory and moves a subscriber that falls
behind its end forward, without a word to anybody: the log is made larger than a demo can fill.  Memory is taken only
as it fills.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

from cloudpubsub.demo.child import Child

__all__ = ["Broker"]

_HOST = "127.0.0.1"
_START_S = 15.0
_SEGMENTS, _SEGMENT_BYTES = 64, 16 << 20
_CONFIGURATION = """
id = 0
[router]
id = 0
max_connections = 100
max_outgoing_packet_count = 200
max_segment_size = {segment_bytes}
max_segment_count = {segments}
[v4.1]
name = "v4"
listen = "{host}:{port}"
next_connection_delay_ms = 1
[v4.1.connections]
connection_timeout_ms = 60000
max_payload_size = 262144
max_inflight_count = 100
dynamic_filters = true
"""


class Broker:
    """Start with `start`, which returns when it listens on `port`; end with `close`."""

    def __init__(self, directory: Path) -> None:
        # Bound and not listened on: the port is ours, and the broker may share it (SO_REUSEADDR on both).
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind((_HOST, 0))
        self.port: int = self._reserved.getsockname()[1]
        self._directory = directory
        self._child: Child | None = None

    def start(self) -> None:
        """Raises RuntimeError with what the broker said if it does not listen in time."""
        configuration = self._directory / "broker.toml"
        configuration.write_text(
            _CONFIGURATION.format(host=_HOST, port=self.port, segments=_SEGMENTS, segment_bytes=_SEGMENT_BYTES)
        )
        self._child = Child("cloudpubsub.demo.broker", [str(configuration)], self._directory / "broker.log")
        deadline_s = time.monotonic() + _START_S
        while not self._accepts():
            code = self._child.exit_code(0.02)  # the pause between two tries
            if code is not None or time.monotonic() > deadline_s:
                what = "does not listen" if code is None else f"ended with {code}"
                raise RuntimeError(f"the broker {what}: {self._child.errors()}")

    def _accepts(self) -> bool:
        try:
            socket.create_connection((_HOST, self.port), timeout=1).close()
        except OSError:
            return False
        return True

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.exit_code() is None

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()  # it has no way to stop, and nothing to save
            self._child.stdout.close()
        self._reserved.close()


def _end_with_parent() -> None:
    try:
        sys.stdin.buffer.read()
    finally:
        os._exit(0)


def _main() -> None:
    from iotcore import IotCoreBroker

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)  # it logs each packet as an error
    threading.Thread(target=_end_with_parent, daemon=True).start()
    IotCoreBroker(config_path=sys.argv[1]).run_forever()


if __name__ == "__main__":
    _main()

"""What a service of `Type=notify` tells systemd: a datagram with lines of NAME=value, see sd_notify(3).

The protocol is that of the manual page and does not change, so a few lines are less to look after than a dependency.
"""

from __future__ import annotations

import os
import socket

__all__ = ["notify", "watchdog_s"]


def notify(*lines: str) -> bool:
    """Send `lines`; False if nobody asked for them or nobody takes them, which is no reason to stop.  Never blocks."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            sender.sendto("\n".join(lines).encode(), address)
        return True
    except OSError:
        return False


def watchdog_s() -> float | None:
    """Seconds within which systemd wants to hear WATCHDOG=1 again; None: it does not watch this process."""
    try:
        if int(os.environ.get("WATCHDOG_PID", os.getpid())) != os.getpid():
            return None
        seconds = int(os.environ["WATCHDOG_USEC"]) / 1e6
    except (KeyError, ValueError):
        return None
    return seconds if seconds > 0 else None

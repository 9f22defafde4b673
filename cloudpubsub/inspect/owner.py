"""Who owns a spool now, found out without getting in the owner's way."""

from __future__ import annotations

import fcntl
import os
import re

__all__ = ["is_listed", "is_owned", "owner_pid", "ring_of"]

# 1: FLOCK  ADVISORY  WRITE 4711 fe:01:262148 0 EOF
_LOCK = re.compile(r"\d+: FLOCK +ADVISORY +WRITE +(\d+) +([0-9a-f]+):([0-9a-f]+):(\d+) ")


def owner_pid(directory: str) -> int | None:
    """The process that holds the lock, as the kernel lists it; None if nobody does or it cannot be told."""
    return _listed(directory) or None


def is_listed(directory: str) -> bool:
    """Whether the kernel lists somebody who has the spool open.  Looks, and touches nothing."""
    return _listed(directory) is not None


def _listed(directory: str) -> int | None:
    """The process that the kernel lists; 0: one outside our container."""
    try:
        facts = os.stat(os.path.join(directory, "lock"), follow_symlinks=False)
        with open("/proc/locks", encoding="ascii") as lines:
            for line in lines:
                found = _LOCK.match(line)
                if found is None:
                    continue
                pid, major, minor, inode = int(found[1]), int(found[2], 16), int(found[3], 16), int(found[4])
                if (os.makedev(major, minor), inode) == (facts.st_dev, facts.st_ino):
                    return pid
    except (OSError, ValueError):
        pass
    return None


def is_owned(directory: str) -> bool | None:
    """Whether some process has the spool open; None: nobody can tell.

    Looks at the kernel's list first.  Only a lock that is not there is tried, for an instant: an owner that opens the
    spool in that very instant would find it taken.
    """
    if is_listed(directory):
        return True
    try:
        fd = os.open(os.path.join(directory, "lock"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


def ring_of(pid: int, name: str) -> str | None:
    """Path of the file called `name` that process `pid` has mapped: its ring may lie anywhere."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                path = line.rstrip("\n").partition("/")
                if path[2].endswith(f"/{name}"):
                    return f"/{path[2]}"
    except OSError:
        pass  # somebody else's process
    return None

"""Opening a log: where its parts lie, and what is said about it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cloudpubsub._errors import SpoolError
from cloudpubsub._message import Recovery
from cloudpubsub._spool import Log

__all__ = ["SEAL_AFTER_S", "open_log", "recovery_of"]

SEAL_AFTER_S = 30.0  # how long a full segment may stay in the page cache alone
_log = logging.getLogger("cloudpubsub")


def _ring_directory(given: str | os.PathLike[str] | None) -> str:
    if given is not None:
        return os.fspath(given)
    # systemd gives several separated by colons.
    return os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or "/dev/shm"


def open_log(
    spool: str | os.PathLike[str] | None,
    *,
    identity: str | None,
    durability: str,
    on_full: str,
    ring_bytes: int,
    ring_dir: str | os.PathLike[str] | None,
    segment_bytes: int,
    max_spool_bytes: int,
    max_spool_messages: int | None,
    spill_after: float,
    spill_timeout: float,
    block_timeout: float | None,
    sync_interval: float,
    max_payload_bytes: int,
) -> Log:
    """Open the log in directory `spool`, made with its parents when it is missing; in memory alone if None.

    Raises SpoolLockedError, IdentityError, SpoolError.  Says in the log what recovery found.
    """
    if spool is not None:
        # An absolute path: the program may change its directory, and files are made later too.
        spool = os.path.abspath(spool)
        try:
            Path(spool).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise SpoolError(exc.errno, f"cannot make the spool's directory: {exc.strerror}", str(spool)) from exc
    log = Log(
        directory=spool,
        ring_directory=os.path.abspath(_ring_directory(ring_dir)) if spool is not None else None,
        identity=identity,
        adopt=False,
        durability=durability,
        on_full=on_full,
        ring_bytes=ring_bytes,
        segment_bytes=segment_bytes,
        spool_bytes_max=max_spool_bytes,
        spool_messages_max=max_spool_messages,
        spill_after_s=spill_after,
        spill_timeout_s=spill_timeout,
        block_timeout_s=block_timeout,
        sync_interval_s=sync_interval,
        seal_after_s=SEAL_AFTER_S,
        payload_max=max_payload_bytes,
    )
    found = log.found
    if spool is None:
        _log.warning("no spool: messages are kept in memory alone and lost with the process")
    elif durability != "memory" and not found["ring_in_file"]:
        _log.warning(
            "%s is not a usable tmpfs: a crash of the process loses what is in the ring only, as with "
            "durability='memory'; give ring_dir a directory on tmpfs",
            _ring_directory(ring_dir),
        )
    if found["records"] or not found["clean"] or found["damaged_ranges"] or found["meta_damaged"]:
        _log.log(
            logging.WARNING if found["damaged_ranges"] or found["meta_damaged"] else logging.INFO,
            "spool %s: found %d messages in %d segments and %d in the ring of a process that did not close; "
            "%d damaged ranges with %d bytes, %d torn bytes, %d unreadable files%s",
            spool,
            found["records"] - found["ring_records"],
            found["segments"],
            found["ring_records"],
            found["damaged_ranges"],
            found["damaged_bytes"],
            found["torn_bytes"],
            found["unreadable"],
            "; the meta file was damaged and made anew" if found["meta_damaged"] else "",
        )
    return log


def recovery_of(log: Log) -> Recovery:
    """What opening `log` found."""
    found = log.found
    return Recovery(
        records=found["records"],
        bytes=found["record_bytes"],
        torn_bytes=found["torn_bytes"],
        damaged_ranges=found["damaged_ranges"],
        damaged_bytes=found["damaged_bytes"],
        segments=found["segments"],
        ring_records=found["ring_records"],
        duration_s=found["duration_s"],
    )

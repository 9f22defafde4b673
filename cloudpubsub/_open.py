"""Opening a log: where its parts lie, and what is said about it."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

from cloudpubsub._errors import SpoolError
from cloudpubsub._message import Recovery
from cloudpubsub._spool import Log

if TYPE_CHECKING:
    from cloudpubsub._options import Options

__all__ = ["SEAL_AFTER_S", "open_log", "recovery_of"]

_MOVE_TIMEOUT_S = 60.0
SEAL_AFTER_S = 30.0  # how long a full segment may stay in the page cache alone
_log = logging.getLogger("cloudpubsub")


def _ring_directory(given: str | os.PathLike[str] | None) -> str:
    if given is not None:
        return os.fspath(given)
    # systemd gives several separated by colons.
    return os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or "/dev/shm"


def _make_directory(path: str) -> None:
    """With its parents, and so that it is still there after a power cut."""
    missing, above = [], path
    while not os.path.exists(above):
        missing.append(above)
        above = os.path.dirname(above)
    os.makedirs(path, mode=0o700, exist_ok=True)
    for made in missing:
        with contextlib.suppress(OSError):  # a parent that we may not read, or a file system that cannot
            parent = os.open(os.path.dirname(made), os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)


def _open(options: Options, spool: str | None, identity: str | None) -> Log:
    return Log(
        directory=spool,
        ring_directory=os.path.abspath(_ring_directory(options.ring_dir)) if spool is not None else None,
        identity=identity,
        adopt=options.adopt,
        durability=options.durability,
        on_full=options.on_full,
        ring_bytes=options.ring_bytes,
        segment_bytes=options.segment_bytes,
        spool_bytes_max=options.max_spool_bytes,
        spool_messages_max=options.max_spool_messages,
        min_free_bytes=options.min_free_bytes,
        spill_after_s=options.spill_after,
        spill_timeout_s=options.spill_timeout,
        block_timeout_s=options.block_timeout,
        sync_interval_s=options.sync_interval,
        sync_bytes=options.sync_bytes,
        seal_after_s=SEAL_AFTER_S,
        payload_max=options.max_payload_bytes,
    )


def open_log(options: Options, *, identity: str | None) -> Log:
    """Open the log in directory `options.spool`, made with its parents when it is missing; in memory alone if None.

    Raises SpoolLockedError, IdentityError, SpoolError.  Says in the log what recovery found.
    """
    # An absolute path: the program may change its directory, and files are made later too.
    spool = None if options.spool is None else os.path.abspath(options.spool)
    if spool is not None:
        try:
            _make_directory(spool)
        except OSError as exc:
            raise SpoolError(exc.errno, f"cannot make the spool's directory: {exc.strerror}", spool) from exc
    log = _open(options, spool, identity)
    if spool is not None and log.stats()["ring_bytes"] != options.ring_bytes:
        # The ring of a killed process, of another size: what is in it goes to the disk, and a new one is made.
        found = log.found
        if log.close(_MOVE_TIMEOUT_S) > 0:
            _log.warning("spool %s: the disk refuses what the last process left, so its ring stays as it is", spool)
        log = _open(options, spool, identity)
        log.found.update(records=found["records"], ring_records=found["ring_records"], clean=found["clean"])
    found = log.found
    if spool is None:
        _log.warning("no spool: messages are kept in memory alone and lost with the process")
    elif options.durability != "memory" and not found["ring_in_file"]:
        _log.warning(
            "%s is not a usable tmpfs: a crash of the process loses what is in the ring only, as with "
            "durability='memory'; give ring_dir a directory on tmpfs",
            _ring_directory(options.ring_dir),
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
        bytes_read=found["bytes_read"],
        duration_s=found["duration_s"],
    )

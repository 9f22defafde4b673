"""Made tests/data/spool-v1, a spool of format version 1, and spool-v1.json, what is in it.  Run once; never again for
version 1: the files are there to show that every later version still reads them.

    python tests/data/make_golden.py

With CLOUDPUBSUB_GOLDEN=DIRECTORY in the environment it makes the same there instead, and tests/test_golden.py reads
that one: how a machine shows that it reads what another kind of machine wrote.

Three opens: the first leaves a segment, in which a byte is then changed; the second finds that, settles the rest of it
and leaves a sealed segment with a pad in it, whose head stands in the middle; the third is killed and leaves an
unsealed segment, to which some bytes of a torn write are added.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from cloudpubsub import Options, _append
from cloudpubsub._open import open_log
from cloudpubsub._spool import Log

HERE = Path(os.environ.get("CLOUDPUBSUB_GOLDEN", Path(__file__).parent))
SPOOL = HERE / "spool-v1"
IDENTITY = "gateway-17"
RING = 64 << 10
Entry = dict[str, object]
alive: list[Log] = []  # not closed at the end


def open_spool() -> Log:
    settings = {
        "broker": "mqtt://localhost",
        "client_id": IDENTITY,
        "spool": SPOOL,
        "ring_bytes": RING,
        "segment_bytes": RING,
    }
    return open_log(Options._from_settings(settings), identity=IDENTITY)


def append(log: Log, topic: str, payload: bytes, userdata: bytes = b"", retain: bool = False) -> Entry:
    position = _append.append(log, topic, payload, retain, userdata)
    return {
        "position": position,
        "topic": topic,
        "payload": base64.b64encode(payload).decode(),
        "userdata": base64.b64encode(userdata).decode(),
        "retain": retain,
    }


def settle_all(log: Log) -> None:
    while messages := log.read(1 << 20):
        log.settle_through(messages[-1].position or 0)


def first() -> list[Entry]:
    log = open_spool()
    for number in range(5):
        append(log, "doomed", b"%d" % number)
    log.close(10)
    (segment,) = (SPOOL / "log").iterdir()
    data = bytearray(segment.read_bytes())
    data[data.index(b"doomed2")] ^= 1
    segment.write_bytes(data)
    return []


def second() -> list[Entry]:
    log = open_spool()
    settle_all(log)
    while log.published() % RING < RING - 1500:
        append(log, "filler", bytes(400))
        settle_all(log)
    kept = [
        append(log, "state/\u00fc", "gr\u00fc\u00dfe".encode(), retain=True),
        append(log, "empty", b""),
        append(log, "bytes", bytes(range(256)), userdata=b"\x00\xffuser"),
    ]
    kept += [append(log, f"gateway-17/{number % 3}", b"%04d" % number * (number % 40)) for number in range(40)]
    log.wait_synced(log.published() - 1, 10)
    log.settle_through(log.read(300)[0].position or 0)
    log.close(10)
    return kept


def third() -> list[Entry]:
    log = open_spool()
    alive.append(log)
    kept = [append(log, "last", b"number %d." % number, userdata=b"u") for number in range(10)]
    log.wait_synced(log.published() - 1, 10)
    return kept


def run(step: str) -> list[Entry]:
    """In a process of its own, which is killed."""
    done = subprocess.run([sys.executable, __file__, step], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    entries: list[Entry] = json.loads(done.stdout)
    return entries


def main() -> None:
    if SPOOL.exists():
        sys.exit(f"{SPOOL} is there; it must not change")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as ring_directory:
        os.environ["RUNTIME_DIRECTORY"] = ring_directory
        entries = run("first") + run("second") + run("third")
    unsealed = max((SPOOL / "log").iterdir())
    data = unsealed.read_bytes().rstrip(b"\0")
    unsealed.write_bytes(data + bytes(-len(data) % 8) + b"torn in the middle")
    (SPOOL / "lock").unlink()
    (HERE / "spool-v1.json").write_text(json.dumps(entries, indent=1) + "\n")
    shutil.copymode(HERE, SPOOL)


if __name__ == "__main__":
    steps = {"first": first, "second": second, "third": third}
    if len(sys.argv) > 1:
        print(json.dumps(steps[sys.argv[1]]()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    main()

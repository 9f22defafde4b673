"""A small spool put to the test: numbered messages in, numbers out, and every one accounted for.

`Trial` is that in this process.  `Worker` is a process of its own with any number of them, for what may kill a process
or is preloaded into it; its trials have the same methods.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cloudpubsub import Spool, SpoolError, SpoolFull, SpoolLockedError
from tests.making import DEADLINE_S, ROOT, eventually

KIB = 1024
SMALL: dict[str, Any] = {
    "ring_bytes": 64 * KIB,
    "segment_bytes": 64 * KIB,
    "spill_timeout": 5,
    "min_free_bytes": 0,  # of file systems that are small themselves
}
SPAN = 344  # bytes of a record made here
RING_HOLDS = SMALL["ring_bytes"] // SPAN
SEGMENT_HOLDS = (SMALL["segment_bytes"] - 192) // SPAN  # beside header and footer
MANY = 1_000  # five segments and a ring


def payload_of(number: int, size: int = 305) -> bytes:
    return b"%010d" % number + bytes(size - 10)


def number_of(payload: bytes) -> int:
    return int(payload[:10])


class Trial:
    """A spool in `path`.  `put` appends the next numbers, `take` reads and acknowledges; both remember."""

    def __init__(self, path: str | Path, *, size: int = 305, count: int = 0, **settings: Any) -> None:
        self.path, self.size, self.settings = Path(path), size, {**SMALL, **settings}
        self.taken: list[int] = []  # in order of arrival
        self.refused: list[int] = []  # by SpoolFull
        self.count = count  # numbers used so far
        self.spool = Spool(self.path, **self.settings)

    def put(self, count: int = MANY) -> int:
        """Append; returns how many were refused with SpoolFull.  Nothing else may be raised."""
        before = len(self.refused)
        for number in range(self.count, self.count + count):
            try:
                self.spool.append("numbers", payload_of(number, self.size))
            except SpoolFull:
                self.refused.append(number)
        self.count += count
        return len(self.refused) - before

    def take(self, at_least: int = 1 << 60) -> int:
        """Read and acknowledge until there is nothing, or `at_least` so many; returns how many."""
        taken = 0
        while taken < at_least and (batch := self.spool.read(min(64 * KIB, SPAN * at_least))):
            self.spool.ack(batch[-1].position or 0)
            self.taken += [number_of(message.payload) for message in batch]
            taken += len(batch)
        return taken

    def try_to_take(self) -> bool:
        """`take`, unless the spool cannot be read now."""
        try:
            self.take()
        except (SpoolError, ValueError):  # what was read may be gone before it is acknowledged
            return False
        return True

    def take_patiently(self) -> None:
        """Until everything is taken or lost, whatever cannot be read meanwhile."""
        eventually(lambda: self.try_to_take() and self.stats()["backlog_messages"] == 0, "all taken", 60)

    def wall_clock(self) -> float:
        """As this process sees it."""
        return time.time()

    def overload(self, seconds: float) -> None:
        """Ten times as much comes in as is taken."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.put(500)
            self.take(50)
            time.sleep(0.005)

    def start_reading(self) -> None:
        """On a thread of its own, which may never come back."""
        threading.Thread(target=self.spool.read, daemon=True).start()

    def sync(self, timeout: float = DEADLINE_S) -> bool:
        """True: everything put so far is said to be durable."""
        try:
            self.spool.sync(timeout)
        except SpoolError:
            return False
        return True

    def stats(self) -> dict[str, Any]:
        """In which every message is accounted for, at any time."""
        stats: dict[str, Any] = self.spool.stats()
        for unit, backlog in (("", "backlog_messages"), ("_bytes", "backlog_bytes")):
            ended = sum(stats[name + unit] for name in ("acked", "dropped", "dead_lettered"))
            assert stats["published" + unit] == ended + stats[backlog], stats
        return stats

    def storage(self) -> str:
        return str(self.stats()["storage"])

    def files(self) -> list[str]:
        """Names of the segments on the disk."""
        return sorted(os.listdir(self.path / "log"))

    def return_to_disk(self) -> None:
        """Wait until the disk is used again, which has to happen by itself."""
        before = self.stats()["spilled_bytes"]

        def is_used() -> bool:
            # One message to try with; when it works, as many as bring memory to its limit.
            self.put(1 if self.stats()["storage"] == "failed" else 20)
            stats = self.stats()
            return bool(stats["storage"] == "ok" and stats["spilled_bytes"] > before)

        eventually(is_used, "back on the disk")

    def check(self) -> None:
        """Everything is taken: in order, each once, and what is missing is exactly what the ledger calls dropped."""
        stats = self.stats()
        assert stats["backlog_messages"] == 0
        assert self.taken == sorted(set(self.taken)), "not in order"
        assert not set(self.taken) & set(self.refused), "refused, and stored all the same"
        assert len(self.taken) + len(self.refused) + stats["dropped"] == self.count

    def finish(self) -> None:
        """Take what is left, `check`, and close with nothing unsaved."""
        self.take()
        self.check()
        assert self.close() == 0

    def close(self, timeout: float = 60.0) -> int:
        return self.spool.close(timeout)

    def reopen(self) -> None:
        """Another process's turn, as far as the spool can tell."""
        self.spool = Spool(self.path, **self.settings)

    def can_reopen(self) -> bool:
        """... as soon as whatever still has it is through."""
        try:
            self.reopen()
        except SpoolLockedError:
            return False
        return True

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RemoteTrial:
    """A trial in a worker; anything asked of it is asked there."""

    def __init__(self, worker: Worker, name: str, settings: dict[str, Any]) -> None:
        self._worker, self._name, self.directory = worker, name, worker.root / name
        self._ask("__init__", **settings)

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **named: self._ask(method, *args, **named)

    def _ask(self, method: str, *args: Any, **named: Any) -> Any:
        return self._worker.ask(self._name, method, *args, **named)


class Worker:
    """A process with trials, each in a directory of its name below `root`."""

    def __init__(self, root: Path, **environment: str) -> None:
        self.root = root
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.trial", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    def trial(self, name: str, **settings: Any) -> RemoteTrial:
        return RemoteTrial(self, name, settings)

    def cannot_open(self, name: str, **settings: Any) -> int:
        """The errno with which opening fails."""
        return int(self.ask(name, "cannot_open", **settings))

    def ask(self, name: str, method: str, *args: Any, **named: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, method, args, named]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"{name}.{method}: the process is gone, exit code {self._process.wait(DEADLINE_S)}"
        answer = json.loads(line)
        assert "error" not in answer, f"{name}.{method}: {answer['error']}"
        return answer["value"]

    def end(self) -> int:
        """Let it come to its end by itself; returns the exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(DEADLINE_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def _serve(root: Path, lines: Iterable[str]) -> None:
    import traceback

    trials: dict[str, Trial] = {}
    for line in lines:
        name, method, args, named = json.loads(line)
        try:
            if method == "__init__":
                trials[name] = Trial(root / name / "spool", **named)
                answer = {"value": None}
            elif method == "cannot_open":
                try:
                    Trial(root / name / "spool", **named)
                    answer = {"error": "it was opened"}
                except SpoolError as error:
                    answer = {"value": error.errno}
            else:
                value = getattr(trials[name], method)
                answer = {"value": value(*args, **named) if callable(value) else value}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.stdin)

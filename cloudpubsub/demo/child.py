"""Child processes of the demo: none of them outlives it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

__all__ = ["Child"]

_TAIL_CHARACTERS = 2_000


class Child:
    """`python -m MODULE ARGUMENTS…` in a session of its own, so that a Ctrl-C on the terminal goes to the demo alone.

    The child reads its stdin and ends when that ends, which it does with this process, however that ends.  What it
    writes to stderr goes to the file `log`.  Not thread-safe, except that `stdout` may be read by another thread.
    """

    def __init__(self, module: str, arguments: list[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self.stdout = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self, wait_s: float = 0.0) -> int | None:
        """Its exit code, or None if it still runs after `wait_s` seconds."""
        try:
            return self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return None

    def tell(self, line: str) -> None:
        """A line to its stdin."""
        try:
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            pass  # it has ended already

    def kill(self) -> None:
        """SIGKILL, and wait for the end.  Does nothing after the end."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def errors(self) -> str:
        """The end of what it wrote to stderr."""
        return self._log.read_text(errors="replace")[-_TAIL_CHARACTERS:].strip()

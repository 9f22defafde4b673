"""Bugs that were put into a copy of the C core on purpose, and the tests that have to notice.

    python -m tests.core.mutants            # every mutant against every suite, as a table; takes long
    python -m tests.core.mutants NAME       # one mutant against the test that is there for it

A mutant is a replacement of text in one or more files, so it breaks, loudly, when that text changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .build import CORE, ROOT, sanitizer_environment

SECONDS = 240
CUTS = ["pytest", "-x", "-q", "tests/core/test_power_cut.py"]
RING = ["pytest", "-x", "-q", "tests/core/test_ring.py", "-k", "producers"]
SWEEP = "tests.core.kill_sweep"
SUITES = {
    "segment": ["pytest", "-x", "-q", "tests/core/test_segment.py"],
    "meta": ["pytest", "-x", "-q", "tests/core/test_meta.py"],
    "ring": ["pytest", "-x", "-q", "tests/core/test_ring.py"],
    "model": ["pytest", "-x", "-q", "tests/core/test_log_model.py"],
    "threads": ["pytest", "-x", "-q", "tests/core/test_log_threads.py"],
    "cuts": CUTS,
    **{f"kill {group}": [SWEEP, group] for group in ("memory", "process", "power", "cut")},
}


@dataclass(frozen=True)
class Mutant:
    name: str
    changes: tuple[tuple[str, str, str], ...]  # file, text, what becomes of it
    caught_by: list[str]  # arguments of ``python -m``
    sanitizer: str = ""  # without it nothing of the bug can be seen on this machine


MUTANTS = (
    Mutant(
        "a new segment's name is not made durable",
        (("_log_files.c", "status = io->sync_directory(io->context, log->directory, &segment->error);",
          "status = io == NULL ? CPS_IO : CPS_OK;"),),
        CUTS,
    ),
    Mutant(
        "a record's checksum is not looked at",
        (("_segment_read.c", "if (cps_record_crc(at, record, segment->epoch) != record->crc) return CPS_DAMAGED;",
          "return CPS_OK;"),),
        ["pytest", "-x", "-q", "tests/core/test_segment.py", "-k", "flipped"],
    ),
    Mutant(
        "`spilled` moves before the batch is written",
        (("_flusher.c", "        CPS_ASSERT(size > 0);\n",
          "        log->settled.spilled = position + size;\n"
          "        cps_shared_commit_settled(log->home.shared, &log->settled);\n"),),
        [SWEEP, "process", "spill-staged"],
    ),
    Mutant(
        "a pin holds nothing",
        (("_ring.c", "if (ring->pin_used[i] && ring->pin_position[i] < lowest)",
          "if (ring->pin_used[i] && ring->pin_position[i] < lowest && lowest == 0)"),),
        ["pytest", "-x", "-q", "tests/core/test_ring.py", "-k", "128"],
    ),
    Mutant(
        # x86 orders stores by itself: only a weaker machine would hand out a cursor before the bytes.  What says that
        # they belong together is gone all the same, and that is what the thread sanitizer sees.
        "nothing orders a record's bytes and the cursor that covers them",
        (("_ring.c", "atomic_store_explicit(&ring->published, ring->produced.published, memory_order_release);",
          "atomic_store_explicit(&ring->published, ring->produced.published, memory_order_relaxed);"),),
        RING,
        sanitizer="thread",
    ),
    Mutant(
        "a dropped segment is not counted",
        (("_log_write.c", "    log->settled.dropped_messages += messages;\n    log->settled.dropped_bytes += bytes;\n"
          "    cps_log_lose(log, first, end, messages, bytes, CPS_REASON_QUOTA);",
          "    cps_log_lose(log, first, end, messages, bytes, CPS_REASON_QUOTA);"),),
        ["pytest", "-x", "-q", "tests/core/test_log_threads.py", "-k", "drop_oldest"],
    ),
    Mutant(
        "a dropped segment is not remembered until its file is gone",
        (("_log_write.c", "log->settled.victims[place] = victim->base + 1;", "log->settled.victims[place] = 0;"),),
        [SWEEP, "process", "drop-committed", "remove-begin"],
    ),
    Mutant(
        "a footer is written before the records are durable",
        (("_segment.c", "enum cps_status status = cps_segment_sync(segment);\n    if (status != CPS_OK) return status;",
          "enum cps_status status = CPS_OK;"),),
        ["pytest", "-x", "-q", "tests/core/test_segment.py", "-k", "footer"],
    ),
    Mutant(
        "the meta file is not synced",
        (("_meta.c", "    status = io->sync(io->context, meta->handle, &meta->error);\n", ""),),
        CUTS,
    ),
    Mutant(
        "a take-over is not announced in the ring",
        (("_home.c", "    atomic_store_explicit(&home->shared->next_generation, generation, memory_order_release);\n"
          '    CPS_CRASH_POINT("announce-done");', '    (void)generation;\n    CPS_CRASH_POINT("announce-done");'),),
        [SWEEP, "process", "opening-saved"],
    ),
    Mutant(
        "cursors and counters are changed in place",
        (("_shared.h", "_Atomic uint64_t *slot = slots + (now & 1) * words;", "_Atomic uint64_t *slot = slots;"),
         ("_shared.h", "_Atomic uint64_t *slot = slots + (before & 1) * words;", "_Atomic uint64_t *slot = slots;")),
        ["pytest", "-x", "-q", "tests/core/test_kill_points.py", "-k", "words"],
    ),
    Mutant(
        "a new ring says that everything is settled",
        (("_log_account.c", "        cps_shared_commit_settled(log->home.shared, s);\n", ""),),
        [SWEEP, "process", "opening-saved-twice"],
    ),
    Mutant(
        "a segment of which nothing was said is kept whole",
        (("_log.c", "if (status == CPS_OK && last->base < from && last->end > last->base) {",
          "if (status == CPS_OK && last->end > last->base) {"),),
        [SWEEP, "process", "spill-appended"],
    ),
)  # fmt: skip
HEALTHY = Mutant("no bug at all", (), ["pytest", "--version"])


def environment(mutant: Mutant, core: Path) -> dict[str, str]:
    wanted = sanitizer_environment(mutant.sanitizer) if mutant.sanitizer else {}
    return {**os.environ, **wanted, "CLOUDPUBSUB_CORE": str(core)}


@contextmanager
def source_of(mutant: Mutant) -> Iterator[Path]:
    """A folder with the mutant's source."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        core = Path(folder)
        for path in CORE.glob("_*.[ch]"):
            shutil.copy(path, core)
        for name, text, replacement in mutant.changes:
            before = (core / name).read_text()
            if before.count(text) != 1:
                raise ValueError(f"{mutant.name}: {name} has {before.count(text)} places like {text!r}")
            (core / name).write_text(before.replace(text, replacement))
        yield core


def python(arguments: list[str], chosen: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=chosen, check=False, capture_output=True, text=True, timeout=SECONDS
    )


def make(mutant: Mutant, core: Path) -> None:
    """Build it; one that does not compile proves nothing."""
    built = python(["-m", "tests.core.build"], environment(mutant, core))
    if built.returncode != 0:
        raise RuntimeError(f"{mutant.name}: {built.stderr}")


def is_caught(mutant: Mutant, core: Path, by: list[str]) -> bool:
    extra = ["-p", "no:cacheprovider"] if by[0] == "pytest" else []
    try:
        done = python(["-m", *by, *extra], environment(mutant, core))
    except subprocess.TimeoutExpired:
        return True  # it hangs, which a test with a time limit of its own would notice too
    if by[0] == "pytest" and done.returncode in (2, 3, 4, 5):
        raise RuntimeError(f"{mutant.name}: pytest did not run:\n{done.stdout}{done.stderr}")
    return done.returncode != 0


def main(arguments: list[str]) -> None:
    for mutant in (HEALTHY, *MUTANTS):
        if arguments and mutant.name != arguments[0]:
            continue
        with source_of(mutant) as core:
            make(mutant, core)
            suites = {"its own test": mutant.caught_by} if arguments else SUITES
            caught = [name for name, by in suites.items() if is_caught(mutant, core, by)]
        print(f"{mutant.name}: {', '.join(caught) or 'SURVIVES'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

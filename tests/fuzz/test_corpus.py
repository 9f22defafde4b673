"""Every input of the fuzz corpus once, without a fuzzer but with sanitizers, built with the compiler of the tests."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.core.build import CORE, ROOT, STRICT, cache, compiler, run

HERE = Path(__file__).resolve().parent
TARGETS = ("recovery", "stream")
HELPERS = [HERE / "replay.c", HERE / "files.c", HERE / "expect.c", ROOT / "tests/core/io_sim.c"]
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
FLAGS = ("-O1", "-g", "-pthread", f"-I{CORE}", f"-I{ROOT / 'tests/core'}", f"-I{HERE}", *STRICT, *SANITIZE)


def sources() -> list[Path]:
    """The C core and what the targets share."""
    # What Cython writes has a .pyx beside it.
    return [*sorted(path for path in CORE.glob("*.c") if not path.with_suffix(".pyx").exists()), *HELPERS]


def fingerprint() -> str:
    digest = hashlib.sha256(repr((compiler(), FLAGS)).encode())
    digest.update(subprocess.run([*compiler(), "--version"], check=True, capture_output=True).stdout)
    headers = [*CORE.glob("*.h"), *(ROOT / "tests/core").glob("*.h"), *HERE.glob("*.h")]
    for path in [*sources(), *sorted(headers), *(HERE / f"fuzz_{target}.c" for target in TARGETS)]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def build() -> Path:
    """A directory with a program for each target, kept as that of tests/core/build.py is."""
    kept = cache() / f"fuzz-{fingerprint()}"
    if kept.exists():
        os.utime(kept)
        return kept
    made = Path(tempfile.mkdtemp(dir=cache()))
    try:
        objects = []
        for source in sources():
            objects.append(str(made / f"{source.stem}.o"))
            run([*compiler(), *FLAGS, "-c", str(source), "-o", objects[-1]])
        for target in TARGETS:
            source = HERE / f"fuzz_{target}.c"
            run([*compiler(), *FLAGS, str(source), *objects, "-o", str(made / target)])
        try:
            made.rename(kept)
        except OSError:
            if not kept.exists():  # else another run was faster with the same result
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return kept


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_breaks_nothing(target: str) -> None:
    corpus = sorted(map(str, (HERE / "corpus" / target).iterdir()))
    assert corpus
    # Leaks are the fuzzer's to find: looking for them needs ptrace, which not every container allows.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        [str(build() / target), *corpus], check=False, env=environment, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, f"the last file named broke it:\n{done.stderr[-6000:]}"

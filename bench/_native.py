"""C programs of the benchmarks, compiled when they are needed.

They are kept in `build/bench` of a source tree, named by what went in; elsewhere in a directory that goes with this
process.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent / "native"
ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("-O2", "-g", "-std=gnu11", "-pthread", "-fvisibility=hidden")
DIRECTORY_VARIABLE = "BENCH_NATIVE_PROGRAMS"
_WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Wmissing-prototypes")


class Missing(RuntimeError):
    """Something that is not installed here; the text says what."""


def compiler() -> list[str]:
    """The C compiler as a command line.  Raises Missing."""
    command = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(command[0]) is None:
        raise Missing("C compiler")
    return command


def core_sources() -> list[Path]:
    """The C core of the library.  Raises Missing outside of a source tree."""
    found = sorted((ROOT / "cloudpubsub").glob("_*.c"))
    sources = [path for path in found if not path.with_suffix(".pyx").exists()]  # those are what Cython writes
    if not sources:
        raise Missing("source tree")
    return sources


@cache
def build(
    name: str, *, core: bool = False, flags: tuple[str, ...] = (), libraries: tuple[str, ...] = ()
) -> Path:
    """The program of `native/NAME.c`, with the C core if wanted.  Raises Missing where something lacks."""
    sources = [HERE / f"{name}.c", *(core_sources() if core else [])]
    headers = [*HERE.glob("*.h"), *((ROOT / "cloudpubsub").glob("_*.h") if core else [])]
    command = [
        *compiler(),
        *FLAGS,
        *_WARNINGS,
        *flags,
        *(["-I", str(ROOT / "cloudpubsub")] if core else []),
        *map(str, sources),
        *(f"-l{library}" for library in libraries),
    ]
    key = hashlib.sha256(repr(command).encode() + _version(compiler()).encode())
    for path in [*sources, *sorted(headers)]:
        key.update(path.read_bytes())
    program = directory() / f"{name}-{key.hexdigest()[:16]}"
    if not program.exists():
        made = program.with_name(f"{program.name}.{os.getpid()}")
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False, timeout=300)
        if done.returncode != 0:
            made.unlink(missing_ok=True)
            if libraries:
                raise Missing(f"lib{libraries[0]} (with its headers)")
            raise RuntimeError(f"{name}.c does not compile:\n{done.stderr[-4000:]}")
        made.replace(program)
    return program


def directory() -> Path:
    """Where programs are kept; a child is told by the environment."""
    told = os.environ.get(DIRECTORY_VARIABLE)
    kept = Path(told) if told else _kept_directory() or _own_directory()
    kept.mkdir(parents=True, exist_ok=True)
    return kept


def _kept_directory() -> Path | None:
    return ROOT / "build" / "bench" if (ROOT / "setup.py").exists() and os.access(ROOT, os.W_OK) else None


@cache
def _own_directory() -> Path:
    own = Path(tempfile.mkdtemp(prefix="cloudpubsub-bench-native-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


@cache
def _version_of(command: Sequence[str]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout


def _version(command: Sequence[str]) -> str:
    return _version_of(tuple(command))


def compiler_version() -> str:
    """What the compiler says of itself, but for the name it was called by."""
    first = (_version(compiler()).splitlines() or ["unknown"])[0]
    return first.split(" ", 1)[-1] if first.startswith(("cc ", "gcc ", "x86_64-", "aarch64-")) else first

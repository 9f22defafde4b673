"""Build the C core as the extension module ``_core_test``, reached through cffi, without the rest of the package.

``SOURCES`` is the one list to extend.  What the tests see of a source is declared in ``NAME.cdef`` beside this file:
``ring.cdef`` for ``_ring.c``, ``io_sim.cdef`` for ``tests/core/io_sim.c``; the C compiler sees ``_ring.h`` and
``io_sim.h`` instead.  A ``.cdef`` without a source (``record.cdef`` for ``_record.h``) is read before all others, so it
may only use the basics.  ``enum cps_status`` is taken from ``_status.h``; no ``.cdef`` declares it.

Our C is compiled with strict warnings as errors; the glue that cffi generates is not ours and is not judged.  The
result is kept in a directory of this user under the temporary directory, named by a hash of everything that went in.

``CLOUDPUBSUB_SANITIZE=address,undefined`` or ``=thread`` builds with sanitizers; their run-time library has to be in
the process before Python starts:

    env $(python tests/core/build.py address,undefined) python -m pytest tests/core

``CC`` chooses the compiler; ``CLOUDPUBSUB_CORE`` another folder with the C files of the core, for mutants.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cffi

MODULE = "_core_test"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CORE = Path(os.environ.get("CLOUDPUBSUB_CORE", ROOT / "cloudpubsub"))

# Every C file of the core and of its tests, each after the files whose types its declarations use.
SOURCES = (
    "cloudpubsub/_io.c",
    "cloudpubsub/_crc32c.c",
    "cloudpubsub/_ring.c",
    "cloudpubsub/_ledger.c",
    "cloudpubsub/_home.c",
    "cloudpubsub/_quarantine.c",
    "cloudpubsub/_meta.c",
    "cloudpubsub/_segment.c",
    "cloudpubsub/_segment_read.c",
    "cloudpubsub/_store.c",
    "cloudpubsub/_log.c",
    "cloudpubsub/_log_account.c",
    "cloudpubsub/_log_ahead.c",
    "cloudpubsub/_log_write.c",
    "cloudpubsub/_log_read.c",
    "cloudpubsub/_flusher.c",
    "cloudpubsub/_log_files.c",
    "cloudpubsub/_window.c",
    "cloudpubsub/_wire.c",
    "cloudpubsub/_wire_out.c",
    "cloudpubsub/_frames.c",
    "tests/core/io_sim.c",
    "tests/core/crash.c",
    "tests/core/exhaust.c",
    "tests/core/stress.c",
)

STRICT = ("-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wmissing-prototypes", "-Werror")
KEEP_SECONDS = 7 * 24 * 3600.0
COMPILERS = 2  # at a time


def compiler() -> list[str]:
    """The C compiler as a command line."""
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def sanitizers() -> str:
    """What ``CLOUDPUBSUB_SANITIZE`` asks for, or an empty string."""
    wanted = os.environ.get("CLOUDPUBSUB_SANITIZE", "")
    allowed = ("", "address", "undefined", "address,undefined", "thread")
    if wanted not in allowed:
        raise ValueError(f"CLOUDPUBSUB_SANITIZE={wanted!r}: allowed are {', '.join(allowed[1:])}")
    return wanted


def sanitizer_environment(wanted: str) -> dict[str, str]:
    """Environment variables for a Python that is to load the core built with the sanitizers ``wanted``."""
    name = {"address": "libasan.so", "thread": "libtsan.so"}.get(wanted.partition(",")[0], "libubsan.so")
    found = subprocess.run([*compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    library = Path(found.stdout.strip())
    if not library.is_absolute():
        raise RuntimeError(f"{compiler()[0]} has no {name}; with gcc it comes in the package of the compiler")
    return {
        "CLOUDPUBSUB_SANITIZE": wanted,
        "LD_PRELOAD": str(library.resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaves memory to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


def stem(path: str) -> str:
    """The name that a source or header shares with its declarations: ``ring`` for ``_ring.c``."""
    return Path(path).stem.removeprefix("_")


def cdef_names() -> list[str]:
    """Names of the ``.cdef`` files in the order in which cffi has to read them."""
    ordered = [stem(source) for source in SOURCES]
    present = {path.stem for path in HERE.glob("*.cdef")}
    return sorted(present.difference(ordered)) + [name for name in ordered if name in present]


def basics() -> str:
    """``enum cps_status`` as cffi wants it; the compiler fills in the values."""
    names = re.findall(r"^\s*(CPS_[A-Z_]+) = -?\d+,", (CORE / "_status.h").read_text(), re.MULTILINE)
    return "enum cps_status { " + ", ".join(names) + ", ... };\n"


def glue() -> str:
    """C source of the extension module."""
    ffi = cffi.FFI()
    ffi.cdef(basics())
    includes = ['#include "_status.h"']
    for name in cdef_names():
        ffi.cdef((HERE / f"{name}.cdef").read_text())
        header = f"_{name}.h" if (CORE / f"_{name}.h").exists() else f"{name}.h"
        includes.append(f'#include "{header}"')
    ffi.set_source(MODULE, "\n".join(includes))
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / f"{MODULE}.c"
        with contextlib.redirect_stdout(io.StringIO()):  # it would announce the file
            ffi.emit_c_code(str(target))
        return target.read_text()


def flags() -> list[str]:
    """Compiler flags for every file."""
    chosen = ["-g", "-fPIC", "-DCPS_CRASH_POINTS", f"-I{CORE}", f"-I{HERE}"]
    if not sanitizers():
        return ["-O2", *chosen]
    return ["-O1", *chosen, f"-fsanitize={sanitizers()}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def located(source: str) -> Path:
    """Where a source of the list is."""
    folder, _, name = source.rpartition("/")
    return (CORE if folder == "cloudpubsub" else ROOT / folder) / name


def conditions() -> Any:
    """A digest of what all files are compiled with: compiler, flags, headers."""
    version = subprocess.run([*compiler(), "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version)
    places = [f"-I{CORE}", f"-I{HERE}"]
    chosen = [flag for flag in flags() if flag not in places]
    digest.update(repr((compiler(), chosen, STRICT, sys.version, cffi.__version__)).encode())
    for path in [*sorted(CORE.glob("*.h")), *sorted(HERE.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest


def fingerprint(glue_text: str) -> str:
    """A name for the result: equal only if nothing that goes into it differs."""
    digest = conditions()
    digest.update(glue_text.encode())
    for source in SOURCES:
        digest.update(source.encode() + b"\0" + located(source).read_bytes() + b"\0")
    return str(digest.hexdigest()[:24])


def cache() -> Path:
    """A directory that only this user can write to; results unused for a week are removed from it."""
    directory = Path(tempfile.gettempdir()) / f"cloudpubsub-core-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    facts = directory.lstat()
    if directory.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise RuntimeError(f"{directory} belongs to somebody else; remove it or set TMPDIR")
    for old in directory.iterdir():
        try:
            if time.time() - old.stat().st_mtime > KEEP_SECONDS:
                if old.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.unlink()
        except FileNotFoundError:
            pass  # another test run removed it first
    return directory


def run(command: list[str]) -> None:
    """Run a compiler; what it says goes into the error."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def compile_kept(command: list[str], text: bytes, name: str) -> Path:
    """The object file that ``command`` makes of ``text``; kept, as most builds differ from the last in one file."""
    digest = conditions()
    digest.update(repr(name).encode() + text)
    kept = cache() / f"{name}-{digest.hexdigest()[:24]}.o"
    if not kept.exists():
        handle, made = tempfile.mkstemp(dir=cache(), suffix=".o")
        os.close(handle)
        run([*command, "-o", made])
        os.replace(made, kept)
    os.utime(kept)
    return kept


def build() -> Path:
    """Path of the built module; builds it if it is not in the cache.  Safe beside other test runs."""
    glue_text = glue()
    name = MODULE + importlib.machinery.EXTENSION_SUFFIXES[0]
    kept = cache() / fingerprint(glue_text)
    if (kept / name).exists():
        os.utime(kept)
        return kept / name
    made = Path(tempfile.mkdtemp(dir=cache()))
    try:
        (made / f"{MODULE}.c").write_text(glue_text)
        python = [f"-I{sysconfig.get_path('include')}", f"-I{sysconfig.get_path('platinclude')}"]
        glued = [*compiler(), "-w", *flags(), *python, "-c", str(made / f"{MODULE}.c")]
        with ThreadPoolExecutor(COMPILERS) as pool:
            jobs = [pool.submit(compile_kept, glued, glue_text.encode(), MODULE)]
            for source in SOURCES:
                command = [*compiler(), *STRICT, *flags(), "-c", str(located(source))]
                jobs.append(pool.submit(compile_kept, command, located(source).read_bytes(), Path(source).stem))
            objects = [job.result() for job in jobs]
        run([*compiler(), "-shared", *flags(), *map(str, objects), "-o", str(made / name), "-pthread"])
        try:
            made.rename(kept)
        except OSError:
            if not (kept / name).exists():  # else another run was faster with the same result
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return kept / name


def load() -> tuple[Any, Any]:
    """Build the module if needed and import it: cffi's ``(ffi, lib)``."""
    if MODULE not in sys.modules:
        path = build()
        spec = importlib.util.spec_from_file_location(MODULE, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[MODULE] = module
    loaded = sys.modules[MODULE]
    return loaded.ffi, loaded.lib


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(" ".join(f"{key}={value}" for key, value in sanitizer_environment(sys.argv[1]).items()))
    else:
        print(build())

"""Builds ``cloudpubsub._spool``, ``_link`` and ``_sender``: thin Cython faces over a C core that knows no Python.

The core is a static library of its own, so that ``CLOUDPUBSUB_STRICT=1`` (what ``make lint`` and CI set) can turn every
warning in it into an error without touching the C that Cython writes.  What users build has no warning flags: a new
compiler must not break an old release.  There is no ``-march``: one build runs on every machine of its architecture.
"""

import os
import platform
import sys

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

CORE = (
    "cloudpubsub/_ring.c",
    "cloudpubsub/_segment.c",
    "cloudpubsub/_segment_read.c",
    "cloudpubsub/_store.c",
    "cloudpubsub/_log.c",
    "cloudpubsub/_log_account.c",
    "cloudpubsub/_log_ahead.c",
    "cloudpubsub/_log_read.c",
    "cloudpubsub/_log_write.c",
    "cloudpubsub/_flusher.c",
    "cloudpubsub/_log_files.c",
    "cloudpubsub/_wire.c",
    "cloudpubsub/_wire_out.c",
    "cloudpubsub/_window.c",
    "cloudpubsub/_frames.c",
    "cloudpubsub/_io.c",
    "cloudpubsub/_crc32c.c",
    "cloudpubsub/_meta.c",
    "cloudpubsub/_home.c",
    "cloudpubsub/_ledger.c",
    "cloudpubsub/_quarantine.c",
)
HEADERS = (
    "cloudpubsub/_bytes.h",
    "cloudpubsub/_crash_point.h",
    "cloudpubsub/_crc32c.h",
    "cloudpubsub/_frames.h",
    "cloudpubsub/_home.h",
    "cloudpubsub/_io.h",
    "cloudpubsub/_ledger.h",
    "cloudpubsub/_log.h",
    "cloudpubsub/_log_inside.h",
    "cloudpubsub/_meta.h",
    "cloudpubsub/_quarantine.h",
    "cloudpubsub/_record.h",
    "cloudpubsub/_ring.h",
    "cloudpubsub/_segment.h",
    "cloudpubsub/_segment_bytes.h",
    "cloudpubsub/_shared.h",
    "cloudpubsub/_status.h",
    "cloudpubsub/_store.h",
    "cloudpubsub/_window.h",
    "cloudpubsub/_wire.h",
)

DECLARATIONS = [
    f"cloudpubsub/{name}.pxd" for name in ("_core", "_application_message", "_spool", "_link", "_delivery", "_sender")
]

# -g0: the debugging information that Python is often built with would be most of what is installed.
FLAGS = ["-O2", "-g0", "-std=c11", "-pthread", "-fvisibility=hidden"]
STRICT_FLAGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wmissing-prototypes", "-Werror"]

# Of ARMv7 on, atomic 64-bit words are instructions and the library is left out; for ARMv6 they are functions of it.
is_arm_32 = sys.maxsize < 1 << 32 and platform.machine().startswith(("arm", "aarch64"))
ATOMICS = ["-Wl,--push-state,--as-needed", "-latomic", "-Wl,--pop-state"] if is_arm_32 else []

core_flags = FLAGS + (STRICT_FLAGS if os.environ.get("CLOUDPUBSUB_STRICT") == "1" else [])

core = (
    "cps_core",
    {
        "sources": list(CORE),
        "include_dirs": ["cloudpubsub"],
        "cflags": core_flags,
        # Any header may matter to any source: an edit of one rebuilds them all, which takes a few seconds.
        "obj_deps": {"": list(HEADERS)},
    },
)

# Each links the part of the library that it uses: _spool the log, _link and _sender the wire; _append and _sender reach
# the log through _spool.
extensions = [
    Extension(
        f"cloudpubsub.{name}",
        [f"cloudpubsub/{name}.pyx"],
        include_dirs=["cloudpubsub"],
        depends=[*CORE, *HEADERS, *DECLARATIONS],
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread", *ATOMICS],
    )
    for name in ("_application_message", "_spool", "_append", "_delivery", "_link", "_sender", "_rounds")
]

setup(
    # One set of benchmarks: `python -m bench.NAME` in a source tree, `cloudpubsub bench NAME` wherever it is installed.
    packages=[*find_packages(include=["cloudpubsub", "cloudpubsub.*"]), "cloudpubsub.bench"],
    package_dir={"cloudpubsub.bench": "bench"},
    libraries=[core],
    ext_modules=cythonize(
        extensions,
        compiler_directives={
            "language_level": 3,
            # Docstrings with signatures, so that help() and inspect show the arguments.
            "embedsignature": True,
            "binding": True,
        },
    ),
)

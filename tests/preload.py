"""Shared objects for LD_PRELOAD, made from the C files beside this one."""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent


@lru_cache
def preloaded(name: str) -> dict[str, str]:
    """Environment of a process into which `name`.c is to be loaded."""
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    made = f"{directory}/{name}.so"
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    flags = ["-shared", "-fPIC", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, *flags, "-o", made, str(HERE / f"{name}.c"), "-ldl"], check=True, timeout=120)
    # A sanitizer's run-time library, where there is one, has to stay the first.
    return {"LD_PRELOAD": " ".join(filter(None, [os.environ.get("LD_PRELOAD"), made]))}

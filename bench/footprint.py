"""How much does it take: on the disk, at import, in memory?

Sizes of what is installed; the time that `import cloudpubsub` takes in a fresh interpreter, alone and with a client
until it is connected; and the memory of a process whose client is idle: connected to a broker that says nothing more
than it has to, with nothing to send.

All find bytecode, which pip leaves when it installs, and no module that something else has imported before them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from . import _harness

ROUNDS = 15
LEFT_OUT = {".c", ".h", ".pyx", ".pxd", ".pyi", ".html", ".pyc"}  # what runs needs none of it

IMPORT = """
import time
from resource import RUSAGE_SELF, getrusage
before, start = getrusage(RUSAGE_SELF), time.perf_counter()
CODE
seconds, after = time.perf_counter() - start, getrusage(RUSAGE_SELF)
print(1000 * seconds, 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
"""

IDLE = """
CODE
fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
for name in ("VmRSS", "RssAnon", "RssFile", "RssShmem"):
    print(fields[name].split()[0])
"""
INTERPRETER = ""
PAHO = "import paho.mqtt.client"
CLIENT = """
import threading
import cloudpubsub
up = threading.Event()
client = cloudpubsub.Client(sys.argv[1], client_id="idle", spool=sys.argv[2], on_connect=lambda url: up.set())
client.start()
assert up.wait(60)
"""
IMPORTS = {
    "paho-mqtt": PAHO,
    "cloudpubsub": "import cloudpubsub",
    "cloudpubsub, until a client is connected": CLIENT,
}


def _serve(listener: socket.socket) -> None:
    """Says yes to every CONNECT, and that a ping arrived."""

    def talk(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(4096):
                connection.sendall(b"\x20\x02\x00\x00" if data[0] == 0x10 else b"\xd0\x00")

    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=talk, args=(connection,), daemon=True).start()


@contextlib.contextmanager
def _broker() -> Iterator[str]:
    """Its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        yield f"mqtt://127.0.0.1:{listener.getsockname()[1]}"


def _run(template: str, code: str, url: str, bytecode: str) -> list[float]:
    """What `code` in `template` prints, in a new interpreter that keeps bytecode in that directory."""
    # Without `site`: an installation for development brings a finder along that imports a part of it beforehand.
    paths = [str(_directory(name).parent) for name in ("cloudpubsub", "paho")]
    code = f"import sys\nsys.path[:0] = {paths}\n" + template.replace("CODE", code)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-IS", "-X", f"pycache_prefix={bytecode}", "-c", code, url, f"{directory}/spool"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return [float(word) for word in done.stdout.split()]


def _directory(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def sizes() -> dict[str, int]:
    """Bytes of the files of both packages that running needs, as they are in a wheel: without what Python caches."""
    found = {}
    for name in ("cloudpubsub", "paho"):
        files = [each for each in _directory(name).rglob("*") if each.is_file() and each.suffix not in LEFT_OUT]
        found[name] = sum(each.stat().st_size for each in files)
        if name == "cloudpubsub":
            found["cloudpubsub, compiled"] = sum(each.stat().st_size for each in files if each.suffix == ".so")
    return found


def imports(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds, of the clock and of the CPU, in turns."""
    samples: dict[str, list[list[float]]] = {name: [] for name in IMPORTS}
    with _broker() as url, tempfile.TemporaryDirectory() as bytecode:
        for number in range(rounds + 1):
            for name, code in IMPORTS.items():
                sample = _run(IMPORT, code, url, bytecode)
                if number > 0:  # the first one compiles
                    samples[name].append(sample)
    return {
        name: {
            "wall_ms": median(wall for wall, _ in seen),
            "wall_ms_min": min(wall for wall, _ in seen),
            "cpu_ms": median(cpu for _, cpu in seen),
            "cpu_ms_min": min(cpu for _, cpu in seen),
        }
        for name, seen in samples.items()
    }


def memory(rounds: int) -> dict[str, dict[str, float]]:
    """KiB of a process: resident in all, and of that anonymous, of files, and in tmpfs (the ring)."""
    found = {}
    with _broker() as url, tempfile.TemporaryDirectory() as bytecode:
        subjects = {"the interpreter": INTERPRETER, "paho-mqtt imported": PAHO, "an idle client": CLIENT}
        for name, code in subjects.items():
            samples = [_run(IDLE, code, url, bytecode) for _ in range(rounds + 1)][1:]  # the first one compiles
            columns = zip(*samples, strict=True)
            found[name] = dict(zip(("rss", "anonymous", "files", "shared"), map(median, columns), strict=True))
    return found


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    return {"bytes": sizes(), "import": imports(rounds), "kib": memory(min(rounds, 5))}


def show(report: dict[str, Any]) -> str:
    lines = ["| installed | KiB |", "| --- | ---: |"]
    lines += [f"| {name} | {size / 1024:,.0f} |" for name, size in report["bytes"].items()]
    lines += ["", "| import of | ms (median) | ms (least) | ms of CPU (least) |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {it['wall_ms']:.0f} | {it['wall_ms_min']:.0f} | {it['cpu_ms_min']:.0f} |"
        for name, it in report["import"].items()
    ]
    lines += [
        "",
        "| resident memory, KiB | all | anonymous | of files | in tmpfs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {it['rss']:,.0f} | {it['anonymous']:,.0f} | {it['files']:,.0f} | {it['shared']:,.0f} |"
        for name, it in report["kib"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.footprint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    arguments = parser.parse_args()
    found = _harness.environment()
    _harness.warn_if_busy(found)
    report = measure(1 if arguments.quick else ROUNDS)
    if arguments.json:
        print(json.dumps({"environment": found, **report}, indent=1))
    else:
        print(f"{_harness.environment_line(found)}\n\n{show(report)}")


if __name__ == "__main__":
    main()

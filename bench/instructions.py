"""How many instructions does a message cost in the C core?

callgrind counts them on each hot path, from where a message is handed over to where the path is done with it.  Unlike
times, counts are the same on a busy machine, so a path that became slower shows in a change of a few percent.
`instructions.json` beside this file holds what was counted when a path was last changed on purpose (`--record`);
`--check` fails when a path takes more than that and the tolerance: 3 % with the compiler that it was recorded with, and
25 % with another one, whose code is another.

Two counts: our own code, and what it calls in the C library (copies, locks), which differs from machine to machine
because the library chooses by the CPU; the second is compared with the wide tolerance where the library is another.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import _native

RECORD = Path(__file__).resolve().with_suffix(".json")
TOLERANCE = 0.03
WIDE_TOLERANCE = 0.25
#: What is counted: name to (path of the program, function to count in, messages).
PATHS: dict[str, tuple[str, str, int]] = {
    "append 64 B": ("ring", "measured_append*", 30_000),
    "frame 64 B from the ring": ("ring", "measured_frame*", 30_000),
    "take the PUBACK": ("ring", "measured_acks*", 30_000),
    "frame 64 B from a segment": ("disk", "measured_frame*", 20_000),
    "spill 1 KiB": ("spill", "cps_flusher_run", 9_000),
    "parse a PUBLISH of 64 B and frame its PUBACK": ("inbound", "measured_inbound*", 30_000),
}
Counts = dict[str, dict[str, float]]


def count(name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Instructions a message on one path: (of our own code and of the libraries; the functions that take most)."""
    path, function, messages = PATHS[name]
    program = _native.build("instructions", core=True)
    with tempfile.TemporaryDirectory(prefix="cloudpubsub-bench-") as directory:
        out = Path(directory) / "callgrind.out"
        spool = Path(directory) / "spool"
        spool.mkdir()
        command = ["valgrind", "--tool=callgrind", f"--toggle-collect={function}", f"--callgrind-out-file={out}"]
        command += ["--compress-strings=no", "--compress-pos=no"]
        command += [str(program), path, str(messages), str(spool)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{name}: exit code {done.returncode}\n{done.stderr[-4000:]}")
        costs = parse(out.read_text())
    own = sum(cost for (file, _), cost in costs.items() if file == str(program))
    if own < messages:
        raise RuntimeError(f"{name}: {own} instructions for {messages} messages: the measured part was not found")
    dearest: dict[str, float] = {}
    for (_, symbol), cost in sorted(costs.items(), key=lambda item: -item[1])[:12]:
        dearest[symbol] = dearest.get(symbol, 0) + round(cost / messages, 1)
    rest = sum(costs.values()) - own
    return {"own": round(own / messages, 2), "library": round(rest / messages, 2)}, dearest


def parse(text: str) -> dict[tuple[str, str], int]:
    """Cost of each function itself, by (object file, name), out of what callgrind has written."""
    costs: dict[tuple[str, str], int] = {}
    file = function = ""
    is_call = False
    for line in text.splitlines():
        if match := re.match(r"(ob|fn|calls)=(.*)", line):
            if match[1] == "ob":
                file = match[2]
            elif match[1] == "fn":
                function = match[2]
            else:
                is_call = True  # the next line is what the called function cost
        elif match := re.fullmatch(r"(?:\+|-|\*)?\d* (\d+)", line):
            if not is_call:
                key = (file, function)
                costs[key] = costs.get(key, 0) + int(match[1])
            is_call = False
    return costs


def environment() -> dict[str, str]:
    """What the counts depend on."""
    said = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    return {
        "compiler": _native.compiler_version(),
        "library": " ".join(platform.libc_ver()),
        "cpu": _cpu_level(),
        "valgrind": said.strip(),
    }


def _cpu_level() -> str:
    """What the C library chooses its copies by, roughly."""
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    flags = set(found[1].split()) if found else set()
    return " ".join(sorted(flags & {"avx2", "avx512vl", "erms", "fsrm", "sve", "crc32"}))


def compare(recorded: dict[str, Any], found: dict[str, str], counts: Counts) -> tuple[list[str], list[str]]:
    """(what became dearer than is allowed, remarks)."""
    same_compiler = recorded["environment"]["compiler"] == found["compiler"]
    same_library = same_compiler and all(
        recorded["environment"][key] == found[key] for key in ("library", "cpu", "valgrind")
    )
    failures, remarks = [], []
    if not same_compiler:
        remarks.append(
            f"recorded with another compiler ({recorded['environment']['compiler']}; this is {found['compiler']}): "
            f"the tolerance is {WIDE_TOLERANCE:.0%} instead of {TOLERANCE:.0%}"
        )
    elif not same_library:
        remarks.append(f"another C library, CPU or valgrind: what is in the library may differ by {WIDE_TOLERANCE:.0%}")
    for name in sorted(set(recorded["paths"]) - set(counts)):
        failures.append(f"{name}: recorded, and not counted any more")
    for name, count_ in counts.items():
        if name not in recorded["paths"]:
            failures.append(f"{name}: not recorded; run `python -m bench.instructions --record`")
            continue
        for part, is_same in (("own", same_compiler), ("library", same_library)):
            before, now = recorded["paths"][name][part], count_[part]
            tolerance = TOLERANCE if is_same else WIDE_TOLERANCE
            text = f"{name}: {now:,.1f} instructions in {'our code' if part == 'own' else 'the C library'}"
            # Half an instruction is what a start costs, spread over all messages.
            if now > before * (1 + tolerance) + 0.5:
                failures.append(f"{text}, {before:,.1f} were recorded")
            elif now < before * (1 - tolerance) - 0.5 and is_same:
                remarks.append(f"{text}, {before:,.1f} were recorded: better; keep it with --record")
    return failures, remarks


def run(only: str | None = None) -> tuple[Counts, dict[str, dict[str, float]]]:
    """Count every path, or those whose name contains `only`; as many at a time as there are CPUs."""
    _native.build("instructions", core=True)
    names = [name for name in PATHS if only is None or only in name]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = dict(zip(names, pool.map(count, names), strict=True))
    return {name: counts for name, (counts, _) in found.items()}, {name: top for name, (_, top) in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a path became dearer")
    parser.add_argument("--record", action="store_true", help="keep these counts as those to compare with")
    parser.add_argument("--functions", action="store_true", help="tell which functions take most of it")
    parser.add_argument("--only", metavar="TEXT", help="paths whose name contains it")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    if shutil.which("valgrind") is None:
        print("valgrind is missing; as root: apt-get install valgrind", file=sys.stderr)
        return 1
    counts, dearest = run(arguments.only)
    found, machine = environment(), platform.machine()
    if arguments.json:
        print(json.dumps({"environment": found, "machine": machine, "paths": counts}, indent=1))
    else:
        width = max(map(len, counts))
        print(f"{'instructions a message':{width}}  our code   library")
        for name, one in counts.items():
            print(f"{name:{width}}  {one['own']:8.1f}  {one['library']:8.1f}")
            for symbol, cost in dearest[name].items() if arguments.functions else ():
                print(f"    {cost:8.1f}  {symbol}")
    kept = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if arguments.record:
        paths = {**kept.get(machine, {}).get("paths", {}), **counts}
        kept[machine] = {"environment": found, "paths": {name: paths[name] for name in PATHS if name in paths}}
        RECORD.write_text(json.dumps(kept, indent=1) + "\n")
        return 0
    if not arguments.check:
        return 0
    if machine not in kept:
        print(f"nothing was recorded on {machine}: not compared")
        return 0
    failures, remarks = compare(kept[machine], found, counts)
    for text in remarks:
        print(text)
    for text in failures:
        print(f"DEARER: {text}")
    print(f"{len(counts) - len({text.split(':')[0] for text in failures})} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

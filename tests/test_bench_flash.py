"""The count of what flash gets to write: it runs, and counts what must be so."""

from __future__ import annotations

import json
import subprocess
import sys

from bench import flash
from tests.making import ROOT
from tests.mounts import need_mounts


def test_it_counts_every_subject_and_nothing_while_the_link_keeps_up() -> None:
    need_mounts()
    done = subprocess.run(
        [sys.executable, "-m", "bench.flash", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    subjects = report["subjects"]
    assert list(subjects) == list(flash.SUBJECTS)
    for name, figures in subjects.items():
        counts = (figures["written_bytes"], figures["writes"], figures["flushes"])
        if name.startswith(("link up, memory", "link up, process")):
            assert counts == (0, 0, 0) and figures["messages"] > 0, name
        elif not name.endswith("/s"):  # in the short time of the others nothing may be due
            assert all(count > 0 for count in counts), name
    # Everything went to the disk once: records with their headers, and little else.
    assert 256 / 200 <= subjects["no link, process, all at once"]["written_bytes"] / 2_000_000 < 1.5
    assert flash.show(report).count("\n") == len(subjects) + 1

"""Counting instructions: what callgrind writes is read right, and what became dearer is noticed."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from bench import instructions

_OUT = """\
version: 1
events: Ir
ob=/some/program
fl=/some/a.c
fn=first
10 100
+2 20
cob=/lib/libc.so.6
cfn=memcpy
calls=5 10
* 500
11 3
fn=second
20 7
ob=/lib/libc.so.6
fl=???
fn=memcpy
0 500
totals: 630
"""
_ENVIRONMENT = {"compiler": "gcc 12", "library": "glibc 2.36", "cpu": "avx2", "valgrind": "valgrind-3.19.0"}


def _compare(own: float, called: float, **environment: str) -> tuple[list[str], list[str]]:
    recorded: dict[str, Any] = {"environment": _ENVIRONMENT, "paths": {"append": {"own": 200.0, "library": 100.0}}}
    return instructions.compare(
        recorded, {**_ENVIRONMENT, **environment}, {"append": {"own": own, "library": called}}
    )


def test_what_a_function_calls_is_not_counted_as_its_own() -> None:
    assert instructions.parse(_OUT) == {
        ("/some/program", "first"): 123,
        ("/some/program", "second"): 7,
        ("/lib/libc.so.6", "memcpy"): 500,
    }


def test_the_same_counts_pass() -> None:
    assert _compare(200.0, 100.0) == ([], [])


def test_more_than_the_tolerance_fails() -> None:
    failures, _ = _compare(207.0, 100.0)
    assert len(failures) == 1 and "207" in failures[0] and "200" in failures[0]
    assert len(_compare(200.0, 104.0)[0]) == 1


def test_less_is_worth_a_remark() -> None:
    failures, remarks = _compare(150.0, 100.0)
    assert not failures
    assert "--record" in remarks[0]


def test_another_compiler_gets_a_wider_tolerance_and_is_named() -> None:
    failures, remarks = _compare(230.0, 120.0, compiler="gcc 13")
    assert not failures
    assert "gcc 13" in remarks[0] and "25%" in remarks[0]
    assert len(_compare(260.0, 120.0, compiler="gcc 13")[0]) == 1


def test_another_library_widens_only_what_is_in_it() -> None:
    assert not _compare(200.0, 120.0, library="glibc 2.41")[0]
    assert len(_compare(207.0, 120.0, library="glibc 2.41")[0]) == 1


def test_a_path_that_is_not_counted_any_more_fails() -> None:
    recorded = {"environment": _ENVIRONMENT, "paths": {"append": {"own": 1.0, "library": 1.0}}}
    assert instructions.compare(recorded, _ENVIRONMENT, {})[0] == ["append: recorded, and not counted any more"]


def test_the_record_names_every_path() -> None:
    for kept in json.loads(instructions.RECORD.read_text()).values():
        assert list(kept["paths"]) == list(instructions.PATHS)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_one_path_is_counted() -> None:
    counts, dearest = instructions.count("take the PUBACK")
    assert 20 < counts["own"] < 2000
    assert "cps_wire_take_acks" in dearest

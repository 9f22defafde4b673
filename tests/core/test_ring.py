"""The ring: every state of small ones against a plain model, then threads on a small one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import EMULATED

from .build import load


def exhaust(ring_bytes: int, base: int, every_length: bool) -> int:
    ffi, lib = load()
    states = ffi.new("uint64_t *")
    wrong = lib.exhaust_ring(ring_bytes, base, every_length, states)
    assert wrong == ffi.NULL, ffi.string(wrong)
    return int(states[0])


@pytest.mark.parametrize(("ring_bytes", "least"), [(128, 2_000), (256, 50_000), (512, 1_000_000)])
def test_every_state_of_a_small_ring_is_as_the_model_says(ring_bytes: int, least: int) -> None:
    assert exhaust(ring_bytes, ring_bytes << 30, True) > least


@pytest.mark.parametrize("ring_bytes", [1024, 2048])
def test_states_of_a_larger_ring_are_as_the_model_says(ring_bytes: int) -> None:
    assert exhaust(ring_bytes, 0, False) > 50_000


def test_states_across_positions_of_32_bits_are_as_the_model_says() -> None:
    assert exhaust(256, (1 << 32) - 128, True) > 50_000


@pytest.mark.parametrize("start", [0, (1 << 32) - 4096, 1 << 62])
def test_producers_and_two_readers_of_a_small_ring_agree(core: tuple[Any, Any], start: int) -> None:
    ffi, lib = core
    report = ffi.new("stress_report *")
    wrong = lib.stress_ring(1024, start, 3, 5000 if EMULATED else 500, report)
    assert wrong == ffi.NULL, ffi.string(wrong)
    assert report.wraps > 100 and report.full > 0
    assert report.messages > 500

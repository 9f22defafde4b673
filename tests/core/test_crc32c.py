"""CRC-32C: the vectors of RFC 3720, and the two ways of computing it against each other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .build import load


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_known_values_come_out(core: tuple[Any, Any], data: bytes, crc: int) -> None:
    lib = core[1]
    assert lib.cps_crc32c(0, data, len(data)) == crc
    assert lib.cps_crc32c_table(0, data, len(data)) == crc


@given(st.binary(max_size=300), st.integers(0, 300), st.integers(0, 8))
def test_pieces_add_up_and_both_ways_agree(data: bytes, cut: int, skew: int) -> None:
    ffi, lib = load()
    buffer = ffi.new("uint8_t[]", bytes(skew) + data)
    at = buffer + skew
    cut = min(cut, len(data))
    whole = lib.cps_crc32c_table(0, at, len(data))
    assert lib.cps_crc32c(0, at, len(data)) == whole
    assert lib.cps_crc32c(lib.cps_crc32c(0, at, cut), at + cut, len(data) - cut) == whole

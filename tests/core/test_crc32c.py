"""CRC-32C: the vectors of RFC 3720, and the two ways of computing it against each other."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .build import compiler, load

AT_HWCAP, AT_HWCAP2 = 16, 26


def expected_name() -> str:
    """What the kernel says of this CPU, asked in another way than the core does."""
    machine, hwcap = platform.machine(), ctypes.CDLL(None).getauxval
    hwcap.restype, hwcap.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    if machine == "x86_64":
        with open("/proc/cpuinfo") as info:
            return "sse4.2" if " sse4_2 " in info.read() else "table"
    if machine.startswith(("aarch64", "arm")):
        if sys.maxsize > 1 << 32:
            return "armv8-crc" if hwcap(AT_HWCAP) & 1 << 7 else "table"
        is_clang = b"clang" in subprocess.run([*compiler(), "--version"], check=True, capture_output=True).stdout
        return "armv8-crc" if hwcap(AT_HWCAP2) & 1 << 4 and not is_clang else "table"
    return "table"


def test_the_instruction_of_this_cpu_is_used(core: tuple[Any, Any]) -> None:
    ffi, lib = core
    assert ffi.string(lib.cps_crc32c_name()).decode() == expected_name()


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

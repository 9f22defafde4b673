"""Fixtures of the tests of the C core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .build import load
from .disk import Disk, Log
from .objects import Stream, Window


@pytest.fixture(scope="session")
def core() -> tuple[Any, Any]:
    """``(ffi, lib)`` of the C core, built when its sources changed."""
    return load()


@pytest.fixture
def open_window() -> Iterator[Callable[..., Window]]:
    """Make windows that are checked and closed after the test."""
    opened: list[Window] = []

    def make(*args: int, **named: int) -> Window:
        opened.append(Window(*args, **named))
        return opened[-1]

    yield make
    for window in opened:
        window.lib.cps_window_check(window.c)
        window.close()


@pytest.fixture
def open_stream() -> Iterator[Callable[..., Stream]]:
    """Make streams that are closed after the test."""
    opened: list[Stream] = []

    def make(*args: int, **named: int) -> Stream:
        opened.append(Stream(*args, **named))
        return opened[-1]

    yield make
    for stream in opened:
        stream.close()


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A simulated disk, empty."""
    made = Disk()
    yield made
    made.close()


@pytest.fixture
def open_log(disk: Disk) -> Iterator[Callable[..., Log]]:
    """Open logs on the simulated disk (or on the one given) that are closed after the test."""
    opened: list[Log] = []

    def make(on: Disk = disk, **chosen: Any) -> Log:
        opened.append(Log(on, **chosen))
        return opened[-1]

    yield make
    for log in opened:
        log.disk.heal()
        log.close()

"""The models hold, and everything in them is needed.

What takes more than a few seconds is marked: only `make model` runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from . import home, page, ring, share, stamp, wake
from .machine import Counterexample, Model, explore
from .orders import ORDERS, PROVED_BY
from .source import read_operations

MODULES = (page, ring, wake, home, stamp, share)
MODELS: dict[str, Callable[..., Model]] = {name: build for module in MODULES for name, build in module.MODELS.items()}
VARIANTS = [(name, variant) for module in MODULES for name, all_ in module.VARIANTS.items() for variant in all_]
LARGE = {"ring.passed_on", "ring.both_readers", "ring.killed", "ring.watched", "wake.room", "stamp.shared"}
#: That many states at least, so that nothing is left out unnoticed.
STATES = {
    "page.watched": 500,
    "page.two_writers": 300,
    "page.killed": 50,
    "ring.passed_on": 10_000,
    "ring.both_readers": 10_000,
    "ring.killed": 5_000,
    "ring.watched": 1_000,
    "wake.next_record": 500,
    "wake.room": 10_000,
    "wake.eventfd": 3_000,
    "wake.eventfd_in_rounds": 3_000,
    "wake.settled": 100,
    "wake.both_settled": 50,
    "home.opens": 200,
    "stamp.shared": 10_000,
    "share.bounded": 1_000,
}


def marked(name: str, *arguments: str) -> object:
    return pytest.param(name, *arguments, marks=[pytest.mark.model] if name in LARGE else [])


@pytest.mark.parametrize("name", [marked(name) for name in MODELS])
def test_the_model_holds_in_every_order(name: str) -> None:
    result = explore(MODELS[name](), ORDERS)
    assert result.states >= STATES[name]
    kinds = {op.tag: op.kind for op in read_operations() if op.tag}
    assert {tag: kinds[tag] for tag, _ in result.tags} == dict(result.tags)


@pytest.mark.parametrize(("name", "variant"), [marked(*pair) for pair in VARIANTS])
def test_each_step_is_needed(name: str, variant: str) -> None:
    with pytest.raises(Counterexample):
        explore(MODELS[name](variant), ORDERS, strict=False)


def test_each_step_that_a_model_can_do_otherwise_is_tried() -> None:
    for module in MODULES:
        known = set(re.findall(r'variant [!=]= "(.+?)"', Path(str(module.__file__)).read_text()))
        assert known == {variant for all_ in module.VARIANTS.values() for variant in all_}, module.__name__


@pytest.mark.parametrize("tag", [tag for tag, order in ORDERS.items() if order != "relaxed"])
def test_each_ordering_is_needed(tag: str) -> None:
    with pytest.raises(Counterexample):
        explore(MODELS[PROVED_BY[tag]](), {**ORDERS, tag: "relaxed"}, strict=False)

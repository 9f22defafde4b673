"""A test that cannot fail proves nothing: each of a list of bugs, put in on purpose, is noticed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .build import sanitizers
from .mutants import HEALTHY, MUTANTS, SWEEP, Mutant, is_caught, make, source_of


def survives(mutant: Mutant) -> bool:
    with source_of(mutant) as core:
        make(mutant, core)
        return not is_caught(mutant, core, mutant.caught_by)


own_sanitizers = pytest.mark.skipif(bool(sanitizers()), reason="mutants choose their sanitizers themselves")


@own_sanitizers
@pytest.mark.timeout(600)
def test_without_a_bug_what_catches_them_is_quiet() -> None:
    """What is a test of the suite says so there; the others have only this."""
    sweeps = [mutant.caught_by for mutant in MUTANTS if mutant.caught_by[0] == SWEEP]
    with source_of(HEALTHY) as core:
        make(HEALTHY, core)
        assert [by for by in sweeps if is_caught(HEALTHY, core, by)] == []


@own_sanitizers
@pytest.mark.timeout(600)
def test_every_mutant_is_caught() -> None:
    with ThreadPoolExecutor(2) as pool:
        survived = list(pool.map(survives, MUTANTS))
    assert [mutant.name for mutant, alive in zip(MUTANTS, survived, strict=True) if alive] == []

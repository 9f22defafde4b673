"""The C files are what the models say that they are."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from . import home, page, ring, share, stamp, wake
from .orders import ORDERS, PROVED_BY
from .source import CORE, STEPS, Steps, function_text, read_operations, sources

MODULES = (page, ring, wake, home, stamp, share)


def test_every_atomic_operation_is_in_a_model_or_says_why_not() -> None:
    operations = read_operations()  # raises where one says neither
    assert len(operations) >= 30
    assert all(op.tag or len(op.reason) > 8 for op in operations)


def check_tags(core: Path = CORE) -> None:
    tagged = [op for op in read_operations(core) if op.tag]
    assert Counter(op.tag for op in tagged) == Counter(list(ORDERS))
    assert {op.tag: op.orders for op in tagged} == {tag: frozenset({order}) for tag, order in ORDERS.items()}
    assert all(op.kind in ("load", "store", "rmw") for op in tagged)


def test_every_tag_stands_at_one_operation_and_has_the_order_of_the_models() -> None:
    check_tags()


def changed(folder: Path, file: str, text: str, becomes: str) -> Path:
    """A copy of the C files in which `text` was changed, once."""
    for path in sources():
        shutil.copy(path, folder)
    old = (folder / file).read_text()
    assert old.count(text) == 1
    (folder / file).write_text(old.replace(text, becomes))
    return folder


@pytest.mark.parametrize(
    ("file", "text", "becomes"),
    [
        ("_ring.c", "lowest, memory_order_release", "lowest, memory_order_relaxed"),
        ("_shared.h", "(sequence, memory_order_acquire)", "(sequence, memory_order_relaxed)"),
        ("_shared.h", "(sequence, memory_order_acquire)", "(sequence)"),
        ("_ring.c", "model: ring.published.store;", "model: ring.published.load;"),
        ("_ring.c", "model: ring.reclaim.view;", "model: ring.reclaim.seen;"),
    ],
)
def test_another_order_or_tag_is_noticed(file: str, text: str, becomes: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_tags(changed(tmp_path, file, text, becomes))


@pytest.mark.parametrize(
    ("file", "text", "becomes"),
    [
        ("_ring.c", "/* model: ring.published.load; pairs", "/* pairs"),
        ("_ring.c", "ring->limit = low;", "ring->limit = atomic_load(&ring->reclaim);"),
        ("_quarantine.h", "/* no model: a number for the quota, and nothing behind it */", ""),
    ],
)
def test_an_operation_without_a_word_is_noticed(file: str, text: str, becomes: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs one"):
        read_operations(changed(tmp_path, file, text, becomes))


def test_every_tag_is_used_by_a_model_and_every_ordering_is_proved_by_one() -> None:
    text = "".join(Path(str(module.__file__)).read_text() for module in MODULES)
    assert {tag for tag in ORDERS if f'"{tag}"' not in text} == set()
    assert set(PROVED_BY) == {tag for tag, order in ORDERS.items() if order != "relaxed"}
    assert set(ORDERS.values()) <= {"relaxed", "acquire", "release"}


def check_steps(steps: Steps, core: Path = CORE) -> None:
    text, at = function_text(steps.file, steps.function, core), 0
    for piece in steps.texts:
        found = text.find(piece, at)
        assert found >= 0, f"{steps.file}, {steps.function}: no `{piece}` where it is expected; look at the model again"
        at = found + len(piece)


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: f"{steps.file} {steps.function}")
def test_the_function_does_what_the_model_does(steps: Steps) -> None:
    check_steps(steps)


def test_a_function_that_does_it_in_another_order_is_noticed(tmp_path: Path) -> None:
    copy = "        copy_record(ring, message, start, (uint32_t)length);\n"
    text = (CORE / "_ring.c").read_text()
    assert copy in text
    behind = '        CPS_CRASH_POINT("push-published");\n'
    core = changed(tmp_path, "_ring.c", behind, behind + copy)
    (core / "_ring.c").write_text((core / "_ring.c").read_text().replace(copy, "", 1))
    push = next(steps for steps in STEPS if "copy_record(ring, message, start" in steps.texts)
    with pytest.raises(AssertionError, match="look at the model again"):
        check_steps(push, core)


def test_nothing_else_orders_memory() -> None:
    """No volatile, nothing of Cython's, and no fence that a model would have to know."""
    other = re.compile(r"\bvolatile\b|signal_fence|cpython\.atomic|libcpp\.atomic")
    for path in sources():
        comment = r"#[^\n]*" if path.suffix in (".pyx", ".pxd") else r"/\*.*?\*/"
        assert not other.search(re.sub(comment, "", path.read_text(), flags=re.S)), path.name


def implicit_accesses(path: Path, folder: Path) -> int:
    """How many accesses of `_Atomic` variables do not say their order: they are sequentially consistent."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    flags = ["-std=c11", "-O0", "-pthread", f"-I{CORE}", str(path)]
    if "clang" in version:
        flags += ["-Watomic-implicit-seq-cst", "-fsyntax-only"]
    else:
        flags += ["-S", "-fdump-tree-gimple=/dev/stdout", "-o", str(folder / "out.s")]
    said = subprocess.run([compiler, *flags], capture_output=True, text=True, check=True)
    if "clang" in version:
        return said.stderr.count("[-Watomic-implicit-seq-cst]")
    return len(re.findall(r"__atomic_\w+ \([^;]*, 5\);", said.stdout))


def test_no_atomic_is_used_without_saying_its_order(tmp_path: Path) -> None:
    """What is read or assigned like any other variable is sequentially consistent, and no search would find it."""
    bad = tmp_path / "bad.c"
    bad.write_text(
        "_Atomic int a;\nint get(void) { return a; }\nvoid put(int b) { a = b; }\nvoid more(void) { a++; }\n"
    )
    assert implicit_accesses(bad, tmp_path) >= 3
    for path in sources():
        if path.suffix == ".c":
            assert implicit_accesses(path, tmp_path) == 0, path.name

"""What ties the models to the C files: the functions that a program stands for, and the tags of atomic operations.

Each atomic operation of the C core has a comment, behind it or right before it, that says `model: TAG` (see `orders`)
or `no model: REASON`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

__all__ = ["CORE", "STEPS", "Operation", "Steps", "follows", "function_text", "read_operations", "sources"]

CORE = Path(__file__).resolve().parent.parent.parent / "cloudpubsub"
Function = TypeVar("Function", bound=Callable[..., object])

_OPERATION = re.compile(r"\b(?:atomic_\w+|__atomic_\w+|__sync_\w+)\b(?=\s*\()")
_TAG = re.compile(r"(?<!no )\bmodel: ([a-z]+(?:\.[a-z]+)+)")
_REASON = re.compile(r"\bno model: (\w.+)")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


class Steps(NamedTuple):
    file: str
    function: str
    texts: tuple[str, ...]


class Operation(NamedTuple):
    where: str
    kind: str  # load, store or rmw
    orders: frozenset[str]
    tag: str
    reason: str  # why no model has it


#: Of all models that were imported.
STEPS: list[Steps] = []


def follows(file: str, function: str, *texts: str) -> Callable[[Function], Function]:
    """The program does what `function` in `file` does: these pieces of its text, in this order.

    A text may stand for several steps of the program; what it leaves out is done by one thread for itself alone.
    """

    def note(program: Function) -> Function:
        STEPS.append(Steps(file, function, texts))
        return program

    return note


def sources(core: Path = CORE) -> list[Path]:
    """Without the C that Cython writes, which has nothing to do with ours."""
    written = {path.with_suffix(".c") for path in core.glob("*.pyx")}
    return sorted(
        path for ending in ("c", "h", "pyx", "pxd") for path in core.glob(f"*.{ending}") if path not in written
    )


def _without_comments(text: str) -> str:
    """The same length, so that places stay what they are."""
    return _COMMENT.sub(lambda comment: re.sub(r"[^\n]", " ", comment[0]), text)


def _around(text: str, code: str, at: int) -> str:
    """The comments of the statement at `at`: inside and behind it, or right before it."""
    begin = text.rfind("\n", 0, at) + 1
    end = text.find("\n", _statement_end(code, at))
    while begin > 0:  # lines that are all comment
        before = text.rfind("\n", 0, begin - 1) + 1
        if code[before:begin].strip() or not text[before:begin].strip():
            break
        begin = before
    return " ".join(re.sub(r"\s*\n\s*\*?\s*", " ", comment) for comment in _COMMENT.findall(text[begin:end]))


def _statement_end(code: str, at: int) -> int:
    """Where the parentheses of the call at `at` close."""
    depth, i = 0, code.index("(", at)
    while True:
        depth += {"(": 1, ")": -1}.get(code[i], 0)
        if depth == 0:
            return i
        i += 1


def _kind(name: str) -> str:
    for word, kind in (("exchange", "rmw"), ("fetch", "rmw"), ("load", "load"), ("store", "store")):
        if word in name:
            return kind
    return "other"


def read_operations(core: Path = CORE) -> list[Operation]:
    """Every atomic operation of the C core, in the order of files and lines."""
    found = []
    for path in sources(core):
        text = path.read_text()
        code = _without_comments(text)
        for match in _OPERATION.finditer(code):
            where = f"{path.name}:{code.count(chr(10), 0, match.start()) + 1}"
            said = _around(text, code, match.start())
            tags, reasons = set(_TAG.findall(said)), _REASON.findall(said)
            if len(tags) + len(reasons) != 1:
                raise ValueError(f"{where}: needs one `model: TAG` or `no model: REASON`, has {tags} {reasons}")
            call = code[match.start() : _statement_end(code, match.start())]
            orders = frozenset(re.findall(r"memory_order_(\w+)", call))
            found.append(Operation(where, _kind(match[0]), orders, "".join(tags), "".join(reasons)))
    return found


def function_text(file: str, function: str, core: Path = CORE) -> str:
    """Its code without comments, each run of white space as one blank."""
    text = (core / file).read_text()
    if file.endswith((".c", ".h")):
        begins = re.search(rf"^(?!\s)[^;{{}}#]*\b{function}\([^;{{}}]*\{{.*?^\}}", _without_comments(text), re.M | re.S)
    else:
        begins = re.search(rf"^( *)c?def .*\b{function}\(.*?(?=^\1\S|\Z)", text, re.M | re.S)
    if begins is None:
        raise ValueError(f"{file}: there is no function {function}")
    return re.sub(r"\s+", " ", begins[0])

"""What is released as source builds with a compiler alone: everything that the build reads is in the sdist."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MADE_BY_THE_BUILD = {f"cloudpubsub/{each.stem}.c" for each in (ROOT / "cloudpubsub").glob("*.pyx")}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Paths of the files in an sdist made of these sources."""
    directory = tmp_path_factory.mktemp("sdist")
    # In a copy without what building left here: metadata of an earlier build may name files that no rule names.
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=False, capture_output=True, timeout=60,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a clone of the repository")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            copy = directory / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(directory)]
    done = subprocess.run(command, cwd=directory / "source", check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}


def test_every_source_of_the_package_is_in_it(packed: set[str]) -> None:
    suffixes = {".c", ".h", ".py", ".pyi", ".pyx", ".pxd", ".typed"}
    package = ROOT / "cloudpubsub"
    needed = {str(each.relative_to(ROOT)) for each in package.rglob("*") if each.suffix in suffixes}
    needed = {each for each in needed if each not in MADE_BY_THE_BUILD} | {"cloudpubsub/py.typed"}
    assert needed - packed == set()
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= packed


def test_what_cython_writes_is_not_in_it(packed: set[str]) -> None:
    assert packed & MADE_BY_THE_BUILD == set()
    assert not [name for name in packed if name.endswith((".so", ".o", ".a", ".pyc"))]


def test_the_tests_are_in_it_with_all_that_they_read(packed: set[str]) -> None:
    listed = subprocess.run(["git", "ls-files", "-z", "tests"], cwd=ROOT, check=True, capture_output=True, timeout=60)
    tests = {name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()}
    assert tests - packed == set()

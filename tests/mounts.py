"""File systems of a test's own, and what happens to them: full, read-only, broken.

Only root can mount.  Elsewhere the tests that need it are skipped; a CI that runs as root may not skip them.  Whatever
was mounted is unmounted and its loop device freed when the `with` block ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.making import eventually

SYSTEM_PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"  # not on every user's PATH
META_BYTES = 15 << 19  # of an image, more than ext4 takes for itself
TOOLS = ("losetup", "mkfs.ext4", "mount", "umount")

# Takes what is free, and whatever gets free later, until it is killed or its parent is gone.
_FILL = """
import errno, os, sys, time
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
parent, told = os.getppid(), False
while os.getppid() == parent:
    size = 1 << 20
    while size >= 1:
        try:
            os.write(fd, bytes(size))
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            size //= 4
    if not told:
        print("full", flush=True)
        told = True
    time.sleep(0.005)
"""


def run(tool: str, *args: object) -> None:
    command, environment = [tool, *map(str, args)], {**os.environ, "PATH": SYSTEM_PATH}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=environment)
    if done.returncode != 0:
        raise OSError(f"{tool}: {done.stderr.strip() or done.returncode}")


def cannot(why: str) -> None:
    """Skip, but in a CI that could."""
    may_skip = os.environ.get("CI", "").lower() in ("", "0", "false") or os.geteuid() != 0
    if may_skip or shutil.which("losetup", path=SYSTEM_PATH) is None:
        pytest.skip(f"no file system of our own: {why}")
    pytest.fail(f"no file system of our own, and in CI as root this may not be skipped: {why}")


def need_mounts() -> None:
    """Skip the test where nothing can be mounted."""
    if os.geteuid() != 0:
        cannot("this is not root")
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SYSTEM_PATH) is None]
    if missing:
        cannot(f"{', '.join(missing)} not found")


class Mount:
    """A mounted file system that nobody else uses."""

    def __init__(self, path: Path, image: Path | None = None) -> None:
        self.path, self.image = path, image
        device = os.stat(path).st_dev
        self.sys = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")  # of a loop device

    def is_attached(self) -> bool:
        return (self.sys / "loop" / "backing_file").exists()

    def write_by_pages(self) -> None:
        """One request a page: a loop device calls a request written when only a part of it was."""
        (self.sys / "queue" / "max_sectors_kb").write_text(str(os.sysconf("SC_PAGESIZE") // 1024))

    def break_file_system(self) -> None:
        """ext4 finds an error in itself, and goes read-only until it is mounted anew."""
        name = self.sys.resolve().name
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("the test's doing")

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Read-only for everybody, as long as nobody has a file open for writing."""
        run("mount", "-o", "remount,ro", self.path)
        try:
            yield
        finally:
            run("mount", "-o", "remount,rw", self.path)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Another process has taken everything, and takes at once what gets free."""
        file = self.path / "filler"
        with subprocess.Popen([sys.executable, "-c", _FILL, file], stdout=subprocess.PIPE, text=True) as filler:
            try:
                assert filler.stdout is not None
                assert filler.stdout.readline() == "full\n"
                yield
            finally:
                filler.kill()
                filler.wait()
                file.unlink()

    def free_bytes(self) -> int:
        facts = os.statvfs(self.path)
        return facts.f_bfree * facts.f_frsize


def _unmount(path: Path) -> None:
    try:
        run("umount", path)
    except OSError:
        run("umount", "-l", path)  # somebody still holds a file; it goes when he does
        raise


@contextmanager
def mounted(path: Path, *args: object, image: Path | None = None) -> Iterator[Mount]:
    """`mount *args path`; skips where that is not possible."""
    path.mkdir(exist_ok=True)
    try:
        run("mount", *args, path)
    except OSError as error:
        cannot(str(error))
    made = Mount(path, image)
    try:
        yield made
    finally:
        _unmount(path)
        if image is not None:
            eventually(lambda: not made.is_attached(), "the loop device is free again")


@contextmanager
def tmpfs(path: Path, size_bytes: int) -> Iterator[Mount]:
    need_mounts()
    with mounted(path, "-t", "tmpfs", "-o", f"size={size_bytes},mode=700", "tmpfs") as made:
        yield made


def make_image(image: Path, size_bytes: int) -> None:
    """ext4 in a file that is sparse where data will be; nothing is left for the kernel to do later."""
    need_mounts()
    with image.open("wb") as file:
        file.truncate(size_bytes)
    # Bitmaps, inodes and journal come first, and get their blocks now: what fails later is the writing of data.
    layout = "packed_meta_blocks=1,lazy_itable_init=0,lazy_journal_init=0"
    run("mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-J", "size=4", "-E", layout, image)
    with image.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, META_BYTES)


@contextmanager
def ext4_image(path: Path, image: Path, options: str = "noatime") -> Iterator[Mount]:
    """What `make_image` made, mounted; the loop device goes with the mount.  The image stays."""
    with mounted(path, "-t", "ext4", "-o", f"loop,{options}", image, image=image) as made:
        yield made


@contextmanager
def ext4(path: Path, size_bytes: int, options: str = "noatime") -> Iterator[Mount]:
    image = path.with_suffix(".image")
    make_image(image, size_bytes)
    try:
        with ext4_image(path, image, options) as made:
            yield made
    finally:
        image.unlink()


@contextmanager
def covered_read_only(path: Path) -> Iterator[None]:
    """Whoever opens something below `path` finds it read-only; what is open for writing stays so."""
    need_mounts()
    run("mount", "--bind", path, path)
    try:
        run("mount", "-o", "remount,bind,ro", path)
        yield
    finally:
        run("umount", path)

"""The meta file: two slots, of which a torn or lost one falls back to the last synced state."""

from __future__ import annotations

import errno

import pytest

from .disk import Disk

PATH = "/spool/meta"
SLOT = 4096


class Meta:
    def __init__(self, disk: Disk) -> None:
        self.ffi, self.lib, self.disk = disk.ffi, disk.lib, disk
        self.c = self.ffi.new("cps_meta *")
        damaged, self.error = self.ffi.new("bool *"), self.ffi.new("int *")
        assert self.lib.cps_meta_open(disk.io, PATH.encode(), self.c, damaged, self.error) == self.lib.CPS_OK
        self.damaged = bool(damaged[0])

    def save(self, epoch: int, synced: bool) -> int:
        self.c.epoch = epoch
        return int(self.lib.cps_meta_save(self.c, synced))

    def close(self) -> None:
        self.lib.cps_meta_close(self.c)


def reopen(disk: Disk, meta: Meta, seed: int | None = None) -> Meta:
    if seed is not None:
        disk.lib.sim_cut(disk.c, 0)
    meta.close()
    if seed is not None:
        disk.lib.sim_restart(disk.c, True, seed)
    return Meta(disk)


def make(disk: Disk) -> Meta:
    """A meta file with a durable epoch 1 whose name is durable too."""
    meta = Meta(disk)
    assert not meta.damaged and meta.c.epoch == 0
    assert meta.save(1, True) == disk.lib.CPS_OK
    error = disk.ffi.new("int *")
    assert disk.io.sync_directory(disk.io.context, b"/spool", error) == disk.lib.CPS_OK
    return meta


def test_everything_that_was_saved_comes_back(disk: Disk) -> None:
    meta = make(disk)
    meta.c.identity_bytes = 3
    meta.c.identity[0:3] = b"abc"
    meta.c.next_position, meta.c.generation, meta.c.clean = 1 << 40, 7, True
    meta.c.produced.messages, meta.c.settled.dead_bytes = 123, 456
    spool_id = bytes(meta.c.spool_id)
    assert meta.save(2, True) == disk.lib.CPS_OK
    meta = reopen(disk, meta)
    assert bytes(meta.c.spool_id) == spool_id and bytes(meta.c.identity[0:3]) == b"abc"
    assert (meta.c.epoch, meta.c.next_position, meta.c.generation, meta.c.clean) == (2, 1 << 40, 7, True)
    assert (meta.c.produced.messages, meta.c.settled.dead_bytes) == (123, 456)
    meta.close()


@pytest.mark.parametrize("seed", range(40))
def test_a_power_cut_falls_back_to_the_last_synced_state_at_worst(disk: Disk, seed: int) -> None:
    meta = make(disk)
    for epoch in range(2, 2 + seed % 4):
        assert meta.save(epoch, False) == disk.lib.CPS_OK
    last = meta.c.epoch
    meta = reopen(disk, meta, seed)
    assert not meta.damaged
    assert meta.c.epoch in (1, last)
    meta.close()


@pytest.mark.parametrize("seed", range(40))
def test_a_state_found_after_a_kill_is_made_durable_before_the_older_one_goes(disk: Disk, seed: int) -> None:
    meta = make(disk)
    assert meta.save(2, False) == disk.lib.CPS_OK  # in the cache only
    meta = reopen(disk, meta)
    disk.lib.sim_cut(disk.c, 1 + seed % 3)  # in the sync of what was found, in the write, in its sync
    assert meta.save(3, True) == disk.lib.CPS_IO
    meta = reopen(disk, meta, seed)
    assert not meta.damaged and meta.c.epoch in ((1, 2), (2, 3), (2, 3))[seed % 3]
    meta.close()


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("at", [0, 8, 12, 100, 4091, 4095])
def test_a_torn_slot_leaves_the_other(disk: Disk, slot: int, at: int) -> None:
    meta = make(disk)
    assert meta.save(2, True) == disk.lib.CPS_OK
    disk.view(PATH)[slot * SLOT + at] ^= 0x40
    meta = reopen(disk, meta)
    newest = 1 if disk.content(PATH)[SLOT + 12] == 2 else 0
    assert not meta.damaged and meta.c.epoch == (1 if slot == newest else 2)
    meta.close()


def test_two_torn_slots_are_told(disk: Disk) -> None:
    meta = make(disk)
    assert meta.save(2, True) == disk.lib.CPS_OK
    disk.view(PATH)[20] ^= 1
    disk.view(PATH)[SLOT + 20] ^= 1
    meta = reopen(disk, meta)
    assert meta.damaged and meta.c.epoch == 0
    meta.close()


@pytest.mark.parametrize("kind", ["WRITE", "SYNC"])
def test_a_failed_save_can_be_repeated_and_costs_nothing(disk: Disk, kind: str) -> None:
    meta = make(disk)
    disk.fail(kind, errno.EIO)
    assert meta.save(2, True) == disk.lib.CPS_IO
    assert meta.c.error == errno.EIO
    assert meta.save(3, True) == disk.lib.CPS_OK
    meta = reopen(disk, meta, 5)
    assert meta.c.epoch == 3
    meta.close()

"""A secondary that has lost what it had received, and what it knows of that (hast/secondary.py, _lacks)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hast import boot, secondary
from hast.decision import Outcome, decide
from hast.errors import DiskError
from hast.metadata import Metadata, Pair
from hast.promotion import forced
from tests.unit.handshakes import CAPTURED, UID


def lacks(rundir: Path, metadata: Metadata, write: Callable[[Metadata], None]) -> secondary.Secondary:
    """A secondary with this metadata that finds that it lacks something; write: what its disk does with metadata."""

    async def body() -> secondary.Secondary:
        resource = SimpleNamespace(name=metadata.resource)
        node = secondary.Secondary(resource, rundir, lambda *_, **__: None)  # type: ignore[arg-type]
        node.component = SimpleNamespace(write_metadata=write)  # type: ignore[assignment]
        node.metadata, node._hast = metadata, True
        node._lacks()
        return node

    return asyncio.run(body())


@pytest.mark.parametrize("remotecnt", [0, 1])
def test_a_target_that_its_primary_takes_for_complete_is_found_when_it_is_forced(
    tmp_path: Path, remotecnt: int
) -> None:
    """The primary has stored that both are in sync, and its secondary has not heard of it when it loses something."""
    stored: list[Metadata] = []
    target = replace(CAPTURED, pair=Pair(2, remotecnt), syncing=True)
    node = lacks(tmp_path, target, stored.append)
    assert stored == [node.metadata] and node.metadata.syncing
    went = forced(node.metadata, UID)
    found = decide(UID, Pair(remotecnt, 2), went.resuid, went.pair, False).outcome
    assert found is (Outcome.SPLIT_BRAIN if remotecnt else Outcome.RESUID_MISMATCH)


def test_who_cannot_store_it_says_so_all_the_same(tmp_path: Path) -> None:
    """The disk has just failed; it may be well by the time that somebody asks this node to become primary."""
    stored: list[Metadata] = []

    def write(metadata: Metadata) -> None:
        if not stored:
            stored.append(metadata)
            raise DiskError("no")
        stored.append(metadata)

    node = lacks(tmp_path, replace(CAPTURED, pair=Pair(1, 2)), write)
    assert node.metadata is not None and node.metadata.syncing
    assert boot.lost(tmp_path, CAPTURED.resource)
    node._store(node.metadata)
    assert len(stored) == 2 and stored[1] == node.metadata, "the next one tries again, though it is the same"


def test_who_may_have_stored_that_it_is_complete_stores_that_it_is_not(tmp_path: Path) -> None:
    """The block that says so is on the disk, its flush has failed, and that is what it lacks something by."""
    stored: list[Metadata] = []
    target = replace(CAPTURED, pair=Pair(1, 2), syncing=True, unsaid=True)

    def write(metadata: Metadata) -> None:
        stored.append(metadata)
        if not metadata.syncing:
            raise DiskError("no")

    node = lacks(tmp_path, target, write)
    assert stored == [], "it is on the disk already"
    with pytest.raises(DiskError):
        node._store(replace(target, syncing=False))

    async def again() -> None:
        node._lacks()

    asyncio.run(again())
    assert stored[-1] == target and node.stored

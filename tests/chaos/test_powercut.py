"""Power cuts in short: two nodes are recorded, with and without metaflush, and hundreds of the states that their disks
could have been left in are looked at, a few of them by real nodes. By hand: python -m tests.chaos.powercut.

That the judge sees what is wrong is shown with recordings in which something was done too late, or never.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hast.metadata import unpack
from tests import faultdisk
from tests.chaos.powercut.history import FLUSH, NEVER, SECTOR, WRITE, Entry, History
from tests.chaos.powercut.judge import Judge, replay
from tests.chaos.powercut.live import SYNCRATE, Live
from tests.chaos.powercut.promise import is_metadata, turns
from tests.chaos.powercut.revive import Reviver
from tests.chaos.powercut.workload import Recorder

MIB = 1 << 20
AMOUNT = 30  # answered requests in each part of a recording
SEED = 7
TRIES = 20


def recorded(where: Path, mode: str, metaflush: bool, revive: int) -> History:
    """A recording; so many of its states have been given to real nodes."""
    recorder = Recorder(where, mode, metaflush, 16384, 2 * MIB, 4, SEED)
    try:
        history = recorder.run(AMOUNT)
        Reviver(recorder).some(Judge(history), revive, random.Random(SEED), words := [])
        assert len(words) == revive
    finally:
        complaints = recorder.close()
    assert not complaints, complaints
    return history


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    faultdisk.need()
    return recorded(tmp_path_factory.mktemp("powercut"), "fullsync", True, revive=3)


@pytest.mark.slow
def test_states_after_a_power_cut_keep_every_promise(history: History) -> None:
    verdict = replay(history, 100, 5, SEED)
    assert not verdict.violations, "\n".join(v.text for v in verdict.violations[:10])
    assert verdict.states > 250
    assert {"IN_SYNC", "PRIMARY_NEWER", "SECONDARY_NEWER", "alone: SPLIT_BRAIN"} <= set(verdict.outcomes)


@pytest.mark.slow
def test_without_metaflush_flushed_data_is_kept(tmp_path: Path) -> None:
    """memsync, and a map that nothing but the flushes of clients makes durable."""
    faultdisk.need()
    verdict = replay(recorded(tmp_path, "memsync", False, revive=2), 60, 5, SEED)
    assert not verdict.violations, "\n".join(v.text for v in verdict.violations[:10])
    assert verdict.states > 150


def without(history: History, left_out: Callable[[str, Entry], bool]) -> History:
    """The same, but some entries of the disks' recordings are left out."""
    disks = {name: [e for e in entries if not left_out(name, e)] for name, entries in history.disks.items()}
    return replace(history, disks=disks)


def not_flushed(history: History, after: Callable[[str, Entry], bool]) -> History:
    """The same, but the next flush after certain entries is left out."""
    left_out: set[int] = set()
    for name, entries in history.disks.items():
        pending = False
        for entry in entries:
            pending = pending or after(name, entry)
            if entry.kind == FLUSH and pending:
                left_out.add(id(entry))
                pending = False
    return without(history, lambda _, entry: id(entry) in left_out)


def found(what: str, history: History, original: History | None = None) -> bool:
    """Whether a complaint matches. Which moments are looked at is a matter of chance, and what happened in the
    recording is one of time: so other moments are looked at, up to TRIES times. Who had what is told by the original,
    if there is one."""
    changes = turns(original) if original is not None else None
    for seed in range(SEED, SEED + TRIES):
        violations = replay(history, 100, 4, seed, enough=10000, changes=changes).violations
        if any(re.search(what, violation.text) for violation in violations):
            return True
    return False


def test_sees_maps_that_are_not_flushed(history: History) -> None:
    """Invariant 1."""
    wrong = not_flushed(history, lambda _, entry: entry.kind == WRITE and entry.offset == 4096)
    assert found("differ that no map has", wrong)


def test_sees_flushes_that_do_not_reach_the_secondary(history: History) -> None:
    """Invariant 5."""
    data = history.shape.offset * SECTOR
    wrong = not_flushed(history, lambda name, entry: name == "hastb" and entry.kind == WRITE and entry.offset >= data)
    assert found("hastb alone.* lacks what was promised", wrong)


def test_sees_acknowledgements_that_come_too_early(history: History) -> None:
    early = [replace(r, ack=r.begin + 1) if r.ack != NEVER else r for r in history.requests]
    assert found("lacks what was promised", replace(history, requests=early))


def test_sees_counters_that_are_not_stored(history: History) -> None:
    """Invariant 7: without `alone` on its disk, the node that wrote alone is taken for one that is in sync."""

    def alone(name: str, entry: Entry) -> bool:
        return name == "hasta" and is_metadata(entry) and unpack(entry.data, history.resource).alone

    assert found("what was promised is lost with hastb as the source", without(history, alone), history)


def test_sees_targets_that_do_not_know_it(history: History) -> None:
    """Invariant 10."""

    def target(name: str, entry: Entry) -> bool:
        return name == "hastb" and is_metadata(entry) and unpack(entry.data, history.resource).syncing

    assert found("left behind and not known as a target", without(history, target), history)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_one_node_loses_its_power_while_the_other_goes_on(tmp_path: Path, seed: int) -> None:
    """First the primary, or first the secondary; then the one that was left. By hand: --live 50."""
    faultdisk.need()
    recorder = Recorder(tmp_path, "fullsync", True, 16384, 2 * MIB, 4, seed, SYNCRATE)
    try:
        print(Live(recorder, random.Random(seed)).story())
    finally:
        complaints = recorder.close()
    assert not complaints, complaints

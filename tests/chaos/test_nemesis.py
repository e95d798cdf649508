"""The hunter for a minute, with a fixed seed: it finds nothing. And it would find something."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.nemesis.__main__ import chosen
from tests.chaos.nemesis.checker import Checker
from tests.chaos.nemesis.cluster import Cluster, Setup
from tests.chaos.nemesis.faults import KINDS
from tests.chaos.nemesis.model import sector
from tests.chaos.nemesis.operator import Operator
from tests.chaos.nemesis.session import Session, Tally
from tests.chaos.nemesis.story import Story, ViolationError
from tests.e2e.node import MIB

SEED, FAULTS, ROUNDS = "fixed", 14, 1


@pytest.mark.slow
def test_nothing_is_lost(tmp_path: Path) -> None:
    """Sessions of one round each, so that several configurations have their turn."""
    tally, number = Tally(), 0
    while tally.total < FAULTS:
        failure = Session(SEED, number, chosen(None, []), tally).run(FAULTS, tmp_path, ROUNDS)
        assert failure is None, f"{failure.story}\n\n{failure.complaint}\n{logs(tmp_path)}"
        number += 1
    assert tally.requests > 100 * tally.rounds > 0


def logs(place: Path) -> str:
    return "\n".join(f"---- {path.name}\n{path.read_text()[-8000:]}" for path in place.rglob("*.log"))


def tampered(story: str, tamper: str) -> str:
    """What the checker says of a cluster in which something is not as it was acknowledged."""
    cluster = Cluster(Setup(cells=1024), story, Story(story, Counter()))
    operator = Operator(cluster)
    checker = Checker(cluster, operator)
    try:
        cluster.up()
        cluster.progress(cluster.primary, 100)
        client = cluster.clients[cluster.primary]
        assert client.drain(), client.complaint
        checker.all()
        old = dict(cluster.model.possible(0))
        cluster.model.possible(0).clear()
        cluster.model.possible(0)[next(cluster.numbers)] = next(iter(old.values()))
        if tamper == "secondary":
            cluster.model.possible(0).clear()
            cluster.model.possible(0).update(old)
            with cluster.secondary.component().open("r+b") as file:
                file.seek(cluster.metadata(cluster.secondary).offset)
                file.write(sector(1 << 40, 0))
        with pytest.raises(ViolationError) as caught:
            checker.all()
        return str(caught.value)
    finally:
        complaints = cluster.close()
        assert not complaints, complaints


def test_a_lost_write_is_noticed() -> None:
    """The model expects a write that no disk has."""
    assert "cell 0 (offset 0), sector 0, holds" in tampered("lost write", "model")


def test_different_components_are_noticed() -> None:
    """A sector of the secondary's component is another one than the primary's."""
    assert "component differs at offset 0" in tampered("different", "secondary")


def test_an_old_write_that_comes_back_is_noticed_while_clients_work() -> None:
    """A client whose model knows newer data than the disk has complains by itself."""
    cluster = Cluster(Setup(cells=256), "old", Story("old", Counter()))
    try:
        cluster.up()
        client = cluster.clients[cluster.primary]
        cluster.progress(cluster.primary, 100)
        assert client.drain(), client.complaint
        with cluster.primary.component().open("r+b") as file:
            file.seek(cluster.metadata(cluster.primary).offset)
            file.write(bytes(MIB))  # as if none of its writes had been done
        client.go_on()
        with pytest.raises(ViolationError, match="wrong data: read"):
            for _ in range(100):
                cluster.progress(cluster.primary, 1)
                cluster.complain()
    finally:
        cluster.clients.clear()
        client.stop()
        cluster.close()


def test_an_acknowledgement_that_comes_too_early_is_noticed() -> None:
    """The nodes replicate in the mode async, and the model takes that for fullsync: what the primary acknowledged in
    its last moments is missed when the other node takes over."""
    cluster = Cluster(Setup(replication="async", cells=256), "early", Story("early", Counter()))
    operator, rng = Operator(cluster), random.Random("early")
    try:
        cluster.up()
        cluster.weakest = {"fullsync"}
        with pytest.raises(ViolationError, match="after its promotion: cell"):
            for _ in range(5):
                cluster.progress(cluster.primary)
                operator.heal(rng)
                KINDS["power failure of primary, unheard"].inject(cluster, operator, rng)
    finally:
        cluster.close()


def test_seeds_choose_the_same_again() -> None:
    one, again, other = (
        [Session(seed, n, chosen(None, []), Tally()).setup for n in range(5)] for seed in ("a", "a", "b")
    )
    assert one == again != other


def test_every_kind_has_its_switch() -> None:
    """--kinds and --without choose by pattern."""
    assert chosen(["link: c*"], []) == ["link: cut", "link: cut inside a message"]
    assert "link: cut" not in chosen(None, ["link: cut"])
    assert set(chosen(None, [])) <= set(KINDS)

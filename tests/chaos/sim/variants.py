"""Broken variants: does the hunter still hunt? Mistakes in the sequencer, compiled in (tests/sim/variants.py), and
mistakes of workers, put in the place of what they should do.

A mistake of a worker is a function that is given `replace(object, name, value)`, as pytest's monkeypatch has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

from hast import decision, peering, promotion
from tests.chaos.sim.disk import Disk
from tests.chaos.sim.ggate import PARTING
from tests.chaos.sim.oracle import Broken
from tests.chaos.sim.parts import Conn
from tests.chaos.sim.primary import Primary
from tests.chaos.sim.runner import run
from tests.chaos.sim.secondary import Secondary
from tests.sim.harness import PRODUCTION, Library
from tests.sim.variants import Mistake

Replace = Callable[[Any, str, Any], None]

IN_C = [
    Mistake(
        "clean_after_one_side",
        "seq_mutation.c",
        "seq_map_leave(a, bio, remote_ok && bio->error[HAST_LOCAL] == 0);",
        "seq_map_leave(a, bio, remote_ok || bio->error[HAST_LOCAL] == 0);",
    ),
    Mistake(
        "clean_without_the_common_flush",
        "seq_map_update.c",
        "if (e->epoch > s->flushed) {",
        "if (e->epoch > s->epoch) {",
    ),
    Mistake(
        "answer_before_the_counter_is_stored",
        "seq_mutation.c",
        "if (verdict == 0 && !s->degraded_ok)",
        "if (verdict == 0 && s->joining)",
    ),
    Mistake(
        "write_before_the_map",
        "seq_mutation.c",
        "else if (!seq_held(a) && seq_map_durable(a, bio))",
        "else if (!seq_held(a))",
    ),
    Mistake("secondary_left_because_of_this_nodes_map", "seq_map_update.c", "s->joining && peers_map_kept(a)", "0"),
    Mistake("peers_map_forgotten", "seq.c", "map != NULL ? seq_map_merge(a, map, 0) : 0;", "map != NULL;"),
]


@dataclass(frozen=True)
class Worker:
    """A mistake of a worker."""

    name: str
    put: Callable[[Replace], None]


def map_cleared_at_the_handshake(replace: Replace) -> None:
    serve = Secondary.serve

    def early(self: Secondary, conn: Conn, keepmap: bool) -> None:
        serve(self, conn, keepmap)
        self.disk.put_map(0)

    replace(Secondary, "serve", early)


def syncing_cleared_too_early(replace: Replace) -> None:
    """At the first request, and not when the synchronisation is complete."""
    work = Secondary.work

    def early(self: Secondary) -> None:
        work(self)
        self.store(changed(self.meta, syncing=False))

    replace(Secondary, "work", early)


def targets_may_be_promoted(replace: Replace) -> None:
    replace(promotion, "check_primary", lambda metadata: None)
    replace(Secondary, "target", property(lambda self: False))


def counter_not_raised(replace: Replace) -> None:
    replace(peering, "wrote_alone", lambda state, metadata: changed(metadata, alone=True))


def not_told_that_it_is_out_of_date(replace: Replace) -> None:
    """A primary that is to be synchronised does not store so."""
    agreed = peering.agreed

    def forgetting(state: Any, agreement: Any, keepmap: bool) -> Any:
        after, metadata = agreed(state, agreement, keepmap)
        return after, changed(metadata, syncing=False)

    replace(peering, "agreed", forgetting)


def split_brain_taken_for_out_of_date(replace: Replace) -> None:
    decide = decision.decide

    def careless(own_resuid: int, own: Any, resuid: int, theirs: Any, virgin: bool) -> Any:
        made = decide(own_resuid, own, resuid, theirs, virgin)
        if made.outcome is not decision.Outcome.SPLIT_BRAIN:
            return made
        return decision.Decision(decision.Outcome.PRIMARY_NEWER, map=decision.MapChoice.OWN)

    replace(decision, "decide", careless)


def cache_taken_for_durable(replace: Replace) -> None:
    """No flush before what was read at the start is relied on."""
    replace(Disk, "settle", lambda self: None)


def new_connection_before_the_old_one_is_over(replace: Replace) -> None:
    """The worker does not wait until ggate has taken note of the end."""
    take_down = Primary.take_down

    def hasty(self: Primary) -> None:
        take_down(self)
        if self.stage == PARTING:
            self.down()

    def work(self: Primary) -> None:
        if self.mail[0][0] == "parted":
            self.mail.popleft()
        else:
            steps(self)

    steps = Primary.work
    replace(Primary, "take_down", hasty)
    replace(Primary, "work", work)


def metadata_not_flushed(replace: Replace) -> None:
    """The old block may still be there after a power cut."""

    def put(self: Disk, new: Any) -> None:
        self.meta, self.meta_alt = new, self.meta

    replace(Disk, "put_meta", put)


IN_WORKERS = [
    Worker(put.__name__, put)
    for put in (
        map_cleared_at_the_handshake,
        syncing_cleared_too_early,
        targets_may_be_promoted,
        counter_not_raised,
        not_told_that_it_is_out_of_date,
        split_brain_taken_for_out_of_date,
        cache_taken_for_durable,
        new_connection_before_the_old_one_is_over,
        metadata_not_flushed,
    )
]


def found_after(histories: int, library: Library = PRODUCTION, first: int = 0) -> int | None:
    """How many histories it takes until something is broken. Any other error is one of the variant's own, and proves
    nothing."""
    for seed in range(first, first + histories):
        try:
            run(seed, library)
        except Broken:
            return seed - first + 1
    return None

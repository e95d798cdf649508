"""What was done on the component, in numbers: the stat_* fields of control.StatusEntry (docs/protocol.md section 7).

Invariants:
- Nothing is asked of a stage: what it counts is read in the shared memory, as it is in that moment.
"""

from __future__ import annotations

from collections import Counter

from hast.shm.arena import Arena

ERRORS = {f"stat_{kind}_error": kind for kind in ("read", "write", "delete", "flush")}


def counters(arena: Arena) -> Counter[str]:
    """By the names of the fields."""
    stats = arena.seq.stats
    return Counter(
        stat_read=stats.read,
        stat_write=stats.write,
        stat_delete=getattr(stats, "del"),
        stat_flush=stats.flush,
        stat_activemap_update=stats.map_update,
        stat_read_error=stats.read_error,
        stat_write_error=stats.write_error,
        stat_delete_error=stats.delete_error,
        stat_flush_error=stats.flush_error,
    )


def failures(counted: Counter[str]) -> str:
    """What the component has failed, for people: "" when it has not."""
    return ", ".join(f"{kind}: {counted[name]}" for name, kind in ERRORS.items() if counted[name])

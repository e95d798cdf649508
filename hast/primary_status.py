"""What a running primary says of itself: its fields of control.StatusEntry (docs/protocol.md section 7).

Invariants:
- Nothing is asked of a stage: the state is read in the shared memory, as it is in that moment.
- Without stages there are no counters, and without a component nothing but the role: it is said what is known.
"""

from __future__ import annotations

import os
from typing import Any

from hast.control import StatusEntry
from hast.counters import counters
from hast.ffi import _hast
from hast.metadata import Metadata
from hast.outage import DETACHED
from hast.shm.arena import Arena

lib = _hast.lib

STATUS_FIELDS = frozenset(StatusEntry.__dataclass_fields__)


def primary_status(metadata: Metadata | None, arena: Arena | None, detached: bool) -> dict[str, Any]:
    """The fields that only a running worker knows. detached: the component is given up."""
    entry: dict[str, Any] = {"status": "degraded", "role": "primary", "workerpid": os.getpid()}
    if metadata is not None:
        entry |= {"extentsize": metadata.extentsize, "keepdirty": metadata.keepdirty}
        entry["syncing"] = int(metadata.syncing)
        if detached:
            entry["syncing"] = DETACHED
    if arena is None or metadata is None:
        return entry
    seq = arena.seq
    entry |= counters(arena)
    entry |= {
        "status": "complete" if seq.connected and seq.ndirty == 0 else "degraded",
        "dirty": seq.ndirty * metadata.extentsize,
        "idle_queue_size": seq.nfree,
        "local_queue_size": arena.ring_used(lib.HAST_RING_DISK),
        "send_queue_size": arena.ring_used(lib.HAST_RING_SEND),
        "recv_queue_size": 0,
        "done_queue_size": arena.ring_used(lib.HAST_RING_DISK_DONE),
    }
    return {key: value for key, value in entry.items() if key in STATUS_FIELDS}

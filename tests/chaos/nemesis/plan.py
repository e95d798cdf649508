"""What a seed chooses: the configuration of each session, the faults of each round, and the pauses between them.

Invariants:
- A pure function of seed, session and round: the same again, on any machine, whatever happened before. How long things
  take is not chosen here, so that the same choices may meet other moments.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from tests.chaos.nemesis import features
from tests.chaos.nemesis.client import Load
from tests.chaos.nemesis.cluster import Setup
from tests.chaos.nemesis.faults import TABLE

SPARE = 6  # kinds chosen beyond those that are wanted, for those that do not apply when their turn comes


@dataclass(frozen=True)
class Step:
    """A fault, by its kind, the seed of what it chooses itself, and the seconds to go on after it."""

    kind: str
    seed: str
    pause: float


def setup(seed: str, session: int) -> Setup:
    rng = random.Random(f"{seed}/{session}/setup")
    cell, cells = rng.choice([(4096, 4096), (4096, 8192), (512, 8192)])
    return Setup(
        replication=rng.choices(["fullsync", "memsync", "async"], [45, 40, 15])[0],
        metaflush=rng.choice(["on", "off"]),
        compression=rng.choice(["none", "hole", "lzf"]),
        checksum=rng.choice(["none", "crc32", "sha256"]),
        timeout=rng.choice([2, 3]),
        syncrate=rng.choice(["0", "0", "8M"]),
        extentsize=(cell * cells) // rng.choice([64, 128]),
        keepdirty=rng.choice([1, 4, 16]),
        on_io_error=rng.choice(["detach", "pass"]),
        cell=cell,
        cells=cells,
        memory=rng.random() < 0.7,
        disk=rng.random() < 0.35 and features.has("disk"),
        net=rng.random() < 0.25 and features.has("net"),
        load=Load(
            connections=rng.choice([1, 2, 3]),
            depth=rng.choice([2, 6, 16]),
            pace=rng.choice([150, 400]),
            hot=rng.choice([16, 64, 256]),
            hot_share=rng.choice([0.2, 0.5]),
        ),
    )


def steps(seed: str, session: int, number: int, kinds: Collection[str], of: Setup) -> tuple[int, list[Step]]:
    """How many faults a round of a session with this setup has, and more than that, in order."""
    rng = random.Random(f"{seed}/{session}/{number}")
    table = [fault for fault in TABLE if fault.name in kinds and of.has(fault.where)]
    wanted = rng.choices([1, 2, 4, 6, 9], [15, 20, 25, 25, 15])[0]
    chosen = rng.choices(table, [fault.weight for fault in table], k=wanted + SPARE)
    pauses = [rng.choice([0, rng.uniform(0, 0.3), rng.uniform(0.3, 1.5)]) for _ in chosen]
    return wanted, [
        Step(fault.name, f"{seed}/{session}/{number}/{n}", pause)
        for n, (fault, pause) in enumerate(zip(chosen, pauses, strict=True))
    ]

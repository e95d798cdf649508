"""The table of faults: what kinds there are, and what each of them needs."""

from __future__ import annotations

from dataclasses import dataclass

from tests.chaos.nemesis import deaths, disks, links, roles, syncs, wires
from tests.chaos.nemesis.common import Inject


@dataclass(frozen=True)
class Fault:
    """One kind. weight: how often it is chosen, beside the others. needs: what hast, or the machine, must be able to do
    for it. where: the sessions that have what it works on, "" for all (cluster.py, Setup.has)."""

    name: str
    inject: Inject
    weight: float = 1.0
    needs: str = ""
    where: str = ""

    @property
    def local(self) -> bool:
        """It leaves the other node, and the way to it, alone: that is no excuse for an error."""
        return self.name.startswith("disk of primary")


MIDDLES = ("cut", "target dies", "source dies", "stage dies", "worker dies")

HARMS: dict[str, disks.Harm] = {
    "some writes fail": disks.fail("write", some=True),
    "all writes fail": disks.fail("write"),
    "some flushes fail": disks.fail("flush", some=True),
    "flushes fail and lose": disks.lose,
    "some reads fail": disks.fail("read", some=True),
    "everything fails": disks.fail("all"),
    "full": disks.full,
    "read-only": disks.readonly,
    "slow": disks.slow,
    "hangs": disks.hang,
}

TABLE: tuple[Fault, ...] = (
    *(
        Fault(f"kill {kind} of {side}", deaths.kill_process(side, kind))
        for side in ("primary", "secondary")
        for kind in ("disk", "ggate" if side == "primary" else "recv", "worker", "spawner", "keeper")
    ),
    *(Fault(f"kill {kind} of primary twice", deaths.kill_twice(kind), 2) for kind in ("disk", "ggate")),
    Fault("kill main of primary", deaths.kill_main("primary")),
    Fault("kill main of secondary", deaths.kill_main("secondary")),
    Fault("kill main and keeper of primary", deaths.kill_main_and_keeper("primary")),
    Fault("kill main and keeper of secondary", deaths.kill_main_and_keeper("secondary")),
    Fault("restart in place of primary", deaths.upgrade("primary")),
    Fault("restart in place of secondary", deaths.upgrade("secondary")),
    Fault("power failure of primary", deaths.power_off("primary", False), 2),
    Fault("power failure of secondary", deaths.power_off("secondary", False)),
    Fault("power failure of primary, unheard", deaths.power_off_unheard, 3),
    Fault("power failure of both", deaths.power_off_both),
    Fault("primary killed one by one", deaths.power_off("primary", True), 2),
    Fault("secondary killed one by one", deaths.power_off("secondary", True)),
    Fault("restart of primary", deaths.restart("primary")),
    Fault("restart of secondary", deaths.restart("secondary")),
    *(
        Fault(
            f"stop {'all' if whole else 'a process'} of {side}, {'long' if long else 'short'}",
            deaths.freeze(side, whole, long),
        )
        for side in ("primary", "secondary")
        for whole in (False, True)
        for long in (False, True)
    ),
    Fault("link: cut", links.cut, 2, where="relay"),
    Fault("link: cut inside a message", links.cut_inside, 3, where="relay"),
    Fault("link: flaps", links.flap, where="relay"),
    Fault("link: half-open, secondary not told", links.half_open(True), where="relay"),
    Fault("link: half-open, primary not told", links.half_open(False), where="relay"),
    Fault("link: partition", links.link(links.both_ways(links.hold)), where="relay"),
    Fault("link: held back towards the secondary", links.link(links.one_way(links.hold, True)), where="relay"),
    Fault("link: held back towards the primary", links.link(links.one_way(links.hold, False)), where="relay"),
    Fault("link: black hole", links.link(links.both_ways(links.swallow)), where="relay"),
    Fault("link: black hole towards the secondary", links.link(links.one_way(links.swallow, True)), where="relay"),
    Fault("link: black hole towards the primary", links.link(links.one_way(links.swallow, False)), where="relay"),
    Fault("link: delay", links.link(links.both_ways(links.delay)), where="relay"),
    Fault("link: throttle", links.link(links.both_ways(links.throttle)), where="relay"),
    Fault("role: swap under load", roles.swap, 2),
    Fault("role: promote and demote at once", roles.swap_at_once, 2),
    Fault("role: demote and promote the same", roles.bounce),
    Fault("role: secondary leaves and comes", roles.away),
    Fault("role: both primary", roles.both_primary(False)),
    Fault("role: both primary, link cut", roles.both_primary(True)),
    Fault("reload with other settings", roles.reload, 2),
    Fault("reload: primary leaves its secondary for a while", roles.part),
    Fault("secondary made anew", roles.made_anew),
    *(Fault(f"sync interrupted: {what}", syncs.interrupted(what)) for what in MIDDLES),
    Fault("sync interrupted: source dies, target is asked", syncs.interrupted("source dies, target is asked")),
    Fault("sync interrupted: source dies, target is forced", syncs.forced),
    *(Fault(f"sync to primary interrupted: {what}", syncs.backwards(what)) for what in MIDDLES),
    Fault("net: cable pulled", wires.wire(wires.pulled), 3, where="net"),
    Fault("net: the secondary hears nothing", wires.wire(wires.deaf), 2, where="net"),
    Fault("net: the primary hears nothing", wires.wire(wires.mute), 2, where="net"),
    Fault("net: narrow", wires.wire(wires.narrow), 2, where="net"),
    Fault("net: loose contact", wires.flaps, 2, where="net"),
    *(Fault(f"disk of secondary: {what}", disks.of_secondary(harm), where="disk") for what, harm in HARMS.items()),
    *(
        Fault(f"disk of secondary: flush lost, {kind} killed", disks.lost_in_death(kind), where="disk")
        for kind in ("disk", "recv", "worker")
    ),
    *(
        Fault(f"disk of primary: {what}", disks.of_primary(harm), where="disk")
        for what, harm in HARMS.items()
        if what not in ("hangs", "slow")
    ),
    Fault("disk of primary: slow", disks.of_primary(disks.slow), where="disk"),
    Fault("disk of primary: hangs", disks.of_primary(disks.hang, excused=True), where="disk"),
    Fault("disk of secondary: unplugged", disks.unplugged("secondary"), where="disk"),
    Fault("disk of primary: unplugged", disks.unplugged("primary"), where="disk"),
)
KINDS = {fault.name: fault for fault in TABLE}
assert len(KINDS) == len(TABLE)

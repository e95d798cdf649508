"""Holds what a power cut left on two disks against what was promised, by the rules that hastd itself follows: its
metadata, its handshake, its maps.

What has to be true of every state of both disks at one moment:
1. the metadata is whole on either;
2. a node that may be primary by itself keeps what was promised, alone: a good one all of it, one that was left
   behind all of what had been promised until then, and nothing newer;
3. whichever of both becomes primary (one can), the handshake leads to a synchronisation, not to a split-brain, and
   knows the counters;
4. sectors that differ lie in extents that one of the maps has (invariants 1 and 2), so that both become the same;
5. then they hold everything that was promised;
6. when a node that may be primary writes alone before it meets the other, then either what it has written and what was
   promised are both there in the end, or the split-brain is found.

With `metaflush off` the map is not flushed before the data; a client's flush makes it durable as well. What remains of
4 is then: where no mutation has touched the sector that is not yet covered by a client's flush.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from hast import decision, promotion
from hast.activemap import METADATA_SIZE, is_set, or_into
from hast.control import Role
from hast.decision import Outcome
from hast.errors import DataError, HastError, UnavailableError
from hast.handshake import PrimaryHandshake, answer_second
from hast.messages import HANDSHAKE_LIMIT, Handshake1Reply, Handshake2Request, SyncSource, unpack_message
from hast.metadata import Metadata, unpack
from tests.chaos.powercut.cut import KINDS, Disk, State
from tests.chaos.powercut.history import NEVER, SECTOR, History
from tests.chaos.powercut.promise import OWN_WRITE, Promises, Turn, stored, turns

TOKEN = bytes(range(16))


@dataclass
class Node:
    """A node as a cut has left it. `floor`: what it has to hold alone; behind: the moment since which it may lack
    what is written, None for a good one."""

    name: str
    state: State
    metadata: Metadata
    floor: list[float]
    behind: float | None

    @property
    def map(self) -> bytes:
        return b"".join(self.state[METADATA_SIZE // SECTOR : self.metadata.offset // SECTOR])  # type: ignore[arg-type]

    @property
    def data(self) -> State:
        return self.state[self.metadata.offset // SECTOR :]


@dataclass(frozen=True)
class Meeting:
    """What a handshake leads to: who has the newer data, and which extents are copied; error: it was refused."""

    outcome: Outcome
    source: Node | None
    union: bytes
    error: str = ""


@dataclass(frozen=True)
class Violation:
    moment: float
    kinds: tuple[str, str]
    text: str


@dataclass
class Verdict:
    """What was looked at and what was found. outcomes: of the handshakes, how often each."""

    states: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)


def promoted(node: Node) -> tuple[Metadata, bool] | None:
    """Its metadata as primary; None when it must not be primary by itself."""
    try:
        return promotion.as_primary(node.metadata, 4711)
    except UnavailableError:
        return None


def meet(primary: Node, metadata: Metadata, virgin: bool, secondary: Node) -> Meeting:
    """The handshake of the two, as hastd does it. metadata: the primary's, which it has as one."""
    own = replace(secondary.metadata, prevrole=Role.SECONDARY)
    ours = PrimaryHandshake(metadata, secondary.name, virgin=virgin)
    step2 = ours.first_reply(Handshake1Reply(2, TOKEN).to_nv())
    request = Handshake2Request.from_nv(unpack_message(step2, HANDSHAKE_LIMIT)[1])
    answer = answer_second(request, 2, own, lambda: secondary.map, "none", "none", bond=request.bond + 1)
    _, nv, payload = unpack_message(answer.message, HANDSHAKE_LIMIT)
    try:
        ours.second_reply(nv)
        agreement = ours.finish(payload)
    except HastError as error:
        return Meeting(answer.decision.outcome, None, b"", str(error))
    union = bytearray(primary.map)
    if agreement.map is not None:
        or_into(union, agreement.map)
    source = primary if agreement.syncsrc is SyncSource.PRIMARY else secondary
    return Meeting(answer.decision.outcome, source, bytes(union))


class Judge:
    """Goes through a history, cut by cut. changes: when nodes ceased to be good, or became so, where that is not to
    be read from the history."""

    def __init__(self, history: History, changes: list[Turn] | None = None) -> None:
        self.history = history
        self.shape = history.shape
        self.promises = Promises(history)
        self.disks = {name: Disk(entries, history.shape) for name, entries in history.disks.items()}
        self.behind: dict[str, float | None] = dict.fromkeys(history.disks)
        self.floors: dict[str, list[float]] = {}  # of those that are behind
        self.first = min((r.begin for r in history.requests if not r.flush), default=NEVER)
        self.verdict = Verdict()
        self._turns: list[Turn] = (turns(history) if changes is None else changes)[::-1]

    def advance(self, moment: float) -> None:
        """To a cut at that moment, later than the last one."""
        while self._turns and self._turns[-1].at < moment:
            turn = self._turns.pop()
            self.promises.advance(turn.at)
            if turn.good:
                self.behind[turn.node] = None
            elif self.behind[turn.node] is None:
                self.behind[turn.node] = turn.at
                self.floors[turn.node] = self.promises.durable.copy()
        self.promises.advance(moment)
        for disk in self.disks.values():
            disk.advance(moment)

    def node(self, name: str, state: State) -> Node:
        """Raises DataError when there is no metadata on it."""
        block = b"".join(state[: METADATA_SIZE // SECTOR])  # type: ignore[arg-type]
        metadata = unpack(block, self.history.resource)
        behind = self.behind[name]
        return Node(name, state, metadata, self.promises.durable if behind is None else self.floors[name], behind)

    def look(self, moment: float, kinds: tuple[str, str], rng: random.Random) -> tuple[State, State]:
        """One state of both; what is wrong with it goes into the verdict."""
        states = [self.disks[name].state(kind, rng) for name, kind in zip(self.disks, kinds, strict=True)]
        self.verdict.states += 1
        for text in self._wrong(states, kinds, rng):
            where = f"cut at {moment:.0f} ({self.history.around(moment)}), {' / '.join(kinds)}: {text}"
            self.verdict.violations.append(Violation(moment, kinds, where))
        return states[0], states[1]

    def _wrong(self, states: list[State], kinds: tuple[str, str], rng: random.Random) -> Iterator[str]:
        try:
            nodes = [self.node(name, state) for name, state in zip(self.disks, states, strict=True)]
        except DataError as error:
            yield f"metadata: {error}"
            return
        for node, kind in zip(nodes, kinds, strict=True):
            yield from self._alone(node, kind)
        yield from self._together(nodes)
        yield from self._apart(nodes, rng)

    # ---- rule 2 ----

    def _alone(self, node: Node, kind: str) -> Iterator[str]:
        if promoted(node) is None:
            return
        if node.behind is None:
            if node.metadata.syncing:
                return  # as primary it serves what is marked from the other node
            yield from self._broken(node, node.floor, "alone")
            if kind == "everything" and self._kept(node):
                yield from self._broken(node, self.promises.acked, "alone, without a power cut")
            return
        if node.metadata.syncing:
            return
        yield from self._broken(node, node.floor, "alone, left behind and not known as a target,")
        begin, behind = self.promises.begin, node.behind
        if behind < self.first:
            return  # the counters of two empty nodes that meet for the first time: neither lacks anything
        if newer := [s for s, value in enumerate(node.data) if value and begin[value] > behind]:  # type: ignore[index]
            yield f"{node.name}, left behind and not known as a target, has newer data in sectors {newer[:4]}"

    def _kept(self, node: Node) -> bool:
        """Whether acknowledgements mean that this node has it, in its cache at least."""
        return self.history.replication == "fullsync" or node.metadata.prevrole is Role.PRIMARY

    def _broken(self, node: Node, floor: list[float], how: str) -> Iterator[str]:
        if old := self.promises.broken(node.data, floor):
            yield f"{node.name} {how} lacks what was promised in {len(old)} sectors: {self._show(old, node.data)}"

    def _show(self, sectors: list[int], data: State) -> str:
        return ", ".join(f"{s} (extent {self.shape.extent(s)}) has {data[s]!r}" for s in sectors[:4])

    # ---- rules 3 to 5 ----

    def _together(self, nodes: list[Node]) -> Iterator[str]:
        one, two = (node.data for node in nodes)
        differ = [s for s, (x, y) in enumerate(zip(one, two, strict=True)) if x != y]
        able = 0
        for primary, secondary in (nodes, nodes[::-1]):
            taken = promoted(primary)
            if taken is None:
                continue
            able += 1
            met = meet(primary, *taken, secondary)
            self.verdict.outcomes[met.outcome.name] += 1
            how = f"{primary.name} primary again, {met.outcome.name}: "
            if met.source is None:
                if not _strangers(met, nodes):
                    yield how + met.error
                continue
            if met.outcome is Outcome.IMPOSSIBLE:
                yield how + f"counters {primary.metadata.pair} and {secondary.metadata.pair}"
            yield from (how + text for text in self._synchronised(met, differ, nodes))
        if not able:
            yield "neither node may be primary by itself"

    def _synchronised(self, met: Meeting, differ: list[int], nodes: list[Node]) -> Iterator[str]:
        assert met.source is not None
        missed = [s for s in differ if not is_set(met.union, self.shape.extent(s))]
        if missed and not self.history.metaflush:
            excused = self.promises.touched()
            missed = [s for s in missed if s not in excused]
        if missed:
            shown = ", ".join(
                f"{s} (extent {self.shape.extent(s)}): {nodes[0].data[s]!r} and {nodes[1].data[s]!r}"
                for s in missed[:4]
            )
            yield f"{len(missed)} sectors differ that no map has: {shown}"
        if old := self.promises.broken(met.source.data, self.promises.durable):
            yield (
                f"what was promised is lost with {met.source.name} as the source, in {len(old)} sectors:"
                f" {self._show(old, met.source.data)}"
            )

    # ---- a node goes on alone ----

    def _apart(self, nodes: list[Node], rng: random.Random) -> Iterator[str]:
        for first, other in (nodes, nodes[::-1]):
            taken = promoted(first)
            if taken is None or taken[0].syncing:
                continue
            at = rng.randrange(self.shape.sectors)
            writer = self._written(first, taken[0], at)
            for primary, secondary in ((writer, other), (other, writer)):
                again = promoted(primary)
                if again is None:
                    continue
                met = meet(primary, *again, secondary)
                how = f"{first.name} wrote alone, then {primary.name} primary, {met.outcome.name}: "
                self.verdict.outcomes[f"alone: {met.outcome.name}"] += 1
                if met.outcome is Outcome.SPLIT_BRAIN and (other.metadata.alone or other.behind is None):
                    continue
                if met.source is None:
                    if not _strangers(met, nodes):
                        yield how + met.error
                elif met.source is not writer or not is_set(met.union, self.shape.extent(at)):
                    yield how + "what it wrote is lost"
                elif old := self.promises.broken(met.source.data, self.promises.durable):
                    yield how + f"what was promised is lost in {len(old)} sectors: {self._show(old, met.source.data)}"

    def _written(self, node: Node, metadata: Metadata, at: int) -> Node:
        """The node when it has written a sector as primary without the other (invariant 7)."""
        state = node.state.copy()
        state[self.shape.offset + at] = OWN_WRITE
        extent = self.shape.extent(at)
        place, bit = METADATA_SIZE // SECTOR + extent // 8 // SECTOR, extent % (8 * SECTOR)
        sector = bytearray(state[place])  # type: ignore[arg-type]
        sector[bit // 8] |= 1 << (bit % 8)
        state[place] = bytes(sector)
        pair = decision.before_degraded_write(metadata.pair, None)
        return replace(node, state=state, metadata=replace(metadata, pair=pair, alone=True))


def _strangers(met: Meeting, nodes: list[Node]) -> bool:
    """A node that was never used became primary: it and the one that was used are not the same resource any more, and
    say so, each with what it has."""
    return met.outcome is Outcome.RESUID_MISMATCH and any(node.metadata.resuid == 0 for node in nodes)


def moments(history: History, count: int, rng: random.Random) -> list[float]:
    """So many moments to cut at, or fewer, in order, each between two things that happened: a third of them near where
    metadata was stored, the others in all that was done to the nodes alike, however long it took."""
    marks = [at for at, text in history.marks]
    begin = next(at for at, text in history.marks if text == "created")
    stamps = {float(s) for e in history.disks.values() for entry in e for s in (entry.begin, entry.end)}
    stamps |= {r.ack for r in history.requests if r.ack != NEVER}
    known = sorted(s + 0.5 for s in stamps if s > begin)
    chosen: set[float] = set()
    blocks = stored(history)
    for _ in range(count // 3):
        at = bisect(known, rng.choice(blocks).begin) + rng.randint(-20, 40)
        chosen.add(known[max(0, min(at, len(known) - 1))])
    for _ in range(count - count // 3):
        part = rng.randrange(len(marks))
        last = marks[part + 1] if part + 1 < len(marks) else NEVER
        low, high = bisect(known, marks[part]), bisect(known, last)
        if low < high:
            chosen.add(known[rng.randrange(low, high)])
    return sorted(chosen)


def replay(
    history: History, cuts: int, each: int, seed: int, enough: int = 200, changes: list[Turn] | None = None
) -> Verdict:
    """`each` states at each of so many cuts; no more once there are enough violations."""
    rng = random.Random(seed)
    judge = Judge(history, changes)
    names = list(KINDS)
    for moment in moments(history, cuts, rng):
        judge.advance(moment)
        for _ in range(each):
            judge.look(moment, (rng.choice(names), rng.choice(names)), rng)
        if len(judge.verdict.violations) >= enough:
            break
    return judge.verdict

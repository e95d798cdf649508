"""Two nodes with a link between them that can fail, their processes by kind, and the clients that work on them.

Here is what can be done; who decides on it is in operator.py and faults.py.

Invariants:
- `primary` is the node whose copy counts, `clients` those who work now; a node is asked only while it can answer.
- What a fault has changed and time does not heal by itself has a cure in `cures`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hast import boot, promotion
from hast.activemap import METADATA_SIZE
from hast.control import Role
from hast.errors import DataError, HastError
from hast.metadata import Metadata, unpack
from tests.chaos.nemesis.caches import Cache
from tests.chaos.nemesis.client import Client, Load
from tests.chaos.nemesis.model import Model
from tests.chaos.nemesis.network import ADDRESSES, Network
from tests.chaos.nemesis.story import Story, ViolationError
from tests.e2e.node import loopback
from tests.e2e.pair import Pair, PairNode
from tests.e2e.relay import Relay
from tests.faultdisk import FaultDisk

DEADLINE = 90.0  # seconds: for anything that has to come true
SLACK = 25.0  # seconds that a busy machine may add to the delays that are promised
STAGES = ("disk", "ggate", "recv")
_places = itertools.count(1)


@dataclass(frozen=True)
class Setup:
    """One configuration: settings of hast.conf, geometry, and the load. `disk`: on fault disks; `net`: in network
    namespaces, without relays; `memory`: components in /dev/shm."""

    replication: str = "fullsync"
    metaflush: str = "on"
    compression: str = "hole"
    checksum: str = "none"
    timeout: int = 2
    syncrate: str = "0"
    extentsize: int = 256 << 10
    keepdirty: int = 8
    on_io_error: str = "detach"
    directio: str = "auto"
    cell: int = 4096
    cells: int = 8192
    memory: bool = True
    disk: bool = False
    net: bool = False
    load: Load = field(default_factory=Load)

    @property
    def size(self) -> int:
        return self.cell * self.cells

    def conf(self) -> str:
        return (
            f"timeout {self.timeout}\nreplication {self.replication}\nmetaflush {self.metaflush}\n"
            f"compression {self.compression}\nchecksum {self.checksum}\nsyncrate {self.syncrate}\n"
            f"on-io-error {self.on_io_error}\ndirectio {self.directio}"
        )

    def has(self, what: str) -> bool:
        """Whether there is what a kind of fault works on."""
        return {"": True, "relay": not self.net, "net": self.net, "disk": self.disk}[what]

    def words(self) -> str:
        places = [word for word, is_so in (("in memory", self.memory), ("fault disks", self.disk)) if is_so]
        places.append("namespaces" if self.net else "relays")
        conf = self.conf().replace("\n", ", ")
        return (
            f"{', '.join(places)}, {conf}, {self.cells} cells of {self.cell}, extents of {self.extentsize},"
            f" keepdirty {self.keepdirty}, {self.load.connections}x{self.load.depth} requests"
        )


def wait(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """The first true value; ViolationError when there is none in time: whatever it is, it hangs or crawls."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(HastError):
            if value := condition():
                return value
        if time.monotonic() > deadline:
            raise ViolationError(f"in vain for {seconds:g} s: {what}")
        time.sleep(0.02)


class Cluster:
    """Nothing runs before up(). `forgive` of operator.py judges errors that clients are answered with."""

    def __init__(self, setup: Setup, seed: str, story: Story) -> None:
        self.setup, self.seed, self.story = setup, seed, story
        self.settings = {"hasta": setup, "hastb": setup}  # reloads change them
        number = next(_places)
        base = os.getpid() * 32 + number * 2 + (1 << 22)
        self.relays: dict[str, Relay] = {}
        self.network: Network | None = None
        if setup.net:
            self.network = Network(number)
        else:
            self.relays = {name: Relay(loopback(base + n)) for n, name in enumerate(("hasta", "hastb"))}
        self.pair = Pair(
            {"disk": setup.size + (1 << 20)},
            conf=setup.conf(),
            remotes={name: relay.url for name, relay in self.relays.items()},
            addresses=(ADDRESSES["hasta"], ADDRESSES["hastb"]) if setup.net else None,
            memory=setup.memory,
            hooks=True,
        )
        self.nodes = self.pair.nodes
        for node in self.nodes:
            there = self.pair.other(node)
            if self.network is not None:
                node.prefix = self.network.prefix(node.node)
            else:  # who is connected to has to know the address that it comes from
                self.relays[node.node].target(there.address, self.relays[there.node].address)
            if setup.disk:
                FaultDisk.under(node)
        self.caches = {node: Cache(node) for node in self.nodes if node.disks}
        self.rng = random.Random(f"{seed}/caches")
        self.primary: PairNode = self.pair.a
        self.model = Model(setup.cells, setup.cell)
        self.clients: dict[PairNode, Client] = {}
        self.numbers = itertools.count(1)
        self.cures: list[tuple[str, Callable[[], None]]] = []
        self.stopped: dict[int, PairNode] = {}  # processes that have got SIGSTOP
        self.forgive: Callable[[PairNode, int, str], bool] = lambda node, error, text: False
        self.hurt: set[PairNode] = set()  # killed since both were in sync
        self.dark: set[PairNode] = set()  # lost the cache of its disk since then
        self.settled_modes()  # weakest: modes since then; unflushed: metadata was not always flushed since then
        self.served = 0  # requests that were acknowledged to clients that have ended
        self.slowest = 0.0
        self.troubled = 0.0  # when the other node, or the way to it, was last in trouble by our doing
        self._clients = itertools.count(1)

    @property
    def secondary(self) -> PairNode:
        return self.pair.other(self.primary)

    # ---- life ----

    def up(self) -> None:
        setup = self.setup
        self.pair.create("-e", str(setup.extentsize), "-k", str(setup.keepdirty))
        self.pair.start()
        self.pair.roles(self.primary)
        self.begin()
        self.work(self.primary)

    def begin(self) -> None:
        """All is well: what was hurt is forgotten, and what is on the disks is there for good."""
        self.hurt.clear()
        self.dark.clear()
        self.settled_modes()
        for cache in self.caches.values():
            cache.begin()

    def settled_modes(self) -> None:
        """No other setting than the present ones is of any consequence now."""
        self.weakest = {setup.replication for setup in self.settings.values()}
        self.unflushed = any(setup.metaflush == "off" for setup in self.settings.values())

    def close(self) -> list[str]:
        """As Pair.close()."""
        for node in list(self.clients):
            self.rest(node)
        self.cure()
        self.heal_links()
        complaints = self.pair.close()
        for relay in self.relays.values():
            relay.close()
        if self.network is not None:
            self.network.close()
        return complaints

    def heal_links(self) -> None:
        for relay in self.relays.values():
            relay.heal()
        if self.network is not None:
            self.network.heal()

    def write_conf(self, node: PairNode, setup: Setup, alone: bool = False) -> None:
        """The node's configuration from now on, for its next start or reload. alone: it is to have no other node."""
        relay = self.relays.get(node.node)
        remote = relay.url if relay is not None else f"tcp4://{self.pair.other(node).address}"
        remote = "none" if alone else remote
        hook = f"exec {node.directory}/hook\n"
        node.write_conf("nbd", hook + setup.conf(), "", f"remote {remote}\nsource {node.address}")
        self.settings[node.node] = setup
        self.weakest.add(setup.replication)
        self.unflushed = self.unflushed or setup.metaflush == "off"

    @property
    def limit(self) -> float:
        """Seconds that a client may have to wait."""
        return max(setup.timeout for setup in self.settings.values()) + SLACK

    # ---- clients ----

    def work(self, node: PairNode, model: Model | None = None) -> Client:
        """A client works on the node from now on."""
        number = next(self._clients)
        client = Client(
            f"client {number} on {node.node}",
            node.socket(),
            model or self.model,
            f"{self.seed}/{number}",
            self.setup.load,
            self.limit,
            lambda error, text: self.forgive(node, error, text),
            self.numbers,
        )
        self.clients[node] = client
        client.start()
        return client

    def rest(self, node: PairNode) -> None:
        """No client works there any more."""
        client = self.clients.pop(node, None)
        if client is not None:
            client.stop()
            self.served += sum(client.done.values())
            self.slowest = max(self.slowest, client.slowest)
            self.complain(client)

    def complain(self, *clients: Client) -> None:
        """Raise what clients have to complain of."""
        for client in clients or tuple(self.clients.values()):
            if client.complaint:
                raise ViolationError(f"{client.name}: {client.complaint}")

    @contextlib.contextmanager
    def excused(self, node: PairNode) -> Iterator[None]:
        """The clients of a node need not be answered meanwhile."""
        client = self.clients.get(node)
        with client.excused() if client is not None else contextlib.nullcontext():
            yield

    def progress(self, node: PairNode, mutations: int = 20) -> None:
        """Returns when so many more were acknowledged there."""
        client = self.clients[node]
        goal = client.mutations + mutations
        wait(
            lambda: client.complaint or client.mutations >= goal,
            f"{client.name} gets answers",
            DEADLINE,
        )
        self.complain(client)

    # ---- processes ----

    def alive(self, node: PairNode) -> bool:
        return node.hastd is not None and node.hastd.poll() is None

    def frozen(self, node: PairNode) -> bool:
        return node in self.stopped.values()

    def usable(self, node: PairNode) -> bool:
        """It can be asked, and will answer."""
        return self.alive(node) and not self.frozen(node)

    def processes(self, node: PairNode) -> dict[str, int]:
        """Pids by kind: main, spawner, keeper, worker, and the stages by their names."""
        found: dict[str, int] = {}
        main = node.hastd.pid if node.hastd is not None else 0
        for pid, title in node.titles().items():
            kind = title.rpartition(": ")[2]
            if pid == main:
                found["main"] = pid
            elif kind in STAGES or kind in ("spawner", "keeper"):
                found[kind] = pid
            elif title.startswith(f"hastd: {node.name()} ("):
                found["worker"] = pid
        return found

    def kill(self, node: PairNode, kind: str) -> bool:
        """kill -9 of one process; False when it is not there."""
        pid = self.processes(node).get(kind, 0)
        self.hurt.add(node)
        if not pid:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return True

    def stop_processes(self, node: PairNode, pids: list[int]) -> Callable[[], None]:
        """SIGSTOP; the cure is returned. Clients of the node are excused meanwhile."""
        excuse = contextlib.ExitStack()
        excuse.enter_context(self.excused(node))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.stopped[pid] = node

        def cure() -> None:
            for pid in pids:
                if self.stopped.pop(pid, None) is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
            excuse.close()

        return cure

    def died(self, node: PairNode) -> None:
        """Its hastd was killed: the rest ends by itself, and that is collected here. But for the keeper: by that the
        next hastd knows what role it had."""
        self.hurt.add(node)
        if node.hastd is not None:
            node.hastd.wait(DEADLINE)
            node.hastd = None
        self.cure(f"disk of {node.node}")  # a disk that hangs holds up who is killed
        wait(
            lambda: not set(node.titles().values()) - {"hastd: keeper"},
            f"the processes of {node.node} end after their hastd: {node.titles()}",
            60,
        )

    def power_off(self, node: PairNode) -> None:
        """All at once, as a power failure does, and with it what its disk had not flushed; but for metadata that is not
        to be flushed nothing is promised then."""
        self.hurt.add(node)
        self.forget_stopped(node)
        node.kill(lambda: self.cure(f"disk of {node.node}"))
        cache = self.caches.get(node)
        if cache is not None and not self.unflushed:
            self.cure(f"disk of {node.node}")
            volatile, lost = cache.lose(self.rng)
            for note in (boot.note, boot.outdated_note):
                note(node.rundir, node.name()).unlink(missing_ok=True)  # as it is with all of /run
            self.story.tell(f"  {node.node} had not flushed {volatile} writes, of which {lost} are lost or torn")
            self.dark.add(node)
            other = self.pair.other(node)
            if other is self.primary and other in self.clients and self.behind(other):
                # The lost node had what the primary lacks: what nobody had it flush is gone.
                model = self.clients[other].model
                self.rest(other)
                self.model = model.fork(model.flushed)
                self.work(other)

    def slaughter(self, node: PairNode, rng: random.Random) -> None:
        """One after another, in any order: those who live see the others die."""
        self.hurt.add(node)
        self.forget_stopped(node)
        pids = node.pids()
        rng.shuffle(pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            time.sleep(rng.choice([0, 0, 0.002, 0.02]))
        node.kill(lambda: self.cure(f"disk of {node.node}"))

    def forget_stopped(self, node: PairNode) -> None:
        self.stopped = {pid: owner for pid, owner in self.stopped.items() if owner is not node}

    # ---- cures ----

    def cure(self, which: str | None = None) -> None:
        """End lasting faults: all of them, or those of a name."""
        for name, cure in list(self.cures):
            if which in (None, name):
                self.cures.remove((name, cure))
                self.story.tell(f"over: {name}")
                cure()

    # ---- what can be seen ----

    @staticmethod
    def backing(node: PairNode) -> Path:
        """The file that holds a node's component, to be read whatever its disk is up to."""
        return node.disks[0].backing if node.disks else node.component()

    def metadata(self, node: PairNode) -> Metadata:
        """The block on the node's component, whoever runs."""

        def read() -> Metadata | None:
            with self.backing(node).open("rb") as component:
                block = component.read(METADATA_SIZE)
            try:
                return unpack(block, node.name())
            except DataError:  # it is being written
                return None

        found: Metadata = wait(read, f"{node.node} has a metadata block", 5)
        return found

    def behind(self, node: PairNode) -> str:
        """Why the node may lack what was acknowledged by the other one; empty: it has it all."""
        mine, other = self.metadata(node), self.metadata(self.pair.other(node))
        if mine.resuid != other.resuid:
            return "it was made anew"
        if mine.syncing or self.lacking(node):
            return "it is being synchronised"
        if (other.alone and other.prevrole is Role.PRIMARY) or other.pair.localcnt != mine.pair.remotecnt:
            return "the other one has written alone"
        return ""

    def lacking(self, node: PairNode) -> bool:
        """It is a target, and its disk does not say so: it has failed, or has lost what it was to say."""
        data = self.metadata(node)
        if self.usable(node) and self.role(node) == "secondary" and node.status()["syncing"] == 1:
            return True
        lost = boot.lost(node.rundir, node.name()) and not promotion.whole(data)
        return lost or bool(boot.outdated(node.rundir, node.name(), data.resuid))

    def connected(self) -> bool:
        """Both say that they have each other."""
        primary, resource = self.primary, "disk"
        return self.pair._connected(self.secondary, resource, "from") and self.pair._connected(primary, resource, "to")

    def settled(self) -> bool:
        """Connected, and what an outage has left is copied; clients may be writing. By the primary's log, which is not
        late, as hooks are."""
        name = re.escape(self.primary.name())
        words = r"worker \(.*\) (?!serves)|connected to .*|connection to .* lost|synchronisation complete"
        news = re.findall(rf"hastd started|{name}: (?:{words})", self.primary.said())
        return bool(news) and news[-1].endswith((" complete", " 0 extents to synchronise"))

    def role(self, node: PairNode) -> str:
        return str(node.status()["role"]) if self.usable(node) else "none"

    def describe(self, node: PairNode) -> str:
        """For the story."""
        data = self.metadata(node)
        flags = "".join(f" {flag}" for flag in ("alone", "syncing") if getattr(data, flag))
        return f"{node.node} {data.prevrole.text} {data.pair.localcnt}/{data.pair.remotecnt}{flags}"

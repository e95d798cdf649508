"""A node for tests: a hastd of its own in a directory of its own, and proof that nothing of it is left.

Invariants:
- Nothing is shared with other tests or other nodes: directory, addresses, names of resources and of their devices.
- Every process of the node, and every program that the node's `run()` starts, has HAST_TEST_ID in its environment:
  by that it is found, counted and, at the end, killed, and nothing else is.
- close() leaves nothing behind whatever happened before it; what hastd itself should have taken away and did not
  is returned as complaints.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hast.address import parse_address
from hast.control import CMD_SET_ROLE, CMD_STATUS, ControlRequest, Role, RoleReply
from hast.control_client import ControlClient
from hast.errors import HastError
from hast.nv import Nv
from tests.faultdisk import FaultDisk

ROOT = Path(__file__).resolve().parents[2]
SHM = Path("/dev/shm")
DEVDIR = Path("/dev/hast")
DEADLINE = 60.0  # seconds: for whatever is waited for
MIB = 1 << 20
PR_SET_PDEATHSIG = 1
PRCTL = ctypes.CDLL(None).prctl

ADDRESSES = 500  # of each process

_counter = itertools.count(1)
_addresses = itertools.count()


def eventually(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """The first true value of the condition; AssertionError when it has none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"in vain for {seconds:g} s: {what}"
        time.sleep(0.02)
    return value


def loopback(number: int) -> str:
    """One of 127.1.0.1 to 127.254.255.254."""
    number, low = divmod(number, 254)
    number, middle = divmod(number, 256)
    return f"127.{1 + number % 254}.{middle}.{1 + low}"


def own_address() -> str:
    """A loopback address that nobody else uses: no other test of this process, and none of another one."""
    return loopback(os.getpid() * ADDRESSES + next(_addresses))


def end_with_parent() -> None:
    """In the child: SIGTERM when the tests are killed, so that not even then a hastd is left."""
    PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def component_size(data: int) -> int:
    """Size of a file that `hastctl create` makes a component with so many bytes of data of (docs/disk-format.md)."""
    extents = -(-data // (2 * MIB)) + 1
    return 4096 + -(-extents // 4096) * 512 + data


class Node:
    """One node. `resources` maps short names to the size of their data in bytes; where files are meant, use `name()`,
    because what the resources are really called is unique on the machine.

    `memory`: components on /dev/shm instead of a disk. `conf` stands in the global section, `resource_conf` in
    every resource (or, as a dictionary, in those that it names), `node_conf` in each `on` section. `suffix`: two nodes
    with the same one have the same resources. A node starts with nothing running: create(), start().
    """

    def __init__(
        self,
        resources: dict[str, int] | None = None,
        *,
        node: str = "hasta",
        device: str = "nbd",
        memory: bool = True,
        conf: str = "",
        resource_conf: str | dict[str, str] = "",
        node_conf: str = "remote none",
        suffix: str = "",
    ) -> None:
        number = next(_counter)
        self.id = f"hast-test-{os.getpid()}-{number}"
        self.node = node
        self.address = own_address()
        self.resources = {"disk": 64 * MIB} if resources is None else resources
        self.directory = Path(tempfile.mkdtemp(prefix="hast-test-"))
        self.components = SHM / self.id if memory else self.directory / "components"
        self.components.mkdir(exist_ok=True)
        self.rundir = self.directory / "run"
        self.conf = self.directory / "hast.conf"
        self.log = self.directory / "hastd.log"
        self.hastd: subprocess.Popen[bytes] | None = None
        self.disks: list[FaultDisk] = []  # under components: FaultDisk.under()
        self.prefix: list[str] = []  # of hastd's command line: to run it in another network, for one
        self._suffix = suffix or f"t{os.getpid()}n{number}"
        self._shared = bool(suffix)
        self._disturbed = False  # killed: what is left then is the next start's to take away
        self.env = os.environ | {
            "HAST_NODE": node,
            "HAST_TEST_ID": self.id,
            "SPT_NOENV": "1",  # setproctitle is not to write its titles over the environment
        }
        for name in self.resources:
            with self.component(name).open("wb") as file:
                file.truncate(component_size(self.resources[name]))
        self.write_conf(device, conf, resource_conf, node_conf)

    def write_conf(self, device: str, conf: str, resource_conf: str | dict[str, str], node_conf: str) -> None:
        lines = [
            f"control {self.directory}/control",
            f"pidfile {self.directory}/pid",
            f"rundir {self.rundir}",
            f"listen tcp4://{self.address}",
            f"device {device}",
            conf,
        ]
        for name in self.resources:
            lines += [
                f"resource {self.name(name)} {{",
                resource_conf.get(name, "") if isinstance(resource_conf, dict) else resource_conf,
                f"on {self.node} {{",
                f"name {self.provname(name)}",
                f"local {self.component(name)}",
                node_conf,
                "}",
                "}",
            ]
        self.conf.write_text("\n".join(lines) + "\n")

    # ---- names ----

    def name(self, resource: str = "disk") -> str:
        """What the resource is called in hast.conf."""
        return f"{resource}-{self._suffix}"

    def provname(self, resource: str = "disk") -> str:
        """What its device is called: two nodes on one machine cannot have the same device."""
        return f"{self.name(resource)}-{self.node}" if self._shared else self.name(resource)

    def component(self, resource: str = "disk") -> Path:
        return self.components / resource

    def socket(self, resource: str = "disk") -> Path:
        return self.rundir / f"{self.name(resource)}.sock"

    def uri(self, resource: str = "disk") -> str:
        return f"nbd+unix:///?socket={self.socket(resource)}"

    def device(self, resource: str = "disk") -> Path:
        return DEVDIR / self.provname(resource)

    # ---- commands ----

    def run(
        self, *command: str | Path, check: bool = True, seconds: float = 200.0, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """A program with its output; AssertionError with all it said when check is on and it fails."""
        text = [str(word) for word in command]
        how.setdefault("env", self.env)
        done = subprocess.run(text, capture_output=True, text=True, timeout=seconds, check=False, **how)
        said = f"{' '.join(text)}\nexited with {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0 or not check, said
        return done

    def ctl(self, command: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """hastctl with this node's configuration."""
        return self.run(ROOT / "bin" / "hastctl", command, "-c", self.conf, *arguments, check=check)

    def create(self, *options: str, resource: str | None = None) -> None:
        """hastctl create, of all resources unless one is named; data sizes as they were asked for."""
        names = self.resources if resource is None else [resource]
        self.ctl("create", *options, *(self.name(name) for name in names))

    def role(self, role: str, resource: str = "disk", check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.ctl("role", role, self.name(resource), check=check)

    def status(self, resource: str = "disk") -> dict[str, Any]:
        """The resource's entry of `hastctl status --json`."""
        return dict(json.loads(self.ctl("status", "--json", self.name(resource), check=False).stdout)[0])

    def dump(self, resource: str = "disk") -> dict[str, Any]:
        """`hastctl dump --json` of the resource's component."""
        return dict(json.loads(self.ctl("dump", "--json", self.name(resource)).stdout)[0])

    # ---- the same without the program hastctl, which takes a fifth of a second each time ----

    def ask(self, request: ControlRequest) -> Nv:
        """hastd's reply. Raises HastError."""
        with ControlClient(parse_address(str(self.directory / "control")), DEADLINE) as client:
            client.connect()
            return client.request(request.to_nv())

    def answers(self) -> bool:
        try:
            self.ask(ControlRequest(CMD_STATUS, ("all",)))
        except HastError:
            return False
        return True

    def set_role(self, role: str, resource: str = "disk") -> None:
        """AssertionError, with the reason, when hastd refuses."""
        request = ControlRequest(CMD_SET_ROLE, (self.name(resource),), Role.from_text(role))
        entry = RoleReply.from_nv(self.ask(request)).entries[0]
        assert not entry.error, f"{self.node}: role {role}: {entry.errmsg}\n{self.said()}"

    # ---- life ----

    def start(self, *options: str) -> None:
        """Start hastd and wait until it answers."""
        with self.log.open("ab") as log:
            self.hastd = subprocess.Popen(
                [*self.prefix, ROOT / "bin" / "hastd", "-F", "-c", self.conf, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                preexec_fn=end_with_parent,
            )
        hastd = self.hastd

        def answers() -> bool:
            assert hastd.poll() is None, f"hastd exited with {hastd.returncode}:\n{self.said()}"
            return self.answers()

        eventually(answers, "hastd answers")
        self._disturbed = False

    def primary(self, *options: str) -> None:
        """All of it: components made, hastd started, every resource primary."""
        self.create()
        self.start(*options)
        for name in self.resources:
            self.set_role("primary", name)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End hastd in good order; its exit code."""
        assert self.hastd is not None
        self.hastd.send_signal(number)
        code = self.hastd.wait(DEADLINE)
        self.hastd = None
        return code

    def pids(self) -> list[int]:
        """Every living process of this node."""
        mark = f"HAST_TEST_ID={self.id}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue  # it is gone
            if mark in environment and state != "Z":
                found.append(int(entry.name))
        return found

    def titles(self) -> dict[int, str]:
        """Titles of the node's processes by pid."""
        titles = {}
        for pid in self.pids():
            try:
                titles[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()
            except OSError:
                continue
        return titles

    def kill(self, then: Callable[[], object] | None = None) -> None:
        """SIGKILL to every process of the node at once, until none is left. then: done once, when all of them have been
        sent it; such as to free those that a disk holds up."""
        self._disturbed = True

        def none_left() -> bool:
            nonlocal then
            pids = self.pids()
            # A power failure: nobody lives to see another one die, and goes on without it.
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            if then is not None:
                then()
                then = None
            return not pids

        eventually(none_left, f"processes of {self.id} die")
        if self.hastd is not None:
            self.hastd.wait(DEADLINE)
            self.hastd = None

    def said(self) -> str:
        """The last of what hastd logged."""
        return self.log.read_text(errors="replace")[-20000:] if self.log.exists() else ""

    # ---- what is left ----

    def mounts(self) -> list[str]:
        """Mount points below the node's directory, the innermost first."""
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return sorted((p for p in points if p.startswith(f"{self.directory}/")), reverse=True)

    def loops(self) -> list[str]:
        """Loop devices on files of the node's."""
        found = []
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            try:
                file = backing.read_text().strip()
            except OSError:
                continue  # detached meanwhile
            if file.startswith((f"{self.directory}/", f"{self.components}/")):
                found.append(f"/dev/{backing.parts[3]}")
        return found

    def leftovers(self) -> list[str]:
        """Everything that a hastd that has ended must not leave."""
        left = [f"process {pid}: {title}" for pid, title in self.titles().items()]
        own = {str(disk.point) for disk in self.disks}  # these are closed later
        left += [f"mount {point}" for point in self.mounts() if point not in own]
        left += [f"loop device {device}" for device in self.loops()]
        left += [f"device {self.device(name)}" for name in self.resources if self.device(name).is_symlink()]
        left += [f"shared memory {path}" for path in SHM.glob(f"*{self._suffix}*")]
        for place in (self.directory, self.rundir):
            if place.is_dir():
                left += [f"socket {path}" for path in place.iterdir() if path.is_socket()]
        if (self.directory / "pid").exists():
            left.append("the pidfile")
        return left

    def close(self) -> list[str]:
        """End the node and remove all of it. What it should have removed itself, and did not."""
        complaints = []
        for disk in self.disks:
            disk.heal()
        if self.hastd is not None:
            try:
                code = self.stop()
                if code != 0:
                    complaints.append(f"hastd exited with {code}")
            except subprocess.TimeoutExpired:
                complaints.append(f"hastd did not end within {DEADLINE:g} s of SIGTERM")
        if not self._disturbed:
            complaints += [f"left behind: {what}" for what in self.leftovers()]
        self.kill()
        for disk in self.disks:
            disk.close()
        self._sweep()
        return complaints

    def _sweep(self) -> None:
        """After the kill: mounts, loop devices and files, by force."""
        # A FUSE mount whose server is dead fails everybody who uses it: no umount or losetup can hang on it.
        for _ in range(3):
            for point in self.mounts():
                self.run("umount", "-l", point, check=False)
            for device in self.loops():
                self.run("losetup", "-d", device, check=False)
            if not self.mounts() and not self.loops():
                break
        for name in self.resources:
            self.device(name).unlink(missing_ok=True)
        shutil.rmtree(self.components, ignore_errors=True)
        shutil.rmtree(self.directory)


def complain(nodes: Sequence[Node]) -> list[str]:
    """Close them all, also when some cannot be closed; everything there is to complain of."""
    complaints: list[str] = []
    for node in nodes:
        try:
            complaints += [f"{node.id}: {text}" for text in node.close()]
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            complaints.append(f"{node.id}: {error}")
    return complaints

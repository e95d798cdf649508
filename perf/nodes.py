"""hast as a system of the comparison: pairs of nodes on one machine, with TCP over loopback between them.

Invariants:
- Settings are the defaults (compression hole, no checksum), but for the replication mode and, on a disk, O_DIRECT.
- After each job the components of both nodes are the same, byte for byte; those of a degraded pair are when its
  secondary has come back at the end.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from hast.device import fuse
from perf.errors import MissingError, PerfError
from perf.fio import Target
from perf.measure import System
from perf.scene import Scene
from tests.e2e.pair import Pair, PairNode, said
from tests.nbdclient import FLUSH, RawClient

MODES = ("fullsync", "memsync", "async")
DEGRADED = "degraded"
HAST = tuple(f"hast {where}{mode}" for where in ("", "fuse ") for mode in (*MODES, DEGRADED))


@contextmanager
def pair(sizes: dict[str, int], resource_conf: str | dict[str, str] = "", **how: object) -> Iterator[Pair]:
    """Two nodes in sync, `a` primary, default settings but for resource_conf; `how`: more arguments of Pair."""
    two = Pair(sizes, conf="", resource_conf=resource_conf, **how)  # type: ignore[arg-type]
    try:
        two.up()
        yield two
    except BaseException:
        print(said([two]), file=sys.stderr)
        raise
    finally:
        for complaint in two.close():
            print(complaint, file=sys.stderr)


def request(node: PairNode, resource: str, kind: int, offset: int = 0, data: bytes = b"") -> None:
    """A connection for one request, answered when this returns."""
    with RawClient(node.socket(resource)) as client:
        answer = client.do(kind, offset, len(data), 0, data)
    if answer.error:
        raise PerfError(f"{resource}: request {kind} failed with error {answer.error}")


def compare(two: Pair, resource: str, primary: PairNode | None = None) -> None:
    """PerfError unless the data of both components is the same, once all that was acknowledged is on both."""
    request(primary or two.a, resource, FLUSH)
    at = two.differing(resource)
    if at is not None:
        raise PerfError(f"{resource}: the components differ at offset {at}")


def build(names: Sequence[str], scene: Scene, stack: ExitStack) -> list[System]:
    """The systems of HAST that are named, running until the stack ends. MissingError: nothing runs."""
    systems = []
    for device, prefix in (("nbd", "hast "), ("fuse", "hast fuse ")):
        modes = [mode for mode in (*MODES, DEGRADED) if f"{prefix}{mode}" in names]
        if not modes:
            continue
        if device == "fuse" and (reason := fuse.usable()) is not None:
            raise MissingError(f"no block device can be made: {reason}")
        both = [mode for mode in modes if mode != DEGRADED]
        if both:
            two = stack.enter_context(pair(*resources(both, scene), device=device, memory=scene.memory))
            systems += [system(two, f"{prefix}{mode}", device, mode, scene) for mode in both]
        if DEGRADED in modes:
            systems.append(stack.enter_context(degraded(f"{prefix}{DEGRADED}", device, scene)))
    return systems


def named(mode: str, scene: Scene) -> list[str]:
    """The resources of a mode, one for each target."""
    return [f"{mode}{number}" for number in range(scene.targets)]


def resources(modes: Sequence[str], scene: Scene) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes and configuration of all resources."""
    sizes, conf = {}, {}
    directio = "" if scene.memory else f"\ndirectio {'on' if scene.direct else 'off'}"
    for mode in modes:
        for name in named(mode, scene):
            sizes[name] = scene.size
            conf[name] = f"replication {'memsync' if mode == DEGRADED else mode}{directio}"
    return sizes, conf


def target(node: PairNode, device: str, resource: str) -> Target:
    if device == "nbd":
        return Target("nbd", node.uri(resource))
    return Target("block", str(node.device(resource)))


def system(two: Pair, name: str, device: str, mode: str, scene: Scene) -> System:
    names = named(mode, scene)

    def check() -> None:
        for resource in names:
            if device == "fuse":  # the device's page cache is clean: every job writes with O_DIRECT
                subprocess.run(["sync", two.a.device(resource)], check=True, timeout=60)
            compare(two, resource)

    targets = tuple(target(two.a, device, resource) for resource in names)
    return System(name, targets, scene.size, lambda: two.a.pids() + two.b.pids(), check)


@contextmanager
def degraded(name: str, device: str, scene: Scene) -> Iterator[System]:
    """A pair whose secondary has been stopped: the primary goes on alone, and marks what it writes."""
    with pair(*resources([DEGRADED], scene), device=device, memory=scene.memory) as two:
        two.b.stop()
        names = named(DEGRADED, scene)
        yield System(name, tuple(target(two.a, device, r) for r in names), scene.size, two.a.pids)
        two.b.start()
        for resource in names:
            two.b.set_role("secondary", resource)
            two.wait_in_sync(two.a, resource)
            compare(two, resource)

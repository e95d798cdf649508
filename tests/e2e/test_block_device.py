"""/dev/hast/<name>: a block device that file systems trust, there exactly while the resource is served."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hast.device import fuse
from tests import tools
from tests.e2e.node import DEADLINE, MIB, Node, eventually
from tests.e2e.test_ordering import watched

MakeNode = Callable[..., Node]
pytestmark = pytest.mark.root


@pytest.fixture
def make_block(make_node: MakeNode) -> Iterator[MakeNode]:
    """Makes nodes with a block device for each resource; the arguments are Node's. A watchdog aborts the channels of
    these nodes, and of nobody else, when a test takes so long that somebody must be hanging on one."""
    tools.need_root()
    reason = fuse.usable()
    if reason is not None:
        pytest.skip(reason)
    nodes: list[Node] = []

    def make(**keywords: object) -> Node:
        nodes.append(make_node(device="fuse", **keywords))
        return nodes[-1]

    def abort() -> None:
        for node in nodes:
            for resource in node.resources:
                fuse.abort(node.rundir, node.name(resource))

    watchdog = threading.Timer(3 * DEADLINE, abort)
    watchdog.daemon = True
    watchdog.start()
    yield make
    watchdog.cancel()


@pytest.fixture
def block(make_block: MakeNode) -> Node:
    """One node, primary, with a block device of 64 MiB."""
    node = make_block()
    node.primary()
    return node


def fio(node: Node, *arguments: str) -> list[str]:
    tools.need("fio")
    return [
        str(tools.find("fio")),
        "--name=test",
        f"--filename={node.device()}",
        "--direct=1",
        "--ioengine=libaio",
        "--minimal",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        *arguments,
    ]


@contextmanager
def mounted(node: Node, options: str = "rw") -> Iterator[Path]:
    """The file system on the device, on a directory of the node's."""
    point = node.directory / "mnt"
    point.mkdir(exist_ok=True)
    node.run("mount", "-o", options, node.device(), point)
    try:
        yield point
    finally:
        node.run("umount", point)
        # A mount namespace that another test has made meanwhile has the mount as well, until it ends.
        eventually(lambda: not in_use(node.device()), f"{node.device()} is not mounted anywhere any more")


def in_use(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return True
    return False


def tree_digest(root: Path) -> str:
    """A digest of all names, sizes and contents below a directory."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(str(path.relative_to(root)).encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def write_tree(root: Path, seed: int) -> None:
    """Three hundred files of up to 256 KiB in thirty directories, some of them removed again."""
    rng = random.Random(seed)
    for n in range(300):
        path = root / f"d{n % 30}" / f"f{n}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(256 << 10)))
    for n in range(0, 300, 3):
        (root / f"d{n % 30}" / f"f{n}").unlink()


CHECKS = {"ext4": ("e2fsck", "-f", "-n"), "xfs": ("xfs_repair", "-n")}


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_file_system_is_made_written_trimmed_and_clean(make_block: MakeNode, kind: str) -> None:
    tools.need(f"mkfs.{kind}", "fstrim")
    node = make_block(resources={"disk": 512 * MIB})
    node.primary()
    device = node.device()
    node.run(str(tools.find(f"mkfs.{kind}")), "-q", device)
    with mounted(node) as point:
        write_tree(point, seed=1)
        (point / "large").write_bytes(bytes(64 * MIB))
        os.sync()
        (point / "large").unlink()
        node.run("fstrim", point)
        digest = tree_digest(point)
    check = str(tools.find(CHECKS[kind][0]))
    node.run(check, *CHECKS[kind][1:], device)
    deletes = node.status()["stat_delete"]
    assert int(deletes) > 0
    # The same data after the device has gone and come back.
    node.role("init")
    node.role("primary")
    node.run(check, *CHECKS[kind][1:], device)
    with mounted(node, "ro") as point:
        assert tree_digest(point) == digest


def test_verified_writes_at_depth_32(block: Node) -> None:
    block.run(*fio(block, "--rw=randwrite", "--bsrange=512-256k", "--iodepth=32", "--size=64m"))


def test_device_and_nbd_show_the_same_data(block: Node) -> None:
    tools.need("qemu-img")
    block.run(*fio(block, "--rw=randwrite", "--bs=64k", "--iodepth=8", "--size=16m"))
    block.run("qemu-img", "compare", "-f", "raw", "-F", "raw", block.uri(), block.device())


def test_fsync_reaches_fdatasync(block: Node, tmp_path: Path) -> None:
    tools.need("strace")
    fd = os.open(block.device(), os.O_RDWR)
    try:
        with watched(block, tmp_path) as finish:
            os.pwrite(fd, b"\xa5" * 4096, 4 * MIB)
            os.fsync(fd)
            calls = finish().calls
    finally:
        os.close(fd)
    writes = [n for n, (name, _, data) in enumerate(calls) if name == "pwrite64" and data.startswith(b"\xa5")]
    flushes = [n for n, (name, _, _) in enumerate(calls) if name == "fdatasync"]
    assert writes and flushes
    assert writes[-1] < flushes[-1]


# ---- when it is there ----


def assert_there(node: Node) -> None:
    assert node.device().is_symlink()
    info = node.device().stat()
    assert stat.S_ISBLK(info.st_mode)
    with node.device().open("rb", buffering=0) as device:
        assert device.seek(0, os.SEEK_END) == node.resources["disk"]
        device.seek(0)
        assert len(device.read(4096)) == 4096


def assert_gone(node: Node) -> None:
    assert not os.path.lexists(node.device())
    assert node.mounts() == []
    assert node.loops() == []


def test_there_as_primary_and_gone_as_init(make_block: MakeNode) -> None:
    node = make_block()
    node.create()
    node.start()
    assert_gone(node)
    node.role("primary")
    assert_there(node)
    node.role("init")
    assert_gone(node)
    node.role("primary")
    assert_there(node)


def test_gone_when_hastd_is_stopped(block: Node) -> None:
    assert_there(block)
    assert block.stop() == 0
    assert_gone(block)


def test_gone_after_a_kill_and_the_next_start(block: Node) -> None:
    with block.device().open("r+b", buffering=0) as device:
        device.write(b"\x5a" * 4096)
        os.fsync(device.fileno())
    block.kill()
    block.start()
    assert_gone(block)
    block.role("primary")
    assert_there(block)
    with block.device().open("rb", buffering=0) as device:
        assert device.read(4096) == b"\x5a" * 4096


def test_role_init_with_a_mounted_file_system(block: Node) -> None:
    """What uses the device gets errors, hastd goes on, and the next primary has a new device."""
    tools.need("mkfs.ext4")
    block.run("mkfs.ext4", "-q", block.device())
    with mounted(block) as point:
        (point / "file").write_bytes(b"x" * 4096)
        block.role("init")
        assert not os.path.lexists(block.device())
        block.role("primary")
        assert_there(block)
    eventually(lambda: len(block.loops()) == 1, "the old loop device is free")


# ---- what its users do not notice ----


def stage_pid(node: Node, stage: str) -> int:
    """The process of a stage; 0 while there is none."""
    return next((pid for pid, title in node.titles().items() if title.endswith(f"): {stage}")), 0)


@pytest.mark.parametrize("stage", ["ggate", "disk"])
def test_user_does_not_notice_that_a_stage_was_killed(block: Node, stage: str) -> None:
    command = fio(block, "--rw=randwrite", "--bsrange=4k-128k", "--iodepth=16", "--size=64m", "--rate=10m")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as writer:
        for _ in range(3):
            pid = int(eventually(lambda: stage_pid(block, stage), f"a {stage} stage"))
            written = block.status()["stat_write"]
            eventually(lambda written=written: block.status()["stat_write"] != written, "something is written")
            assert writer.poll() is None, writer.communicate()[0]
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: stage_pid(block, stage) not in (0, pid), f"a new {stage} stage")
        output, _ = writer.communicate(timeout=DEADLINE)
    assert writer.returncode == 0, output


def test_device_is_back_after_its_worker_was_killed(block: Node) -> None:
    pid = int(block.status()["workerpid"])
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: block.status()["status"] is not None and block.status()["workerpid"] != pid, "a new worker")
    eventually(lambda: block.device().is_symlink() and block.loops(), "a new device")
    assert_there(block)
    assert len(block.loops()) == len(block.mounts()) == 1
    assert "mounted already" not in block.said()


def test_two_resources_have_a_device_each(make_block: MakeNode) -> None:
    node = make_block(resources={"one": 8 * MIB, "two": 16 * MIB})
    node.primary()
    sizes = {}
    for name in node.resources:
        with node.device(name).open("rb") as device:
            sizes[name] = device.seek(0, os.SEEK_END)
    assert sizes == node.resources


def test_no_device_where_none_is_wanted(make_node: MakeNode) -> None:
    node = make_node(device="nbd")
    node.primary()
    assert_gone(node)

"""The keeper: real processes that hold real descriptors; hastd's side of them is played by the tests."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hast import keeper as keeper_module
from hast import keeping
from hast.config import parse
from hast.daemon import Daemon
from hast.device import fuse
from hast.errors import HastError
from hast.keeper import SOCKET
from hast.keeping import Keeping
from tests import tools
from tests.e2e.node import eventually

Message = dict[str, Any]


class Scene:
    """Keepers in a directory; all of them end with the test."""

    def __init__(self, rundir: Path) -> None:
        self.rundir = rundir
        self.processes: list[subprocess.Popen[bytes]] = []

    def keeper(self, limit: float = 60.0) -> socket.socket:
        """Start one; the connection of the hastd that has started it."""
        sock, process = keeping.start(self.rundir, limit)
        self.processes.append(process)
        return sock

    def ended(self) -> bool:
        return self.processes[-1].poll() is not None

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    found = Scene(tmp_path)
    yield found
    found.close()


def tell(sock: socket.socket, message: Message, *fds: int) -> None:
    socket.send_fds(sock, [json.dumps(message).encode()], list(fds))


def keep(sock: socket.socket, name: str, fd: int | None = None, **record: Any) -> None:
    tell(sock, {"cmd": "keep", "name": name, "record": {"role": "primary", **record}}, *([] if fd is None else [fd]))


def find(rundir: Path) -> Keeping:
    """What the next hastd finds."""
    found = Keeping(rundir)
    found.find()
    return found


def close(found: Keeping, leave: bool = True) -> None:
    asyncio.run(found.close(leave))


def test_next_hastd_finds_roles_and_descriptors(scene: Scene) -> None:
    reading, writing = os.pipe()
    first = scene.keeper()
    keep(first, "one", writing, device={"provname": "one"})
    keep(first, "two")
    keep(first, "gone")
    tell(first, {"cmd": "drop", "name": "gone"})
    os.close(writing)
    first.close()
    found = find(scene.rundir)
    assert found.kept["one"].device == {"provname": "one"} and found.kept["two"].fd == -1
    assert found.devices() == {"one"} and set(found.kept) == {"one", "two"}
    os.write(found.kept["one"].fd, b"still open")
    assert os.read(reading, 100) == b"still open"
    close(found, leave=False)
    assert os.read(reading, 100) == b"", "nobody has it any more"
    assert scene.ended() or scene.processes[-1].wait(10) == 0
    assert not (scene.rundir / SOCKET).exists()
    os.close(reading)


def test_ends_when_nothing_is_kept_and_hastd_is_gone(scene: Scene) -> None:
    sock = scene.keeper()
    keep(sock, "one")
    tell(sock, {"cmd": "drop", "name": "one"})
    sock.close()
    eventually(scene.ended, "it ends")
    assert not (scene.rundir / SOCKET).exists()


def test_ends_when_no_hastd_comes_back(scene: Scene) -> None:
    sock = scene.keeper(limit=0.3)
    reading, writing = os.pipe()
    keep(sock, "one", writing)
    os.close(writing)
    sock.close()
    assert os.read(reading, 1) == b""
    os.close(reading)
    eventually(scene.ended, "it ends")


def test_hastds_that_die_while_they_start_do_not_count(scene: Scene) -> None:
    """The time goes on from the last one that worked."""
    sock = scene.keeper(limit=1.0)
    keep(sock, "one")
    sock.close()

    def died() -> bool:
        if (scene.rundir / SOCKET).exists() and not scene.ended():
            try:
                close(find(scene.rundir))
            except HastError:
                pass  # it was just ending
        return scene.ended()

    eventually(died, "it ends although one hastd after the other has come")


def test_hastd_that_has_come_has_all_the_time_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody ends the devices under the one that is about to serve them; when it dies, the old time counts again."""
    clock = [0.0]
    monkeypatch.setattr(keeper_module, "now", lambda: clock[0])
    (ours, theirs), (next_ours, next_theirs), (listener, other) = (socket.socketpair() for _ in range(3))
    with ours, theirs, next_ours, next_theirs, listener, other:
        keeper = keeper_module.Keeper(listener, theirs, 30.0)
        keeper.lost()
        clock[0] = 25.0
        assert keeper.left() == 5.0
        keeper.main = next_theirs
        keeper.answer()
        clock[0] = 50.0
        assert keeper.left() == 5.0
        keeper.lost()
        assert keeper.left() == -20.0


def test_device_of_a_secondary_is_let_go(scene: Scene) -> None:
    """It was about to become primary when hastd was started anew: nobody is going to serve that device."""
    first = scene.keeper()
    reading, writing = os.pipe()
    keep(first, "data", writing, role="secondary", device={"provname": "data"})
    os.close(writing)
    first.close()
    text = f"rundir {scene.rundir}\nresource data {{ local /nowhere\n on here {{ remote none }} }}"
    daemon = Daemon(parse(text, "hast.conf", ["here"]), True, 0)
    daemon._find_kept()
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert daemon._keeping.kept["data"].role == "secondary" and daemon._keeping.devices() == set()
    close(daemon._keeping, leave=False)


def test_waits_again_for_a_hastd_that_worked(scene: Scene) -> None:
    sock = scene.keeper(limit=60)
    keep(sock, "one")
    sock.close()

    async def works() -> None:
        found = find(scene.rundir)
        found.start()  # says that it is here
        await found.close(leave=True)

    asyncio.run(works())
    found = find(scene.rundir)
    assert set(found.kept) == {"one"}
    close(found, leave=False)


def test_messages_that_make_no_sense(scene: Scene) -> None:
    """They cost nothing that is kept, and leave no descriptor open."""
    sock = scene.keeper()
    keep(sock, "one")
    reading, writing = os.pipe()
    bad = (b"x", b"[]", b"{}", b'{"cmd": "keep", "name": "x", "record": 3}', b'{"cmd": "keep"}', b'{"cmd": "drop"}')
    for data in bad:
        socket.send_fds(sock, [data], [writing])
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)
    sock.close()
    found = find(scene.rundir)
    assert set(found.kept) == {"one"}
    close(found, leave=False)


def test_keeper_of_another_version_is_replaced(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    sock = scene.keeper()
    keep(sock, "one")
    sock.close()
    monkeypatch.setattr(keeping, "VERSION", 99)

    async def works() -> None:
        found = find(scene.rundir)
        assert scene.processes[0].wait(10) == 0
        assert set(found.kept) == {"one"}
        found.start()
        await found.close(leave=True)

    asyncio.run(works())
    monkeypatch.undo()
    found = find(scene.rundir)
    assert set(found.kept) == {"one"}
    close(found, leave=False)


def test_keeper_that_hangs_holds_nobody_up_for_long(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "FIND_SECONDS", 0.2)
    path = scene.rundir / SOCKET
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(path))
        silent.listen(1)
        with pytest.raises(HastError, match="does not say what it has"):
            find(scene.rundir)


@pytest.mark.parametrize("noticed", [False, True])
def test_a_restart_in_place_leaves_a_keeper_also_when_it_has_just_died(tmp_path: Path, noticed: bool) -> None:
    """hastd may have seen its end and wait before it starts another one, or not have seen it yet."""

    async def life() -> None:
        hastd = Keeping(tmp_path)
        hastd.start()
        hastd.role("one", "primary")
        first = hastd._pid
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        while noticed and hastd._retry is None:
            await asyncio.sleep(0)
        await hastd.close(leave=True)

    asyncio.run(life())
    found = find(tmp_path)
    assert found.kept["one"].role == "primary"
    close(found, leave=False)
    assert not (tmp_path / SOCKET).exists()


def test_another_user_is_not_heard(scene: Scene) -> None:
    tools.need_root()
    tools.need("setpriv")
    sock = scene.keeper()
    keep(sock, "one")
    sock.close()
    assert (scene.rundir / SOCKET).stat().st_mode & 0o777 == 0o600
    (scene.rundir / SOCKET).chmod(0o666)
    scene.rundir.chmod(0o755)
    for parent in scene.rundir.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n"
        "s.send(b'{\"cmd\": \"hello\"}'); sys.exit(len(s.recv(100)) > 0)"
    )
    command = ["setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c", program]
    done = subprocess.run([*command, str(scene.rundir / SOCKET)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "BrokenPipe" in done.stderr or "ConnectionReset" in done.stderr, done.stderr
    found = find(scene.rundir)
    assert set(found.kept) == {"one"}
    close(found, leave=False)


@pytest.mark.root
def test_users_of_a_device_get_errors_when_no_hastd_comes_back(scene: Scene) -> None:
    """Also while another process still has the channel open."""
    tools.need_root()
    reason = fuse.usable()
    if reason is not None:
        pytest.skip(reason)
    sock = scene.keeper(limit=0.3)
    channel = fuse.open_channel()
    try:
        point = fuse.mount(channel, scene.rundir, "one")
        keep(sock, "one", channel, mount=str(point))
        sock.close()
        user = os.open(point, os.O_PATH)
        eventually(scene.ended, "it ends")
        # Nobody serves it, so this would wait for ever.
        with pytest.raises(OSError) as found:
            os.close(os.open(point, os.O_RDONLY))
        os.close(user)
        assert found.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    finally:
        fuse.abort(scene.rundir, "one")
        fuse.detach(scene.rundir, "one", "one", scene.rundir)
        os.close(channel)

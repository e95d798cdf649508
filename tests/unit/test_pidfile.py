"""The pidfile: held for life, whatever its name leads to meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hast.errors import SystemCallError, TemporaryError
from hast.pidfile import PidFile
from tests.tools import ROOT


def held(path: Path) -> PidFile:
    pidfile = PidFile(str(path))
    pidfile.acquire()
    pidfile.write()
    return pidfile


def test_names_the_process_and_is_removed(tmp_path: Path) -> None:
    pidfile = held(tmp_path / "pid")
    assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
    pidfile.remove()
    assert not (tmp_path / "pid").exists()


def test_second_one_is_told_who_has_it(tmp_path: Path) -> None:
    first = held(tmp_path / "pid")
    with pytest.raises(TemporaryError, match=f"another hastd is running: process {os.getpid()} holds"):
        PidFile(str(tmp_path / "pid")).acquire()
    first.remove()
    held(tmp_path / "pid").remove()


def test_stale_file_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("123456789 and more\n")
    pidfile = held(tmp_path / "pid")
    assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
    pidfile.remove()


@pytest.mark.parametrize("content", ["", "garbage\n"])
def test_holder_that_has_not_written_yet(tmp_path: Path, content: str) -> None:
    first = PidFile(str(tmp_path / "pid"))
    first.acquire()
    (tmp_path / "pid").write_text(content)
    with pytest.raises(TemporaryError, match="a process that is just starting"):
        PidFile(str(tmp_path / "pid")).acquire()
    first.remove()


def test_lock_survives_daemonising_and_ends_with_the_process(tmp_path: Path) -> None:
    program = """if True:
        import os, sys
        from hast.pidfile import PidFile
        pidfile = PidFile(sys.argv[1])
        pidfile.acquire()
        if os.fork():
            os._exit(0)
        pidfile.write()
        print("ready", flush=True)
        sys.stdin.read()
        os._exit(1)
    """
    path = tmp_path / "pid"
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.wait()  # the parent is gone, the daemon is not
        with pytest.raises(TemporaryError, match=f"process {path.read_text().strip()} holds"):
            PidFile(str(path)).acquire()
        process.stdin.close()
        assert process.stdout.read() == b""  # the daemon is gone
    held(path).remove()


def test_file_of_somebody_else_is_not_unlinked(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    first = held(path)
    path.unlink()
    second = held(path)
    first.remove()
    assert path.read_text() == f"{os.getpid()}\n"
    second.remove()


def test_what_cannot_be_a_pidfile(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("directory", "fifo", "link", "missing/pid"):
        with pytest.raises(SystemCallError, match=f"pidfile {tmp_path}/{name}"):
            PidFile(str(tmp_path / name)).acquire()
    assert not (tmp_path / "target").exists()

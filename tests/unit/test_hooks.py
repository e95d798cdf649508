"""Hooks: nothing waits for them, their order is kept, and what goes wrong with them is said."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hast.hooks import QUEUE_LIMIT, Hooks

DEADLINE = 20.0


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.01)


def run(hooks: Hooks, body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        try:
            await body()
        finally:
            await hooks.close()

    asyncio.run(main())


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_arguments_order_and_surroundings(tmp_path: Path) -> None:
    hooks = Hooks()
    out = tmp_path / "out"
    secret = os.open(tmp_path / "secret", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(secret, True)
    program = script(
        tmp_path / "hook",
        f'echo "$@" >>{out}; fds=$(readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2); open=$(ls -l /proc/$$/fd);'
        f' echo "$fds" >{tmp_path}/fds; echo "$open" >{tmp_path}/open;'
        f" read -r _ _ _ _ _ sid _ </proc/$$/stat; echo $sid $$ >{tmp_path}/sid",
    )

    async def body() -> None:
        for n in range(5):
            hooks.run(program, ("role", "data", "init", str(n)))
        hooks.run(None, ("role", "data", "init", "never"))
        await until(lambda: len(lines(out)) == 5 and hooks.running == 0)

    run(hooks, body)
    os.close(secret)
    assert lines(out) == [f"role data init {n}" for n in range(5)]
    assert lines(tmp_path / "fds") == ["/dev/null"] * 3
    assert "hook" in (tmp_path / "open").read_text() and "secret" not in (tmp_path / "open").read_text()
    session, pid = lines(tmp_path / "sid")[0].split()
    assert session == pid


def test_failures_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hooks = Hooks()
    (tmp_path / "text").write_text("not executable")

    async def body() -> None:
        hooks.run(script(tmp_path / "three", "exit 3"), ("role", "data", "init", "primary"))
        hooks.run(str(tmp_path / "absent"), ("connect", "data"))
        hooks.run(str(tmp_path / "text"), ("connect", "data"))
        hooks.run(script(tmp_path / "killed", "kill -9 $$"), ("disconnect", "data"))
        await until(lambda: len(caplog.messages) == 4)

    run(hooks, body)
    assert [message.replace(str(tmp_path), "") for message in caplog.messages] == [
        "data: hook '/three role data init primary' failed with exit status 3",
        "data: hook '/absent connect data' cannot be started: No such file or directory",
        "data: hook '/text connect data' cannot be started: Permission denied",
        "data: hook '/killed disconnect data' was killed by signal 9",
    ]


def test_one_that_runs_long_is_reported_waited_for_no_longer_and_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = Hooks(report_seconds=0.2, kill_seconds=0.6)
    # The child must die with its parent, or the group was not killed.
    slow = script(tmp_path / "slow", f"sleep 1000 & echo $! >{tmp_path}/child; wait")

    async def body() -> None:
        hooks.run(slow, ("syncdone", "data"))
        hooks.run(script(tmp_path / "next", f"touch {tmp_path}/next-ran"), ("role", "data", "a", "b"))
        await until(lambda: (tmp_path / "next-ran").exists())
        assert hooks.running >= 1, "the next one starts although the slow one still runs"
        await until(lambda: hooks.running == 0)

    run(hooks, body)
    text = "\n".join(caplog.messages)
    assert text.count("has been running for 0.2 s") == 1 and text.count("has been running for 0.4 s") == 1
    assert "has run for 0.6 s, killing it" in text and "was killed by signal 9" in text
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]


def test_resources_do_not_wait_for_each_other(tmp_path: Path) -> None:
    hooks = Hooks()
    slow = script(tmp_path / "slow", "sleep 1000")

    async def body() -> None:
        hooks.run(slow, ("role", "one", "a", "b"))
        hooks.run(script(tmp_path / "quick", f"touch {tmp_path}/ran"), ("role", "two", "a", "b"))
        await until(lambda: (tmp_path / "ran").exists())

    run(hooks, body)


def test_queue_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hooks = Hooks()
    slow = script(tmp_path / "slow", "sleep 1000")

    async def body() -> None:
        for _ in range(QUEUE_LIMIT + 5):
            hooks.run(slow, ("role", "data", "a", "b"))
        assert sum("is not run" in message for message in caplog.messages) == 5
        await until(lambda: hooks.running == 1)

    run(hooks, body)


def test_close_ends_what_runs_also_what_ignores_sigterm(tmp_path: Path) -> None:
    hooks = Hooks()
    pids = tmp_path / "pids"
    stubborn = script(tmp_path / "stubborn", f"trap '' TERM; echo $$ >>{pids}; while :; do sleep 0.1; done")

    async def body() -> None:
        hooks.run(stubborn, ("role", "one", "a", "b"))
        hooks.run(stubborn, ("role", "two", "a", "b"))
        await until(lambda: len(lines(pids)) == 2)

    run(hooks, body)
    for pid in lines(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)

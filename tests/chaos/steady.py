"""A client that writes steadily and knows how long it had to wait: python -m tests.chaos.steady FILE

It writes one block after the other to the file, past the page cache, over and over, each block with a number, and knows
the longest time between two writes that were acknowledged. For each line on its standard input it writes one of JSON to
its standard output: how many writes, the longest pause in seconds since the last line, and the error that ended it. At
the end of its input it reads everything back, and says in a last line whether all of it is there.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.e2e.node import eventually
from tests.tools import ROOT

BLOCK = 4096
BLOCKS = 256


class Steady:
    """In its own process; see serve()."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        if stat.S_ISREG(os.fstat(self.fd).st_mode):
            os.posix_fallocate(self.fd, 0, BLOCKS * BLOCK)
            os.fsync(self.fd)
        self.writes, self.longest, self.error = 0, 0.0, ""
        self.last = time.monotonic()
        self.stop = False

    def write(self) -> None:
        with mmap.mmap(-1, BLOCK) as buffer:
            while not self.stop:
                buffer[:] = (self.writes + 1).to_bytes(8, "little") * (BLOCK // 8)
                try:
                    done = os.pwrite(self.fd, buffer, self.writes % BLOCKS * BLOCK)
                except OSError as error:
                    self.error = str(error)
                    return
                if done != BLOCK:
                    self.error = f"{done} bytes of {BLOCK} were written"
                    return
                now = time.monotonic()
                self.longest, self.last = max(self.longest, now - self.last), now
                self.writes += 1

    def report(self) -> dict[str, Any]:
        longest = max(self.longest, time.monotonic() - self.last)
        self.longest = 0.0
        return {"writes": self.writes, "longest": longest, "error": self.error}

    def check(self) -> str:
        """What is wrong with what can be read back; empty when nothing is."""
        with mmap.mmap(-1, BLOCK) as buffer:
            for number in range(max(0, self.writes - BLOCKS), self.writes):
                os.preadv(self.fd, [buffer], number % BLOCKS * BLOCK)
                if buffer[:] != (number + 1).to_bytes(8, "little") * (BLOCK // 8):
                    return f"write {number + 1} was acknowledged and is not there"
        return ""

    def serve(self) -> None:
        thread = threading.Thread(target=self.write, daemon=True)
        thread.start()
        for _ in sys.stdin:
            print(json.dumps(self.report()), flush=True)
        self.stop = True
        thread.join()
        print(json.dumps({**self.report(), "error": self.error or self.check()}), flush=True)


class SteadyProcess:
    """The program, from outside."""

    def __init__(self, file: Path, env: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.chaos.steady", str(file)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=env)

    def ask(self) -> dict[str, Any]:
        """Its report. AssertionError when it met an error."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def progress(self) -> float:
        """Returns when it has gone on: the longest pause since it was asked last."""
        longest: list[float] = []
        writes = []

        def more() -> bool:
            report = self.ask()
            longest.append(report["longest"])
            writes.append(report["writes"])
            return bool(writes[-1] > writes[0])

        eventually(more, "the steady client gets answers")
        return max(longest)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the steady client has ended: {self.process.wait()}"
        report: dict[str, Any] = json.loads(line)
        assert not report["error"], f"the steady client met: {report['error']}"
        return report

    def end(self) -> dict[str, Any]:
        """Have it read back what it wrote; its last report."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        report = self._answer()
        self.process.wait(60)
        return report


if __name__ == "__main__":
    Steady(sys.argv[1]).serve()

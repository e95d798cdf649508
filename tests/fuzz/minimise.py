"""Keeps of a corpus what reaches something that nothing smaller reaches, at most LIMIT bytes of it."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz import build
from tests.fuzz.targets import Target, checker

LIMIT = 100_000  # bytes of all inputs of a target
TIMEOUT = 900
ROOT = Path(__file__).resolve().parents[2]


def minimise(target: Target, corpora: Iterable[Path]) -> list[bytes]:
    """The inputs to keep, the smallest first."""
    paths = [path for corpus in corpora if corpus.is_dir() for path in corpus.iterdir()]
    files = sorted({path.read_bytes() for path in paths}, key=_order)
    kept = _merge(target, files) if target.kind == "c" else _by_lines(target, files)
    total, result = 0, []
    for data in sorted(kept, key=_order):
        total += len(data)
        if total > LIMIT:
            break
        result.append(data)
    return result


def _order(data: bytes) -> tuple[int, bytes]:
    return len(data), data


def store(target: Target, inputs: Iterable[bytes]) -> None:
    """Put them into the place of the committed corpus."""
    shutil.rmtree(target.corpus, ignore_errors=True)
    target.corpus.mkdir(parents=True)
    for data in inputs:
        (target.corpus / hashlib.sha1(data).hexdigest()[:16]).write_bytes(data)


def _merge(target: Target, files: list[bytes]) -> list[bytes]:
    """libFuzzer knows best what its counters say."""
    with tempfile.TemporaryDirectory(prefix="hast-fuzz-") as name:
        old, new = Path(name, "old"), Path(name, "new")
        old.mkdir()
        new.mkdir()
        for n, data in enumerate(files):
            (old / f"{n:06}").write_bytes(data)
        command = [str(build.program(target)), "-merge=1", "-set_cover_merge=0", str(new), str(old)]
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT, cwd=name)
        return [path.read_bytes() for path in new.iterdir()]


def _by_lines(target: Target, files: list[bytes]) -> list[bytes]:
    """Lines of hast/ that follow each other, as the smallest inputs reach them."""
    check, seen, kept = checker(target.name), set(), []
    logging.disable(logging.CRITICAL)
    for data in files:
        reached = _reached(check, data)
        if not reached <= seen:
            seen |= reached
            kept.append(data)
    return kept


def _reached(check: Any, data: bytes) -> set[tuple[str, int, int]]:
    reached: set[tuple[str, int, int]] = set()
    prefix = str(ROOT / "hast")

    def tracer(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(prefix):
            return None
        last = frame.f_lineno

        def local(inner: FrameType, kind: str, _: Any) -> Any:
            nonlocal last
            if kind == "line":
                reached.add((name, last, inner.f_lineno))
                last = inner.f_lineno
            return local

        return local

    sys.settrace(tracer)
    try:
        check(data)
    finally:
        sys.settrace(None)
    return reached

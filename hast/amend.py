"""Changes the metadata of a component that no worker has, on an administrator's word.

Invariants:
- The component is locked meanwhile: where a worker has it, this fails.
- The change is durable when this returns, whatever `metaflush` is.
- A disk that hangs holds up nobody else. Nothing can end a thread that waits for one, and hastd can neither end nor be
  started anew with such a thread in it: so a process of its own does it, which nobody has to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hast import boot, promotion
from hast.channel import Channel, ChannelClosedError, Message
from hast.config import Resource
from hast.errors import HastError, SystemCallError, TemporaryError
from hast.metadata import Metadata
from hast.spawner import resource_from_dict, resource_to_dict

LOCK_SECONDS = 2.0  # for the kernel to let go of the component of a worker that has just ended
DISK_SECONDS = 20.0  # for the disk to take it


def _force(metadata: Metadata) -> Metadata:
    return promotion.forced(metadata, secrets.randbits(64))


def _force_lost(metadata: Metadata) -> Metadata:
    """The same for a component that is noted to lack something, which could not be stored (hast/opening.py)."""
    if not (metadata.syncing or promotion.whole(metadata)):
        metadata = replace(metadata, syncing=True, unsaid=True)
    return _force(metadata)


CHANGES = {"discard": promotion.discarding, "force": _force, "force, lost": _force_lost}


async def amend(resource: Resource, rundir: Path, change: str) -> bool:
    """Make one of CHANGES; whether that has changed anything. Raises HastError; nothing has changed then, or what was
    asked for has."""
    ours, process = _start(resource, rundir, change)
    try:
        async with asyncio.timeout(DISK_SECONDS):
            received = await ours.arecv()
    except TimeoutError:
        raise TemporaryError(f"{resource.name}: component {resource.localpath} does not answer") from None
    finally:
        # It is not killed: a flush that fails it later would be unheard. It ends when the disk lets it go.
        ours.close()
        threading.Thread(target=process.wait, name=f"metadata of {resource.name}", daemon=True).start()
    if received is None:
        raise TemporaryError(f"{resource.name}: the process that was to change its metadata has died")
    answer = received[0]
    if "error" in answer:
        error = HastError(str(answer["error"]))
        error.exit_code = int(answer.get("code", os.EX_SOFTWARE))
        raise error
    return bool(answer["changed"])


def _start(resource: Resource, rundir: Path, change: str) -> tuple[Channel, subprocess.Popen[bytes]]:
    """The process, and where it says what has come of it: all that it has of hastd. Raises SystemCallError."""
    ours, theirs = Channel.pair(f"{resource.name}: changing its metadata")
    settings = {
        "path": sys.path,
        "channel": theirs.fileno(),
        "resource": resource_to_dict(resource),
        "change": change,
        "note": str(boot.note(rundir, resource.name)),
    }
    program = (
        "import json, sys; settings = json.loads(sys.argv.pop()); sys.path[:] = settings['path']\n"
        "from hast.amend import main; main(settings)"
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program, json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # a terminal's SIGINT is for main alone
        )
    except OSError as error:
        ours.close()
        raise SystemCallError(f"{resource.name}: cannot change its metadata: {error.strerror}") from error
    finally:
        theirs.close()
    return ours, process


# The process.


def main(settings: dict[str, Any]) -> None:
    """Make the change, and say so."""
    from setproctitle import setproctitle

    resource = resource_from_dict(settings["resource"])
    setproctitle(f"hastd: {resource.name}: metadata")
    channel = Channel.from_fd(settings["channel"])
    answer: Message
    try:
        answer = {
            "changed": change_component(resource, settings["change"], Path(settings["note"]), lambda: _wanted(channel))
        }
    except HastError as error:
        answer = {"error": str(error), "code": error.exit_code}
    with contextlib.suppress(ChannelClosedError):
        channel.send(answer)


def _wanted(channel: Channel) -> bool:
    """Whether hastd still waits for it."""
    try:
        return channel.recv(timeout=0) is not None
    except TimeoutError:
        return True


def change_component(
    resource: Resource, change: str, note: Path, wanted: Callable[[], bool] = lambda: True
) -> bool:
    """amend(), with all that may hang. note: where a flush that fails is noted (hast/boot.py). wanted: asked last
    before the metadata are changed: that may be much later, where a disk has hung."""
    from hast.component import open_component  # the C part: hastd's main process does without it
    from hast.opening import distrust_map

    component = open_component(resource.name, resource.localpath, resource.directio, wait=LOCK_SECONDS, note=note)
    try:
        before = component.read_metadata()
        rundir, known = note.parent, before
        if change == "force" and boot.outdated(rundir, resource.name, before.resuid):
            change = "force, lost"
        if change != "discard" and before.syncing and boot.anew(rundir, resource.name):
            # It may have lost something since its primary was complete with it, unheard: that has lowered its localcnt.
            known = replace(before, unsaid=True)
        after = CHANGES[change](known)
        if change == "force, lost":
            distrust_map(component, before)
        if not wanted():
            raise TemporaryError(f"{resource.name}: nobody waits for it any more")
        if after != before:
            component.write_metadata(after)
        else:
            component.flush()  # who wrote it may have died before its flush
        return after != before
    finally:
        component.close()

"""Changes the metadata of a component that no worker has, on an administrator's word.

Invariants:
- The component is locked meanwhile: where a worker has it, this fails.
- The change is durable when this returns, whatever `metaflush` is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hast.component import open_component
from hast.config import Resource
from hast.errors import TemporaryError
from hast.metadata import Metadata

LOCK_SECONDS = 2.0  # for the kernel to let go of the component of a worker that has just ended
DISK_SECONDS = 20.0  # for the disk to take it

Change = Callable[[Metadata], Metadata]


def amend(resource: Resource, change: Change) -> tuple[Metadata, Metadata]:
    """The metadata before and after. Raises HastError; nothing has changed then, or what was asked for has."""
    component = open_component(resource.name, resource.localpath, resource.directio, wait=LOCK_SECONDS)
    try:
        before = component.read_metadata()
        after = change(before)
        if after != before:
            component.write_metadata(after)
        else:
            component.flush()  # who wrote it may have died before its flush
        return before, after
    finally:
        component.close()


async def amend_soon(resource: Resource, change: Change) -> tuple[Metadata, Metadata]:
    """amend(), in a thread: a disk that hangs stops nobody else. Raises HastError."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(DISK_SECONDS):
            return await loop.run_in_executor(None, amend, resource, change)
    except TimeoutError:
        raise TemporaryError(f"{resource.name}: component {resource.localpath} does not answer") from None

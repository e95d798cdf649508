"""How a worker comes to its component: what workers before it have noted counts beside what the disk says.

Invariants:
- A component that was given up (hast/outage.py) need not be of any use to the next worker of the same primary, which
  goes on without it. It is used only if it is the same one, nobody else has it, it can be read, and takes a flush.
- What was known of a component that is out of date, and could not be stored, is stored before it is served; where it
  still cannot be, it is served as what it is, or not at all.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from hast import boot, promotion
from hast.component import AbsentComponent, Component, open_component
from hast.config import Resource
from hast.control import Role
from hast.errors import DataError, DiskError, HastError, InUseError, TemporaryError
from hast.metadata import Metadata

log = logging.getLogger(__name__)

LOCK_SECONDS = 2.0  # for the kernel to let go of the component of a worker that was killed


def open_primary(resource: Resource, rundir: Path, again: bool) -> tuple[Component, Metadata]:
    """The component, and its metadata. again: one that the worker before this one has given up need not be of any
    use; without it the secondary goes on doing everything. Raises HastError."""
    name, path = resource.name, resource.localpath
    known = boot.given_up(rundir, name) if again else None
    component = None
    try:
        component = open_component(name, path, resource.directio, True, LOCK_SECONDS, boot.note(rundir, name))
        metadata = component.read_metadata()
        if known is not None:  # what it refuses now the stages would need in a moment
            if metadata.resuid != known.resuid:
                raise DataError(f"{name}: component {path} is another one now")
            component.read_map(metadata)
            component.flush()
    except HastError as error:
        if component is not None:
            component.close()
        # In use: what its disk still holds of the worker before does not matter to who does without it.
        if known is None or (isinstance(error, TemporaryError) and not isinstance(error, InUseError)):
            raise
        log.error("%s; it was given up before: going on without it", error)
        return AbsentComponent.of(name, path, known, str(error)), known
    boot.forget(boot.detached_note(rundir, name))
    return component, metadata


def read_note(rundir: Path, component: Component, metadata: Metadata) -> tuple[Metadata, bool]:
    """A process before this one knew that the component is out of date, and could not store it. Store it now. The
    metadata that hold, and whether that was in vain once more. Raises DiskError: then, and there is more to be
    stored."""
    name = metadata.resource
    word = boot.outdated(rundir, name, metadata.resuid)
    if not word:
        return metadata, False
    known = replace(metadata, syncing=True, unsaid=True)
    if word == boot.TARGET:  # it may not be primary, even with the other node: who says that that has everything?
        known = replace(known, prevrole=Role.SECONDARY)
    try:
        component.fill_map(known)
        component.write_metadata(known)
    except DiskError:
        if promotion.as_primary(known, 0)[0] != known:
            raise
        return known, True
    boot.forget(boot.outdated_note(rundir, name))
    return known, False


def distrust_map(component: Component, metadata: Metadata) -> None:
    """A flush of a primary's component has failed. The map may be among what the disk has lost: so all of it is to be
    copied, whatever `metaflush` says: nobody knows whether it did so when that was written. Raises DiskError."""
    if metadata.prevrole is Role.PRIMARY:
        component.fill_map(metadata)


def flush(component: Component, metadata: Metadata, rundir: Path, lost: bool = False) -> Metadata:
    """Before a role is taken; the metadata that hold. A disk that fails it has lost something, may not say so again,
    and the other node may have it: so this one is a target from then on. lost: it has failed one before, after which
    distrust_map() was called, or has lost what was received, which could not be stored. A primary that wrote alone has
    nobody who has more, nor has a component that was never used. Raises DiskError; what could not be stored then is
    noted in rundir.
    """
    whole = promotion.whole(metadata)
    target = replace(metadata, syncing=True, unsaid=True, prevrole=Role.SECONDARY)
    try:
        component.flush()
    except DiskError:
        if not whole:
            try:
                distrust_map(component, metadata)
                component.write_metadata(target)
            except HastError:
                boot.outdate(rundir, metadata.resource, metadata.resuid, boot.TARGET)
        raise
    if not lost or metadata.syncing or whole:
        return metadata
    component.write_metadata(target)
    return target

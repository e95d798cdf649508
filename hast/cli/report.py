"""What hastctl prints: entries of replies and metadata as text or JSON. Pure functions.

Invariants:
- Lines that FreeBSD's hastctl prints are printed as it prints them, to the blank: scripts read them. What it has
  and we do not know is 0 there, or empty, as with FreeBSD's.
- Lines of our own come last, are indented like the others, and are of the form `key: value`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hast.cli.sizes import humanize
from hast.control import StatusEntry, error_text

TABLE_HEAD = "Name\tStatus\t Role\t\tComponents"


def status_text(entries: Sequence[StatusEntry]) -> str:
    """The table of `hastctl status`."""
    lines = [TABLE_HEAD] if entries else []
    for entry in entries:
        if entry.error:
            lines.append(f"{entry.resource}\tERR{entry.error}")
        else:
            components = f"{entry.localpath or ''}\t{entry.remoteaddr or ''}"
            lines.append(f"{entry.resource}\t{entry.status or '-':<9}{entry.role or '':<15}{components}")
    return "".join(line + "\n" for line in lines)


def list_text(entries: Sequence[StatusEntry]) -> str:
    """The text of `hastctl list`."""
    return "".join(line + "\n" for entry in entries for line in _list_lines(entry))


def _list_lines(entry: StatusEntry) -> list[str]:
    if entry.error:
        return [f"{entry.resource}:", f"  error: {entry.error}"]
    extentsize, dirty = entry.extentsize or 0, entry.dirty or 0
    lines = [
        f"{entry.resource}:",
        f"  role: {entry.role or ''}",
        f"  provname: {entry.provname or ''}",
        f"  localpath: {entry.localpath or ''}",
        f"  extentsize: {extentsize} ({humanize(extentsize)}B)",
        f"  keepdirty: {entry.keepdirty or 0}",
        f"  remoteaddr: {entry.remoteaddr or ''}",
    ]
    if entry.sourceaddr is not None:
        lines.append(f"  sourceaddr: {entry.sourceaddr}")
    lines.append(f"  replication: {entry.replication or ''}")
    if entry.status is not None:
        lines.append(f"  status: {entry.status}")
    if entry.workerpid:
        lines.append(f"  workerpid: {entry.workerpid}")
    lines += [f"  dirty: {dirty} ({humanize(dirty)}B)", *_statistics(entry)]
    if entry.syncing:
        lines.append("  syncing: yes" if entry.syncing == 1 else "  syncing: yes, the local component is not used")
    if entry.errmsg is not None:
        lines.append(f"  errmsg: {entry.errmsg}")
    return lines


def _statistics(entry: StatusEntry) -> list[str]:
    kinds = ("read", "write", "delete", "flush")
    queues = ("local", "send", "recv", "done", "idle")
    errors = ", ".join(f"{kind}: {getattr(entry, f'stat_{kind}_error') or 0}" for kind in kinds)
    sizes = ", ".join(f"{queue}: {getattr(entry, f'{queue}_queue_size') or 0}" for queue in queues)
    return [
        "  statistics:",
        f"    reads: {entry.stat_read or 0}",
        f"    writes: {entry.stat_write or 0}",
        f"    deletes: {entry.stat_delete or 0}",
        f"    flushes: {entry.stat_flush or 0}",
        f"    activemap updates: {entry.stat_activemap_update or 0}",
        f"    local errors: {errors}",
        f"    queues: {sizes}",
    ]


def status_data(entry: StatusEntry) -> dict[str, Any]:
    """An entry for --json: every key is always there, null where nothing is known."""
    data = asdict(entry)
    if entry.error and entry.errmsg is None:
        data["errmsg"] = error_text(entry.error)
    return data


@dataclass(frozen=True)
class Dump:
    """What `hastctl dump` shows of a component; sizes in bytes, dirtyextents in extents."""

    resource: str
    datasize: int
    extentsize: int
    keepdirty: int
    localoff: int
    resuid: int
    localcnt: int
    remotecnt: int
    prevrole: str
    syncing: bool
    discard: bool
    dirty: int
    dirtyextents: int

    def text(self) -> str:
        """FreeBSD's lines, and ours."""
        lines = [
            f"resource: {self.resource}",
            f"    datasize: {self.datasize} ({humanize(self.datasize)}B)",
            f"    extentsize: {self.extentsize} ({humanize(self.extentsize)}B)",
            f"    keepdirty: {self.keepdirty}",
            f"    localoff: {self.localoff}",
            f"    resuid: {self.resuid}",
            f"    localcnt: {self.localcnt}",
            f"    remotecnt: {self.remotecnt}",
            f"    prevrole: {self.prevrole}",
            f"    dirty: {self.dirty} ({self.dirtyextents} extents)",
        ]
        if self.syncing:
            lines.append("    syncing: yes")
        if self.discard:
            lines.append("    discard: yes")
        return "".join(line + "\n" for line in lines)

    def data(self) -> dict[str, Any]:
        """The same for --json."""
        return asdict(self)

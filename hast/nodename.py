"""What this node may be called in hast.conf (docs/protocol.md section 8).

Invariants:
- The first name is the node's own; the others are accepted as well.
- No name server is asked: failover must not wait for one. The one exception is the host ID on a machine
  without /etc/hostid, where the C library may look up the host's own name; so it is read only when asked for.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

_DMI_UUID = Path("/sys/class/dmi/id/product_uuid")
# FreeBSD's rc.d/hostid makes kern.hostuuid from this text; on Linux that file is the binary host ID.
_FREEBSD_UUID = Path("/etc/hostid")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def node_names(environ: Mapping[str, str] = os.environ, with_host_id: bool = True) -> tuple[str, ...]:
    """The names this node answers to: host name, its first label, host UUID, `hostid<n>` (n decimal).

    HAST_NODE in `environ` takes the place of the host name, and then the names of the machine (UUID and
    host ID) do not count, because several nodes may run on it.
    """
    override = environ.get("HAST_NODE", "")
    if override:
        return _with_label(override)
    names = _with_label(os.uname().nodename)
    uuid = _host_uuid()
    if uuid:
        names += (uuid,)
    if with_host_id:
        names += _host_id_name()
    return names


def is_named(name: str, names: tuple[str, ...]) -> bool:
    """Whether `name`, from an `on` section, is one of this node's `names`; case does not matter."""
    return name.casefold() in (own.casefold() for own in names)


def _with_label(name: str) -> tuple[str, ...]:
    label = name.partition(".")[0]
    return (name, label) if label and label != name else (name,)


def _host_uuid() -> str:
    source = _DMI_UUID if sys.platform.startswith("linux") else _FREEBSD_UUID
    try:
        uuid = source.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):  # absent in many virtual machines; readable by root only
        return ""
    return uuid if _UUID.fullmatch(uuid) else ""


def _host_id_name() -> tuple[str, ...]:
    import ctypes  # slow to import, and rarely needed

    try:
        gethostid = ctypes.CDLL(None).gethostid
    except (OSError, AttributeError):
        return ()
    gethostid.restype = ctypes.c_long
    host_id = int(gethostid()) & 0xFFFFFFFF
    return (f"hostid{host_id}",) if host_id else ()  # 0 = never set: it would name every such machine

"""hast.conf as hastd and hastctl use it: every setting resolved for this node (docs/protocol.md section 8).

Invariants:
- A `Resource` is complete: no default and no inheritance is left to whoever uses it.
- Of the places where a setting may stand, the innermost wins: the resource's `on` section for this node, the
  resource, the global `on` section for this node, the global section, the default. Order in the file does
  not matter. Only `listen` adds up, as with FreeBSD's hastd.
- Within one configuration no two resources share a name, a provider name or a local path.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hast.address import Address, parse_address
from hast.confgrammar import Section, Setting, parse_sections
from hast.conflex import Token, fail, printable
from hast.errors import ConfigError
from hast.nodename import is_named, node_names

DEFAULT_PATH = "/etc/hast.conf"
DEFAULT_CONTROL = parse_address("/var/run/hastctl")
DEFAULT_PIDFILE = "/var/run/hastd.pid"
DEFAULT_RUNDIR = "/run/hast"
DEFAULT_LISTEN = (parse_address("tcp4://0.0.0.0:8457"), parse_address("tcp6://[::]:8457"))
DEFAULT_TIMEOUT = 20
MAX_FILE = 1 << 20  # bytes

T = TypeVar("T")


@dataclass(frozen=True)
class Resource:
    """One resource as this node has it. Two are equal when nothing that matters to a worker differs.

    `name` identifies it on both nodes, `provname` names /dev/hast/<provname>; `remote` is None for
    `remote none`; `source` has port 0. `timeout` is in seconds, `syncrate` in bytes per second (0 =
    unlimited). `exec` is the hook's path or None. `replication`, `checksum`, `compression`, `device`,
    `directio` ("on", "off", "auto") and `on_io_error` are the words of the file.
    """

    name: str
    provname: str
    localpath: str
    remote: Address | None
    source: Address | None
    replication: str
    checksum: str
    compression: str
    timeout: int
    exec: str | None
    metaflush: bool
    device: str
    directio: str
    keepawake: bool
    syncrate: int
    on_io_error: str


@dataclass(frozen=True)
class Config:
    """A whole configuration. `node` is this node's name; `resources` keeps the order of the file."""

    path: str
    node: str
    control: Address
    pidfile: str
    listen: tuple[Address, ...]
    rundir: str
    resources: dict[str, Resource]


def load(path: str = DEFAULT_PATH, names: Sequence[str] | None = None) -> Config:
    """Read and resolve the file `path` for the node called `names` (default: what this machine is called).

    Raises ConfigError when the file cannot be read or understood.
    """
    text = _read(path)
    if names is None:
        names = node_names(with_host_id="hostid" in text)
    return parse(text, path, names)


def _read(path: str) -> str:
    reading = f"cannot read configuration '{printable(path)}'"
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{reading}: {error.strerror}") from error
    except ValueError as error:  # a NUL byte in the path
        raise ConfigError(f"{reading}: {error}") from error
    if len(data) > MAX_FILE:
        raise ConfigError(f"{reading}: it is larger than {MAX_FILE} bytes")
    return data.decode("utf-8", "surrogateescape")  # comments may be in any encoding


def parse(text: str, path: str, node_names: Sequence[str]) -> Config:
    """Resolve the configuration `text` for the node called `node_names`; `path` is for messages only.

    Raises ConfigError, whose message is one line: `<path>:<line>:<column>: found ..., expected ... (<hint>)`.
    """
    if not node_names:
        raise ValueError("a node has at least one name")
    names = tuple(node_names)
    root = parse_sections(text, path)
    mine = [s for s in root.sections if s.place == "node" and is_named(s.name.text, names)]
    daemon = Scope(_merge(path, mine), root.settings)
    resources: dict[str, Resource] = {}
    tokens: dict[str, Token] = {}
    for section in root.sections:
        if section.place == "resource":
            resource = _resource(path, section, daemon, names)
            _check_unique(path, resource, section.name, resources, tokens)
            resources[resource.name] = resource
            tokens[resource.name] = section.name
    return Config(
        path=path,
        node=names[0],
        control=daemon.get("control", DEFAULT_CONTROL),
        pidfile=daemon.get("pidfile", DEFAULT_PIDFILE),
        listen=_listen([root, *mine]),
        rundir=daemon.get("rundir", DEFAULT_RUNDIR),
        resources=resources,
    )


class Scope:
    """Settings from the innermost place to the outermost."""

    def __init__(self, *levels: dict[str, Setting]) -> None:
        self.levels = levels

    def find(self, name: str) -> Setting | None:
        return next((level[name] for level in self.levels if name in level), None)

    def get(self, name: str, default: T) -> T:
        """The value that counts, or `default`, whose type it has: the grammar saw to that."""
        setting = self.find(name)
        if setting is None:
            return default
        assert isinstance(setting.value, type(default)), name
        return setting.value


def _merge(path: str, sections: list[Section]) -> dict[str, Setting]:
    """The settings of all sections that name this node; one set in two of them would be ambiguous."""
    merged: dict[str, Setting] = {}
    for section in sections:
        for name, setting in section.settings.items():
            if name in merged:
                fail(
                    path,
                    setting.token,
                    f"'{name}' once for this node",
                    f"another section for this node sets it on line {merged[name].token.line}",
                    f"'{name}' a second time",
                )
            merged[name] = setting
    return merged


def _listen(sections: list[Section]) -> tuple[Address, ...]:
    addresses = [s.value for section in sections for s in section.listen if isinstance(s.value, Address)]
    return tuple(dict.fromkeys(addresses)) or DEFAULT_LISTEN


def _resource(path: str, section: Section, daemon: Scope, names: tuple[str, ...]) -> Resource:
    mine = [s for s in section.sections if is_named(s.name.text, names)]
    if not mine:
        _fail_no_section(path, section, names)
    scope = Scope(_merge(path, mine), section.settings, *daemon.levels)
    name = section.name.text
    exec_path = scope.get("exec", "")
    return Resource(
        name=name,
        provname=scope.get("name", name),
        localpath=_local(path, section, scope, mine[0]),
        remote=_remote(path, section, scope, mine[0]),
        source=_source(path, scope),
        replication=scope.get("replication", "memsync"),
        checksum=scope.get("checksum", "none"),
        compression=scope.get("compression", "hole"),
        timeout=scope.get("timeout", DEFAULT_TIMEOUT),
        exec=exec_path or None,
        metaflush=scope.get("metaflush", True),
        device=scope.get("device", "auto"),
        directio=scope.get("directio", "auto"),
        keepawake=scope.get("keepawake", True),
        syncrate=scope.get("syncrate", 0),
        on_io_error=scope.get("on-io-error", "detach"),
    )


def _fail_no_section(path: str, section: Section, names: tuple[str, ...]) -> None:
    own = ", ".join(printable(name) for name in names)
    others = ", ".join(s.name.text for s in section.sections)
    fail(
        path,
        section.name,
        f"an 'on' section with one of this node's names: {own}",
        f"it has sections for: {others}" if others else "it has no 'on' section at all",
        f"resource '{section.name.text}' without a section for this node",
    )


def _local(path: str, section: Section, scope: Scope, node: Section) -> str:
    local = scope.get("local", "")
    if not local:
        fail(
            path,
            section.name,
            f"'local <path>' in it or in its section 'on {node.name.text}'",
            found=f"resource '{section.name.text}' without 'local'",
        )
    return local


def _remote(path: str, section: Section, scope: Scope, node: Section) -> Address | None:
    remote = scope.find("remote")
    if remote is None:
        fail(
            path,
            node.name,
            "'remote <address>' in it",
            "write 'remote none' while there is no other node",
            f"section 'on {node.name.text}' of resource '{section.name.text}' without 'remote'",
        )
    return remote.value if isinstance(remote.value, Address) else None


def _source(path: str, scope: Scope) -> Address | None:
    setting, remote = scope.find("source"), scope.find("remote")
    if setting is None or not isinstance(setting.value, Address):
        return None
    source = setting.value
    peer = remote.value if remote is not None else None
    if isinstance(peer, Address) and {source.protocol, peer.protocol} == {"tcp4", "tcp6"}:
        expected = f"an address of the same family as 'remote {peer}'"
        fail(path, setting.token, expected, "one is IPv4 and the other IPv6")
    # The primary connects twice from there, so that a fixed port cannot work: only the address counts.
    return replace(source, port=0)


def _check_unique(
    path: str, resource: Resource, at: Token, others: dict[str, Resource], tokens: dict[str, Token]
) -> None:
    """Two resources on one device or one disk would destroy each other's data."""
    for other in others.values():
        where = f"resource '{other.name}' on line {tokens[other.name].line} has it"
        if other.provname == resource.provname:
            found = f"resource '{resource.name}' with the name '{resource.provname}'"
            fail(path, at, "a name of its own in /dev/hast", where, found)
        if _one_path(other.localpath) == _one_path(resource.localpath):
            found = f"resource '{resource.name}' with the local path '{resource.localpath}'"
            fail(path, at, "a local path of its own", where, found)


def _one_path(path: str) -> str:
    """The one spelling of an absolute path, as far as its text tells. normpath leaves two leading slashes."""
    return os.path.normpath("/" + path.lstrip("/"))

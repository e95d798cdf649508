"""What a changed configuration means for a running hastd: decided here, carried out in hast/reloader.py.

Invariants:
- Pure: two configurations in, a plan out; a plan applied to the first one gives the second one, but for the settings
  that hastd reads at its start only (`START_ONLY`), which stay as they are.
- A resource is the same one as long as its name is: whatever else changes, its role stays.
- Every setting of a resource is in one of the tables below, so that a new one cannot be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from enum import IntEnum

from hast.config import Config, Resource, parse
from hast.control import Role
from hast.errors import ConfigError

# Settings of hastd itself that nothing can change while it runs: its locks and its sockets are there.
START_ONLY = ("pidfile", "rundir")


class Action(IntEnum):
    """What a changed setting costs; of several changes the dearest counts."""

    NONE = 0  # it is used the next time that it is needed
    RECONNECT = 1  # the connection to the other node is made anew
    RESTART = 2  # a new worker: clients wait, NBD clients have to connect again


# Settings whose change is more than a new value, by role; in the role init there is nothing to be done.
RESTART = {
    Role.PRIMARY: frozenset({"provname", "localpath", "device", "directio"}),
    Role.SECONDARY: frozenset({"localpath", "directio"}),
}
RECONNECT = {
    Role.PRIMARY: frozenset({"remote", "source", "replication", "checksum", "compression", "timeout"}),
    Role.SECONDARY: frozenset({"remote", "checksum", "compression", "timeout"}),
}
LIVE = frozenset({"exec", "syncrate", "metaflush", "on_io_error", "keepawake"})

# The word of hast.conf for a field that is not called like it.
WORDS = {"provname": "name", "localpath": "local", "on_io_error": "on-io-error"}


def words(names: Iterable[str]) -> list[str]:
    """Settings by their words in hast.conf."""
    return [WORDS.get(name, name) for name in names]


def changed_settings(old: Resource, new: Resource) -> tuple[str, ...]:
    """The fields in which two versions of a resource differ."""
    return tuple(f.name for f in fields(Resource) if getattr(old, f.name) != getattr(new, f.name))


def action(settings: Iterable[str], role: Role) -> Action:
    """What a change of these fields costs a resource in this role."""
    changed = set(settings)
    if changed & RESTART.get(role, frozenset()):
        return Action.RESTART
    return Action.RECONNECT if changed & RECONNECT.get(role, frozenset()) else Action.NONE


@dataclass(frozen=True)
class Change:
    """A resource that is in both configurations with different settings."""

    old: Resource
    new: Resource

    @property
    def settings(self) -> tuple[str, ...]:
        """The fields that differ."""
        return changed_settings(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.new.name} ({', '.join(words(self.settings))})"


@dataclass(frozen=True)
class Plan:
    """The way from one configuration to another. `globals` are hastd's own settings that have new values in `new`;
    those in START_ONLY are not among them, but in `kept`."""

    new: Config
    globals: tuple[str, ...]
    kept: tuple[str, ...]
    added: tuple[Resource, ...]
    removed: tuple[str, ...]
    changed: tuple[Change, ...]

    def apply(self, old: Config) -> Config:
        """The configuration that is in force afterwards."""
        resources = {name: resource for name, resource in old.resources.items() if name not in self.removed}
        resources |= {change.new.name: change.new for change in self.changed}
        resources |= {resource.name: resource for resource in self.added}
        settings = {name: getattr(self.new, name) for name in ("path", "node", *self.globals)}
        return replace(old, **settings, resources={name: resources[name] for name in self.new.resources})

    def kept_text(self, old: Config) -> str:
        """What the administrator is told about `kept`; empty when there is nothing."""
        kept = ", ".join(f"{name} {getattr(old, name)}" for name in self.kept)
        return f"{kept}: in use until hastd is started anew, it cannot be changed before" if kept else ""

    def __str__(self) -> str:
        """In one line: what is added, what is removed, what has changed."""
        parts = [
            ("added", [resource.name for resource in self.added]),
            ("removed", list(self.removed)),
            ("changed", [*(f"'{name}'" for name in self.globals), *map(str, self.changed)]),
        ]
        return "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names) or "nothing has changed"


def plan(old: Config, new: Config) -> Plan:
    """What has to be done so that `new` is in force after `old`."""
    differing = [name for name in ("control", "listen", *START_ONLY) if getattr(old, name) != getattr(new, name)]
    both = [(old.resources[name], resource) for name, resource in new.resources.items() if name in old.resources]
    return Plan(
        new=new,
        globals=tuple(name for name in differing if name not in START_ONLY),
        kept=tuple(name for name in differing if name in START_ONLY),
        added=tuple(resource for name, resource in new.resources.items() if name not in old.resources),
        removed=tuple(name for name in old.resources if name not in new.resources),
        changed=tuple(Change(before, after) for before, after in both if before != after),
    )


def check_change(old: Config, new: Config) -> None:
    """Raises ConfigError when `new` must not take the place of `old`."""
    check(new)
    nothing = parse("", new.path, [new.node])
    if new == nothing and old.resources:
        # An editor or a script may be just about to write it; believing it would end every resource.
        raise ConfigError(f"{new.path}: it says nothing at all, which is not taken for the removal of every resource")


def check(config: Config) -> None:
    """Raises ConfigError for what hast.conf may say and hastd cannot do."""
    if not config.control.is_unix:
        raise ConfigError(
            f"{config.path}: control {config.control}: hastd listens to hastctl on Unix sockets only,"
            " because whoever reaches a TCP port could change roles"
        )

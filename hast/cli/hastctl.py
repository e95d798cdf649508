"""The command hastctl; see hastctl(8).

Invariants:
- Output, options and exit codes are those of FreeBSD's hastctl; what is our own (discard, restart, stop, role -f, -h,
  --json) adds to them.
- A command imports what it needs when it needs it: failover waits for the start of this program.
"""

from __future__ import annotations

import getopt
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hast.errors import HastError, NoResourceError, UsageError

if TYPE_CHECKING:
    from hast.cli.report import Dump
    from hast.config import Config, Resource
    from hast.control import ControlRequest, RoleEntry, StatusEntry
    from hast.nv import Nv

USAGE = """\
usage: hastctl create [-d] [-c config] [-e extentsize] [-k keepdirty]
                [-m mediasize] name ...
       hastctl role [-df] [-c config] <init | primary | secondary> all | name ...
       hastctl list [-d] [-c config] [--json] [all | name ...]
       hastctl status [-d] [-c config] [--json] [all | name ...]
       hastctl dump [-d] [-c config] [--json] [all | name ...]
       hastctl discard [-d] [-c config] name ...
       hastctl restart [-d] [-c config]
       hastctl stop [-d] [-c config]
"""

# Longer than hastd takes at most to do it: see hast/supervisor.py and hast/workers.py.
STATUS_SECONDS = 15.0
ROLE_SECONDS = 120.0
STOP_SECONDS = 120.0
RESTART_SECONDS = 120.0
RESTART_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Options:
    """A command line; sizes in bytes, keepdirty in extents, 0 for the default."""

    command: str
    names: tuple[str, ...]
    config: str | None = None
    debug: int = 0
    json: bool = False
    force: bool = False
    extentsize: int = 0
    keepdirty: int = 0
    mediasize: int = 0


def parse_options(arguments: Sequence[str]) -> Options:
    """Raises UsageError; an empty one asks for the usage text."""
    if not arguments or arguments[0] not in COMMANDS:
        raise UsageError("")
    command = arguments[0]
    short = {"create": "c:dhe:k:m:", "role": "c:dhf"}.get(command, "c:dh")
    long = ["json"] if command in ("list", "status", "dump") else []
    try:
        given, names = getopt.gnu_getopt(list(arguments[1:]), short, long)
    except getopt.GetoptError as error:
        raise UsageError(error.msg) from None
    values = dict(given)
    if "-h" in values:
        raise UsageError("")
    return Options(
        command=command,
        names=tuple(names),
        config=values.get("-c"),
        debug=sum(option == "-d" for option, _ in given),
        json="--json" in values,
        force="-f" in values,
        extentsize=_size(values, "-e", "extentsize"),
        keepdirty=_size(values, "-k", "keepdirty"),
        mediasize=_size(values, "-m", "mediasize"),
    )


def _size(values: dict[str, str], option: str, what: str) -> int:
    if option not in values:
        return 0
    from hast.cli.sizes import expand_number

    try:
        return expand_number(values[option])
    except ValueError as error:
        raise UsageError(f"invalid {what}: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run hastctl; the exit code."""
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        code = COMMANDS[options.command](options)
        sys.stdout.flush()
        return code
    except UsageError as error:
        if str(error):
            complain(f"{error} ('hastctl -h' shows its usage)")
        else:
            sys.stderr.write(USAGE)
        return error.exit_code
    except HastError as error:
        complain(str(error))
        return error.exit_code
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return os.EX_OK
    except KeyboardInterrupt:
        return 130


def complain(text: str) -> None:
    """One line on stderr."""
    print(f"hastctl: {text}", file=sys.stderr)


def load(options: Options) -> Config:
    """The configuration. Raises ConfigError."""
    from hast import config

    return config.load(options.config if options.config is not None else config.DEFAULT_PATH)


# ---- create and dump: they work on the component itself ----


def create(options: Options) -> int:
    """Initialise the components of the resources named."""
    if not options.names:
        raise UsageError("create: name at least one resource")
    return _each_resource(options, load(options), options.names, _create_one)


def _create_one(options: Options, resource: Resource) -> None:
    from hast import component
    from hast.activemap import DEFAULT_EXTENTSIZE, DEFAULT_KEEPDIRTY

    metadata = component.create(
        resource.name,
        resource.localpath,
        options.extentsize or DEFAULT_EXTENTSIZE,
        options.keepdirty or DEFAULT_KEEPDIRTY,
        options.mediasize or None,
    )
    if options.debug:
        complain(f"{resource.name}: {resource.localpath} now holds {metadata.datasize} bytes of data")


def dump(options: Options) -> int:
    """Show what the components say about themselves."""
    config = load(options)
    names = tuple(config.resources) if options.names in ((), ("all",)) else options.names
    dumped: list[dict[str, object]] = []

    def dump_one(options: Options, resource: Resource) -> None:
        found = read_dump(resource.name, resource.localpath)
        if options.json:
            dumped.append(found.data())
        else:
            sys.stdout.write(found.text())

    code = _each_resource(options, config, names, dump_one)
    if options.json:
        print_json(dumped)
    return code


def read_dump(name: str, path: str) -> Dump:
    """Metadata and activemap of a component, whether hastd uses it or not. Raises HastError."""
    from hast.activemap import count_dirty, dirty_bytes, extent_count
    from hast.cli.report import Dump
    from hast.component import open_component

    component = open_component(name, path, write=False)
    try:
        metadata = component.read_metadata()
        bits = component.read_map(metadata)
    finally:
        component.close()
    extents = extent_count(metadata.datasize, metadata.extentsize)
    return Dump(
        resource=name,
        datasize=metadata.datasize,
        extentsize=metadata.extentsize,
        keepdirty=metadata.keepdirty,
        localoff=metadata.offset,
        resuid=metadata.resuid,
        localcnt=metadata.pair.localcnt,
        remotecnt=metadata.pair.remotecnt,
        prevrole=metadata.prevrole.text,
        syncing=metadata.syncing,
        discard=metadata.discard,
        dirty=dirty_bytes(bits, metadata.datasize, metadata.extentsize),
        dirtyextents=count_dirty(bits, extents),
    )


def _each_resource(
    options: Options, config: Config, names: Sequence[str], do: Callable[[Options, Resource], None]
) -> int:
    """Do it for each resource, also after one has failed; the exit code of the first that did."""
    code = os.EX_OK
    for name in names:
        try:
            if name not in config.resources:
                raise NoResourceError(f"{name}: {config.path} has no such resource")
            do(options, config.resources[name])
        except HastError as error:
            text = str(error)
            complain(text if text.startswith(f"{name}:") else f"{name}: {text}")
            code = code or error.exit_code
    return code


# ---- role, status, list, stop: hastd does it ----


def ask(options: Options, request: ControlRequest, seconds: float) -> Nv:
    """hastd's reply. Raises HastError."""
    from hast.control import CMD_SET_ROLE
    from hast.control_client import ControlClient

    config = load(options)
    if request.cmd == CMD_SET_ROLE:  # a primary may wait so long for the other node
        seconds += max((resource.timeout for resource in config.resources.values()), default=0)
    with ControlClient(config.control, seconds) as client:
        client.connect()
        return client.request(request.to_nv())


def role(options: Options) -> int:
    """Change the role of resources."""
    from hast.control import CMD_SET_ROLE, ControlRequest, Role, RoleReply

    roles = {known.text: known for known in Role}
    if len(options.names) < 2 or options.names[0] not in roles:
        raise UsageError("role: name a role (init, primary or secondary) and at least one resource")
    wanted = roles[options.names[0]]
    if options.force and wanted is not Role.PRIMARY:
        raise UsageError("role: only the role primary can be forced")
    request = ControlRequest(CMD_SET_ROLE, options.names[1:], wanted, options.force)
    entries = RoleReply.from_nv(ask(options, request, ROLE_SECONDS)).entries
    for entry in entries:
        if not entry.error and options.debug:
            changed = "is already" if entry.role == wanted.text else f"changed from {entry.role} to"
            complain(f"{entry.resource}: role {changed} {wanted.text}")
    return _first_error(entries)


def discard(options: Options) -> int:
    """Give up what secondaries have changed alone, at their next split-brain."""
    from hast.control import ALL, CMD_DISCARD, ControlRequest, RoleReply

    if not options.names or ALL in options.names:
        raise UsageError("discard: name the resources whose changes on this node are to be thrown away")
    request = ControlRequest(CMD_DISCARD, options.names)
    entries = RoleReply.from_nv(ask(options, request, ROLE_SECONDS)).entries
    for entry in entries:
        if not entry.error and options.debug:
            complain(f"{entry.resource}: its changes are thrown away when a split-brain is found")
    return _first_error(entries)


def status(options: Options) -> int:
    """The table of resources."""
    from hast.cli.report import status_text

    return _show(options, status_text)


def list_resources(options: Options) -> int:
    """All that is known of resources."""
    from hast.cli.report import list_text

    return _show(options, list_text)


def _show(options: Options, to_text: Callable[[Sequence[StatusEntry]], str]) -> int:
    from hast.control import ALL, CMD_STATUS, ControlRequest, StatusReply

    reply = ask(options, ControlRequest(CMD_STATUS, options.names or (ALL,)), STATUS_SECONDS)
    entries = StatusReply.from_nv(reply).entries
    if options.json:
        from hast.cli.report import status_data

        print_json([status_data(entry) for entry in entries])
    else:
        sys.stdout.write(to_text(entries))
    sys.stdout.flush()
    return _first_error(entries)


def _first_error(entries: Sequence[RoleEntry | StatusEntry]) -> int:
    """Complain about each error; the number of the first is the exit code, as with FreeBSD's hastctl."""
    from hast.control import error_text

    code = os.EX_OK
    for entry in entries:
        if entry.error:
            text = entry.errmsg or error_text(entry.error)
            complain(text if text.startswith(f"{entry.resource}:") else f"{entry.resource}: {text}")
            code = code or entry.error
    return code


def stop(options: Options) -> int:
    """End hastd, and wait until it is gone."""
    from hast.control import CMD_STOP, ControlRequest
    from hast.control_client import ControlClient

    if options.names:
        raise UsageError("stop: it takes no argument, it ends all of hastd")
    with ControlClient(load(options).control, STOP_SECONDS) as client:
        client.connect()
        client.request(ControlRequest(CMD_STOP).to_nv())
        client.wait_closed()
    return os.EX_OK


def restart(options: Options) -> int:
    """Start hastd anew, with the code that is installed now, and wait until every resource goes on."""
    import time

    from hast.control import CMD_RESTART, ControlRequest
    from hast.control_client import ControlClient

    if options.names:
        raise UsageError("restart: it takes no argument, all resources go on")
    deadline = time.monotonic() + RESTART_SECONDS
    roles = {entry.resource: entry.role for entry in _statuses(options)}
    with ControlClient(load(options).control, RESTART_SECONDS) as client:
        client.connect()
        client.request(ControlRequest(CMD_RESTART).to_nv())
        client.wait_closed()
    while True:
        try:
            entries = _statuses(options)
            if not any(_idle(entry) for entry in entries):
                break
        except HastError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            break
        time.sleep(RESTART_POLL_SECONDS)
    changed = [entry for entry in entries if roles.get(entry.resource, "init") != entry.role]
    idle = [entry for entry in entries if _idle(entry)]
    for entry in changed:
        complain(f"{entry.resource}: it was {roles.get(entry.resource)}, and is {entry.role} now: see hastd's log")
    for entry in idle:
        complain(f"{entry.resource}: {entry.errmsg or 'nothing serves it yet'}")
    return os.EX_TEMPFAIL if changed or idle else os.EX_OK


def _idle(entry: StatusEntry) -> bool:
    """It is not served, or not yet: a worker that is there need not do that."""
    return entry.role != "init" and (not entry.workerpid or entry.errmsg is not None)


def _statuses(options: Options) -> Sequence[StatusEntry]:
    from hast.control import ALL, CMD_STATUS, ControlRequest, StatusReply

    return StatusReply.from_nv(ask(options, ControlRequest(CMD_STATUS, (ALL,)), STATUS_SECONDS)).entries


def print_json(data: object) -> None:
    """One JSON document on stdout."""
    import json

    json.dump(data, sys.stdout, indent=2)
    sys.stdout.write("\n")


COMMANDS: dict[str, Callable[[Options], int]] = {
    "create": create,
    "role": role,
    "list": list_resources,
    "status": status,
    "dump": dump,
    "discard": discard,
    "restart": restart,
    "stop": stop,
}

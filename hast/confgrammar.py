"""The grammar of hast.conf: text to a tree of sections with checked values (docs/protocol.md section 8).

Invariants:
- Every statement is checked, also in sections of other nodes: the file is meant to be the same on both.
- A statement stands at most once in a section, except `listen`.
- What a setting means, and which one wins, is not decided here (see config.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from hast.address import DEFAULT_PORT, TCP_FORM, UNIX_FORM, Address, AddressError, parse_address
from hast.conflex import Token, fail, suggest, tokenize

OWN_NAMES = ("keeper", "events")  # of hastd's sockets in the run directory, where a resource's has its name
MAX_NAME = 63  # characters of a resource's or provider's name: it names files and devices
MAX_PATH = 1023  # bytes; PATH_MAX of FreeBSD without its NUL
MAX_TIMEOUT = 2_147_483  # seconds; in milliseconds it still fits in an int
MAX_SYNCRATE = 2**63 - 1  # bytes per second

Place = Literal["global", "node", "resource", "resource-node"]
Value = str | int | bool | Address

_EVERYWHERE: frozenset[Place] = frozenset(("global", "node", "resource", "resource-node"))
_DAEMON: frozenset[Place] = frozenset(("global", "node"))
_RESOURCE: frozenset[Place] = frozenset(("global", "resource"))
_COMPONENT: frozenset[Place] = frozenset(("resource", "resource-node"))

_PLACE_NAMES: dict[Place, str] = {
    "global": "at the top of the file",
    "node": "in an 'on <node>' section at the top of the file",
    "resource": "in a 'resource' section",
    "resource-node": "in an 'on <node>' section of a resource",
}
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_RATE = re.compile(r"([0-9]{1,19})([kKmMgG]?)")


@dataclass(frozen=True)
class Setting:
    """A value and the token that it was read from."""

    value: Value
    token: Token


@dataclass
class Section:
    """The file itself, or what stands between one pair of braces. `name` is the node or the resource."""

    place: Place
    name: Token
    settings: dict[str, Setting] = field(default_factory=dict)
    listen: list[Setting] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def title(self) -> str:
        kind = "resource" if self.place == "resource" else "on"
        return f"'{kind} {self.name.text}'"


class Input:
    """The tokens of one file and how far they are read."""

    def __init__(self, text: str, path: str) -> None:
        self.path = path
        self._tokens = tokenize(text, path)
        self._ahead = next(self._tokens)

    def peek(self) -> Token:
        return self._ahead

    def take(self) -> Token:
        token = self._ahead
        self._ahead = next(self._tokens, token)  # after the end stands the end
        return token

    def word(self, expected: str) -> Token:
        """The next token, which must be a word: neither a keyword nor a number."""
        token = self.peek()
        if token.kind == "keyword":
            fail(self.path, token, expected, f"'{token.text}' is a keyword and cannot be a value here")
        if token.kind == "number":
            fail(self.path, token, expected, "digits alone are a number, and none can stand here")
        if token.kind != "word":
            fail(self.path, token, expected)
        return self.take()


def _path(source: Input) -> Setting:
    expected = "an absolute path"
    token = source.word(expected)
    if not token.text.startswith("/"):
        fail(source.path, token, expected, "hastd runs in '/', where a relative path means something else")
    if len(token.text) > MAX_PATH:
        fail(source.path, token, f"a path of at most {MAX_PATH} bytes", f"it has {len(token.text)}")
    return Setting(token.text, token)


def _name(source: Input) -> Setting:
    token = source.word("a name")
    check_name(source.path, token)
    return Setting(token.text, token)


def check_name(path: str, token: Token) -> None:
    """Refuse a name that cannot be that of a file, a socket and a device."""
    if len(token.text) > MAX_NAME:
        fail(path, token, f"a name of at most {MAX_NAME} characters", f"it has {len(token.text)}")
    if "/" in token.text or token.text in (".", ".."):
        fail(path, token, "a name without '/', other than '.' and '..'", "it names a file in /dev/hast")


def _choice(*choices: str) -> Callable[[Input], Setting]:
    expected = ", ".join(choices[:-1]) + " or " + choices[-1]

    def read(source: Input) -> Setting:
        token = source.peek()
        if token.text not in choices:
            fail(source.path, token, expected, suggest(token.text, choices))
        return Setting(token.text, source.take())

    return read


def _switch(source: Input) -> Setting:
    setting = _choice("on", "off")(source)
    return Setting(setting.value == "on", setting.token)


def _timeout(source: Input) -> Setting:
    token = source.peek()
    # The length comes first: int() refuses thousands of digits with an error of its own.
    if token.kind != "number" or len(token.text) > 10 or not 1 <= int(token.text) <= MAX_TIMEOUT:
        fail(source.path, token, f"a number of seconds from 1 to {MAX_TIMEOUT}")
    return Setting(int(token.text), source.take())


def _syncrate(source: Input) -> Setting:
    expected = "bytes per second, such as 0 (no limit), 500k, 100M or 1G"
    token = source.peek()
    match = _RATE.fullmatch(token.text)
    if match is None:
        fail(source.path, token, expected)
    rate = int(match.group(1)) * _UNITS[match.group(2).lower()]
    if rate > MAX_SYNCRATE:
        fail(source.path, token, expected, f"at most {MAX_SYNCRATE}")
    return Setting(rate, source.take())


def _address(
    expected: str, default_port: int = DEFAULT_PORT, allow_unix: bool = True
) -> Callable[[Input], Setting]:
    def read(source: Input) -> Setting:
        token = source.word(expected)
        try:
            return Setting(parse_address(token.text, default_port, allow_unix), token)
        except AddressError as error:
            fail(source.path, token, expected, error.reason)

    return read


def _remote(source: Input) -> Setting:
    if source.peek().text == "none":
        return Setting("none", source.take())
    setting = _address(f"an address {TCP_FORM}, or none", allow_unix=False)(source)
    if isinstance(setting.value, Address) and setting.value.host in ("0.0.0.0", "::"):
        hint = "this one means every address of this node"
        fail(source.path, setting.token, "the address of the other node", hint)
    return setting


@dataclass(frozen=True)
class Statement:
    """Where a statement may stand and how its value is read."""

    places: frozenset[Place]
    read: Callable[[Input], Setting]


_ANY_ADDRESS = f"an address {TCP_FORM}, or {UNIX_FORM}"

STATEMENTS: dict[str, Statement] = {
    "control": Statement(_DAEMON, _address(_ANY_ADDRESS)),
    "pidfile": Statement(_DAEMON, _path),
    "listen": Statement(_DAEMON, _address(_ANY_ADDRESS)),
    "rundir": Statement(_DAEMON, _path),
    "replication": Statement(_RESOURCE, _choice("fullsync", "memsync", "async")),
    "checksum": Statement(_RESOURCE, _choice("none", "crc32", "sha256")),
    "compression": Statement(_RESOURCE, _choice("none", "hole", "lzf")),
    "timeout": Statement(_RESOURCE, _timeout),
    "exec": Statement(_RESOURCE, _path),
    "metaflush": Statement(_RESOURCE | {"resource-node"}, _switch),
    "name": Statement(_COMPONENT, _name),
    "local": Statement(_COMPONENT, _path),
    "remote": Statement(frozenset(("resource-node",)), _remote),
    # Port 0: the primary connects twice from there, so a fixed port could not work.
    "source": Statement(
        frozenset(("resource-node",)), _address(f"an address {TCP_FORM}", default_port=0, allow_unix=False)
    ),
    "device": Statement(_EVERYWHERE, _choice("auto", "fuse", "nbd", "ublk", "ggate")),
    "directio": Statement(_EVERYWHERE, _choice("auto", "on", "off")),
    "keepawake": Statement(_EVERYWHERE, _switch),
    "syncrate": Statement(_EVERYWHERE, _syncrate),
    "on-io-error": Statement(_EVERYWHERE, _choice("detach", "pass")),
}


def parse_sections(text: str, path: str) -> Section:
    """The tree of a whole file. Raises ConfigError at the first thing that does not belong."""
    source = Input(text, path)
    root = Section("global", source.peek())
    _body(source, root)
    return root


def _body(source: Input, section: Section) -> None:
    """Everything up to the end of the section, which is consumed."""
    while True:
        token = source.peek()
        if token.kind == ("end" if section.place == "global" else "}"):
            source.take()
            return
        if token.text == "on" and section.place in ("global", "resource"):
            _node_section(source, section)
        elif token.text == "resource" and section.place == "global":
            _resource_section(source, section)
        else:
            _statement(source, section)


def _statement(source: Input, section: Section) -> None:
    token = source.peek()
    statement = STATEMENTS.get(token.text)
    if statement is None or section.place not in statement.places:
        _fail_statement(source, section)
    source.take()
    setting = statement.read(source)
    if token.text == "listen":
        section.listen.append(setting)
        return
    earlier = section.settings.setdefault(token.text, setting)
    if earlier is not setting:
        fail(
            source.path,
            token,
            f"'{token.text}' once in a section",
            f"it is already set on line {earlier.token.line}",
            f"a second '{token.text}'",
        )


def _node_section(source: Input, parent: Section) -> None:
    source.take()
    name = source.word("the name of a node")
    place: Place = "node" if parent.place == "global" else "resource-node"
    _braced(source, Section(place, name), parent)


def _resource_section(source: Input, parent: Section) -> None:
    source.take()
    name = source.word("the name of a resource")
    check_name(source.path, name)
    if name.text == "all":
        fail(source.path, name, "a name other than 'all'", "for hastctl 'all' means every resource")
    if name.text in OWN_NAMES:
        fail(source.path, name, f"a name other than '{name.text}'", "hastd has a socket of that name itself")
    for other in parent.sections:
        if other.place == "resource" and other.name.text == name.text:
            fail(
                source.path,
                name,
                "each resource once",
                f"the first is on line {other.name.line}",
                f"a second resource '{name.text}'",
            )
    _braced(source, Section("resource", name), parent)


def _braced(source: Input, section: Section, parent: Section) -> None:
    if source.peek().kind != "{":
        fail(source.path, source.peek(), f"'{{' after {section.title()}")
    source.take()
    parent.sections.append(section)
    _body(source, section)


def _fail_statement(source: Input, section: Section) -> NoReturn:
    """Say what could have stood here instead of the next token, and what was probably meant."""
    token = source.peek()
    expected = _expected(section)
    opened = f"{section.title()} of line {section.name.line}"
    statement = STATEMENTS.get(token.text)
    if token.kind == "end":
        fail(source.path, token, expected, f"'}}' is missing for {opened}")
    if token.kind == "}":
        fail(source.path, token, expected, "there is no open section that it could end")
    if token.text == "resource":
        fail(source.path, token, expected, f"is '}}' missing for {opened}?")
    if statement is not None:
        places = [_PLACE_NAMES[place] for place in _PLACE_NAMES if place in statement.places]
        fail(source.path, token, expected, f"'{token.text}' stands " + " or ".join(places))
    hint = "" if token.kind in ("{", "number") else suggest(token.text, _names(section))
    fail(source.path, token, expected, hint)


def _names(section: Section) -> list[str]:
    names = [name for name, statement in STATEMENTS.items() if section.place in statement.places]
    if section.place in ("global", "resource"):
        names.append("on")
    if section.place == "global":
        names.append("resource")
    return names


def _expected(section: Section) -> str:
    end = "the end of the file" if section.place == "global" else "'}'"
    return f"a statement ({', '.join(_names(section))}) or {end}"

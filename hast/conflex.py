"""The tokens of hast.conf, and the one form that its errors have (docs/protocol.md section 8).

Invariants:
- Every token knows the line and the column (both from 1; a tab is one column) at which it begins.
- An error is `<path>:<line>:<column>: found <what>, expected <what> (<hint>)`, always one printable line.
- The last token is always the end of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NoReturn

from hast.errors import ConfigError

# FreeBSD's. They are reserved: where a word is expected they are refused. Our own statements are not
# among them, so that a resource may be called `auto` or `device`.
KEYWORDS = frozenset(
    (
        *("control", "pidfile", "listen", "replication", "checksum", "compression", "timeout", "exec"),
        *("metaflush", "resource", "name", "local", "remote", "source", "on", "off"),
        *("fullsync", "memsync", "async", "none", "crc32", "sha256", "hole", "lzf"),
    )
)

Kind = Literal["keyword", "word", "number", "{", "}", "end"]

_TOKEN = re.compile(
    r"(?P<blank>[ \t\r]+)"
    r"|(?P<newline>\n)"
    r"|(?P<comment>\#[^\n]*)"
    r"|(?P<brace>[{}])"
    r"|(?P<word>[a-zA-Z0-9.\-_/:\[\]]+)"
)
_DIGITS = re.compile(r"[0-9]+")
_SHOWN = 64  # characters of a token that an error repeats

_CHARACTER_HINTS = {
    '"': "values are written without quotes",
    "'": "values are written without quotes",
    "=": "a statement is a name and a value with a space between, without '='",
    ";": "statements need no ';' at their end",
    ",": "values are not separated by commas; repeat the statement instead",
    "%": "an address has no zone; use one that is not link-local",
    "\ufeff": "save the file without a byte order mark",
}


@dataclass(frozen=True)
class Token:
    """A token: its kind, its text, and the line and column where it begins."""

    kind: Kind
    text: str
    line: int
    column: int

    def __str__(self) -> str:
        if self.kind == "end":
            return "the end of the file"
        if self.kind in ("keyword", "number"):
            return f"{self.kind} {quote(self.text)}"
        return quote(self.text)


def quote(text: str) -> str:
    """`text` in quotes, on one line, printable and not too long, whatever it holds."""
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return f"'{printable(shown)}'"


def printable(text: str) -> str:
    """`text` with what cannot be printed escaped; undecodable bytes of a file show as \\xNN."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def fail(path: str, at: Token, expected: str, hint: str = "", found: str = "") -> NoReturn:
    """Raise the ConfigError for the token `at`. `found` describes it where its own text does not."""
    tail = f" ({hint})" if hint else ""
    where = f"{printable(path)}:{at.line}:{at.column}"
    raise ConfigError(f"{where}: found {found or at}, expected {expected}{tail}")


def suggest(text: str, known: Iterable[str]) -> str:
    """The hint `did you mean ...?` where one of `known` is close to `text`, else nothing."""
    import difflib  # only errors pay for it

    close = difflib.get_close_matches(text.lower(), sorted(known), n=1)
    return f"did you mean {quote(close[0])}?" if close else ""


def tokenize(text: str, path: str) -> Iterator[Token]:
    """The tokens of `text`, the end of the file last.

    They are made as they are asked for, so that the first error of a file is the one reported. Raises
    ConfigError at a character that is in no token.
    """
    line, line_start, position = 1, 0, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        column = position - line_start + 1
        if match is None:
            _fail_character(path, text[position], line, column)
        position = match.end()
        if match.lastgroup == "newline":
            line, line_start = line + 1, position
        elif match.lastgroup in ("brace", "word"):
            yield Token(_kind(match.group()), match.group(), line, column)
    yield Token("end", "", line, len(text) - line_start + 1)


def _kind(text: str) -> Kind:
    if text == "{":
        return "{"
    if text == "}":
        return "}"
    if text in KEYWORDS:
        return "keyword"
    return "number" if _DIGITS.fullmatch(text) else "word"


def _fail_character(path: str, character: str, line: int, column: int) -> NoReturn:
    fail(
        path,
        Token("word", character, line, column),
        "a word of letters, digits and . - _ / : [ ], or '{' or '}'",
        _CHARACTER_HINTS.get(character, ""),
        f"character {quote(character)}",
    )

"""NBD negotiation: from an accepted connection to the transmission phase, fixed newstyle.

Follows doc/proto.md of the Network Block Device project, sections "Handshake" and "Values". What
comes after the negotiation is the ggate stage's (hast/ffi/nbd.c); the Unix socket and its clients are
hast/device/nbdlisten.py.

Invariants:
- `NbdNegotiation` does no I/O: bytes in, bytes out, in whatever pieces they come, with the same result.
- No length of the client's is used before it was compared with a limit, and no more than one option and what
  one `feed` brought is ever kept.
- The transmission phase begins only with an empty buffer: a client that talks on before it has the answer
  breaks the protocol, and is refused rather than misunderstood.
- A refusal that the protocol can express is an error reply, and the client may go on; anything else is a
  `ProtocolError`, after which the connection is to be closed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag

from hast.errors import ProtocolError

GREETING_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
REPLY_MAGIC = 0x0003E889045565A9
MAX_STRING = 4096  # bytes: no name or description is longer, says the protocol
MIB = 1 << 20


class Handshake(IntFlag):
    """Flags of the greeting and, with the same meaning, of the client's answer to it."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Transmission(IntFlag):
    """Transmission flags: what the export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8


class Option(IntEnum):
    """The options that are understood. Every other number is answered with ERR_UNSUP."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8


class Reply(IntEnum):
    """Types of replies to options."""

    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 0x80000001
    ERR_INVALID = 0x80000003
    ERR_UNKNOWN = 0x80000006
    ERR_TOO_BIG = 0x80000009


class Info(IntEnum):
    """What a client may ask for with INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


@dataclass(frozen=True)
class NbdExport:
    """What a client is offered. `size` in bytes, a multiple of 512; block sizes in bytes."""

    name: str
    size: int
    description: str = ""
    can_trim: bool = True
    read_only: bool = False
    min_block: int = 512
    preferred_block: int = 4096
    max_block: int = 32 * MIB

    def flags(self, structured: bool) -> Transmission:
        """The transmission flags; `structured`: structured replies have been negotiated.

        CAN_MULTI_CONN holds because a flush covers what was acknowledged on any connection.
        """
        flags = Transmission.HAS_FLAGS | Transmission.SEND_FLUSH | Transmission.SEND_FUA
        flags |= Transmission.CAN_MULTI_CONN
        if self.read_only:
            flags |= Transmission.READ_ONLY
        else:
            flags |= Transmission.SEND_WRITE_ZEROES
            if self.can_trim:
                flags |= Transmission.SEND_TRIM
        if structured:
            flags |= Transmission.SEND_DF
        return flags


@dataclass(frozen=True)
class NbdLimits:
    """Bounds on what one client may ask of a negotiation."""

    options: int = 64  # in one negotiation
    option_bytes: int = 65536  # data of one option


@dataclass(frozen=True)
class NbdResult:
    """A finished negotiation: the export and the kind of replies."""

    export: NbdExport
    structured: bool


class State(Enum):
    """What the next bytes are, or how it ended."""

    FLAGS = "the client's flags"
    HEADER = "an option's header"
    DATA = "an option's data"
    DONE = "done"
    ABORTED = "aborted"


@dataclass
class NbdNegotiation:
    """One client's negotiation. Send `greeting()`, then `feed()` what comes until `state` is DONE
    (`result` is set: hand the connection over) or ABORTED (the client took its leave: close it)."""

    export: NbdExport
    limits: NbdLimits = field(default_factory=NbdLimits)
    state: State = State.FLAGS
    result: NbdResult | None = None
    _buffer: bytes = b""
    _no_zeroes: bool = False
    _structured: bool = False
    _options: int = 0
    _option: int = 0
    _length: int = 0

    def greeting(self) -> bytes:
        """What the server says first."""
        flags = Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES
        return GREETING_MAGIC + OPTION_MAGIC + struct.pack(">H", flags)

    @property
    def ended(self) -> bool:
        """Whether nothing more is expected from the client."""
        return self.state in (State.DONE, State.ABORTED)

    @property
    def aborted(self) -> bool:
        """Whether the client took its leave: what it still sends is ignored."""
        return self.state is State.ABORTED

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes from the client; the replies to be sent, in order, each a whole message.

        Raises ProtocolError when the connection is to be closed at once. Replies to options that stood before
        the mistake are lost with it, which no client can tell from a closed connection that came sooner.
        """
        if self.aborted:
            return []
        self._buffer += data
        replies: list[bytes] = []
        while not self.ended:
            wanted = self._wanted()
            if len(self._buffer) < wanted:
                return replies
            piece, self._buffer = self._buffer[:wanted], self._buffer[wanted:]
            replies += self._step(piece)
        if self.aborted:
            self._buffer = b""  # nobody listens any more
        if self._buffer and self.state is State.DONE:
            raise ProtocolError("NBD client sent requests before the negotiation's last answer: closing it")
        return replies

    def _wanted(self) -> int:
        """Bytes that the present state needs to make its step."""
        return {State.FLAGS: 4, State.HEADER: 16, State.DATA: self._length}[self.state]

    def _step(self, piece: bytes) -> list[bytes]:
        if self.state is State.FLAGS:
            return self._client_flags(piece)
        if self.state is State.HEADER:
            return self._option_header(piece)
        self.state = State.HEADER
        return self._option_data(piece)

    def _client_flags(self, piece: bytes) -> list[bytes]:
        (flags,) = struct.unpack(">I", piece)
        known = Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES
        if flags & ~int(known):
            raise ProtocolError(f"NBD client set unknown handshake flags {flags:#x}: closing it")
        self._no_zeroes = bool(flags & Handshake.NO_ZEROES)
        self.state = State.HEADER
        return []

    def _option_header(self, piece: bytes) -> list[bytes]:
        magic, self._option, self._length = struct.unpack(">8sII", piece)
        if magic != OPTION_MAGIC:
            raise ProtocolError("NBD client sent something that is no option: closing it")
        if self._length > self.limits.option_bytes:
            raise ProtocolError(
                f"NBD client sent option {self._option} with {self._length} bytes of data, "
                f"more than {self.limits.option_bytes}: closing it"
            )
        self._options += 1
        if self._options > self.limits.options:
            raise ProtocolError(f"NBD client sent more than {self.limits.options} options: closing it")
        self.state = State.DATA
        return []

    def _option_data(self, data: bytes) -> list[bytes]:
        match self._option:
            case Option.EXPORT_NAME:
                return self._export_name(data)
            case Option.ABORT:
                self.state = State.ABORTED
                return [self._reply(Reply.ACK)]
            case Option.LIST:
                return self._list(data)
            case Option.INFO | Option.GO:
                return self._info(data)
            case Option.STRUCTURED_REPLY:
                if data:
                    return [self._reply(Reply.ERR_INVALID, b"this option takes no data")]
                self._structured = True
                return [self._reply(Reply.ACK)]
            case _:
                return [self._reply(Reply.ERR_UNSUP, b"option not supported")]

    def _export_name(self, data: bytes) -> list[bytes]:
        if not self._is_export(data):
            raise ProtocolError(f"NBD client asked for unknown export {printable(data)}: closing it")
        self._finish()
        answer = struct.pack(">QH", self.export.size, self.export.flags(self._structured))
        return [answer if self._no_zeroes else answer + bytes(124)]

    def _list(self, data: bytes) -> list[bytes]:
        if data:
            return [self._reply(Reply.ERR_INVALID, b"this option takes no data")]
        name = self.export.name.encode()
        server = struct.pack(">I", len(name)) + name + self.export.description.encode()
        return [self._reply(Reply.SERVER, server), self._reply(Reply.ACK)]

    def _info(self, data: bytes) -> list[bytes]:
        request = parse_info(data)
        if request is None:
            return [self._reply(Reply.ERR_INVALID, b"lengths do not add up")]
        name, wanted = request
        if len(name) > MAX_STRING:
            return [self._reply(Reply.ERR_TOO_BIG, b"the name is too long")]
        if not self._is_export(name):
            return [self._reply(Reply.ERR_UNKNOWN, b"no such export")]
        replies = [self._reply(Reply.INFO, payload) for payload in self._infos(wanted)]
        if self._option == Option.GO:
            self._finish()
        return [*replies, self._reply(Reply.ACK)]

    def _infos(self, wanted: set[int]) -> list[bytes]:
        """Block sizes are told to those who did not ask as well: they are enforced."""
        export = self.export
        infos = [
            struct.pack(">HQH", Info.EXPORT, export.size, export.flags(self._structured)),
            struct.pack(">HIII", Info.BLOCK_SIZE, export.min_block, export.preferred_block, export.max_block),
        ]
        if Info.NAME in wanted:
            infos.append(struct.pack(">H", Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted and export.description:
            infos.append(struct.pack(">H", Info.DESCRIPTION) + export.description.encode())
        return infos

    def _is_export(self, name: bytes) -> bool:
        """The empty name is the default export, which is the only one."""
        return name in (b"", self.export.name.encode())

    def _finish(self) -> None:
        self.result = NbdResult(self.export, self._structured)
        self.state = State.DONE

    def _reply(self, kind: Reply, data: bytes = b"") -> bytes:
        return struct.pack(">QIII", REPLY_MAGIC, self._option, kind, len(data)) + data


def parse_info(data: bytes) -> tuple[bytes, set[int]] | None:
    """Name and wanted information of an INFO or GO option; None when its lengths contradict each other."""
    if len(data) < 6:
        return None
    (name_length,) = struct.unpack_from(">I", data)
    if name_length > len(data) - 6:
        return None
    name = data[4 : 4 + name_length]
    (count,) = struct.unpack_from(">H", data, 4 + name_length)
    if len(data) != 6 + name_length + 2 * count:
        return None
    return name, set(struct.unpack_from(f">{count}H", data, 6 + name_length))


def printable(name: bytes) -> str:
    """A client's string for a log line: bounded, on one line, nothing that a terminal obeys."""
    text = ascii(name[:64].decode("utf-8", "replace"))
    return text if len(name) <= 64 else text + "..."

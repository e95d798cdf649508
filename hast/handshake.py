"""The handshake of two nodes, both sides, without sockets (docs/protocol.md sections 3 and 6).

    primary                                          secondary
    PrimaryHandshake.first()        -- connection 1 -->  read_hello(), refuse(), accept_first()     main
             .first_reply()         <-- connection 1 --
             (its result)           -- connection 2 -->  read_hello(), refuse(), check_token()      main
             .second_reply(), .finish()                  answer_second()                            worker
                                    <-- connection 1 --

Invariants:
- Nothing is read, written, stored or waited for here: messages and metadata in, messages and metadata out.
- What must be durable before the next message is sent is in the result that holds that message.
- A map or size of the peer is believed only after it was compared with what the component of this node allows.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from hast import decision
from hast.activemap import all_dirty, clear_bit, extent_count, ondisk_size
from hast.control import Role
from hast.decision import Decision, MapChoice, Outcome
from hast.errors import DataError, HastError, TemporaryError
from hast.messages import (
    FIRST_VERSION,
    MISMATCH,
    NO_ACCESS,
    NOT_CONFIGURED,
    OUTDATED,
    PROTOCOL_VERSION,
    SPLIT_BRAIN,
    STRANGERS,
    TOKEN_MISMATCH,
    Handshake1Reply,
    Handshake1Request,
    Handshake2Reply,
    Handshake2Request,
    PeerSizes,
    Refusal,
    SyncSource,
    decode_payload,
    encode_payload,
    negotiate,
    pack_message,
    parse_handshake1_reply,
    parse_handshake2_reply,
    wrong_role_text,
)
from hast.metadata import Metadata, Pair
from hast.notice import Notice
from hast.nv import Nv, printable

MAX_SECTOR = 65536  # bytes; the largest sector that a peer's map may be rounded up to
MAX_TEXT = 200  # characters of a peer's text that are shown


class PeerError(TemporaryError):
    """The peer cannot be reached, or answers what it should not. Trying again later may help."""


class MismatchError(PeerError):
    """The peer's component does not fit ours: somebody has to do something about it."""


class RefusedError(HastError):
    """The peer refuses, in good order.

    `text` is what it says. `wait`: it may become secondary soon, try again each second. `split_brain`: both
    nodes have data that the other one lacks. `mismatch`: one has to be made anew. `outdated`: neither of them
    has all of the data.
    """

    def __init__(self, resource: str, peer: str, refusal: Refusal) -> None:
        self.text = printable(refusal.errmsg[:MAX_TEXT])
        self.wait = refusal.wait
        self.split_brain = refusal.errmsg == SPLIT_BRAIN
        self.mismatch = refusal.errmsg.startswith(MISMATCH) or refusal.errmsg == STRANGERS
        self.outdated = refusal.errmsg == OUTDATED
        super().__init__(f"{resource}: {peer} refuses the connection: {self.text}")


# The primary.


@dataclass(frozen=True)
class Agreement:
    """What a primary knows after the handshake.

    version is in force; secondary the pair that the secondary told. virgin: the secondary was never used before.
    map: the extents that it has dirty, metadata.mapsize bytes, to be merged into this node's and made durable
    before the first request; None: it has none. metadata is what has to be stored before that, too. hast: the secondary
    is one of ours, and takes notices with this token (hast/notice.py).
    """

    version: int
    syncsrc: SyncSource
    secondary: Pair
    virgin: bool
    map: bytes | None
    metadata: Metadata
    hast: bool = False
    token: bytes = b""


class PrimaryHandshake:
    """The primary's side. Call first(), first_reply(), second_reply(), finish(), in this order.

    peer is its address, for errors. version is that of the main header: the one in force when there was a connection
    before. virgin: nothing was ever written to this resource, since this process made its unique ID. keepmap: this
    node's component cannot be written any more: the secondary's map stays the only one.
    """

    def __init__(
        self,
        metadata: Metadata,
        peer: str,
        version: int = FIRST_VERSION,
        virgin: bool = False,
        keepmap: bool = False,
    ) -> None:
        self.metadata = metadata
        self.peer = peer
        self.version = version
        self.virgin = virgin and metadata.pair == Pair()
        self.keepmap = keepmap
        self._reply: Handshake2Reply | None = None
        self._token = b""

    def first(self) -> bytes:
        """Step 1, for connection 1."""
        return pack_message(self.version, Handshake1Request(self.metadata.resource).to_nv())

    def first_reply(self, nv: Nv) -> bytes:
        """Take the answer to step 1; the result is step 2, for connection 2. Raises RefusedError, DataError."""
        reply = parse_handshake1_reply(nv)
        if isinstance(reply, Refusal):
            raise RefusedError(self.metadata.resource, self.peer, reply)
        self.version = reply.version
        request = Handshake2Request(
            resource=self.metadata.resource,
            token=reply.token,
            resuid=self.metadata.resuid,
            localcnt=self.metadata.pair.localcnt,
            remotecnt=self.metadata.pair.remotecnt,
            virgin=self.virgin,
            hast=True,
            keepmap=self.keepmap,
            outdated=self.metadata.syncing,
            bond=self.metadata.bond,
        )
        self._token = reply.token
        return pack_message(self.version, request.to_nv())

    def second_reply(self, nv: Nv) -> int:
        """Take the answer to step 2; the result is how many bytes of data follow it.

        Raises RefusedError, MismatchError, DataError.
        """
        reply = parse_handshake2_reply(nv)
        if isinstance(reply, Refusal):
            raise RefusedError(self.metadata.resource, self.peer, reply)
        self._check_sizes(reply.sizes)
        limits = map_limits(self.metadata)
        if reply.mapsize and reply.mapsize not in limits:
            raise DataError(
                f"peer sends an activemap of {reply.mapsize} bytes, from {limits.start} to {limits.stop - 1} can be"
            )
        self._reply = reply
        return reply.data.size

    def _check_sizes(self, theirs: PeerSizes) -> None:
        ours = self.metadata
        for what, mine, others in (
            ("data size", ours.datasize, theirs.datasize),
            ("extent size", ours.extentsize, theirs.extentsize),
        ):
            if mine != others:
                raise MismatchError(
                    f"{ours.resource}: {self.peer} has another {what} ({others} bytes, here it is {mine}):"
                    f" create the component anew on the node whose data is not needed, with equal sizes"
                )

    def finish(self, payload: bytes) -> Agreement:
        """Take the data that follows the answer to step 2. Raises DataError when it is not what was announced."""
        reply = self._reply
        assert reply is not None
        pair, bond = self.metadata.pair, reply.bond or self.metadata.bond
        return Agreement(
            version=self.version,
            syncsrc=reply.syncsrc,
            secondary=Pair(reply.sizes.localcnt, reply.sizes.remotecnt),
            virgin=reply.virgin,
            map=self._map(reply, payload),
            metadata=replace(
                self.metadata, pair=decision.when_told_virgin(pair) if reply.virgin else pair, bond=bond
            ),
            hast=reply.hast,
            token=self._token,
        )

    def _map(self, reply: Handshake2Reply, payload: bytes) -> bytes | None:
        """The peer's map in this node's size, without bits behind the last extent."""
        extents = extent_count(self.metadata.datasize, self.metadata.extentsize)
        used = -(-extents // 8)
        if reply.mapsize:
            bits = bytearray(decode_payload(payload, reply.data, reply.mapsize)[:used])
        elif reply.syncsrc is SyncSource.SECONDARY or (reply.virgin and not self.virgin):
            bits = all_dirty(used)  # they differ, and it does not say where
        else:
            return None
        for extent in range(extents, used * 8):
            clear_bit(bits, extent)
        return bytes(bits).ljust(self.metadata.mapsize, b"\0")


def map_limits(metadata: Metadata) -> range:
    """The sizes, in bytes, that a peer's map may have: one bit for each extent of its media less 4096 bytes, rounded
    up to whole sectors (docs/disk-format.md section 5). The peer's media may be larger than what it uses of it: up to
    twice as large is taken."""
    extents = extent_count(metadata.datasize, metadata.extentsize)
    used = metadata.mapsize + metadata.datasize
    return range(-(-extents // 8), ondisk_size(2 * used, metadata.extentsize, MAX_SECTOR) + 1)


# The secondary, in main.


def read_hello(nv: Nv) -> Handshake1Request | Handshake2Request | Notice:
    """The first message of a connection: step 2 is known by its token. Raises DataError."""
    if "notice" in nv:
        return Notice.from_nv(nv)
    return Handshake2Request.from_nv(nv) if "token" in nv else Handshake1Request.from_nv(nv)


def refuse(role: Role | None, allowed: bool) -> Refusal | None:
    """Why neither step can succeed, or None. role: this node's for the resource, None when it is not configured.
    allowed: the peer's address is the resource's `remote`."""
    if role is None:
        return Refusal(NOT_CONFIGURED)
    if not allowed:
        return Refusal(NO_ACCESS)
    if role is not Role.SECONDARY:
        return Refusal(wrong_role_text(role.text), wait=role is Role.PRIMARY)
    return None


def refusal_message(refusal: Refusal, version: int = PROTOCOL_VERSION) -> bytes:
    """A refusal, to be sent. Before a version is in force, the original sends its highest one; so do we."""
    return pack_message(version, refusal.to_nv())


def accept_first(request: Handshake1Request, token: bytes) -> tuple[int, bytes]:
    """The good answer to step 1: the version that is in force now, and the message. token: random, for step 2."""
    version = negotiate(request.version)
    return version, pack_message(version, Handshake1Reply(version, token).to_nv())


def check_token(request: Handshake2Request, token: bytes | None) -> Refusal | None:
    """The refusal of step 2 unless it shows the token of step 1 (None: there was no step 1)."""
    if token is None or not hmac.compare_digest(request.token, token):
        return Refusal(TOKEN_MISMATCH)
    return None


# The secondary, in its worker.


def request_to_dict(request: Handshake2Request) -> dict[str, Any]:
    """Step 2's request as JSON can carry it, from main to the worker."""
    return asdict(request) | {"token": request.token.hex()}


def request_from_dict(data: dict[str, Any]) -> Handshake2Request:
    """The request that request_to_dict() was given."""
    return Handshake2Request(**{**data, "token": bytes.fromhex(data["token"])})


@dataclass(frozen=True)
class SecondaryAnswer:
    """What a secondary does with step 2, in this order: map, when not None, is written over the whole on-disk map and
    made durable; then metadata is, when it is another one than before; then message is sent on connection 1.

    decision says what was decided, and warning in it what the administrator should know. When `accepted` is false the
    connections are closed once the message is sent.
    """

    decision: Decision
    metadata: Metadata
    map: bytes | None
    message: bytes

    @property
    def accepted(self) -> bool:
        return self.decision.error is None

    @property
    def split_brain(self) -> bool:
        return self.decision.outcome is Outcome.SPLIT_BRAIN


def refused_second(text: str, version: int, metadata: Metadata) -> bytes:
    """The refusal of step 2 by a node with this metadata."""
    return refusal_message(Refusal(text, sizes=_sizes(metadata)), version)


def _sizes(metadata: Metadata) -> PeerSizes:
    return PeerSizes(metadata.datasize, metadata.extentsize, metadata.pair.localcnt, metadata.pair.remotecnt)


def answer_second(
    request: Handshake2Request,
    version: int,
    metadata: Metadata,
    read_map: Callable[[], bytes],
    packing: str,
    algorithm: str,
    doubt: bool = False,
    bond: int = 0,
) -> SecondaryAnswer:
    """Decide on step 2. version is in force; metadata this node's, whose pair is a secondary's; read_map() gives its
    on-disk map, metadata.mapsize bytes; packing and algorithm are the resource's compression and checksum. doubt: it
    may have lost what it had acknowledged and not flushed (hast.boot). bond: a random number, not 0, for the two
    components to have in common from now on, where they have nothing yet.

    Raises what read_map() raises.
    """
    theirs = Pair(request.localcnt, request.remotecnt)
    made = decision.decide(metadata.resuid, metadata.pair, request.resuid, theirs, request.virgin)
    if made.outcome is Outcome.SPLIT_BRAIN and metadata.discard:
        pair = decision.as_target(metadata.pair, theirs)
        made = decision.decide(metadata.resuid, pair, request.resuid, theirs, request.virgin)
        made = replace(made, warning="its own changes are thrown away, as 'hastctl discard' has said")
    if request.outdated:
        made = decision.for_outdated(made)
    strangers = request.bond != metadata.bond and 0 not in (request.bond, metadata.bond)
    if strangers:
        made = decision.for_strangers(made, request.outdated or not (metadata.syncing or metadata.discard))
    if made.error is not None:
        return SecondaryAnswer(made, metadata, None, refused_second(made.error, version, metadata))
    if request.hast:  # one that is not ours does not keep it
        known = 0 if strangers or made.outcome is Outcome.ADOPT else metadata.bond or request.bond
        metadata = replace(metadata, bond=known or bond)
    metadata = _accepted(request, made, metadata, doubt)
    bits, keep = b"", None
    if request.keepmap and made.syncsrc is SyncSource.SECONDARY:
        # What that primary has done until now and does from now on is in no map: all of it is to be asked for here.
        bits = keep = bytes(all_dirty(metadata.mapsize))
    elif made.map is MapChoice.OWN:
        bits = read_map()
    elif made.map is MapChoice.FULL:
        # Once this node has adopted the ID, only its own map tells that it lacks everything: should the connection
        # break before the primary has merged the map into its own, the next handshake sends it again.
        bits = keep = bytes(all_dirty(metadata.mapsize))
    payload, data = encode_payload(bits, packing, algorithm)
    uncounted = request.hast or metadata.pair.localcnt == 0
    virgin = (made.virgin and uncounted) or _virgin_again(request, made, metadata)
    reply = Handshake2Reply(_sizes(metadata), made.syncsrc, virgin, len(bits), data, request.hast, metadata.bond)
    return SecondaryAnswer(made, metadata, keep, pack_message(version, reply.to_nv(), payload))


def _virgin_again(request: Handshake2Request, made: Decision, metadata: Metadata) -> bool:
    """Whether the primary has to count this node as used though it was told so before, or never was: a target of one
    whose localcnt is 0 cannot have counters by which it is out of date. Only with a localcnt of 1 will that primary be
    told from it, should it be forced to go its own way. One of FreeBSD's takes that only from a node without any
    counter."""
    if request.localcnt != 0 or request.outdated or made.syncsrc is not SyncSource.PRIMARY:
        return False
    return metadata.syncing if request.hast else metadata.unsaid and metadata.pair == Pair()


def first_request(metadata: Metadata) -> Metadata:
    """The secondary's metadata when its primary has sent the first request: what the handshake has told it is stored
    there. Its localcnt is at least 1, if this node is a target. One of FreeBSD's never says that all is copied, so for
    it nothing is left to be known."""
    return replace(metadata, unsaid=metadata.unsaid and metadata.syncing and metadata.pair.remotecnt > 0)


def _accepted(request: Handshake2Request, made: Decision, metadata: Metadata, doubt: bool) -> Metadata:
    """What is stored before the answer (invariant 10: a target knows that it is one).

    `syncing` ends with the primary's word that it is over. One that is not ours never says it: it counts as over with
    the next handshake, and is not begun at all. It is over as well where that finds a primary that is out of date: then
    nothing has been acknowledged that is not durable here.

    `unsaid` is set where the primary's localcnt does not say that this node is a target: a handshake in sync, or with
    one of 0, which is raised when that one has heard `virgin` (see first_request).
    """
    syncing = metadata.syncing
    if made.outcome in (Outcome.IN_SYNC, Outcome.SECONDARY_NEWER) and request.outdated:
        syncing = False
    elif request.hast:
        syncing = syncing or made.target or metadata.unsaid or (doubt and made.outcome is Outcome.IN_SYNC)
    elif made.outcome is Outcome.IN_SYNC or made.target:
        syncing = False
    resuid = metadata.resuid if made.adopt_resuid is None else made.adopt_resuid
    pair = metadata.pair
    # FreeBSD's hastd needs `virgin` where its localcnt is 0, and ends when it is told that and a counter.
    if made.target and (request.hast or request.localcnt > 0 or pair != Pair()):
        pair = decision.as_target(pair, Pair(request.localcnt, request.remotecnt))
    unfit = syncing or made.target or (metadata.unsaid and not request.hast)
    unsaid = unfit and request.localcnt <= pair.remotecnt and made.syncsrc is SyncSource.PRIMARY
    return replace(metadata, resuid=resuid, pair=pair, syncing=syncing, discard=False, unsaid=unsaid)

"""Hooks of a connection that comes and goes: each event has its hook as long as there are not too many, then only what
is true in the end is told.

Invariants:
- Pure: events and times in, the events whose hooks are to be run now out.
- What was told and what is true become the same at last, however many events there were in between.
- Also where events were left out, each `connect` is followed by one `disconnect`, each `syncstart` by one
  `syncdone` or `syncintr`.
- A synchronisation that was told to be interrupted, and is complete at last, is told to be complete.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

EVENTS = frozenset({"connect", "disconnect", "syncstart", "syncdone", "syncintr"})
BURST = 30.0  # events that are told one by one
SECONDS_EACH = 6.0  # and then one in so many seconds
CATCH_UP = 5.0  # events at most that say what has become of others
BUSY_SECONDS = 1.0  # until it is looked again whether hooks that run have ended


@dataclass(frozen=True)
class State:
    """What follows from events: whether there is a connection, whether a synchronisation runs, and how the last one
    ended ("syncdone", "syncintr", or "" before that)."""

    connected: bool = False
    syncing: bool = False
    result: str = ""

    def after(self, event: str) -> State:
        """The state that an event leads to."""
        if event == "connect":
            return replace(self, connected=True, syncing=False)
        if event == "disconnect":
            return replace(self, connected=False)
        if event == "syncstart":
            return replace(self, syncing=True)
        return replace(self, syncing=False, result=event)


def catch_up(told: State, now: State) -> tuple[str, ...]:
    """The fewest events that lead from what was told to what is true."""
    events: list[str] = []
    if told.syncing and not told.connected:  # it was lost with its connection, which is all that was told
        events.append("syncintr")
        told = told.after("syncintr")
    unseen = not told.syncing and now.result == "syncdone" and told.result != "syncdone"
    if not told.connected and (now.connected or unseen):
        events.append("connect")
    if unseen:
        events += ["syncstart", "syncdone"]
    if now.syncing and not told.syncing:
        events.append("syncstart")
    over = told.syncing and not now.syncing
    if over and now.result == "syncdone":
        events.append("syncdone")
    if not now.connected and (told.connected or "connect" in events):
        events.append("disconnect")
    if over and now.result == "syncintr":
        events.append("syncintr")
    return tuple(events)


class Damper:
    """The events of one resource. Times in seconds, of any clock that does not go back."""

    def __init__(self, now: float) -> None:
        self.told = self.true = State()
        self.holding = False
        self._tokens = BURST
        self._at = now

    def event(self, event: str, now: float, busy: bool = False) -> tuple[str, ...]:
        """Take one of EVENTS; what is to be told now. busy: too many hooks wait for their turn."""
        self.true = self.true.after(event)
        self._refill(now)
        if self.holding:
            return self.late(now, busy)
        if busy or self._tokens < 1:
            self.holding = True
            return ()
        self._tokens -= 1
        self.told = self.true
        return (event,)

    def late(self, now: float, busy: bool = False) -> tuple[str, ...]:
        """What is to be told now, after a while."""
        self._refill(now)
        torn = self.true.syncing and not self.true.connected  # its end is about to be said
        if not self.holding or busy or torn or self._tokens < CATCH_UP:
            return ()
        return self.all(now)

    def all(self, now: float) -> tuple[str, ...]:
        """What was not told yet, however much was told already: something else is about to be."""
        self._refill(now)
        if not self.holding:
            return ()
        events = catch_up(self.told, self.true)
        self._tokens = max(0.0, self._tokens - len(events))
        self.holding = False
        for event in events:
            self.told = self.told.after(event)
        return events

    def wait(self, now: float) -> float:
        """Seconds until late() is to be called, if it is holding."""
        self._refill(now)
        return max(BUSY_SECONDS, (CATCH_UP - self._tokens) * SECONDS_EACH)

    def _refill(self, now: float) -> None:
        self._tokens = min(BURST, self._tokens + (now - self._at) / SECONDS_EACH)
        self._at = now

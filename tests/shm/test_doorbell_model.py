"""Every interleaving of the doorbell's protocol (hast/ffi/doorbell.h), with the store buffers of x86.

A model and not the code: each step below is one load, store, fence or atomic of the C, in its order. It shows
what no stress test shows for certain: that fence, second look and force are each needed, and that together
they are enough. Two producers with a ring each push some entries; a producer may die between any two steps, and
has a successor. A state without a next step in which the consumer has not got everything is a lost wake-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

PRODUCERS = 2
SLEEPING, WORD = PRODUCERS, PRODUCERS + 1  # places in memory behind the producers' tails


@dataclass(frozen=True)
class Rules:
    fence: bool = True
    second_look: bool = True
    force: bool = True
    deaths: int = 0
    entries: int = 2  # of each producer


@dataclass(frozen=True)
class Thread:
    at: str
    taken: tuple[int, ...] = (0,) * PRODUCERS  # consumer: entries of each ring; producer: its tail in [0]
    looked: int = 0  # consumer: which ring it looks at next
    found: bool = False
    word: int = 0
    buffer: tuple[tuple[int, int], ...] = ()  # stores that the others do not see yet


@dataclass(frozen=True)
class State:
    memory: tuple[int, ...] = (0,) * (PRODUCERS + 2)
    consumer: Thread = field(default_factory=lambda: Thread("scan"))
    producers: tuple[Thread, ...] = (Thread("push"),) * PRODUCERS
    deaths: int = 0

    def thread(self, who: int) -> Thread:
        return self.producers[who] if who < PRODUCERS else self.consumer

    def put(self, who: int, thread: Thread) -> State:
        if who == PRODUCERS:
            return replace(self, consumer=thread)
        return replace(self, producers=(*self.producers[:who], thread, *self.producers[who + 1 :]))

    def set(self, place: int, value: int) -> State:
        return replace(self, memory=(*self.memory[:place], value, *self.memory[place + 1 :]))


def load(state: State, thread: Thread, place: int) -> int:
    own = [value for at, value in thread.buffer if at == place]
    return own[-1] if own else state.memory[place]


def store(thread: Thread, place: int, value: int) -> Thread:
    return replace(thread, buffer=(*thread.buffer, (place, value)))


def consume(state: State, rules: Rules) -> Iterator[State]:
    """The consumer's next step."""
    me, t = PRODUCERS, state.consumer
    if t.at in ("scan", "look"):
        have = load(state, t, t.looked)
        found = t.found or have > t.taken[t.looked]
        taken = t.taken
        if t.at == "scan":
            taken = (*taken[: t.looked], have, *taken[t.looked + 1 :])
        t = replace(t, taken=taken, found=found, looked=t.looked + 1)
        if t.looked == PRODUCERS:
            if t.at == "scan":
                done = sum(taken) == PRODUCERS * rules.entries
                at = "end" if done else "scan" if found else "announce"
            else:
                at = "cancel" if found else "word"
            t = replace(t, at=at, looked=0, found=False)
        yield state.put(me, t)
    elif t.at == "announce":
        yield state.put(me, replace(store(t, SLEEPING, 1), at="fence"))
    elif t.at == "fence" and (not t.buffer or not rules.fence):
        yield state.put(me, replace(t, at="look" if rules.second_look else "word"))
    elif t.at == "word":
        yield state.put(me, replace(t, at="stale", word=load(state, t, WORD)))
    elif t.at == "stale":
        yield state.put(me, replace(t, at="wait" if load(state, t, SLEEPING) else "cancel"))
    elif t.at == "wait" and not t.buffer:  # a system call
        yield state.put(me, replace(t, at="asleep" if state.memory[WORD] == t.word else "cancel", word=0))
    elif t.at == "cancel":
        yield state.put(me, replace(store(t, SLEEPING, 0), at="scan", word=0))


def produce(state: State, me: int, rules: Rules) -> Iterator[State]:
    """A producer's next step."""
    t = state.producers[me]
    if t.at == "push":
        if t.taken[0] == rules.entries:
            yield state.put(me, replace(t, at="end"))
        else:
            tail = t.taken[0] + 1
            yield state.put(me, replace(store(t, me, tail), at="fence", taken=(tail, *t.taken[1:])))
    elif t.at == "fence" and (not t.buffer or not rules.fence):
        yield state.put(me, replace(t, at="asleep?"))
    elif t.at == "asleep?":
        yield state.put(me, replace(t, at="take" if load(state, t, SLEEPING) else "push"))
    elif t.at == "take" and not t.buffer:
        at = "change" if state.memory[SLEEPING] else "push"
        yield state.put(me, replace(t, at=at)).set(SLEEPING, 0)
    elif t.at == "change" and not t.buffer:
        yield state.put(me, replace(t, at="wake")).set(WORD, state.memory[WORD] + 1)
    elif t.at == "wake":
        if state.consumer.at == "asleep":
            state = state.put(PRODUCERS, replace(state.consumer, at="cancel"))
        yield state.put(me, replace(t, at="push"))
    elif t.at == "dead" and not t.buffer:
        tail = state.memory[me]
        successor = Thread("force" if rules.force else "push", taken=(tail, *t.taken[1:]))
        yield state.put(me, successor)
    elif t.at == "force":
        yield state.put(me, replace(store(t, SLEEPING, 0), at="change"))


def following(state: State, rules: Rules) -> Iterator[State]:
    """Every state that one step leads to."""
    for who in range(PRODUCERS + 1):
        t = state.thread(who)
        if t.buffer:
            place, value = t.buffer[0]
            yield state.put(who, replace(t, buffer=t.buffer[1:])).set(place, value)
        if who == PRODUCERS:
            yield from consume(state, rules)
            continue
        yield from produce(state, who, rules)
        if state.deaths < rules.deaths and t.at not in ("end", "dead"):
            yield replace(state.put(who, replace(t, at="dead")), deaths=state.deaths + 1)


def explore(rules: Rules) -> tuple[int, State | None]:
    """How many states there are, and one that nothing follows although the consumer has not got everything."""
    todo = [State()]
    seen = set(todo)
    while todo:
        state = todo.pop()
        new = set(following(state, rules))
        if not new and state.consumer.at != "end":
            return len(seen), state
        todo += new - seen
        seen |= new
    return len(seen), None


@pytest.mark.parametrize("rules", [Rules(), Rules(deaths=1, entries=1)], ids=["all live", "one dies"])
def test_no_wake_up_is_lost(rules: Rules) -> None:
    states, lost = explore(rules)
    assert lost is None
    assert states > 1000  # or nothing was explored


@pytest.mark.parametrize(
    "rules",
    [Rules(fence=False), Rules(second_look=False), Rules(force=False, deaths=1, entries=1)],
    ids=["without fence", "without second look", "without force"],
)
def test_each_rule_is_needed(rules: Rules) -> None:
    lost = explore(rules)[1]
    assert lost is not None
    assert lost.consumer.at == "asleep"

"""Hooks of a connection that comes and goes: none is lost that says how it is in the end, and they stay few."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from hast.damper import BURST, EVENTS, SECONDS_EACH, Damper, State, catch_up

WHOLE = ("connect", "syncstart", "syncdone", "disconnect")
FLAP = ("connect", "syncstart", "disconnect", "syncintr")


def final(events: list[str]) -> State:
    state = State()
    for event in events:
        state = state.after(event)
    return state


def well_formed(events: list[str]) -> bool:
    """Whether openings and closings take turns, and a synchronisation begins within a connection."""
    connected = syncing = False
    for event in events:
        if event in ("connect", "disconnect"):
            if connected is (event == "connect"):
                return False
            connected = not connected
        else:
            if syncing is (event == "syncstart") or (event == "syncstart" and not connected):
                return False
            syncing = not syncing
    return True


# A connection's life, as hast/peering.py tells it.
LIVES = st.sampled_from(
    [
        ("connect", "disconnect"),
        WHOLE,
        FLAP,
    ]
)
LAST = st.sampled_from([(), ("connect",), ("connect", "syncstart"), ("connect", "syncstart", "syncdone")])


@given(st.lists(LIVES, max_size=80), LAST, st.lists(st.floats(0, 20), min_size=1), st.sets(st.integers(0, 300)))
@example([WHOLE, FLAP], (), [0.0], {4, 5})
@example([*[("connect", "disconnect")] * 4, *[WHOLE] * 4, FLAP, WHOLE], ("connect", "syncstart"), [0.0], set())
@example([*[("connect", "disconnect")] * 4, *[WHOLE] * 6, FLAP], ("connect", "syncstart"), [0.0, 2.0], set())
def test_what_is_true_in_the_end_is_told(
    lives: list[tuple[str, ...]], last: tuple[str, ...], pauses: list[float], busy: set[int]
) -> None:
    events = [event for life in (*lives, last) for event in life]
    now, told = 0.0, list[str]()
    damper = Damper(now)
    for n, event in enumerate(events):
        now += pauses[n % len(pauses)]
        told += damper.event(event, now, n in busy)
    for _ in range(20):
        now += damper.wait(now)
        told += damper.late(now)
    assert not damper.holding
    assert well_formed(told), told
    expected, found = final(events), final(told)
    assert (found.connected, found.syncing) == (expected.connected, expected.syncing)
    if expected.result == "syncdone" and not expected.syncing:  # else how the one that runs ends is still to come
        assert found.result == "syncdone"
    assert len(told) <= BURST + 5 + now / SECONDS_EACH
    assert set(told) <= EVENTS


def test_a_few_outages_are_told_one_by_one() -> None:
    damper = Damper(0.0)
    events = ["connect", "syncstart", "syncdone", "disconnect"] * 7
    assert [told for event in events for told in damper.event(event, 0.1)] == events


def test_a_storm_ends_with_the_truth() -> None:
    """A connection that is lost twice a second for an hour, then holds."""
    damper, told, now = Damper(0.0), list[str](), 0.0
    for _ in range(7200):
        now += 0.5
        for event in FLAP:
            told += damper.event(event, now)
        told += damper.late(now)
    for event in ("connect", "syncstart", "syncdone"):
        told += damper.event(event, now + 1)
    told += damper.late(now + 60)
    assert told[-1] == "syncdone" and well_formed(told)
    assert len(told) < BURST + 5 + 3700 / SECONDS_EACH


def test_nothing_has_changed_in_the_end() -> None:
    assert catch_up(State(True, False, "syncdone"), State(True, False, "syncdone")) == ()
    assert catch_up(State(), State()) == ()


def test_an_interruption_is_told_to_be_over() -> None:
    told = State(connected=False, syncing=False, result="syncintr")
    assert catch_up(told, State(True, False, "syncdone")) == ("connect", "syncstart", "syncdone")
    assert catch_up(told, State(False, False, "syncdone")) == ("connect", "syncstart", "syncdone", "disconnect")
    assert catch_up(State(True, True, ""), State(False, False, "syncintr")) == ("disconnect", "syncintr")


def test_an_interruption_that_only_its_connection_was_told_of() -> None:
    told = State(connected=False, syncing=True, result="")
    assert catch_up(told, State(False, False, "syncintr")) == ("syncintr",)
    assert catch_up(told, State(True, True, "syncintr")) == ("syncintr", "connect", "syncstart")
    assert catch_up(told, State(True, False, "syncdone")) == ("syncintr", "connect", "syncstart", "syncdone")


def test_something_else_waits_for_what_was_held_back() -> None:
    damper = Damper(0.0)
    while not damper.holding:
        for event in FLAP:
            damper.event(event, 0.0)
    damper.event("connect", 0.0)
    damper.all(0.0)
    assert damper.told.connected and not damper.holding
    assert damper.all(0.0) == ()

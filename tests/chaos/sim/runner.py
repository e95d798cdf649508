"""Runs histories: one by its seed, one from a story, and shortens a story that fails."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.chaos.sim.fate import Fate, Recorder, Replay, Story
from tests.chaos.sim.heal import heal
from tests.chaos.sim.world import World
from tests.sim.harness import PRODUCTION, Library


@dataclass
class Totals:
    """Of many histories."""

    histories: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, world: World) -> None:
        self.histories += 1
        self.counts.update(world.counts)
        self.outcomes.update(world.outcomes)

    def merge(self, other: Totals) -> None:
        self.histories += other.histories
        self.counts.update(other.counts)
        self.outcomes.update(other.outcomes)


def run(seed: int, library: Library = PRODUCTION) -> World:
    """One history. Raises Broken (an AssertionError), or whatever else production code raises."""
    world = World(Fate(seed), library)
    world.run()
    heal(world)
    return world


def record(seed: int, library: Library = PRODUCTION) -> tuple[Story, str]:
    """The story of a history that fails, and how; an empty text when it does not."""
    fate = Recorder(seed)
    try:
        world = World(fate, library)
        fate.story = [fate.kept]
        world.run()
        heal(world)
    except Exception as error:
        story = fate.story
        if fate.kept is not story[-1]:
            story.append(fate.kept)  # the step that failed did not come to its end
        return story, describe(error)
    return fate.story, ""


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def replay(story: Story, library: Library = PRODUCTION, tells: bool = False) -> tuple[str, list[str]]:
    """How it fails ("" when it does not), and, when wanted, what happened line by line."""
    fate = Replay()
    fate.begin(story[0], 0)
    world = World.__new__(World)
    try:
        world.__init__(fate, library, tells)
        world.replay(story[1:])
        heal(world)
    except Exception as error:
        return describe(error), getattr(world, "told", [])
    return "", world.told


def kind(text: str) -> str:
    """What is broken, without numbers."""
    return "".join(c for c in text.removeprefix("Broken: ") if not c.isdigit())[:48]


def shorten(story: Story, library: Library = PRODUCTION, tries: int = 4000) -> Story:
    """The shortest story found that fails in the same way."""
    wanted = kind(replay(story, library)[0])
    best = [list(step) for step in story]

    def fails(candidate: Story) -> bool:
        nonlocal tries
        tries -= 1
        text = replay(candidate, library)[0]
        return bool(text) and kind(text) == wanted

    size = max(1, len(best) // 2)
    while size >= 1 and tries > 0:
        at, shorter = 1, False
        while at < len(best) and tries > 0:
            candidate = best[:at] + best[at + size :]
            if fails(candidate):
                best, shorter = candidate, True
            else:
                at += size
        if size == 1 and not shorter:
            break
        size = max(1, size // 2) if not shorter or size > 1 else 1
    for n, step in enumerate(best):
        for i in range(0 if n == 0 else 1, len(step)):
            if tries <= 0 or step[i] == 0:
                continue
            for value in (0, 1):
                if value >= step[i]:
                    break
                candidate = [list(other) for other in best]
                candidate[n][i] = value
                if fails(candidate):
                    best = candidate
                    step = best[n]
                    break
    return best

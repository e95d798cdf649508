"""Where all chance of a history comes from, so that it can be recorded, replayed and shortened.

A history is a header (how it goes, drawn once) and steps; a step is the number of an action and what that action drew.
Each step has its own draws: when a step is left out, the others still mean what they meant. A draw that is not there
is 0, which every action takes for the simplest case: no error, the oldest, the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

Story = list[list[int]]  # the header, then steps: action, draws


class Fate:
    """Draws from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed).random

    def draw(self, n: int) -> int:
        """0 to n - 1."""
        return int(self.random() * n)

    def chance(self, n: int) -> int:
        """1 once in n times."""
        return 1 if self.random() * n < 1.0 else 0


class Recorder(Fate):
    """The same draws, and they are kept."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.story: Story = [[]]
        self.kept = self.story[0]

    def begin(self, action: int) -> None:
        self.kept = [action]

    def took_place(self) -> None:
        self.story.append(self.kept)

    def draw(self, n: int) -> int:
        value = int(self.random() * n)
        self.kept.append(value)
        return value

    def chance(self, n: int) -> int:
        value = 1 if self.random() * n < 1.0 else 0
        self.kept.append(value)
        return value


class Replay(Fate):
    """Draws from a step of a story."""

    def __init__(self) -> None:
        self.left: Sequence[int] = ()
        self.at = 0

    def begin(self, step: Sequence[int], at: int) -> None:
        self.left, self.at = step, at

    def draw(self, n: int) -> int:
        at = self.at
        self.at = at + 1
        return self.left[at] % n if at < len(self.left) else 0

    def chance(self, n: int) -> int:
        at = self.at
        self.at = at + 1
        return 1 if at < len(self.left) and self.left[at] else 0

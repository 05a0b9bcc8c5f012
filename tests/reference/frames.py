"""Stacks of frames as an environment gives them, oldest first; the first frame of an episode fills its stack."""

from __future__ import annotations

from collections import deque

import numpy as np


class StackedEnvironment:
    """Random frames of `shape`. `shades`: how many different ones there are; few make repeats and coincidences."""

    def __init__(self, stack: int, shape: tuple[int, ...], seed: int, shades: int = 10**9) -> None:
        self.random, self.stack, self.shape, self.shades = np.random.default_rng(seed), stack, shape, shades
        self.reset()

    def frame(self) -> np.ndarray:
        return np.random.default_rng(int(self.random.integers(self.shades))).integers(0, 256, self.shape, np.uint8)

    def reset(self) -> None:
        self.frames = deque([self.frame()] * self.stack, self.stack)

    @property
    def observation(self) -> np.ndarray:
        return np.stack(self.frames) if self.stack > 1 else self.frames[0]

    def step(self) -> tuple[np.ndarray, np.ndarray]:
        """The observation before and the one after."""
        before = self.observation
        self.frames.append(self.frame())
        return before, self.observation

"""What the trainer stands on: whole episodes to score a policy by, Ctrl-C, torch's threads."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch

from angle_rl.agents.actor_critic import as_tensors
from angle_rl.agents.noise import policy_actions
from angle_rl.tensors import beside
from angle_rl.types import RandomKey


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Whole episodes of the policy's deterministic actions."""

    returns: tuple[float, ...]  # undiscounted sum of rewards of each episode
    lengths: tuple[int, ...]  # steps of each episode

    @property
    def mean_return(self) -> float:
        """Mean over the episodes."""
        return float(np.mean(self.returns))


def whole_episodes(feed: Any, policy: Any, key: RandomKey, episodes: int) -> Evaluation:
    """`episodes` episodes of one environment, one after the other."""
    device = next((p.device for p in policy.parameters()), torch.device("cpu"))
    shape = feed.action_space.shape
    feed_key, key = key.split(2)
    seen, feed_key = feed.init(feed_key)
    returns, lengths = [0.0], [0]
    while True:
        action_key, key = key.split(2)
        observations = as_tensors(seen.observation, device)
        actions, _ = policy_actions(policy, observations, (1, *shape), action_key, deterministic=True)
        seen, feed_key = feed.step(feed_key, seen, beside(actions, seen.observation))
        if not seen.stepped[0]:
            continue
        returns[-1] += float(seen.reward[0])
        lengths[-1] += 1
        if seen.terminated[0] or seen.truncated[0]:
            if len(returns) == episodes:
                return Evaluation(returns=tuple(returns), lengths=tuple(lengths))
            returns.append(0.0)
            lengths.append(0)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted, which the callable tells; the second raises as always.

    Elsewhere than in the main thread Ctrl-C does not arrive, and the callable says False.
    """
    pressed = False

    def note(signal_number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Torch's number of threads inside, and as it was afterwards. None changes nothing."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str) -> None:
    """ValueError where torch cannot use the device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device is {device!r}, which torch cannot use here: {error}") from None

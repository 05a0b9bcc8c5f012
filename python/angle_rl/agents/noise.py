"""Where an agent's random numbers come from: a RandomKey each time, never a global generator."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch

from angle_rl.models import takes_noise
from angle_rl.types import RandomKey


@dataclass(frozen=True, kw_only=True)
class ActionBounds:
    """The bounds of a continuous action space on a device, float32 ``[*action_shape]``."""

    low: torch.Tensor
    high: torch.Tensor
    half_range: torch.Tensor  # (high - low) / 2, the unit of all noise
    count: int | None = None  # of actions that can be counted, where low and high are the first and the last

    @property
    def shape(self) -> torch.Size:
        """The shape of one action."""
        return self.low.shape


def action_bounds(space: gymnasium.Space[object], device: torch.device, agent: str) -> ActionBounds:
    """The bounds of `space`. ValueError where the actions are not continuous and bounded."""
    if not isinstance(space, gymnasium.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise ValueError(f"action_space is {space}; {agent} needs continuous actions (a Box of floats)")
    if not space.is_bounded():
        raise ValueError(f"action_space is {space}; {agent} needs finite bounds (see RescaleAction, ClipAction)")
    low = torch.as_tensor(space.low, dtype=torch.float32, device=device)
    high = torch.as_tensor(space.high, dtype=torch.float32, device=device)
    if not bool((low < high).all()):
        raise ValueError(f"action_space is {space}; every low bound must be less than its high bound")
    return ActionBounds(low=low, high=high, half_range=(high - low) / 2)


_GENERATORS = threading.RLock()  # who may seed torch's global generators


def uniform_actions(bounds: ActionBounds, n: int, key: RandomKey) -> torch.Tensor:
    """``[n, *action_shape]`` float32 actions, uniform within the bounds."""
    share = key.uniform(n, *bounds.shape).to(bounds.low.device, torch.float32, non_blocking=True)
    return torch.lerp(bounds.low, bounds.high, share)


def noisy_actions(
    actions: torch.Tensor, bounds: ActionBounds, key: RandomKey, *, scale: float, clip: float | None = None
) -> torch.Tensor:
    """Actions, within the bounds, with normal noise of `scale` half ranges clipped to `clip` half ranges.

    Target policy smoothing of Fujimoto et al. 2018 (arXiv:1802.09477), eq. 14, in halves of the action range.
    """
    noise = key.normal(*actions.shape).to(actions.device, non_blocking=True) * scale
    if clip is not None:
        noise = noise.clamp_(-clip, clip)
    return within_bounds(actions, noise, bounds)


def within_bounds(actions: torch.Tensor, noise: torch.Tensor, bounds: ActionBounds) -> torch.Tensor:
    """Actions with noise ``[n, *action_shape]``, in halves of the action range, clamped to the bounds."""
    noise = noise.to(actions.device, non_blocking=True)
    return torch.clamp(actions + noise * bounds.half_range, bounds.low, bounds.high)


def ornstein_uhlenbeck(
    noise: torch.Tensor, key: RandomKey, *, sigma: float, theta: float = 0.15, mu: float = 0.0
) -> torch.Tensor:
    """The noise that follows ``noise`` ``[n, *action_shape]``: x + theta * (mu - x) + sigma * N(0, 1).

    Each row is a process of its own. Its stationary deviation is ``sigma / sqrt(theta * (2 - theta))``, and its
    values ``k`` steps apart correlate by ``(1 - theta) ** k``. The exploration of Lillicrap et al. 2016
    (arXiv:1509.02971), after Uhlenbeck and Ornstein 1930.
    """
    return noise + theta * (mu - noise) + sigma * key.normal(*noise.shape)


def policy_actions(
    policy: Any,
    observations: Any,
    noise_shape: tuple[int, ...],
    key: RandomKey,
    *,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The policy's actions and log-probabilities; what is random in them comes from the key.

    A `sample_actions` that takes `noise` gets standard normals ``[*noise_shape]``; another runs under torch's
    generators seeded from the key, which are as they were afterwards.
    """
    actions: tuple[torch.Tensor, torch.Tensor | None]
    if not takes_noise(type(policy).sample_actions):
        with seeded_torch(key, _device_and_dtype(policy)[0]):
            actions = policy.sample_actions(observations, deterministic)
        return actions
    device, dtype = _device_and_dtype(policy)
    noise = None if deterministic else key.normal(*noise_shape, dtype=dtype).to(device, non_blocking=True)
    actions = policy.sample_actions(observations, deterministic, noise=noise)
    return actions


def _device_and_dtype(policy: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a policy's parameters are, and float64 where they are that: else noise is float32."""
    parameter = next(policy.parameters(), None)
    if parameter is None:
        return torch.device("cpu"), torch.float32
    return parameter.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32


@contextmanager
def seeded_torch(key: RandomKey, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded from the key inside, and as they were afterwards. Other threads wait."""
    devices = [device] if device.type == "cuda" else []
    with _GENERATORS, torch.random.fork_rng(devices=devices):
        torch.manual_seed(key.seed())
        yield

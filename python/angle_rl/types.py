"""The records that the layers hand to one another: fixed fields, no dynamic attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from angle_rl import _core

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
TensorTree: TypeAlias = "torch.Tensor | dict[str, TensorTree] | tuple[TensorTree, ...]"
"""One tensor, or a dict or tuple of them, as the observation space nests."""


class Batch(NamedTuple):
    """A sampled batch of ``batch`` transitions."""

    observations: Any  # [batch, *observation_shape], a TensorTree for nested spaces
    actions: torch.Tensor  # [batch, *action_shape]
    rewards: torch.Tensor  # [batch] float32
    next_observations: Any  # [batch, *observation_shape]: the true successor, also where the episode was cut
    discounts: torch.Tensor  # [batch] float32, discount**steps * (1 - terminated): the factor of the bootstrap value
    importance_weights: torch.Tensor  # [batch] float32, largest 1; ones under uniform sampling
    handles: torch.Tensor  # [batch] int64, what update_priorities takes
    steps: torch.Tensor  # [batch] int64, number of rewards summed


class Transition(NamedTuple):
    """``n`` transitions on their way into a replay, one per environment that really stepped."""

    observations: Any  # [n, *observation_shape]
    actions: Array  # [n, *action_shape]
    rewards: Array  # [n]
    next_observations: Any  # [n, *observation_shape]: the final observation where the episode ended
    terminated: Array  # [n] bool
    truncated: Array  # [n] bool
    streams: Array  # [n] int64: which environment


class EnvironmentState(NamedTuple):
    """What a feed's ``n`` environments showed last. Observations are arrays, or tensors where the feed has a device."""

    observation: Any  # [n, *observation_shape]: what the next action answers
    reward: Array  # [n] float64
    terminated: Array  # [n] bool
    truncated: Array  # [n] bool
    final_observation: Any  # [n, *observation_shape]: where the step led; differs from `observation` only after a reset
    stepped: Array  # [n] bool: False where this was a reset and no transition took place

    def at_rest(self) -> Array:
        """[n] bool: rows that a caller lets rest until all begin anew; they keep the flags of their episode's end
        without having stepped.
        """
        resting: Array = (self.terminated | self.truncated) & ~self.stepped
        return resting


def reset_state(observation: Any, n: int) -> EnvironmentState:
    """What ``n`` environments show after a reset: ``observation`` ``[n, ...]``, no reward, nothing ended."""
    return EnvironmentState(
        observation=observation,
        reward=np.zeros(n, dtype=np.float64),
        terminated=np.zeros(n, dtype=np.bool_),
        truncated=np.zeros(n, dtype=np.bool_),
        final_observation=observation,
        stepped=np.zeros(n, dtype=np.bool_),
    )


@dataclass(frozen=True)
class RandomKey:
    """A splittable, counter-based source of randomness (Philox4x32-10). Use each key once: to split, or to draw."""

    value: int  # 0 <= value < 2**64

    def __post_init__(self) -> None:
        if not 0 <= self.value < 2**64:
            raise ValueError(f"value is {self.value}; a random key lies in [0, 2**64)")

    def split(self, n: int = 2) -> tuple[RandomKey, ...]:
        """``n`` independent keys."""
        if n < 1:
            raise ValueError(f"n is {n}; a key splits into at least 1")
        return tuple(RandomKey(_core.philox_split(self.value, index)) for index in range(n))

    def seed(self) -> int:
        """An integer in [0, 2**31) to seed another generator with."""
        return _core.philox_split(self.value, 0) >> 33

    def subset(self, n: int, size: int) -> list[int]:
        """``size`` of the numbers below ``n``, any as likely as any other, in the order drawn.

        The first steps of a shuffle (Durstenfeld 1964, doi:10.1145/364520.364540): with ``u = uniform(n)`` step i, from
        0 on, swaps the places i and ``i + floor(u[i] * (n - i))`` of 0, 1, ... n - 1, and the first places are taken.
        """
        numbers = list(range(n))
        for i, u in enumerate(self.uniform(n).tolist()[:size]):
            other = i + int(u * (n - i))
            numbers[i], numbers[other] = numbers[other], numbers[i]
        return numbers[:size]

    def uniform(self, *shape: int) -> torch.Tensor:
        """float64 uniforms in [0, 1) of the given shape."""
        out = torch.empty(shape, dtype=torch.float64)
        _core.philox_uniform(self.value, out.data_ptr(), out.numel())
        return out

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normals of the given shape, float32 or float64; float32 are the float64 ones rounded."""
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}; normals come in torch.float32 and torch.float64")
        out = torch.empty(shape, dtype=dtype)
        fill = _core.philox_normal_f32 if dtype == torch.float32 else _core.philox_normal_f64
        fill(self.value, out.data_ptr(), out.numel())
        return out


class RLState(NamedTuple):
    """All that changes while an agent and its environments run."""

    agent_state: Any  # what the agent's callbacks return
    environment_state: EnvironmentState
    random_key: RandomKey
    iteration: int  # steps taken in this episode (in this run, when running by steps)
    episode: int  # episodes ended
    trajectory: Any  # rows recorded for the caller; None when nobody asked


@dataclass(frozen=True, kw_only=True)
class UpdateSpec:
    """One update of an actor-critic as plain data; an engine executes it and knows no agent."""

    batch_size: int  # rows drawn per update, >= 1
    tau: float  # target <- tau * online + (1 - tau) * target, in (0, 1]
    huber_delta: float | None  # Huber error beyond this |td_error|; None: squared error
    max_gradient_norm: float | None  # clip each optimiser's gradients to this 2-norm; None: no clipping
    policy_batch: str  # "critic": the policy learns on the critic's batch; "fresh": on one of its own
    prioritized: bool  # whether new priorities are written back
    # targets move with every "update", with every "policy" step only, or are "copies" made when the caller says so
    targets_follow: str
    # The equations, for engines that have them themselves; "other": only the update's callables know them.
    # What bootstraps: "soft" (SAC), "smoothed" (TD3), "deterministic" (DDPG), "double" or "maximum" (DQN), "other"
    next_value: str = "other"
    policy_loss: str = "other"  # what the policy descends: "soft", "deterministic" (TD3, DDPG), "none" (DQN), "other"
    # The bootstrap value is the minimum over this many target critics, RandomKey.subset of the first of
    # target_key.split(2), while the second draws whatever else the target needs; None: over all, and no key is split
    critic_subset: int | None = None
    target_noise: float = 0.0  # "smoothed", deviation of the noise on the target policy's actions, in half ranges, >= 0
    target_noise_clip: float = 0.0  # "smoothed", that noise is clipped to this either way, in half ranges, >= 0
    target_entropy: float | None = None  # what a learned entropy coefficient aims at, nats; None: it is not learned

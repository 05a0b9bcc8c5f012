"""Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018, arXiv:1802.09477)."""

from __future__ import annotations

import torch

from angle_rl.agents.actor_critic import ActorCritic
from angle_rl.agents.base import known_as
from angle_rl.agents.ddpg import deterministic_policy_loss
from angle_rl.agents.noise import ActionBounds, noisy_actions, policy_actions
from angle_rl.agents.state import ActorCriticState
from angle_rl.engines.base import NextValues, PolicyLoss
from angle_rl.models import DeterministicPolicy
from angle_rl.types import Batch, RandomKey


class TD3(ActorCritic):
    """TD3: a deterministic policy that is updated late, and smoothed targets that move with it."""

    name = "TD3"
    policy_delay = 2
    has_target_policy = True
    delays_targets = True
    default_noise = "gaussian"
    explores_from_mean = True

    def default_policy(self, observation_dim: int, bounds: ActionBounds) -> torch.nn.Module:
        """A deterministic policy."""
        return DeterministicPolicy(
            observation_dim, bounds.low, bounds.high, self._hyperparameters.hidden_sizes, **self._layers
        )

    @known_as("smoothed")
    def next_values(self, state: ActorCriticState, batch: Batch, key: RandomKey) -> NextValues:
        """The target critics at the target policy's actions with clipped noise, algorithm 1."""
        subset_key, key = self.subset_key(key)
        policy_key, noise_key = key.split(2)
        policy = state.policy if state.target_policy is None else state.target_policy
        shape = (len(batch.rewards), *state.bounds.shape)
        actions, _ = policy_actions(policy, batch.next_observations, shape, policy_key, deterministic=True)
        actions = noisy_actions(
            actions,
            state.bounds,
            noise_key,
            scale=self._hyperparameters.target_noise,
            clip=self._hyperparameters.target_noise_clip,
        )
        return NextValues(self.of_subset(self.future_q(state, batch, actions), subset_key), None, 0.0)

    @known_as("deterministic")
    def policy_loss(self, state: ActorCriticState, batch: Batch, key: RandomKey) -> PolicyLoss:
        """The deterministic policy gradient through the first critic: -mean Q1(s, pi(s))."""
        return deterministic_policy_loss(state, batch, key)

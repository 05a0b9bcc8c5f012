"""Deep deterministic policy gradient (Lillicrap et al. 2016, arXiv:1509.02971)."""

from __future__ import annotations

import torch

from angle_rl.agents.actor_critic import ActorCritic
from angle_rl.agents.base import known_as
from angle_rl.agents.noise import ActionBounds, policy_actions
from angle_rl.agents.state import ActorCriticState
from angle_rl.engines.base import NextValues, PolicyLoss
from angle_rl.models import DeterministicPolicy
from angle_rl.types import Batch, RandomKey


class DDPG(ActorCritic):
    """DDPG: a deterministic policy and one critic, a slow copy of each, and noise that is correlated in time.

    The paper's algorithm 1 without its batch normalisation and weight decay. With more `critics` than one their
    minimum is the target's value.
    """

    name = "DDPG"
    policy_delay = 1
    has_target_policy = True
    delays_targets = False
    critics_under_auto = 1
    default_noise = "ou"
    explores_from_mean = True

    def default_policy(self, observation_dim: int, bounds: ActionBounds) -> torch.nn.Module:
        """A deterministic policy."""
        return DeterministicPolicy(
            observation_dim, bounds.low, bounds.high, self._hyperparameters.hidden_sizes, **self._layers
        )

    @known_as("deterministic")
    def next_values(self, state: ActorCriticState, batch: Batch, key: RandomKey) -> NextValues:
        """The target critic at the target policy's actions: Q'(s', mu'(s'))."""
        subset_key, key = self.subset_key(key)
        policy = state.policy if state.target_policy is None else state.target_policy
        shape = (len(batch.rewards), *state.bounds.shape)
        actions, _ = policy_actions(policy, batch.next_observations, shape, key, deterministic=True)
        return NextValues(self.of_subset(self.future_q(state, batch, actions), subset_key), None, 0.0)

    @known_as("deterministic")
    def policy_loss(self, state: ActorCriticState, batch: Batch, key: RandomKey) -> PolicyLoss:
        """The deterministic policy gradient: -mean Q(s, mu(s))."""
        return deterministic_policy_loss(state, batch, key)


def deterministic_policy_loss(state: ActorCriticState, batch: Batch, key: RandomKey) -> PolicyLoss:
    """The deterministic policy gradient through the first critic: -mean Q1(s, pi(s)).

    Silver et al. 2014, theorem 1; Lillicrap et al. 2016, equation 6.
    """
    shape = (len(batch.rewards), *state.bounds.shape)
    actions, _ = policy_actions(state.policy, batch.observations, shape, key, deterministic=True)
    q = state.critics(batch.observations, actions)
    return PolicyLoss(-q[0].mean(), None, actions)

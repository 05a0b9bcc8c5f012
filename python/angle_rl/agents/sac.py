"""Soft actor-critic (Haarnoja et al. 2018, arXiv:1812.05905)."""

from __future__ import annotations

import math

import torch

from angle_rl.agents.actor_critic import ActorCritic
from angle_rl.agents.base import known_as
from angle_rl.agents.noise import ActionBounds, policy_actions
from angle_rl.agents.optimizers import adam
from angle_rl.agents.state import ActorCriticState
from angle_rl.config import Hyperparameters
from angle_rl.engines.base import NextValues, PolicyLoss
from angle_rl.engines.data_parallel import averaged
from angle_rl.models import SquashedGaussianPolicy
from angle_rl.types import Batch, RandomKey


class SAC(ActorCritic):
    """SAC: a stochastic policy, the entropy in the value, its coefficient learned or fixed."""

    name = "SAC"
    policy_delay = 1
    has_target_policy = False
    delays_targets = False

    def default_policy(self, observation_dim: int, bounds: ActionBounds) -> torch.nn.Module:
        """A squashed Gaussian."""
        return SquashedGaussianPolicy(
            observation_dim, bounds.low, bounds.high, self._hyperparameters.hidden_sizes, **self._layers
        )

    def finish_init(self, state: ActorCriticState) -> None:
        """The entropy coefficient: a parameter and its optimiser if learned, otherwise a constant."""
        start_entropy_coefficient(state, self._hyperparameters)

    @known_as("soft")
    def next_values(self, state: ActorCriticState, batch: Batch, key: RandomKey) -> NextValues:
        """The soft value of the next observations, equation 3: min Q(s', a') - alpha log pi(a'|s')."""
        subset_key, key = self.subset_key(key)
        next_actions, log_prob = policy_actions(
            state.policy, batch.next_observations, (len(batch.rewards), *state.bounds.shape), key
        )
        return NextValues(
            self.of_subset(self.future_q(state, batch, next_actions), subset_key),
            _required(log_prob),
            _required(state.entropy_coefficient),
        )

    @known_as("soft")
    def policy_loss(self, state: ActorCriticState, batch: Batch, key: RandomKey) -> PolicyLoss:
        """Equation 9: mean of alpha log pi(a|s) - min Q(s, a), with a from the policy."""
        actions, log_prob = policy_actions(
            state.policy, batch.observations, (len(batch.rewards), *state.bounds.shape), key
        )
        log_prob = _required(log_prob)
        q = state.critics(batch.observations, actions)
        smallest = torch.minimum(q[0], q[1]) if len(q) == 2 else q.min(0).values
        return PolicyLoss((_required(state.entropy_coefficient) * log_prob - smallest).mean(), log_prob, actions)

    @known_as("entropy")
    def after_policy_step(self, state: ActorCriticState, learned: PolicyLoss) -> None:
        """Equation 18, on the log-probabilities of the policy's own loss."""
        learn_entropy_coefficient(state, _required(learned.log_prob), self.target_entropy(state.bounds))

    def target_entropy(self, bounds: ActionBounds) -> float | None:
        """The config's, or -(action dimensions); None where the coefficient is fixed."""
        target = self._hyperparameters.target_entropy
        if self._hyperparameters.entropy_coefficient != "auto":
            return None
        return -float(math.prod(bounds.shape)) if target is None else target


def start_entropy_coefficient(state: ActorCriticState, hyperparameters: Hyperparameters) -> None:
    """The entropy coefficient of a first state: a parameter and its optimiser if learned, otherwise a constant."""
    coefficient = hyperparameters.entropy_coefficient
    if not isinstance(coefficient, str):
        state.entropy_coefficient = torch.tensor(coefficient, device=state.device)
        return
    state.log_entropy_coefficient = torch.zeros((), device=state.device, requires_grad=True)
    state.entropy_coefficient = torch.ones((), device=state.device)
    rate = hyperparameters.entropy_learning_rate
    state.optimizers["entropy_coefficient"] = adam(
        [state.log_entropy_coefficient], hyperparameters.learning_rate if rate is None else rate
    )


def learn_entropy_coefficient(state: ActorCriticState, log_prob: torch.Tensor, target_entropy: float | None) -> None:
    """One step of the coefficient, in its logarithm, if it is learned; ``log_prob`` is ``[batch]``.

    The loss is -log(alpha) * mean(log pi + target entropy): its gradient needs no backward pass. Where processes learn
    together, the mean is over all of them.
    """
    log_coefficient = state.log_entropy_coefficient
    if log_coefficient is None or target_entropy is None:
        return
    mean = averaged(state.data_parallel.get("policy"), log_prob.detach().mean())
    log_coefficient.grad = -(mean + target_entropy)
    state.optimizers["entropy_coefficient"].step()
    state.entropy_coefficient = log_coefficient.detach().exp()


def _required(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise TypeError("policy gave no log_prob; SAC needs a stochastic policy whose sample_actions gives one")
    return tensor

"""Soft actor-critic for discrete actions (Christodoulou 2019, arXiv:1910.07207).

Where the actions can be counted, every expectation over them is a sum, and nothing is sampled to learn: the value
of the next observations, the policy's loss and the entropy are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn
from torch.nn import functional

from angle_rl.agents.actor_critic import ActorCritic, QFuture
from angle_rl.agents.noise import ActionBounds
from angle_rl.agents.sac import learn_entropy_coefficient, start_entropy_coefficient
from angle_rl.agents.state import ActorCriticState
from angle_rl.config import AgentConfig
from angle_rl.engines.base import NextValues, PolicyLoss
from angle_rl.models import multilayer_perceptron
from angle_rl.types import Batch, RandomKey

TARGET_ENTROPY_SHARE = 0.98
"""The paper's target entropy, as a share of the largest there is, log(actions)"""


class CategoricalPolicy(nn.Module):
    """Probabilities of ``actions`` actions, numbered from ``start`` on.

    Args:
        observation_dim: width of the observations, >= 1.
        actions: number of actions, >= 1.
        start: the first action.
        hidden_sizes: widths of the hidden layers, each >= 1.
        activation: after each of them, "relu", "tanh", "silu" or "gelu".
        layer_norm: a LayerNorm in front of each activation.
    """

    def __init__(
        self,
        observation_dim: int,
        actions: int,
        start: int = 0,
        hidden_sizes: Sequence[int] = (256, 256),
        *,
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.start = start
        self.body = multilayer_perceptron(observation_dim, hidden_sizes, activation=activation, layer_norm=layer_norm)
        self.head = nn.Linear([observation_dim, *hidden_sizes][-1], actions)

    def forward(self, observations: Tensor) -> Tensor:
        """``[batch, observation_dim]`` -> logits, ``[batch, actions]``."""
        logits: Tensor = self.head(self.body(observations))
        return logits

    def sample_actions(
        self, observations: Any, deterministic: bool = False, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Actions, ``[batch]`` int64, and the logarithms of their probabilities, ``[batch]``.

        Args:
            observations: ``[batch, observation_dim]``.
            deterministic: take the likeliest action.
            noise: ``[batch]`` standard normals, whose quantiles choose the actions; None: drawn from torch's
                default generator.
        """
        log_probabilities = functional.log_softmax(self(observations), -1)
        if deterministic:
            indices = log_probabilities.argmax(-1)
        else:
            noise = torch.randn_like(log_probabilities[:, 0]) if noise is None else noise
            shares = torch.special.ndtr(noise.double()).unsqueeze(-1)
            passed = log_probabilities.detach().double().exp().cumsum(-1)[:, :-1] <= shares
            indices = passed.sum(-1)
        chosen = log_probabilities.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
        return indices + self.start, chosen


class DiscreteQ(nn.Module):
    """An ensemble of action-value networks with one output for each action, numbered from ``start`` on.

    Arguments as of `CategoricalPolicy`; ``critics``: number of networks, >= 1, which start apart.
    """

    def __init__(
        self,
        observation_dim: int,
        actions: int,
        start: int = 0,
        hidden_sizes: Sequence[int] = (256, 256),
        critics: int = 2,
        *,
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.start = start
        width = [observation_dim, *hidden_sizes][-1]
        self.members = nn.ModuleList(
            nn.Sequential(
                multilayer_perceptron(observation_dim, hidden_sizes, activation=activation, layer_norm=layer_norm),
                nn.Linear(width, actions),
            )
            for _ in range(critics)
        )

    def action_values(self, observations: Tensor) -> Tensor:
        """``[batch, observation_dim]`` -> q of every action, ``[critics, batch, actions]``."""
        return torch.stack([member(observations) for member in self.members])

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """``[batch, observation_dim]``, ``[batch]`` integers -> q, ``[critics, batch]``."""
        q = self.action_values(observations)
        indices = (actions.long() - self.start).expand(len(q), -1).unsqueeze(-1)
        return q.gather(-1, indices).squeeze(-1)


class DiscreteSAC(ActorCritic):
    """SAC for a Discrete action space.

    A policy of one's own gives logits ``[batch, actions]`` when called, and has `sample_actions`. Critics of one's
    own have `action_values` besides being ``(observations, actions) -> q``; see `DiscreteQ`.
    """

    name = "DiscreteSAC"
    policy_delay = 1
    has_target_policy = False
    delays_targets = False

    def __init__(self, config: AgentConfig, q_future: QFuture | None = None) -> None:
        super().__init__(config, q_future)
        if q_future is not None:
            raise ValueError("q_future is given; DiscreteSAC takes the mean over all next actions, and asks for none")
        if self._noise_process != "none":
            raise ValueError(
                f"exploration_process is {self._noise_process!r}; DiscreteSAC samples its actions, to which no noise "
                "can be added"
            )

    def bounds_of(self, action_space: gymnasium.Space[Any], device: torch.device) -> ActionBounds:
        """The first and the last action, int64 scalars. ValueError where the actions cannot be counted."""
        if not isinstance(action_space, gymnasium.spaces.Discrete) or action_space.n < 2:
            raise ValueError(f"action_space is {action_space}; DiscreteSAC needs Discrete actions, at least 2")
        low = torch.tensor(int(action_space.start), device=device)
        high = low + int(action_space.n) - 1
        self._check_target_entropy(int(action_space.n))
        return ActionBounds(low=low, high=high, half_range=(high - low) / 2, count=int(action_space.n))

    def default_policy(self, observation_dim: int, bounds: ActionBounds) -> torch.nn.Module:
        """A categorical policy."""
        return CategoricalPolicy(
            observation_dim,
            _number_of_actions(bounds),
            int(bounds.low),
            self._hyperparameters.hidden_sizes,
            **self._layers,
        )

    def default_critics(self, observation_dim: int, action_space: gymnasium.Space[Any], number: int) -> torch.nn.Module:
        """So many critics for flat observations, with one output for each action."""
        bounds = self.bounds_of(action_space, torch.device("cpu"))
        return DiscreteQ(
            observation_dim,
            _number_of_actions(bounds),
            int(bounds.low),
            self._hyperparameters.hidden_sizes,
            number,
            **self._layers,
        )

    def finish_init(self, state: ActorCriticState) -> None:
        """The entropy coefficient, as SAC's. TypeError where the critics have no `action_values`."""
        for critics in (state.critics, state.target_critics):
            if not callable(getattr(critics, "action_values", None)):
                raise TypeError(f"critics is a {type(critics).__name__}, which has no action_values(observations)")
        start_entropy_coefficient(state, self._hyperparameters)

    def random_actions(self, state: ActorCriticState, n: int, key: RandomKey) -> torch.Tensor:
        """``[n]`` int64, each action as likely as any other."""
        low = state.bounds.low
        return low + (key.uniform(n) * _number_of_actions(state.bounds)).long().to(low.device)

    def next_values(self, state: ActorCriticState, batch: Batch, key: RandomKey) -> NextValues:
        """The soft value of the next observations, equation 10: sum over a of pi(a) (min Q(a) - alpha log pi(a))."""
        log_probabilities, probabilities = _policy_of(state, batch.next_observations)
        critics: Any = state.target_critics
        smallest = critics.action_values(batch.next_observations).amin(0)
        value = (probabilities * (smallest - self._coefficient(state) * log_probabilities)).sum(-1)
        return NextValues(value.unsqueeze(0), None, 0.0)

    def policy_loss(self, state: ActorCriticState, batch: Batch, key: RandomKey) -> PolicyLoss:
        """Equation 12: mean of the sum over a of pi(a) (alpha log pi(a) - min Q(a)).

        `log_prob` is the policy's mean log-probability, the negative entropy.
        """
        log_probabilities, probabilities = _policy_of(state, batch.observations)
        critics: Any = state.critics
        with torch.no_grad():  # the values are no function of the policy here
            smallest = critics.action_values(batch.observations).amin(0)
        terms = probabilities * (self._coefficient(state) * log_probabilities - smallest)
        return PolicyLoss(terms.sum(-1).mean(), (probabilities * log_probabilities).sum(-1))

    def after_policy_step(self, state: ActorCriticState, learned: PolicyLoss) -> None:
        """Equation 11: the coefficient grows while the entropy is below its target."""
        if learned.log_prob is not None:
            learn_entropy_coefficient(state, learned.log_prob, self.target_entropy(state.bounds))

    def target_entropy(self, bounds: ActionBounds) -> float | None:
        """The config's, or a share of the largest there is; None where the coefficient is fixed."""
        target = self._hyperparameters.target_entropy
        if self._hyperparameters.entropy_coefficient != "auto":
            return None
        return TARGET_ENTROPY_SHARE * math.log(_number_of_actions(bounds)) if target is None else target

    def _coefficient(self, state: ActorCriticState) -> Tensor | float:
        return 0.0 if state.entropy_coefficient is None else state.entropy_coefficient

    def _check_target_entropy(self, actions: int) -> None:
        target, largest = self._hyperparameters.target_entropy, math.log(actions)
        if target is not None and not 0 <= target <= largest:
            raise ValueError(
                f"target_entropy is {target}; with {actions} actions it must lie in [0, log({actions}) = {largest:.3f}]"
            )


def _number_of_actions(bounds: ActionBounds) -> int:
    assert bounds.count is not None  # from `DiscreteSAC.bounds_of`; a look at the tensors would wait for their device
    return bounds.count


def _policy_of(state: ActorCriticState, observations: Any) -> tuple[Tensor, Tensor]:
    """The logarithms of the actions' probabilities, and these, each ``[batch, actions]``."""
    log_probabilities = functional.log_softmax(state.policy(observations), -1)
    return log_probabilities, log_probabilities.exp()

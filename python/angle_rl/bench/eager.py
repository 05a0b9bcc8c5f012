"""SAC in eager torch, twice: as single-file implementations write it, and tuned by hand.

Both learn the same thing. Sizes are HalfCheetah's: observations [17], actions [6] in [-1, 1], two hidden
layers of 256. Noise may be handed in, so that the two can be compared number by number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from angle_rl.bench.rows import ACTION, OBSERVATION, Rows

HIDDEN = 256  # units of each of the two hidden layers
DISCOUNT, TAU = 0.99, 0.005
CRITIC_RATE, POLICY_RATE = 1e-3, 3e-4
TARGET_ENTROPY = -float(ACTION)
LOG_STD_LOW, LOG_STD_HIGH = -5.0, 2.0


class TorchRows(NamedTuple):
    """A uniform batch; rewards and terminated are [batch, 1] or [batch], as the implementation holds them."""

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_observations: torch.Tensor
    terminated: torch.Tensor


def as_tensors(rows: Sequence[npt.NDArray[Any]]) -> TorchRows:
    """The columns as tensors, without a copy where that can be."""
    observations, actions, rewards, next_observations, terminated = map(torch.as_tensor, rows)
    return TorchRows(observations, actions, rewards, next_observations, terminated.to(torch.float32))


class Actor(nn.Module):
    """Mean and log standard deviation of a squashed Gaussian."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(OBSERVATION, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)
        self.mean = nn.Linear(HIDDEN, ACTION)
        self.log_std = nn.Linear(HIDDEN, ACTION)

    def forward(
        self, observations: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = functional.relu(self.fc2(functional.relu(self.fc1(observations))))
        mean = self.mean(hidden)
        log_std = torch.tanh(self.log_std(hidden))
        log_std = LOG_STD_LOW + 0.5 * (LOG_STD_HIGH - LOG_STD_LOW) * (log_std + 1)
        normal = torch.distributions.Normal(mean, log_std.exp())
        before = normal.rsample() if noise is None else mean + noise * log_std.exp()
        actions = torch.tanh(before)
        log_prob: torch.Tensor = normal.log_prob(before)  # type: ignore[no-untyped-call]
        log_prob = log_prob - torch.log(1 - actions.pow(2) + 1e-6)
        return actions, log_prob.sum(1, keepdim=True)


class Critic(nn.Module):
    """One action value [batch, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(OBSERVATION + ACTION, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)
        self.fc3 = nn.Linear(HIDDEN, 1)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        values = torch.cat([observations, actions], 1)
        value: torch.Tensor = self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(values)))))
        return value


class CleanRLStyle:
    """In the manner of single-file implementations: separate networks, plain Adam, uniform NumPy replay.

    The policy is updated twice every second step, each time with a second forward for the entropy
    coefficient.
    """

    name = "cleanrl-style"

    def __init__(self, capacity: int) -> None:
        self.columns = Rows(
            observations=np.zeros((capacity, OBSERVATION), np.float32),
            actions=np.zeros((capacity, ACTION), np.float32),
            rewards=np.zeros((capacity, 1), np.float32),
            next_observations=np.zeros((capacity, OBSERVATION), np.float32),
            terminated=np.zeros((capacity, 1), np.bool_),
        )
        self.capacity, self.next, self.size, self.steps = capacity, 0, 0, 0
        self.actor = Actor()
        self.q1, self.q2 = Critic(), Critic()
        self.q1_target, self.q2_target = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
        self.q_optimizer = torch.optim.Adam([*self.q1.parameters(), *self.q2.parameters()], lr=CRITIC_RATE)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=POLICY_RATE)
        self.log_coefficient = torch.zeros(1, requires_grad=True)
        self.coefficient = 1.0
        self.coefficient_optimizer = torch.optim.Adam([self.log_coefficient], lr=CRITIC_RATE)

    def fill(self, rows: Rows) -> None:
        """Stores rows, [n] with n at most the capacity, from the first place on."""
        n = len(rows.rewards)
        for column, values in zip(self.columns, rows, strict=True):
            column[:n] = values.reshape(n, -1)
        self.next, self.size = n % self.capacity, n

    def store(self, observation: Any, action: Any, reward: float, next_observation: Any, terminated: bool) -> None:
        """Stores one row."""
        values = (observation, action, reward, next_observation, terminated)
        for column, value in zip(self.columns, values, strict=True):
            column[self.next] = value
        self.next = (self.next + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch: int) -> TorchRows:
        """A uniform batch as fresh tensors."""
        indices = np.random.randint(0, self.size, size=batch)  # noqa: NPY002 - as such implementations do
        return as_tensors([column[indices] for column in self.columns])

    def act(self, observation: Any) -> Any:
        """One action for one observation."""
        with torch.no_grad():
            return self.actor(torch.as_tensor(observation, dtype=torch.float32)[None])[0][0].numpy()

    def critic_loss(self, rows: TorchRows, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over critics of the mean squared error."""
        with torch.no_grad():
            next_actions, log_prob = self.actor(rows.next_observations, noise)
            next_q = torch.min(
                self.q1_target(rows.next_observations, next_actions),
                self.q2_target(rows.next_observations, next_actions),
            )
            td_target = rows.rewards + (1 - rows.terminated) * DISCOUNT * (next_q - self.coefficient * log_prob)
        first = functional.mse_loss(self.q1(rows.observations, rows.actions), td_target)
        return first + functional.mse_loss(self.q2(rows.observations, rows.actions), td_target)

    def policy_loss(self, rows: TorchRows, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Mean of the entropy term minus the smaller value."""
        actions, log_prob = self.actor(rows.observations, noise)
        q = torch.min(self.q1(rows.observations, actions), self.q2(rows.observations, actions))
        loss: torch.Tensor = (self.coefficient * log_prob - q).mean()
        return loss

    def update(self, batch: int) -> None:
        """One step of the critics; every second time two of the policy; the targets."""
        rows = self.sample(batch)
        loss = self.critic_loss(rows)
        self.q_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.q_optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for _ in range(2):
                policy_loss = self.policy_loss(rows)
                self.actor_optimizer.zero_grad()
                policy_loss.backward()  # type: ignore[no-untyped-call]
                self.actor_optimizer.step()
                with torch.no_grad():
                    _, log_prob = self.actor(rows.observations)
                coefficient_loss = (-self.log_coefficient.exp() * (log_prob + TARGET_ENTROPY)).mean()
                self.coefficient_optimizer.zero_grad()
                coefficient_loss.backward()
                self.coefficient_optimizer.step()
                self.coefficient = self.log_coefficient.exp().item()
        for online, target in ((self.q1, self.q1_target), (self.q2, self.q2_target)):
            for parameter, slow in zip(online.parameters(), target.parameters(), strict=True):
                slow.data.copy_(TAU * parameter.data + (1 - TAU) * slow.data)

    def critics(self) -> list[torch.Tensor]:
        return [*self.q1.parameters(), *self.q2.parameters()]

    def targets(self) -> list[torch.Tensor]:
        return [*self.q1_target.parameters(), *self.q2_target.parameters()]

    def policy(self) -> list[torch.Tensor]:
        return list(self.actor.parameters())


def _stack(first: nn.Linear, second: nn.Linear) -> list[torch.Tensor]:
    weight = torch.stack([first.weight.detach().t(), second.weight.detach().t()]).contiguous()
    bias = torch.stack([first.bias.detach(), second.bias.detach()])[:, None]
    return [weight.requires_grad_(), bias.clone().requires_grad_()]


def stacked_q(parameters: list[torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """Values [2, batch] of observations with actions [batch, 23], both critics at once."""
    hidden = values.expand(2, *values.shape)
    weight1, bias1, weight2, bias2, weight3, bias3 = parameters
    hidden = torch.baddbmm(bias1, hidden, weight1).relu_()
    hidden = torch.baddbmm(bias2, hidden, weight2).relu_()
    return torch.baddbmm(bias3, hidden, weight3).squeeze(2)


class TunedTorch:
    """Tuned by hand: rows packed in one tensor, stacked critics, fused Adam, targets by one foreach call.

    No critic weight gradients in the policy's backward pass, no second policy forward, nothing read back.
    """

    name = "tuned-torch"

    def __init__(self, capacity: int) -> None:
        start = CleanRLStyle(1)
        self.rows = torch.zeros(capacity, 2 * OBSERVATION + ACTION + 2)
        self.capacity, self.next, self.size = capacity, 0, 0
        self._adopt(start)

    def _adopt(self, start: CleanRLStyle) -> None:
        """Takes over the networks of ``start`` as they are now, with fresh optimisers."""
        actor, q1, q2 = start.actor, start.q1, start.q2
        self.fc1, self.fc2 = copy.deepcopy(actor.fc1), copy.deepcopy(actor.fc2)
        self.head = nn.Linear(HIDDEN, 2 * ACTION)
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([actor.mean.weight, actor.log_std.weight]))
            self.head.bias.copy_(torch.cat([actor.mean.bias, actor.log_std.bias]))
        layers = ((q1.fc1, q2.fc1), (q1.fc2, q2.fc2), (q1.fc3, q2.fc3))
        self.online = [tensor for first, second in layers for tensor in _stack(first, second)]
        self.fixed = [tensor.detach() for tensor in self.online]  # the same memory without gradients
        self.slow = [tensor.detach().clone() for tensor in self.online]
        self.log_coefficient = torch.zeros((), requires_grad=True)
        self.coefficient = torch.ones(())
        policy = self.policy()
        self.q_optimizer = torch.optim.Adam(self.online, lr=CRITIC_RATE, fused=True)
        self.actor_optimizer = torch.optim.Adam(policy, lr=POLICY_RATE, fused=True)
        self.coefficient_optimizer = torch.optim.Adam([self.log_coefficient], lr=CRITIC_RATE, fused=True)

    def fill(self, rows: Rows) -> None:
        """Stores rows, [n] with n at most the capacity, from the first place on."""
        n = len(rows.rewards)
        parts = (rows.observations, rows.actions, rows.next_observations, rows.rewards, rows.terminated)
        columns = [torch.as_tensor(part.reshape(n, -1)) for part in parts]
        self.rows[:n] = torch.cat([column.to(torch.float32) for column in columns], 1)
        self.next, self.size = n % self.capacity, n

    def store(self, observation: Any, action: Any, reward: float, next_observation: Any, terminated: bool) -> None:
        """Stores one row."""
        parts = (observation, action, next_observation, [reward, float(terminated)])
        self.rows[self.next] = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        self.next = (self.next + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def act(self, observation: Any) -> Any:
        """One action for one observation."""
        with torch.no_grad():
            return self._actor(torch.as_tensor(observation, dtype=torch.float32)[None], None)[0][0].numpy()

    def _actor(self, observations: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.fc2(self.fc1(observations).relu_()).relu_()
        mean, log_std = self.head(hidden).chunk(2, 1)
        log_std = LOG_STD_LOW + 0.5 * (LOG_STD_HIGH - LOG_STD_LOW) * (torch.tanh(log_std) + 1)
        noise = torch.randn_like(mean) if noise is None else noise
        before = torch.addcmul(mean, noise, log_std.exp())
        # The noise's own square needs no gradient, and log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)).
        constant = 0.5 * math.log(2 * math.pi) + 2 * math.log(2)
        inner = 2 * (before + functional.softplus(-2 * before)) - log_std
        log_prob = (inner - (0.5 * noise * noise + constant)).sum(1)
        return torch.tanh(before), log_prob

    def critic_loss(self, rows: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over critics of the mean squared error, for packed rows [batch, 42]."""
        both = OBSERVATION + ACTION
        with torch.no_grad():
            following = rows[:, both : both + OBSERVATION]
            next_actions, log_prob = self._actor(following, noise)
            q1, q2 = stacked_q(self.slow, torch.cat([following, next_actions], 1))
            value = torch.minimum(q1, q2) - self.coefficient * log_prob
            td_target = torch.addcmul(rows[:, -2], DISCOUNT * (1 - rows[:, -1]), value)
        difference = stacked_q(self.online, rows[:, :both]) - td_target
        return (difference * difference).sum() / len(rows)

    def policy_loss(self, rows: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean of the entropy term minus the smaller value, and the log-probabilities [batch]."""
        observations = rows[:, :OBSERVATION]
        actions, log_prob = self._actor(observations, noise)
        q1, q2 = stacked_q(self.fixed, torch.cat([observations, actions], 1))
        return (self.coefficient * log_prob - torch.minimum(q1, q2)).mean(), log_prob.detach()

    def update(self, batch: int) -> None:
        """One step of the critics, the policy and the entropy coefficient; the targets."""
        rows = self.rows.index_select(0, torch.randint(self.size, (batch,)))
        loss = self.critic_loss(rows)
        self.q_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.q_optimizer.step()
        policy_loss, log_prob = self.policy_loss(rows)
        self.actor_optimizer.zero_grad()
        policy_loss.backward()  # type: ignore[no-untyped-call]
        self.actor_optimizer.step()
        self.log_coefficient.grad = -self.coefficient * (log_prob.mean() + TARGET_ENTROPY)
        self.coefficient_optimizer.step()
        self.coefficient = self.log_coefficient.detach().exp()
        torch._foreach_lerp_(self.slow, self.fixed, TAU)

    def critics(self) -> list[torch.Tensor]:
        return self.online

    def targets(self) -> list[torch.Tensor]:
        return self.slow

    def policy(self) -> list[torch.Tensor]:
        return [*self.fc1.parameters(), *self.fc2.parameters(), *self.head.parameters()]


def check_same_numbers(batch: int = 64) -> None:
    """RuntimeError unless the two, with the same networks, rows and noise, have the same losses."""
    plain, tuned = CleanRLStyle(batch), TunedTorch(batch)
    tuned._adopt(plain)
    generator = np.random.default_rng(3)
    rows = Rows(
        observations=generator.normal(size=(batch, OBSERVATION)).astype(np.float32),
        actions=generator.uniform(-1, 1, (batch, ACTION)).astype(np.float32),
        rewards=generator.normal(size=batch).astype(np.float32),
        next_observations=generator.normal(size=(batch, OBSERVATION)).astype(np.float32),
        terminated=generator.uniform(size=batch) < 0.2,
    )
    plain.fill(rows)
    tuned.fill(rows)
    whole = as_tensors(plain.columns)
    noise = torch.from_numpy(generator.normal(size=(batch, ACTION)).astype(np.float32))
    pairs = {
        "critic loss": (plain.critic_loss(whole, noise), tuned.critic_loss(tuned.rows, noise)),
        "policy loss": (plain.policy_loss(whole, noise), tuned.policy_loss(tuned.rows, noise)[0]),
    }
    for name, (expected, found) in pairs.items():
        if not torch.allclose(expected, found, rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"tuned-torch: {name} is {found.item()}, cleanrl-style has {expected.item()}")

"""SAC for a device as hand-tuned scripts have it: compiled update functions in CUDA graphs, draws outside of them.

It stands in for LeanRL's SAC and does what that does, step for step: uniform rows on the device; critics stacked by
vmap; one graph for the critics' step and one for the policy's and the entropy coefficient's, the latter twice every
second update; the targets and the coefficient's copy behind them. Its draws cost less than that one's: they go straight
into the graphs' inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.func import stack_module_state
from torch.nn.functional import linear

from angle_rl.bench.eager import (
    CRITIC_RATE,
    DISCOUNT,
    LOG_STD_HIGH,
    LOG_STD_LOW,
    POLICY_RATE,
    TARGET_ENTROPY,
    TAU,
    Actor,
    CleanRLStyle,
    Critic,
    as_tensors,
)
from angle_rl.bench.gpu_timing import Place
from angle_rl.bench.rows import ACTION, OBSERVATION, Rows
from angle_rl.bench.timing import Clock

WARMUPS = 5  # runs before a graph: gradients and moments must be there, and everything compiled that compiles anew

Outputs = tuple[torch.Tensor, torch.Tensor]


class LeanStyle:
    """One of them. Its graphs are made by `fill`."""

    multiple = 2
    updates = 1

    def __init__(self, place: Place, capacity: int, batch: int, *, compiled: bool) -> None:
        """`compiled`: by torch.compile, as well as recorded."""
        self.name = "lean-style" if compiled else "lean-style, not compiled"
        self.place, self.batch, self.compiled, self.device = place, batch, compiled, place.device
        widths = (OBSERVATION, ACTION, None, OBSERVATION, None)
        self.columns = [torch.zeros(*_shape(capacity, width), device=self.device) for width in widths]
        self.inputs = [torch.zeros(*_shape(batch, width), device=self.device) for width in widths]
        self.size, self.taken = 0, 0
        self._begin(Actor(), Critic(), Critic())
        self._launch_critics: Callable[[], object] = lambda: None
        self._launch_policy: Callable[[], object] = lambda: None

    def _begin(self, actor: Actor, first: Critic, second: Critic) -> None:
        """Takes copies of these networks, with fresh optimisers."""
        self.actor = copy.deepcopy(actor).to(self.device)
        parameters, _ = stack_module_state([first, second])
        self.online = {k: v.detach().to(self.device, copy=True).requires_grad_() for k, v in parameters.items()}
        self.slow = {k: v.detach().clone() for k, v in self.online.items()}
        self.log_coefficient = torch.zeros(1, device=self.device, requires_grad=True)
        self.coefficient = torch.ones(1, device=self.device)
        capturable = self.place.real
        self.q_optimizer = torch.optim.Adam(list(self.online.values()), lr=CRITIC_RATE, capturable=capturable)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=POLICY_RATE, capturable=capturable)
        self.coefficient_optimizer = torch.optim.Adam([self.log_coefficient], lr=CRITIC_RATE, capturable=capturable)

    def fill(self, rows: Rows) -> None:
        """Stores rows, [n] with n at most the capacity, from the first place on; then compiles and records."""
        n = len(rows.rewards)
        for column, values in zip(self.columns, rows, strict=True):
            column[:n] = torch.as_tensor(values).to(self.device)
        self.size = n
        self.sample()
        steps: list[Callable[[], object]] = [self._critics_step, self._policy_step]
        if self.compiled and self.place.real:
            steps = [torch.compile(step) for step in steps]
        self._launch_critics, self._launch_policy = (self.place.captured(step, WARMUPS) for step in steps)

    def sample(self) -> None:
        """A uniform batch into the graphs' inputs."""
        chosen = torch.randint(self.size, (self.batch,), device=self.device)
        for column, given in zip(self.columns, self.inputs, strict=True):
            torch.index_select(column, 0, chosen, out=given)

    def update(self) -> object:
        """A batch, one step of the critics; every second time two of the policy; the targets."""
        self.sample()
        self._launch_critics()
        self.taken += 1
        if self.taken % 2 == 0:
            for _ in range(2):
                self._launch_policy()
                self.coefficient.copy_(self.log_coefficient.detach().exp())
        torch._foreach_lerp_(self.targets(), [tensor.detach() for tensor in self.critics()], TAU)
        return None

    # What is recorded ----------

    def _act(self, observations: torch.Tensor, noise: torch.Tensor | None = None) -> Outputs:
        """Actions and their log-probabilities [batch]."""
        actor = self.actor
        hidden = torch.relu(actor.fc2(torch.relu(actor.fc1(observations))))
        mean = actor.mean(hidden)
        share = torch.tanh(actor.log_std(hidden))
        log_std = LOG_STD_LOW + 0.5 * (LOG_STD_HIGH - LOG_STD_LOW) * (share + 1)
        noise = torch.randn_like(mean) if noise is None else noise
        actions = torch.tanh(mean + log_std.exp() * noise)
        density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        return actions, (density - torch.log(1 - actions.square() + 1e-6)).sum(1)

    def _q(self, parameters: dict[str, torch.Tensor], observations: torch.Tensor, actions: torch.Tensor) -> Any:
        """Values [2, batch]."""

        def single(own: dict[str, torch.Tensor]) -> torch.Tensor:
            hidden = torch.cat([observations, actions], 1)
            for layer in ("fc1", "fc2"):
                hidden = torch.relu(linear(hidden, own[f"{layer}.weight"], own[f"{layer}.bias"]))
            return linear(hidden, own["fc3.weight"], own["fc3.bias"]).squeeze(1)

        return torch.vmap(single)(parameters)

    def critic_loss(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over critics of the mean squared error, on the inputs."""
        observations, actions, rewards, following, terminated = self.inputs
        with torch.no_grad():
            next_actions, log_prob = self._act(following, noise)
            next_q = self._q(self.slow, following, next_actions).amin(0) - self.coefficient * log_prob
            target = rewards + (1 - terminated) * DISCOUNT * next_q
        loss: torch.Tensor = (self._q(self.online, observations, actions) - target).square().mean(1).sum()
        return loss

    def policy_loss(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Mean of the entropy term minus the smaller value, on the inputs."""
        observations = self.inputs[0]
        actions, log_prob = self._act(observations, noise)
        fixed = {name: tensor.detach() for name, tensor in self.online.items()}
        loss: torch.Tensor = (self.coefficient * log_prob - self._q(fixed, observations, actions).amin(0)).mean()
        return loss

    def _critics_step(self) -> torch.Tensor:
        self.q_optimizer.zero_grad()
        loss = self.critic_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.q_optimizer.step()
        return loss.detach()

    def _policy_step(self) -> torch.Tensor:
        self.actor_optimizer.zero_grad()
        loss = self.policy_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.actor_optimizer.step()
        self.coefficient_optimizer.zero_grad()
        with torch.no_grad():
            _, log_prob = self._act(self.inputs[0])
        coefficient_loss = (-self.log_coefficient.exp() * (log_prob + TARGET_ENTROPY)).mean()
        coefficient_loss.backward()  # type: ignore[no-untyped-call]
        self.coefficient_optimizer.step()
        return loss.detach()

    # What a learner shows ----------

    def critics(self) -> list[torch.Tensor]:
        return list(self.online.values())

    def targets(self) -> list[torch.Tensor]:
        return list(self.slow.values())

    def policy(self) -> list[torch.Tensor]:
        return list(self.actor.parameters())

    def choose(self, observation: Any) -> Any:
        """One action for one observation."""
        with torch.no_grad():
            given = torch.as_tensor(observation, dtype=torch.float32, device=self.device)[None]
            return self._act(given)[0][0].cpu().numpy()

    def steps(self) -> Clock:
        """RuntimeError."""
        raise RuntimeError(f"{self.name} steps no environment")

    def close(self) -> None:
        pass


def _shape(rows: int, width: int | None) -> tuple[int, ...]:
    return (rows,) if width is None else (rows, width)


def check_lean(place: Place, rows: Rows) -> None:
    """RuntimeError unless its losses are those of the single-file style, with the same networks, rows and noise."""
    n = len(rows.rewards)
    plain, lean = CleanRLStyle(n), LeanStyle(place, n, n, compiled=False)
    plain.fill(rows)
    lean._begin(plain.actor, plain.q1, plain.q2)
    for given, values in zip(lean.inputs, rows, strict=True):
        given.copy_(torch.as_tensor(values))
    noise = torch.randn(n, ACTION, generator=torch.Generator().manual_seed(5))
    whole = as_tensors(plain.columns)
    pairs = {
        "critic loss": (plain.critic_loss(whole, noise), lean.critic_loss(noise.to(place.device))),
        "policy loss": (plain.policy_loss(whole, noise), lean.policy_loss(noise.to(place.device))),
    }
    for name, (expected, found) in pairs.items():
        if not torch.allclose(expected, found.cpu(), rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"lean-style: {name} is {found.item()}, cleanrl-style has {expected.item()}")

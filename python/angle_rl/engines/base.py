"""What engines take and give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from angle_rl.types import Batch, RandomKey


class NextValues(NamedTuple):
    """What the bootstrap value of a batch's next observations is made of, without gradients."""

    q: torch.Tensor  # [critics, batch], whose minimum over critics is the value
    log_prob: torch.Tensor | None  # [batch], of the next actions; None: no entropy term
    entropy_coefficient: float | torch.Tensor  # reward per nat of entropy


class PolicyLoss(NamedTuple):
    """The policy's loss on a batch and what else that forward pass gave."""

    loss: torch.Tensor  # scalar, differentiable in the policy's parameters
    log_prob: torch.Tensor | None  # [batch], of the actions that the loss was taken at


@dataclass(frozen=True, kw_only=True)
class Update:
    """The parts of one actor-critic update: the networks and what the agent says about them."""

    replay: Any  # a ReplayBuffer or PrioritizedReplayBuffer
    critics: torch.nn.Module  # (observations, actions) -> q  [critics, batch]
    targets: tuple[tuple[torch.nn.Module, torch.nn.Module], ...]  # pairs (target, online)
    critics_optimizer: torch.optim.Optimizer
    policy_optimizer: torch.optim.Optimizer
    next_values: Callable[[Batch, RandomKey], NextValues]
    policy_loss: Callable[[Batch, RandomKey], PolicyLoss]
    after_policy_step: Callable[[PolicyLoss], None]  # runs after each policy step, e.g. the entropy coefficient's
    device: torch.device


class UpdateResult(NamedTuple):
    """What an update leaves for the caller. Tensors carry no gradient."""

    finite: bool  # False: a loss was NaN or infinite, and what it would have changed was left alone
    batch: Batch  # what the critics learned on
    q: torch.Tensor  # [critics, batch], before the step
    critic_loss: torch.Tensor  # scalar
    policy_loss: torch.Tensor | None  # scalar; None where no policy step was due
    log_prob: torch.Tensor | None  # [batch], of the policy's actions, where it gave one


class Engine(Protocol):
    """Executes updates. One thread at a time."""

    name: str

    def update(self, random_key: RandomKey, policy_steps: int, copy_targets: bool = False) -> UpdateResult:
        """One critic step, then `policy_steps` policy steps, then the targets.

        `copy_targets` is read where the spec's `targets_follow` is "copies": target <- online.
        """
        ...

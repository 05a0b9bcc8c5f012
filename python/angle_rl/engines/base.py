"""What engines take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

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
    actions: torch.Tensor | None = None  # [batch, *action_shape], the policy's, which it was taken at


class Bounds(NamedTuple):
    """The bounds of continuous actions, each ``[*action_shape]``."""

    low: torch.Tensor
    high: torch.Tensor
    half_range: torch.Tensor  # (high - low) / 2, the unit of the target noise


@dataclass(frozen=True, kw_only=True)
class Update:
    """The parts of one actor-critic update: what learns, and what the agent says about it.

    The callables are the equations; the objects beside them are what these compute with, for an engine that has the
    equations itself (see the spec's `next_value` and `policy_loss`).
    """

    replay: Any  # a ReplayBuffer or PrioritizedReplayBuffer
    critics: torch.nn.Module  # what learns, of any form
    target_critics: torch.nn.Module  # their slow copy
    policy: torch.nn.Module | None  # None: no policy learns (DQN)
    target_policy: torch.nn.Module | None  # its slow copy; None: there is none
    optimizers: Mapping[str, torch.optim.Optimizer]  # "critics", "policy", "entropy_coefficient" where there is one
    device: torch.device
    bounds: Bounds | None = None  # None: the actions are not continuous
    first_action: int | None = None  # what column 0 of the critics stands for, where they value all actions at once
    log_entropy_coefficient: torch.Tensor | None = None  # scalar parameter; None: not learned
    # The equations:
    q_values: Callable[[Any, torch.Tensor], torch.Tensor]  # observations and actions -> q  [critics, batch]
    next_values: Callable[[Batch, RandomKey], NextValues]
    policy_loss: Callable[[Batch, RandomKey], PolicyLoss]
    after_policy_step: Callable[[PolicyLoss], None]  # runs after each policy step, e.g. the entropy coefficient's
    # The entropy coefficient that the agent acts with: a scalar without gradient, or None where there is none
    entropy_coefficient: Callable[[], torch.Tensor | None]
    set_entropy_coefficient: Callable[[torch.Tensor], None]
    reward_scale: Callable[[], float]  # what all rewards are multiplied by
    # [critics] float64, what each critic's part of the loss is multiplied by; None: 1 each
    loss_weights: Callable[[], torch.Tensor | None] = lambda: None
    # "critics" and "policy", where processes learn together: the wrappers that have the networks above inside
    data_parallel: Mapping[str, DistributedDataParallel] = field(default_factory=dict)
    # Why the callables cannot be recorded once and launched again and again, in a few words; None: they can. Those that
    # can read nothing that changes from update to update but tensors in place and what stands above.
    changes_on_host: str | None = None


class TargetPairs(NamedTuple):
    """The tensors of slow copies beside those of the networks that they follow, in the same order."""

    targets: list[torch.Tensor]  # parameters
    online: list[torch.Tensor]
    target_buffers: list[torch.Tensor]  # running statistics and constants
    online_buffers: list[torch.Tensor]


def target_pairs(update: Update) -> TargetPairs:
    """What an update's target networks hold, without gradients, sharing their memory."""
    pairs = [(update.target_critics, update.critics)]
    if update.target_policy is not None and update.policy is not None:
        pairs.append((update.target_policy, update.policy))
    return TargetPairs(
        [p.detach() for target, _ in pairs for p in target.parameters()],
        [p.detach() for _, online in pairs for p in online.parameters()],
        [b for target, _ in pairs for b in target.buffers()],
        [b for _, online in pairs for b in online.buffers()],
    )


@contextmanager
def without_gradients(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, no gradients of these are computed; afterwards of all of them."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class UpdateResult(NamedTuple):
    """What an update leaves for the caller. Tensors carry no gradient, and hold until the engine's next update."""

    finite: bool  # False: a loss or gradient was NaN or infinite, and what it would have changed was left alone
    batch: Batch  # what the critics learned on
    q: torch.Tensor  # [critics, batch], before the step
    critic_loss: torch.Tensor  # scalar
    policy_loss: torch.Tensor | None  # scalar; None where no policy step was due
    log_prob: torch.Tensor | None  # [batch], of the policy's actions, where it gave one


class Engine(Protocol):
    """Executes updates. One thread at a time."""

    name: str
    why: str  # it was taken, in a few words

    def update(self, random_key: RandomKey, policy_steps: int, copy_targets: bool = False) -> UpdateResult:
        """One critic step, then `policy_steps` policy steps, then the targets.

        `copy_targets` is read where the spec's `targets_follow` is "copies": target <- online.
        """
        ...

    def update_many(self, calls: Sequence[tuple[RandomKey, int, bool]]) -> Iterator[UpdateResult]:
        """The results of updates with these arguments, in order; exhaust it.

        It ends early, after the first update that is not finite: those behind it have not been begun, since their
        arguments may depend on how many were taken.
        """
        ...


def one_by_one(engine: Engine, calls: Sequence[tuple[RandomKey, int, bool]]) -> Iterator[UpdateResult]:
    """`Engine.update_many` of an engine that takes its updates singly: each when its result is asked for."""
    for call in calls:
        result = engine.update(*call)
        yield result
        if not result.finite:
            return

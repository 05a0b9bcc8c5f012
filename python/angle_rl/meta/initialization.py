"""Initialisations to learn from quickly: how what a task taught moves the parameters that every task begins with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from angle_rl import ops
from angle_rl.meta.base import Learning
from angle_rl.meta.inner import KINDS, InnerOptimizer, InnerState, Kind, Parameters, gradients_of
from angle_rl.types import Batch, RandomKey


class Reptile:
    """Reptile (Nichol, Achiam and Schulman 2018, arXiv:1803.02999, algorithm 1): phi <- phi + step_size (theta - phi).

    theta is what k ordinary steps on a task made of phi.

    Args:
        step_size: the share of the way, in [0, 1].
        steps: k, environment steps of each visit to a task, >= 1.

    Raises ValueError for arguments out of range.
    """

    name = "reptile"

    def __init__(self, *, step_size: float = 0.3, steps: int = 200) -> None:
        if not 0.0 <= step_size <= 1.0:
            raise ValueError(f"step_size is {step_size}; it must lie in [0, 1]")
        self.step_size = step_size
        self.steps = _checked_steps(steps)

    def move(self, initial: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> None:
        """Move the tensors of `initial`, in place, towards those of the same names in `learned`.

        At step size 1 they are these, at 0 they stay as they are, bit by bit; integers are taken over unless it is 0.
        """
        if self.step_size == 0.0:
            return
        with torch.no_grad():
            for name, tensor in initial.items():
                if tensor.is_floating_point():
                    tensor.lerp_(learned[name], self.step_size)
                else:
                    tensor.copy_(learned[name])


class MAML:
    """Model-agnostic meta-learning (Finn, Abbeel and Levine 2017, arXiv:1703.03400, algorithm 1), task by task.

    The critics' and the policy's outer losses are those that they learn from, L_Q and L_pi, on rows of a task that
    `inner_steps` differentiable steps on other draws of the same task did not see. Each is differentiated in its own
    network's parameters: td targets are constants, as in every update, and so are the adapted critics in L_pi.

    Args:
        first_order: leave out the second derivatives (section 5.2): the outer gradient is that at the adapted
            parameters.
        learning_rate: Adam's step size for the initialisation, >= 0.
        inner_steps: differentiable steps, a batch each, >= 1.
        inner: their kind, see `InnerOptimizer`. Adam by default, from the moments on that the tasks left, as an
            adaptation begins; plain gradients of L_Q grow with the rewards, so "sgd" may need an
            `inner_learning_rate` to match.
        inner_learning_rate: their size, > 0; None: the one of the network's optimiser.
        updates: outer steps in each visit to a task, >= 1.
        steps: environment steps of each visit, >= 1, taken while learning from the initialisation on, as an
            adaptation does; so the outer batches hold what adapting policies see.

    Raises ValueError for arguments out of range.
    """

    name = "maml"

    def __init__(
        self,
        *,
        first_order: bool = False,
        learning_rate: float = 1e-3,
        inner_steps: int = 1,
        inner: Kind = "adam",
        inner_learning_rate: float | None = None,
        updates: int = 20,
        steps: int = 200,
    ) -> None:
        if not 0.0 <= learning_rate < math.inf:
            raise ValueError(f"learning_rate is {learning_rate}; it must lie in [0, inf)")
        if inner not in KINDS:
            raise ValueError(f"inner is {inner!r}; it must be one of {', '.join(KINDS)}")
        if inner_learning_rate is not None and not 0.0 < inner_learning_rate < math.inf:
            raise ValueError(f"inner_learning_rate is {inner_learning_rate}; it must lie in (0, inf), or be None")
        for what, number in (("inner_steps", inner_steps), ("updates", updates)):
            if number < 1:
                raise ValueError(f"{what} is {number}; it must be at least 1")
        self.first_order = first_order
        self.learning_rate = learning_rate
        self.inner_steps = inner_steps
        self.inner: Kind = inner
        self.inner_learning_rate = inner_learning_rate
        self.updates = updates
        self.steps = _checked_steps(steps)

    def outer_gradients(
        self, learning: Learning, batches: Sequence[Batch], validation: Batch, key: RandomKey
    ) -> OuterGradients:
        """The outer losses of a task at an agent's parameters, and their gradients in these. Steps nothing.

        Args:
            learning: the agent whose parameters are the initialisation.
            batches: the task's transitions for the inner steps, one for each, on the agent's device.
            validation: its transitions for the outer losses.
            key: decides all that is random.
        """
        critic_key, policy_key = key.split(2)
        critics = self.critic_gradient(learning, batches, validation, critic_key)
        policy = self.policy_gradient(learning, batches, validation, policy_key, critics.adapted)
        return OuterGradients(critics, policy)

    def critic_gradient(
        self, learning: Learning, batches: Sequence[Batch], validation: Batch, key: RandomKey
    ) -> OuterGradient:
        """The critics' part: L_Q on the validation rows, after steps down L_Q."""

        def loss(parameters: Parameters, batch: Batch, key: RandomKey) -> Tensor:
            return critic_loss(learning, batch, key, parameters)

        return self._through("critics", loss, learning, batches, validation, key)

    def policy_gradient(
        self, learning: Learning, batches: Sequence[Batch], validation: Batch, key: RandomKey, critics: Parameters
    ) -> OuterGradient:
        """The policy's part: L_pi on the validation rows, after steps down L_pi. All is at these parameters of the
        critics, which are constants.
        """
        fixed = {name: tensor.detach() for name, tensor in critics.items()}

        def loss(parameters: Parameters, batch: Batch, key: RandomKey) -> Tensor:
            found: Tensor = learning.policy_loss(batch, key, policy=parameters, critics=fixed).loss
            return found

        return self._through("policy", loss, learning, batches, validation, key)

    def _through(
        self,
        network: str,
        loss: Loss,
        learning: Learning,
        batches: Sequence[Batch],
        validation: Batch,
        key: RandomKey,
    ) -> OuterGradient:
        """A network's outer loss after the inner steps, and its gradient where these began."""
        optimizer = InnerOptimizer(self.inner, learning.networks[network], learning.optimizers[network])
        rate = None if self.inner_learning_rate is None else torch.tensor(self.inner_learning_rate, dtype=torch.float64)
        *keys, outer_key = key.split(len(batches) + 1)
        state = optimizer.start()
        start = state.parameters
        for batch, inner_key in zip(batches, keys, strict=True):
            inner = loss(state.parameters, batch, inner_key)
            gradients = gradients_of(inner, state.parameters, differentiable=not self.first_order)
            state = optimizer.step(state, gradients, rate)
            if self.first_order:
                state = _apart(state)
        outer = loss(state.parameters, validation, outer_key)
        found = gradients_of(outer, state.parameters if self.first_order else start, differentiable=False)
        gradients_at_start = {
            name: torch.zeros_like(start[name]) if gradient is None else gradient for name, gradient in found.items()
        }
        return OuterGradient(outer.detach(), gradients_at_start, state.parameters)


Initialization: TypeAlias = "Reptile | MAML"
"""How the initialisation of a family of tasks is learned"""

Loss: TypeAlias = Callable[[Parameters, Batch, RandomKey], Tensor]
"""A network's loss at parameters, a scalar"""


class OuterGradient(NamedTuple):
    """What the validation rows say of one network's initialisation."""

    loss: Tensor  # scalar
    gradients: dict[str, Tensor]  # by the parameters' names
    adapted: Parameters  # what the inner steps led to

    def is_finite(self) -> bool:
        """Whether the loss and all gradients are finite."""
        return all(bool(tensor.isfinite().all()) for tensor in (self.loss, *self.gradients.values()))


class OuterGradients(NamedTuple):
    """The same of both networks."""

    critics: OuterGradient
    policy: OuterGradient


def critic_loss(learning: Learning, batch: Batch, key: RandomKey, critics: Parameters) -> Tensor:
    """L_Q, what a critic step descends, at these parameters of the critics; a scalar. The td target is a constant."""
    with torch.no_grad():
        future = learning.next_values(batch, key)
        td_target = ops.twin_q_target(batch.rewards, batch.discounts, *future)
    q = learning.q_values(batch.observations, batch.actions, critics)
    return ops.twin_q_loss(q, td_target, batch.importance_weights, huber_delta=learning.huber_delta)[0]


def _apart(state: InnerState) -> InnerState:
    """The same parameters and moments, with no memory of how they came about."""
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in state.parameters.items()}
    moments = {
        name: known._replace(mean=known.mean.detach(), square=known.square.detach())
        for name, known in state.moments.items()
    }
    return InnerState(parameters, moments)


def _checked_steps(steps: int) -> int:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; each visit takes at least 1 environment step")
    return steps

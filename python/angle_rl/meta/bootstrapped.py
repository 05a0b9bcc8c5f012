"""Bootstrapped meta-learning: another learner's meta-parameters, drawn to where learning goes on from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from angle_rl.meta.base import Learning, MetaInputs, MetaLearner, training_batch
from angle_rl.meta.inner import InnerOptimizer, InnerState, Parameters, frozen, gradients_of
from angle_rl.spaces import row_of
from angle_rl.types import Batch, RandomKey

Distance = Literal["kl", "parameters"]

RATE_OF = {"policy": "policy_learning_rate", "critics": "critic_learning_rate"}
"""What the configured step size of a network is called"""


class Bootstrapped(MetaLearner):
    """Learns what another learner learns, by the distance to a target that this very learning leads to.

    Flennerhag et al. 2022 (arXiv:2109.04504), section 3: K differentiable steps under the meta-parameters eta lead from
    x to x_K(eta). From there L - 1 further steps under eta and one on the learner's fixed objective, its `outer_loss`,
    lead to the target, which is held fixed: no gradient passes through it. The meta loss is the distance between the
    two, whose gradient with respect to eta passes through the K steps only.

    Args:
        learner: what says the two losses and has the meta-parameters: MetaEntropy, MetaGradient or one of your own with
            an `inner_loss` and an `outer_loss`. It belongs to this object from now on; its learning rate and its inner
            step are the ones that count.
        steps: K, >= 1.
        target_steps: L, >= 1.
        distance: "kl", of the policies at the validation states: KL(target || x_K), the target's distribution first,
            as the paper's experiments in reinforcement learning have it. Policies that give ``(mean, log_std)``: of
            these Gaussians in closed form, the mean over states of the sum over dimensions; squashing and scaling do
            not change it. Policies that give one tensor: that tensor's squared distance, mean over states of the sum
            over dimensions, which is the KL of Gaussians around it with a variance of 1/2. "parameters": the squared
            distance of what the steps move, as a share of the target's own from where they began: without that, its
            gradients at usual step sizes lie far below Adam's epsilon of 1e-8. None: "kl" for a learner that trains the
            policy, "parameters" otherwise.

    Step 1 learns from the training batch (or states) that the meta step is given. Each further step under eta has
    `batch_size` rows of its own, drawn from the agent's replay by a key of its own; where that has no rows, those that
    were given are dealt out to all steps in turn. The step on the fixed objective has the validation rows that
    `outer_loss` reads, and the step size that the network was configured with where the learner learns it.

    A checkpoint holds the learner's own state. Thread rule: the trainer's thread. Raises ValueError for arguments out
    of range, TypeError for a learner that is none.
    """

    name = "bootstrapped"

    def __init__(
        self, learner: MetaLearner, *, steps: int = 1, target_steps: int = 2, distance: Distance | None = None
    ) -> None:
        if not isinstance(learner, MetaLearner):
            raise TypeError(f"learner is a {type(learner).__name__}; it must be a MetaLearner, such as MetaEntropy()")
        if isinstance(learner, Bootstrapped):
            raise ValueError("learner is a Bootstrapped itself; pass what that one wraps")
        for loss in ("inner_loss", "outer_loss"):
            if getattr(type(learner), loss) is getattr(MetaLearner, loss):
                raise ValueError(f"learner is a {type(learner).__name__}, which has no {loss} to take steps down")
        for name, count in (("steps", steps), ("target_steps", target_steps)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} is {count}; it must be a whole number in [1, inf)")
        if distance is None:
            distance = "kl" if learner.trains == "policy" else "parameters"
        if distance not in get_args(Distance):
            raise ValueError(f"distance is {distance!r}; it must be None or one of {', '.join(get_args(Distance))}")
        if distance == "kl" and learner.trains != "policy":
            raise ValueError(
                f"distance is 'kl', of policies, and the learner trains {learner.trains}; take 'parameters'"
            )
        super().__init__(learning_rate=learner.learning_rate, inner=learner.inner)
        self.learner = learner
        self.steps = steps
        self.target_steps = target_steps
        self.distance = distance
        self.trains = learner.trains
        self.sets = learner.sets
        self.needs_transitions = learner.needs_transitions

    # The meta step ----------

    def meta_gradient(self, learning: Learning, inputs: MetaInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The distance to the target, a scalar, and its gradients by the meta-parameters' names. Steps nothing.

        ValueError where there are fewer rows than steps to deal them to, or "kl" finds no policy that it can read.
        """
        reached = self.after_steps(learning, inputs)
        target = self.target(learning, inputs, reached)
        return self.learner.gradients(self.distance_to(learning, inputs, reached.parameters, target))

    def after_steps(self, learning: Learning, inputs: MetaInputs) -> InnerState:
        """x_K: the network's parameters after K steps under the meta-parameters, differentiable in these."""
        state = self.learner.inner_optimizer(learning).start()
        for index in range(self.steps):
            batch, key = self._rows_of_step(learning, inputs, index)
            state = self.learner.inner_step(learning, state, batch, key)
        return state

    def target(self, learning: Learning, inputs: MetaInputs, reached: InnerState) -> Parameters:
        """L - 1 steps further under the meta-parameters and one on the fixed objective, without any gradient."""
        state = _cut_off(reached)
        for index in range(self.steps, self.steps + self.target_steps - 1):
            batch, key = self._rows_of_step(learning, inputs, index)
            state = _cut_off(self.learner.inner_step(learning, state, batch, key))
        loss = self.learner.outer_loss(learning, state.parameters, inputs, self._keys(inputs)[0])
        gradients = gradients_of(loss, state.parameters, differentiable=False)
        optimizer = self.learner.inner_optimizer(learning)
        state = optimizer.step(state, gradients, self._configured_rate(learning))
        return {name: tensor.detach() for name, tensor in state.parameters.items()}

    def distance_to(self, learning: Learning, inputs: MetaInputs, parameters: Parameters, target: Parameters) -> Tensor:
        """What the meta step descends, a scalar; see the class."""
        if self.distance == "parameters":
            way = _squared_distance(target, frozen(learning.networks[self.trains]))
            return _squared_distance(target, parameters) / way.clamp_min(torch.finfo(way.dtype).tiny)
        states = inputs.validation_states
        return _policy_distance(learning.policy_output(states, target), learning.policy_output(states, parameters))

    def _rows_of_step(self, learning: Learning, inputs: MetaInputs, index: int) -> tuple[Batch, RandomKey]:
        """What a step under the meta-parameters, numbered from 0, learns from: a batch, and the key of its noise."""
        keys = self._keys(inputs)
        noise, draw = keys[1 + 2 * index : 3 + 2 * index]
        given = training_batch(inputs)
        if learning.replay is not None and len(learning.replay) > 0:
            if index == 0:
                return given, noise
            return learning.replay.sample(learning.batch_size, key=draw, device=learning.device), noise
        rows, count = len(given.rewards), self.steps + self.target_steps - 1
        if rows < count:
            raise ValueError(f"there are {rows} rows to train on; {count} inner steps need at least one each")
        return Batch(*row_of(tuple(given), slice(index, None, count))), noise

    def _keys(self, inputs: MetaInputs) -> tuple[RandomKey, ...]:
        """One for the fixed objective; for each step under the meta-parameters one for its noise and one to draw by."""
        return inputs.key.split(1 + 2 * (self.steps + self.target_steps - 1))

    def _configured_rate(self, learning: Learning) -> Tensor | None:
        """The step size on the fixed objective: as configured where the learner learns it, else the optimiser's own."""
        rate = self.learner.inner_rate()
        if rate is None:
            return None
        return torch.full_like(rate.detach(), learning.hyperparameters[RATE_OF[self.trains]])

    # What the learner does ----------

    def begin(self, learning: Learning, key: RandomKey) -> dict[str, Tensor]:
        """The learner's first meta-parameters. ValueError as its own `begin`."""
        return self.learner.begin(learning, key)

    def adopt(self, start: Mapping[str, Tensor]) -> None:
        """Let the learner take these as its meta-parameters."""
        self.learner.adopt(start)

    def meta_parameters(self) -> dict[str, Tensor]:
        """The learner's meta-parameters by name."""
        return self.learner.meta_parameters()

    def has_learned(self) -> bool:
        """Whether one of the learner's is another than at first."""
        return self.learner.has_learned()

    def hyperparameters(self) -> dict[str, float]:
        """What the learner sets now."""
        return self.learner.hyperparameters()

    def policy_auxiliary_loss(self, features: Tensor | None, batch: Batch) -> Tensor | None:
        """The learner's own."""
        return self.learner.policy_auxiliary_loss(features, batch)

    def inner_optimizer(self, learning: Learning) -> InnerOptimizer:
        """The learner's own."""
        return self.learner.inner_optimizer(learning)

    def gradients(self, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss without its graph, and its gradients by the learner's meta-parameters."""
        return self.learner.gradients(loss)

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One step of the learner's Adam down these gradients."""
        self.learner.step(gradients)

    def state_dict(self) -> dict[str, Tensor]:
        """The learner's own."""
        return self.learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Let the learner take over what `state_dict` gave. ValueError where it does not fit; nothing changes then."""
        self.learner.load_state_dict(state)


def _cut_off(state: InnerState) -> InnerState:
    """The same parameters as leaves, and moments, without what they were computed from."""
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in state.parameters.items()}
    moments = {
        name: own._replace(mean=own.mean.detach(), square=own.square.detach()) for name, own in state.moments.items()
    }
    return InnerState(parameters, moments)


def _squared_distance(target: Parameters, parameters: Parameters) -> Tensor:
    """The squared Euclidean distance of two networks' parameters, over the names of the first."""
    return torch.stack([(parameters[name] - tensor).square().sum() for name, tensor in target.items()]).sum()


def _policy_distance(target: Any, output: Any) -> Tensor:
    """From what a policy's forward pass gives at the target to what it gives here, mean over states; see the class."""
    if isinstance(output, Tensor):
        apart: Tensor = output - target
        return apart.square().sum() / len(apart)
    if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, Tensor) for part in output)):
        raise ValueError(
            f"the policy's forward pass gives a {type(output).__name__}; 'kl' reads (mean, log_std) or one tensor, "
            "and distance 'parameters' fits any policy"
        )
    return gaussian_kl(target, output).mean()


def gaussian_kl(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """KL(first || second) of diagonal Gaussians, each ``(mean, log_std)`` of ``[batch, dimensions]``: ``[batch]``.

    Per dimension ``log(s2 / s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2``, in a form that keeps its digits where the
    two are close.
    """
    (mean, log_std), (other_mean, other_log_std) = first, second
    wider = 2.0 * (log_std - other_log_std)
    apart = (mean - other_mean) * torch.exp(-other_log_std)
    return 0.5 * (torch.expm1(wider) - wider + apart.square()).sum(-1)

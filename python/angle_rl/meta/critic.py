"""MetaCritic: a loss of the policy's own features and actions whose descent makes it learn faster."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from angle_rl.meta.base import Learning, MetaInputs, MetaLearner, require, training_batch, validation_batch
from angle_rl.meta.inner import Kind, Parameters, frozen, gradients_of
from angle_rl.types import Batch, RandomKey


class MetaCritic(MetaLearner):
    """Learns an auxiliary loss h_omega that every policy step of the agent descends besides its own.

    Zhou et al. 2020 (arXiv:2003.05334), for SAC, TD3, DDPG and policies of one's own: h_omega is the mean over states
    of softplus(MLP_omega([features(s),] s, a(s))), less log 2, so that the first one, whose last layer is 0, is 0 and
    adds no gradient. With L the policy's loss, U one inner step, and both gradients at theta,

        theta_old = U(theta, grad L(theta; train)),    theta_new = U(theta_old, grad h_omega(theta; train)),

    the meta loss is tanh(L(theta_new; validation) - L(theta_old; validation)), with the same noise on both sides and
    the critics frozen.

    Args:
        learning_rate, inner: as of `MetaLearner`.
        hidden_sizes: widths of the MLP's hidden layers, each >= 1; ReLU follows each.
        use_features: let it see the policy's features, too, where the policy has any (`PolicyModel.features`).

    Its meta-parameters are the MLP's, "weights.k" ``[outputs, inputs]`` and "biases.k" ``[outputs]``, in the policy's
    dtype. ValueError where the agent has no policy, its actions are discrete, or its observations no flat vectors of
    floats. Thread rule: as of `MetaLearner`; `policy_auxiliary_loss` belongs to the thread that takes updates, which
    rests during meta steps.
    """

    name = "critic"
    shapes_policy_loss = True
    needs_transitions = True  # a policy's loss may read more of them than observations

    def __init__(
        self,
        *,
        learning_rate: float = 1e-3,
        inner: Kind = "sgd",
        hidden_sizes: Sequence[int] = (64, 64),
        use_features: bool = True,
    ) -> None:
        super().__init__(learning_rate=learning_rate, inner=inner)
        self.hidden_sizes = tuple(hidden_sizes)
        for size in self.hidden_sizes:
            if size < 1:
                raise ValueError(f"hidden_sizes is {self.hidden_sizes}; every width must be at least 1")
        self.use_features = use_features
        self.reads_features = use_features

    def begin(self, learning: Learning, key: RandomKey) -> dict[str, Tensor]:
        """The MLP as `torch.nn.Linear` would begin, uniform, but with zeros for its last layer."""
        policy: Any = learning.networks.get("policy")
        require(policy is not None, f"{learning.agent} has no policy whose loss MetaCritic could shape")
        parameter = next((p for p in policy.parameters() if p.requires_grad), None)
        require(parameter is not None, "policy has no parameters that learn; MetaCritic shapes what they descend")
        assert parameter is not None
        observations, actions = _widths(learning)
        features = 0
        if self.use_features and learning.features is not None:
            features = _features_width(policy, observations, parameter)
        sizes = [features + observations + actions, *self.hidden_sizes, 1]
        start: dict[str, Tensor] = {}
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            weight_key, bias_key, key = key.split(3)
            bound = 0.0 if layer == len(self.hidden_sizes) else 1 / math.sqrt(inputs)
            for name, drawn in (
                ("weights", weight_key.uniform(outputs, inputs)),
                ("biases", bias_key.uniform(outputs)),
            ):
                start[f"{name}.{layer}"] = ((2 * drawn - 1) * bound).to(parameter.device, parameter.dtype)
        return start

    def policy_auxiliary_loss(self, features: Tensor | None, batch: Batch) -> Tensor:
        """h_omega, differentiable in features and actions, not in the meta-parameters."""
        return self._value({name: tensor.detach() for name, tensor in self._parameters.items()}, features, batch)

    def meta_gradient(self, learning: Learning, inputs: MetaInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The meta loss and its gradients by name. TypeError where the policy's loss gave no actions."""
        training_key, validation_key = inputs.key.split(2)
        training, validation = training_batch(inputs), validation_batch(inputs)
        critics = frozen(learning.networks["critics"])
        optimizer = self.inner_optimizer(learning)
        state = optimizer.start()

        learned = learning.policy_loss(training, training_key, policy=state.parameters, critics=critics)
        if learned.actions is None:
            raise TypeError(f"{learning.agent}'s policy_loss gave no actions, which MetaCritic reads")
        features = None
        if self.use_features and learning.features is not None:
            features = learning.features(training.observations, state.parameters)
        auxiliary = self._value(self._parameters, features, training._replace(actions=learned.actions))
        # Both gradients at the first parameters, and the second before the first's graph is gone.
        by_auxiliary = gradients_of(auxiliary, state.parameters, differentiable=True)
        by_loss = gradients_of(learned.loss, state.parameters, differentiable=False)

        old = optimizer.step(state, by_loss)
        old = old._replace(parameters={name: tensor.detach() for name, tensor in old.parameters.items()})
        new = optimizer.step(old, by_auxiliary)

        def loss_of(parameters: Parameters) -> Tensor:
            loss: Tensor = learning.policy_loss(validation, validation_key, policy=parameters, critics=critics).loss
            return loss

        return self.gradients((loss_of(new.parameters) - loss_of(old.parameters).detach()).tanh())

    def _value(self, parameters: Mapping[str, Tensor], features: Tensor | None, batch: Batch) -> Tensor:
        first = parameters["weights.0"]
        parts = [batch.observations, batch.actions.flatten(1)]
        if self.use_features and features is not None:
            parts.insert(0, features)
        hidden = torch.cat([part.to(first.dtype) for part in parts], 1)
        last = len(self.hidden_sizes)
        for layer in range(last + 1):
            hidden = functional.linear(hidden, parameters[f"weights.{layer}"], parameters[f"biases.{layer}"])
            hidden = hidden.relu() if layer < last else hidden
        # log 2 computed as softplus is: the difference at 0 is 0 to the last bit.
        return (functional.softplus(hidden) - functional.softplus(torch.zeros_like(hidden))).mean()


def _widths(learning: Learning) -> tuple[int, int]:
    """How long observations and actions are. ValueError where they are no flat vectors, and no real numbers."""
    schema: Any = getattr(learning.replay, "schema", None)
    require(
        schema is not None, f"the replay is a {type(learning.replay).__name__} without a schema; MetaCritic reads it"
    )
    nested = schema.observation_structure is not None
    seen, taken = schema.observations[0], schema.actions[0]
    require(not nested, "observations are nested; MetaCritic takes flat vectors of floats")
    flat = len(seen.shape) == 1 and seen.dtype.kind == "f"
    require(flat, f"observations are {seen.dtype}{list(seen.shape)}; MetaCritic takes flat vectors of floats")
    continuous = schema.action_structure is None and taken.dtype.kind == "f"
    require(continuous, f"the actions of {learning.agent} are not continuous; MetaCritic differentiates by them")
    return seen.shape[0], math.prod(taken.shape)


def _features_width(policy: Any, observations: int, like: Tensor) -> int:
    """The width of a policy's features. Of a copy, since a forward pass may count what it sees."""
    with torch.no_grad():
        features: Tensor = copy.deepcopy(policy).eval().features(like.new_zeros(2, observations))
    require(
        features.dim() == 2 and len(features) == 2,
        f"the policy's features have shape {list(features.shape)} for 2 observations; they must be [batch, width] "
        "(use_features=False leaves them out)",
    )
    return features.shape[1]

"""What a meta-learner is, what it sees of the agent whose learning it shapes, and what it is given at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from angle_rl.meta.inner import KINDS, InnerOptimizer, InnerState, Kind, Parameters, gradients_of, tensors_in
from angle_rl.types import Batch, RandomKey


class Equations(Protocol):
    """An agent's equations with some of their inputs replaced; None leaves the agent's own. Differentiable."""

    def __call__(
        self,
        batch: Batch,
        key: RandomKey,
        *,
        policy: Parameters | None = None,
        critics: Parameters | None = None,
        entropy_coefficient: Tensor | None = None,
    ) -> Any:
        """What the agent makes of a batch, with all that is random in it from the key."""
        ...


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What an agent shows to meta-learners: what learns, its equations, and the hyperparameters that can be set.

    The networks, optimisers and replay are the agent's own: to be read, never changed. Its thread only.
    """

    agent: str  # the agent's name
    networks: Mapping[str, nn.Module]  # "policy" (none for DQN) and "critics"
    optimizers: Mapping[str, torch.optim.Optimizer]  # by the same names, besides others
    replay: Any  # the buffer that the agent learns from
    device: torch.device
    continuous: bool  # whether actions are vectors of numbers within bounds
    batch_size: int  # of the agent's updates
    entropy: str  # "fixed", "learned" or "none": what is done about the entropy coefficient
    huber_delta: float | None  # Huber error beyond this |td_error|; None: squared error
    learning_rate_schedule: str  # "constant", or how the learning rates change by themselves
    count_critics: Callable[[], int]  # how many values `q_values` gives; asks a copy of the critics
    reward_scale: Callable[[], float]  # what all rewards are multiplied by now
    loss_weights: Callable[[], Tensor | None]  # [critics] float64, on their parts of the loss now; None: 1 each
    hyperparameters: Mapping[str, float]  # those that can be set, as they were configured
    set_hyperparameters: Callable[[Mapping[str, float]], None]  # some of these, from the next update on
    # The equations, with the gradient passing through what is replaced:
    policy_loss: Equations  # -> engines.PolicyLoss
    next_values: Equations  # -> engines.NextValues
    q_values: Callable[[Any, Tensor, Parameters | None], Tensor]  # observations, actions, critics -> [critics, batch]
    actions: Callable[[Any, Parameters | None], Tensor]  # observations, policy -> deterministic actions [batch, ...]
    # observations, policy -> what the policy's forward pass gives
    policy_output: Callable[[Any, Parameters | None], Any]
    features: Callable[[Any, Parameters | None], Tensor] | None  # the same -> [batch, width]; None: it has none


class MetaInputs(NamedTuple):
    """What one meta step learns from. Training and validation rows differ."""

    states: Any  # [n, *observation_shape], training
    validation_states: Any  # [m, *observation_shape]
    initial_states: Any  # [k, *observation_shape]: what environments showed after resets, or the validation states
    q: Tensor  # [critics, batch] of the newest update, for whoever wants it
    batch: Batch | None  # transitions for training; None where the learner asks for none
    validation_batch: Batch | None
    key: RandomKey  # decides all that is random in this step


class MetaLearner:
    """Learns something about learning: meta-parameters, by the gradient of what follows from an update.

    The default `meta_gradient` differentiates `outer_loss` after one step of the network that `trains` names, down
    `inner_loss`. A subclass says these two, or has a `meta_gradient` of its own.

    Args:
        learning_rate: Adam's step size for the meta-parameters, >= 0.
        inner: the differentiable step, see `InnerOptimizer`.

    Thread rule: the trainer's thread. Raises ValueError for arguments out of range.
    """

    name = "meta"
    trains = "policy"  # the network that the inner step moves
    sets: tuple[str, ...] = ()  # the hyperparameters that it may set
    shapes_policy_loss = False  # whether it has a `policy_auxiliary_loss`
    reads_features = False  # whether that reads its features
    needs_transitions = False  # whether `inputs.batch` and `inputs.validation_batch` must be there

    def __init__(self, *, learning_rate: float = 1e-3, inner: Kind = "sgd") -> None:
        if not 0.0 <= learning_rate < math.inf:
            raise ValueError(f"learning_rate is {learning_rate}; it must lie in [0, inf)")
        if inner not in KINDS:
            raise ValueError(f"inner is {inner!r}; it must be one of {', '.join(KINDS)}")
        self.learning_rate = learning_rate
        self.inner = inner
        self._parameters: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    # What a subclass says ----------

    def begin(self, learning: Learning, key: RandomKey) -> dict[str, Tensor]:
        """The first meta-parameters by name. ValueError where this agent cannot be learned about in this way."""
        raise NotImplementedError

    def hyperparameters(self) -> dict[str, float]:
        """What it sets now, by the names of `Learning.hyperparameters`; nothing as long as nothing was learned."""
        return {}

    def policy_auxiliary_loss(self, features: Tensor | None, batch: Batch) -> Tensor | None:
        """A scalar that every policy step descends besides its own loss; None: there is none.

        It is asked where `shapes_policy_loss`. ``batch.actions`` are the policy's own, differentiable; `features` its
        last hidden layer, or None where it has no `features` or nobody `reads_features`.
        """
        return None

    def inner_loss(self, learning: Learning, parameters: Parameters, batch: Batch, key: RandomKey) -> Tensor:
        """What the inner step descends, a scalar, differentiable in parameters and meta-parameters."""
        raise NotImplementedError

    def inner_rate(self) -> Tensor | None:
        """The inner step's size, a scalar, where it is learned; None: the optimiser's own."""
        return None

    def outer_loss(self, learning: Learning, parameters: Parameters, inputs: MetaInputs, key: RandomKey) -> Tensor:
        """What the meta step descends, a scalar, at parameters that the inner step led to."""
        raise NotImplementedError

    # What it does ----------

    def adopt(self, start: Mapping[str, Tensor]) -> None:
        """Take what `begin` gave as the meta-parameters, with Adam anew."""
        parameters = {name: first.detach().clone() for name, first in start.items()}
        self._parameters = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
        self._first = {name: tensor.detach().clone() for name, tensor in parameters.items()}
        self._optimizer = torch.optim.Adam(list(self._parameters.values()), lr=self.learning_rate)

    def meta_parameters(self) -> dict[str, Tensor]:
        """The meta-parameters by name: leaves that need gradients; empty before `adopt`."""
        return dict(self._parameters)

    def has_learned(self) -> bool:
        """Whether a meta-parameter is another than at first."""
        return any(not tensor.detach().equal(self._first[name]) for name, tensor in self._parameters.items())

    def inner_step(self, learning: Learning, state: InnerState, batch: Batch, key: RandomKey) -> InnerState:
        """Parameters after one more inner step, differentiable in the meta-parameters."""
        loss = self.inner_loss(learning, state.parameters, batch, key)
        gradients = gradients_of(loss, state.parameters, differentiable=True)
        return self.inner_optimizer(learning).step(state, gradients, self.inner_rate())

    def inner_optimizer(self, learning: Learning) -> InnerOptimizer:
        """The steps of the network that it trains."""
        return InnerOptimizer(self.inner, learning.networks[self.trains], learning.optimizers[self.trains])

    def meta_gradient(self, learning: Learning, inputs: MetaInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The meta loss, a scalar, and its gradients by the meta-parameters' names. Steps nothing."""
        inner_key, outer_key = inputs.key.split(2)
        state = self.inner_optimizer(learning).start()
        state = self.inner_step(learning, state, training_batch(inputs), inner_key)
        return self.gradients(self.outer_loss(learning, state.parameters, inputs, outer_key))

    def gradients(self, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss without its graph, and its gradients by the meta-parameters, zeros where it depends on none."""
        own = self._parameters
        found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        pairs = zip(own.items(), found, strict=True)
        gradients = {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs}
        return loss.detach(), gradients

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One step of Adam down these gradients, which need not be named in full."""
        assert self._optimizer is not None
        for name, tensor in self._parameters.items():
            tensor.grad = gradients[name].detach() if name in gradients else None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Meta-parameters, their first values and Adam's moments, by name: copies."""
        state = {f"parameters.{name}": tensor for name, tensor in self._parameters.items()}
        state |= {f"first.{name}": tensor for name, tensor in self._first.items()}
        for name, tensor in self._parameters.items():
            for slot, value in (self._optimizer.state[tensor] if self._optimizer else {}).items():
                state[f"adam.{name}.{slot}"] = value
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. ValueError where it does not fit; nothing has changed then."""
        own = {
            f"{part}.{name}": tensor for part in ("parameters", "first") for name, tensor in self._parameters.items()
        }
        for name, tensor in own.items():
            if name not in state:
                raise ValueError(f"the state has no {name}; it belongs to another meta-learner")
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {list(state[name].shape)}; it must be {list(tensor.shape)}")
        slots: dict[str, dict[str, Tensor]] = {name: {} for name in self._parameters}
        for key in set(state) - set(own):
            part, _, rest = key.partition(".")
            name, _, slot = rest.rpartition(".")
            if part != "adam" or name not in slots or slot not in ("step", "exp_avg", "exp_avg_sq"):
                raise ValueError(f"the state holds {key}, which this meta-learner does not have")
            slots[name][slot] = state[key].clone()
        assert self._optimizer is not None
        with torch.no_grad():
            for name, tensor in self._parameters.items():
                tensor.copy_(state[f"parameters.{name}"])
                self._first[name].copy_(state[f"first.{name}"])
        groups = self._optimizer.state_dict()["param_groups"]
        numbered = {index: slots[name] for index, name in enumerate(slots) if slots[name]}
        self._optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def training_batch(inputs: MetaInputs) -> Batch:
    """The transitions to train on, or the training states in their place."""
    return batch_of_states(inputs.states) if inputs.batch is None else inputs.batch


def validation_batch(inputs: MetaInputs) -> Batch:
    """The transitions to validate on, or the validation states in their place."""
    return batch_of_states(inputs.validation_states) if inputs.validation_batch is None else inputs.validation_batch


def batch_of_states(states: Any) -> Batch:
    """A batch that has observations and no more: what a policy's loss reads. Rewards and the like are empty views."""
    first = next(tensors_in(states))
    nothing = first.new_zeros(()).float().expand(len(first))
    return Batch(states, nothing, nothing, states, nothing, nothing, nothing, nothing)


def require(holds: bool, reason: str) -> None:
    """ValueError, saying why, where something does not hold."""
    if not holds:
        raise ValueError(reason)

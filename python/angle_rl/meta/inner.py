"""Steps of an optimiser that can be differentiated: they return new parameters and change nothing in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Parameters: TypeAlias = dict[str, Tensor]
"""A network's parameters by name, as `torch.func.functional_call` takes them"""

Kind = Literal["sgd", "adam", "rmsprop"]
KINDS: tuple[Kind, ...] = ("sgd", "adam", "rmsprop")


class Moments(NamedTuple):
    """What Adam and RMSprop remember of a parameter; empty tensors where they do not use it."""

    step: int  # steps taken
    mean: Tensor  # of the gradients, shape of the parameter
    square: Tensor  # of their squares, shape of the parameter


@dataclass(frozen=True, kw_only=True)
class Rates:
    """An optimiser's numbers for one parameter."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False  # weight decay as AdamW has it


class InnerState(NamedTuple):
    """Parameters on their way through differentiable steps, with an optimiser's memory of them."""

    parameters: Parameters
    moments: dict[str, Moments]


class InnerOptimizer:
    """Differentiable steps of a network's parameters, of the kind asked for, at the rates of its own optimiser.

    "sgd" takes the plain gradient; "adam" goes on from copies of that optimiser's moments, where it has any (Kingma and
    Ba 2015, arXiv:1412.6980, algorithm 1; weight decay as that optimiser has it); "rmsprop" divides the gradient by the
    root of a running mean of its squares, from Adam's copy on (Tieleman and Hinton 2012, lecture 6.5). One thread.
    """

    def __init__(self, kind: Kind, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.kind = kind
        self._network = network
        self._optimizer = optimizer

    def start(self) -> InnerState:
        """The network's parameters of now and the optimiser's moments: copies that need gradients, and copies."""
        parameters: Parameters = {}
        moments: dict[str, Moments] = {}
        for name, parameter in self._network.named_parameters():
            if parameter.requires_grad:
                parameters[name] = parameter.detach().clone().requires_grad_()
                moments[name] = self._moments_of(parameter)
        return InnerState(parameters, moments)

    def step(
        self, state: InnerState, gradients: Mapping[str, Tensor | None], learning_rate: Tensor | None = None
    ) -> InnerState:
        """New parameters and moments, differentiable in parameters, gradients and `learning_rate` (a scalar).

        A gradient of None leaves its parameter. `learning_rate` of None: each parameter's own.
        """
        rates = self._rates()
        parameters, moments = dict(state.parameters), dict(state.moments)
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            rate = rates[name].learning_rate if learning_rate is None else learning_rate
            parameters[name], moments[name] = stepped(
                self.kind, state.parameters[name], gradient, state.moments[name], rates[name], rate
            )
        return InnerState(parameters, moments)

    def _moments_of(self, parameter: Tensor) -> Moments:
        nothing = parameter.new_empty(0)
        known: dict[str, Any] = self._optimizer.state.get(parameter, {})
        zeros = torch.zeros_like(parameter, requires_grad=False)
        if self.kind == "sgd":
            return Moments(0, nothing, nothing)
        square = known["exp_avg_sq"].clone() if "exp_avg_sq" in known else zeros
        if self.kind == "rmsprop":
            return Moments(0, nothing, square)
        mean = known["exp_avg"].clone() if "exp_avg" in known else zeros.clone()
        return Moments(int(known["step"]) if "step" in known else 0, mean, square)

    def _rates(self) -> dict[str, Rates]:
        of_parameter: dict[Tensor, Rates] = {}
        for group in self._optimizer.param_groups:
            rates = Rates(
                learning_rate=float(group["lr"]),
                betas=tuple(group.get("betas", (0.9, 0.999))),
                epsilon=group.get("eps", 1e-8),
                weight_decay=group.get("weight_decay", 0.0),
                decoupled=group.get("decoupled_weight_decay", isinstance(self._optimizer, torch.optim.AdamW)),
            )
            of_parameter |= dict.fromkeys(group["params"], rates)
        return {name: of_parameter[p] for name, p in self._network.named_parameters() if p in of_parameter}


def stepped(
    kind: Kind, parameter: Tensor, gradient: Tensor, moments: Moments, rates: Rates, learning_rate: float | Tensor
) -> tuple[Tensor, Moments]:
    """A parameter after one step, and its moments; differentiable in all tensors. See `InnerOptimizer`."""
    if kind == "sgd":
        return parameter - learning_rate * gradient, moments
    first, second = rates.betas
    if rates.weight_decay and not rates.decoupled:
        gradient = gradient + rates.weight_decay * parameter
    square = second * moments.square + (1.0 - second) * gradient * gradient
    if kind == "rmsprop":
        return parameter - learning_rate * gradient / _root(square, rates.epsilon), moments._replace(square=square)
    if rates.weight_decay and rates.decoupled:
        parameter = parameter - learning_rate * rates.weight_decay * parameter
    step = moments.step + 1
    mean = first * moments.mean + (1.0 - first) * gradient
    corrected = _root(square / (1.0 - second**step), rates.epsilon)
    return parameter - learning_rate * (mean / (1.0 - first**step)) / corrected, Moments(step, mean, square)


def _root(square: Tensor, epsilon: float) -> Tensor:
    """``sqrt(square) + epsilon``, whose derivative is 0, not infinite, where the square is 0, as the mean is."""
    empty = square == 0
    return torch.where(empty, torch.ones_like(square), square).sqrt() * ~empty + epsilon


def gradients_of(loss: Tensor, parameters: Parameters, *, differentiable: bool) -> dict[str, Tensor | None]:
    """The loss's gradients by name; None for parameters that it does not depend on. Touches no ``.grad``."""
    found = torch.autograd.grad(
        loss, list(parameters.values()), create_graph=differentiable, retain_graph=differentiable, allow_unused=True
    )
    return dict(zip(parameters, found, strict=True))


class _Around(nn.Module):
    """Networks together, so that `functional_call` can put other parameters into all of them for one call."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)

    def forward(self, call: Any) -> Any:
        return call()


def with_parameters(networks: Mapping[str, nn.Module], parameters: Mapping[str, Parameters | None], call: Any) -> Any:
    """``call()`` while the networks have these parameters by their names; None leaves a network's own.

    For that time only, and in this thread: nobody else may use the networks meanwhile. Any exception puts the own
    parameters back, too.
    """
    replaced = {
        f"{name}.{own}": tensor
        for name, given in parameters.items()
        if given is not None
        for own, tensor in given.items()
    }
    if not replaced:
        return call()
    used = {name: networks[name] for name, given in parameters.items() if given is not None}
    return torch.func.functional_call(_Around(used), replaced, (call,))


def frozen(network: nn.Module) -> Parameters:
    """A network's parameters without gradients, sharing its memory."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested dicts and tuples."""
    if isinstance(tree, dict):
        for part in tree.values():
            yield from tensors_in(part)
    elif isinstance(tree, tuple):
        for part in tree:
            yield from tensors_in(part)
    else:
        yield tree

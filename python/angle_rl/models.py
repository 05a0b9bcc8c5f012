"""Policies and critics.

A policy of your own is a subclass of ``PolicyModel`` that defines ``forward`` only. It returns either

- ``(mean, log_std)``, each ``[batch, action_dim]``: a Gaussian in front of tanh, sampled, squashed and scaled
  to the bounds by ``PolicyModel.sample_actions``; or
- one tensor ``[batch, action_dim]``: the actions themselves, within the bounds; ``log_prob`` is then zero.

Whoever needs more defines ``sample_actions`` too. Models are ordinary ``torch.nn.Module``: reading them is
safe from any thread while nobody trains them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from angle_rl import acting, ops
from angle_rl.encoders import ObservationEncoder
from angle_rl.spaces import Space

__all__ = ["DeterministicPolicy", "PolicyModel", "QNetwork", "SquashedGaussianPolicy", "TwinQ"]

LOG_STD_RANGE = (-20.0, 2.0)
"""Where ``SquashedGaussianPolicy`` clamps ``log_std``: deviations from 2e-9 to 7.4 before squashing."""


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}
"""What `activation` names in all networks; "gelu" is the exact one, by erf"""

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": partial(functional.relu, inplace=True),
    "tanh": torch.tanh,
    "silu": functional.silu,
    "gelu": functional.gelu,
}
LAYER_NORM_EPSILON = 1e-5
"""Added to the variance in every LayerNorm, as torch.nn.LayerNorm does"""


def multilayer_perceptron(
    inputs: int, hidden_sizes: Sequence[int], *, activation: str = "relu", layer_norm: bool = False
) -> nn.Sequential:
    """``[..., inputs] -> [..., hidden_sizes[-1]]``: linear layers, an activation after each.

    With ``layer_norm`` a LayerNorm (Ba et al. 2016, arXiv:1607.06450) comes between the two. ValueError for an
    activation that is none of ``ACTIVATIONS``.
    """
    _check_activation(activation)
    layers: list[nn.Module] = []
    for outputs in hidden_sizes:
        layers.append(nn.Linear(inputs, outputs))
        if layer_norm:
            layers.append(nn.LayerNorm(outputs, eps=LAYER_NORM_EPSILON))
        layers.append(ACTIVATIONS[activation]())
        inputs = outputs
    return nn.Sequential(*layers)


class PolicyModel(nn.Module):
    """What a policy is; see the module's text for writing your own.

    Args:
        low, high: ``[action_dim]``, the bounds that actions are scaled to: finite, low below high. Without
            them actions lie in [-1, 1].

    A subclass may also define ``features(observations) -> [batch, width]``, its last hidden layer.

    Attributes:
        action_dim: number of action components; None if no bounds were given.
    """

    action_scale: Tensor
    action_center: Tensor

    def __init__(self, low: Any = None, high: Any = None) -> None:
        super().__init__()
        if (low is None) != (high is None):
            raise ValueError(f"low is {low} and high is {high}; give both bounds or neither")
        self.action_dim: int | None = None
        self._scaled = low is not None
        if low is not None:
            scale, center = _scaling(low, high)
            self.action_dim = scale.numel()
            self._scaled = bool((scale != 1).any() or (center != 0).any())
            # The bounds belong to the environment, not to what was learned: they are not in the state dict.
            self.register_buffer("action_scale", scale, persistent=False)
            self.register_buffer("action_center", center, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: everything but what acting remembers of this very object."""
        return {name: value for name, value in vars(self).items() if name != acting.PLAN}

    def noise_shape(self, batch: int) -> tuple[int, ...] | None:
        """Shape of the ``noise`` that ``sample_actions`` takes for ``batch`` rows; None: it takes none."""
        return None if self.action_dim is None else (batch, self.action_dim)

    def scale_actions(self, actions: Tensor) -> Tensor:
        """``[..., action_dim]`` from [-1, 1] to the bounds, never beyond them in float32."""
        if not self._scaled:
            return actions
        return torch.addcmul(self.action_center, actions, self.action_scale)

    def sample_actions(
        self, observations: Any, deterministic: bool = False, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Actions within the bounds, and their log-density.

        Args:
            observations: ``[batch, ...]``, what ``forward`` takes.
            deterministic: take the mean (as noise 0) and not a sample.
            noise: ``[batch, action_dim]`` standard normals; None: drawn from torch's default generator. Read
                neither with ``deterministic`` nor by a policy whose ``forward`` returns actions.

        Returns:
            ``actions`` (``[batch, action_dim]``) and ``log_prob`` (``[batch]``): the log-density of the
            action in [-1, 1], before scaling to the bounds, so that it means the same for every environment;
            zeros where ``forward`` returns actions. Both carry gradients to the parameters.
        """
        if not torch.is_grad_enabled() and type(self) in _COMPILED:
            found = acting.sampled(self, observations, deterministic, noise, _COMPILED[type(self)])
            if found is not None:
                return found
        output = self(observations)
        if isinstance(output, Tensor):
            return output, output.new_zeros(output.shape[:-1])
        mean, log_std = output
        if deterministic:
            noise = torch.zeros_like(mean)
        elif noise is None:
            noise = torch.randn_like(mean)
        actions, log_prob = ops.squashed_gaussian(mean, log_std, noise)
        return self.scale_actions(actions), log_prob


@cache
def takes_noise(sample_actions: Callable[..., Any]) -> bool:
    """Whether a policy's `sample_actions` takes its normals as `noise=`."""
    parameters = inspect.signature(sample_actions).parameters
    return "noise" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class SquashedGaussianPolicy(PolicyModel):
    """A tanh-squashed diagonal Gaussian (Haarnoja et al. 2018, arXiv:1812.05905).

    Args:
        observation_dim: width of the observations, >= 1.
        low, high: ``[action_dim]`` bounds of the actions, finite, low below high.
        hidden_sizes: widths of the hidden layers, each >= 1.
        activation: after each of them, "relu", "tanh", "silu" or "gelu".
        layer_norm: a LayerNorm in front of each activation.

    ``log_std`` is clamped to ``LOG_STD_RANGE``.
    """

    def __init__(
        self,
        observation_dim: int,
        low: Any,
        high: Any,
        hidden_sizes: Sequence[int] = (256, 256),
        *,
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        _check_sizes(observation_dim=observation_dim, hidden_sizes=hidden_sizes)
        super().__init__(low, high)
        self.body = multilayer_perceptron(observation_dim, hidden_sizes, activation=activation, layer_norm=layer_norm)
        self.head = nn.Linear([observation_dim, *hidden_sizes][-1], 2 * self.action_scale.numel())

    def features(self, observations: Tensor) -> Tensor:
        """``[batch, observation_dim] -> [batch, hidden_sizes[-1]]``, the last hidden layer."""
        output: Tensor = self.body(observations)
        return output

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """``[batch, observation_dim] -> (mean, log_std)``, each ``[batch, action_dim]``, before squashing."""
        mean, log_std = self.head(self.body(observations)).chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD_RANGE)


class DeterministicPolicy(PolicyModel):
    """Actions ``tanh(network(observations))`` scaled to the bounds (Lillicrap et al. 2016, arXiv:1509.02971).

    Arguments as of ``SquashedGaussianPolicy``. ``sample_actions`` ignores ``noise``, adds none of its own,
    and gives a ``log_prob`` of zeros.
    """

    def __init__(
        self,
        observation_dim: int,
        low: Any,
        high: Any,
        hidden_sizes: Sequence[int] = (256, 256),
        *,
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        _check_sizes(observation_dim=observation_dim, hidden_sizes=hidden_sizes)
        super().__init__(low, high)
        self.body = multilayer_perceptron(observation_dim, hidden_sizes, activation=activation, layer_norm=layer_norm)
        self.head = nn.Linear([observation_dim, *hidden_sizes][-1], self.action_scale.numel())

    def noise_shape(self, batch: int) -> None:
        """None: it takes no noise."""
        return

    def features(self, observations: Tensor) -> Tensor:
        """``[batch, observation_dim] -> [batch, hidden_sizes[-1]]``, the last hidden layer."""
        output: Tensor = self.body(observations)
        return output

    def forward(self, observations: Tensor) -> Tensor:
        """``[batch, observation_dim] -> actions``, ``[batch, action_dim]`` within the bounds."""
        return self.scale_actions(self.head(self.body(observations)).tanh())


_COMPILED: dict[type[PolicyModel], tuple[float, float] | None] = {
    SquashedGaussianPolicy: LOG_STD_RANGE,
    DeterministicPolicy: None,
}
"""The policies, exactly these, that a compiled pass may act for, and where it clamps `log_std`"""


class TwinQ(nn.Module):
    """Action-value networks of one form, evaluated together (Fujimoto et al. 2018, arXiv:1802.09477).

    Args:
        observation_dim: width of the observations, >= 1.
        action_dim: width of the actions, >= 1.
        hidden_sizes: widths of the hidden layers, each >= 1.
        critics: number of networks, >= 1.
        activation: after each hidden layer, "relu", "tanh", "silu" or "gelu".
        layer_norm: a LayerNorm in front of each activation.

    Attributes:
        weights: one parameter ``[critics, out, in]`` a layer.
        biases: one parameter ``[critics, out]`` a layer.
        scales, shifts: with ``layer_norm`` one parameter ``[critics, out]`` a hidden layer, ones and zeros at first.

    Member k is initialised as the k-th of ``critics`` stacks of ``torch.nn.Linear`` would be: all differ.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_sizes: Sequence[int] = (256, 256),
        critics: int = 2,
        *,
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        _check_sizes(observation_dim=observation_dim, action_dim=action_dim, hidden_sizes=hidden_sizes, critics=critics)
        _check_activation(activation)
        super().__init__()
        self.critics = critics
        self.activation = activation
        self.layer_norm = layer_norm
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        sizes = [observation_dim + action_dim, *hidden_sizes, 1]
        shapes = list(itertools.pairwise(sizes))
        members = [[nn.Linear(*shape) for shape in shapes] for _ in range(critics)]
        with torch.no_grad():
            layers = list(zip(*members, strict=True))
            weights = [torch.stack([linear.weight for linear in layer]) for layer in layers]
            biases = [torch.stack([linear.bias for linear in layer]) for layer in layers]
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(biases)
        if layer_norm:
            self.scales = nn.ParameterList(torch.ones(critics, width) for width in hidden_sizes)
            self.shifts = nn.ParameterList(torch.zeros(critics, width) for width in hidden_sizes)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """``[batch, observation_dim]``, ``[batch, action_dim]`` -> q, ``[critics, batch]``.

        Raises:
            ValueError: for another width or number of axes.
        """
        _check_matrix("observations", observations, self.observation_dim)
        _check_matrix("actions", actions, self.action_dim)
        # Activations are [critics, width, batch], so that weight gradients come out in the weights' layout.
        values = torch.cat((observations, actions), 1).t().expand(self.critics, -1, -1)
        last, activate = len(self.weights) - 1, _FUNCTIONS[self.activation]
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = torch.baddbmm(bias.unsqueeze(2), weight, values)
            if index < last:
                if self.layer_norm:
                    values = _normalized(values, self.scales[index], self.shifts[index])
                values = activate(values)
        return values.squeeze(1)


class QNetwork(nn.Module):
    """The values of all of finitely many actions at once (Mnih et al. 2015, doi:10.1038/nature14236).

    Args:
        observation_space: what ``ObservationEncoder`` takes.
        actions: number of actions, >= 1.
        hidden_sizes: widths of the hidden layers behind the encoder, each >= 1.
        dueling: two streams, a value and advantages, that part before the last hidden layer and of which each has
            one: ``Q = V + A - mean(A)`` (Wang et al. 2016, arXiv:1511.06581, equation 9).
        activation: after each hidden layer, "relu", "tanh", "silu" or "gelu".
        layer_norm: a LayerNorm in front of each activation.
    """

    def __init__(
        self,
        observation_space: Space,
        actions: int,
        hidden_sizes: Sequence[int] = (256, 256),
        *,
        dueling: bool = False,
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        _check_sizes(actions=actions, hidden_sizes=hidden_sizes)
        super().__init__()
        self.actions = actions
        self.dueling = dueling
        self.encoder = ObservationEncoder(observation_space)
        shared, stream = (hidden_sizes[:-1], hidden_sizes[-1:]) if dueling else (hidden_sizes, ())
        width = [self.encoder.width, *shared][-1]
        hidden = partial(multilayer_perceptron, activation=activation, layer_norm=layer_norm)
        self.body = hidden(self.encoder.width, shared)
        last = [width, *stream][-1]
        self.advantages = nn.Sequential(*hidden(width, stream), nn.Linear(last, actions))
        if dueling:
            self.value = nn.Sequential(*hidden(width, stream), nn.Linear(last, 1))

    def forward(self, observations: Any) -> Tensor:
        """Observations as the space nests, each ``[batch, ...]`` -> q, ``[batch, actions]``."""
        hidden = self.body(self.encoder(observations))
        q: Tensor = self.advantages(hidden)
        if self.dueling:
            q = self.value(hidden) + q - q.mean(1, keepdim=True)
        return q


def _normalized(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm over the features of ``[critics, features, batch]``, scale and shift ``[critics, features]``."""
    variance, mean = torch.var_mean(values, 1, correction=0, keepdim=True)
    normal = (values - mean) * torch.rsqrt(variance + LAYER_NORM_EPSILON)
    return torch.addcmul(shift.unsqueeze(2), normal, scale.unsqueeze(2))


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")


def _check_matrix(name: str, tensor: Tensor, width: int) -> None:
    if tensor.dim() != 2 or tensor.shape[1] != width:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [batch, {width}]")


def _check_sizes(hidden_sizes: Sequence[int], **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if any(size < 1 for size in hidden_sizes):
        raise ValueError(f"hidden_sizes is {tuple(hidden_sizes)}; every width must be at least 1")


def _scaling(low: Any, high: Any) -> tuple[Tensor, Tensor]:
    """float32 ``scale``, ``center`` with ``low <= center + action * scale <= high``, action in [-1, 1]."""
    low, high = (torch.as_tensor(bound, dtype=torch.float32, device="cpu").detach() for bound in (low, high))
    for name, bound in (("low", low), ("high", high)):
        if bound.dim() != 1 or bound.numel() < 1:
            raise ValueError(f"{name} has shape {list(bound.shape)}; it must be [action_dim]")
        if not bool(bound.isfinite().all()):
            raise ValueError(f"{name} is {bound.tolist()}; every bound must be finite")
    if low.shape != high.shape:
        raise ValueError(f"low has shape {list(low.shape)} and high {list(high.shape)}; they must be equal")
    if not bool((low < high).all()):
        raise ValueError(f"low is {low.tolist()} and high {high.tolist()}; low must lie below high")
    center = (0.5 * (low.double() + high.double())).float()
    scale = (0.5 * (high.double() - low.double())).float()
    # Rounding may have carried an end beyond its bound: shrink until neither is.
    outside = (center + scale > high) | (center - scale < low)
    while bool(outside.any()):
        scale = torch.where(outside, torch.nextafter(scale, torch.zeros_like(scale)), scale)
        outside = (center + scale > high) | (center - scale < low)
    return scale, center

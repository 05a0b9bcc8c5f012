"""Whether the native engine takes an update: our own MLPs on a CPU, Adam, and nothing of the user's in between."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import optimizer as torch_optimizers

from angle_rl import _core
from angle_rl.encoders import ObservationEncoder, VectorEncoder
from angle_rl.engines.base import Update
from angle_rl.models import LAYER_NORM_EPSILON, DeterministicPolicy, QNetwork, SquashedGaussianPolicy, TwinQ
from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer
from angle_rl.types import UpdateSpec

MOST_CRITICS = 16
ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.SiLU: "silu", nn.GELU: "gelu"}
POLICIES: dict[tuple[str, str], type[nn.Module] | None] = {
    ("soft", "soft"): SquashedGaussianPolicy,
    ("smoothed", "deterministic"): DeterministicPolicy,
    ("deterministic", "deterministic"): DeterministicPolicy,
    ("double", "none"): None,
    ("maximum", "none"): None,
}
"""The equations that it has, `next_value` and `policy_loss`, and the policy that belongs to them"""

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
METHODS = {"forward", "sample_actions", "features", "scale_actions", "noise_shape"}
"""What an instance may have replaced, of a module whose class it has left alone"""


class Hidden(NamedTuple):
    """One hidden layer: linear, then LayerNorm where there is one, then the activation."""

    linear: nn.Linear
    norm: nn.LayerNorm | None
    activation: str  # "relu", "tanh", "silu", "gelu"


class _RefusalError(Exception):
    """Carries the reason."""


def native_refusal(spec: UpdateSpec, update: Update) -> str | None:
    """Why the native engine does not take this update, in a few words; None where it takes it.

    It looks at the parts as they are now. Any thread, while nobody changes them.
    """
    try:
        _check_equations(spec)
        networks = _check_networks(spec, update)
        _check_tensors(networks, update)
        _check_optimizers(spec, update)
        _check_entropy_coefficient(spec, update)
        _check_replay(update)
    except _RefusalError as refusal:
        return str(refusal)
    return None


def bfloat16_refusal(update: Update) -> str | None:
    """Why the native engine cannot compute this update with bfloat16 products; None where it can."""
    if not _core.has_bfloat16():
        return f"this CPU, or {_core.isa()}, has no bfloat16 products"
    dtype = next(update.critics.parameters()).dtype
    return None if dtype == torch.float32 else f"networks of {dtype} are not computed in bfloat16"


def hidden_layers(body: nn.Module) -> list[Hidden] | None:
    """The layers of what `multilayer_perceptron` makes; None where a module is built in any other way."""
    if type(body) is not nn.Sequential:
        return None
    layers, modules = [], list(body)
    while modules:
        linear = modules.pop(0)
        norm = modules.pop(0) if modules and type(modules[0]) is nn.LayerNorm else None
        activation = modules.pop(0) if modules else None
        if type(linear) is not nn.Linear or type(activation) not in ACTIVATIONS:
            return None
        if isinstance(activation, nn.GELU) and activation.approximate != "none":
            return None
        if isinstance(norm, nn.LayerNorm):
            affine = norm.weight is not None and norm.bias is not None
            if not affine or norm.normalized_shape != (linear.out_features,):
                return None
        layers.append(Hidden(linear, norm, ACTIVATIONS[type(activation)]))  # type: ignore[arg-type]
    return layers


def kind_of(layer: Hidden) -> tuple[str, bool, float]:
    """A hidden layer's activation, whether it has a LayerNorm, and what that adds to the variance."""
    return layer.activation, layer.norm is not None, LAYER_NORM_EPSILON if layer.norm is None else layer.norm.eps


# The parts, one by one ----------


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise _RefusalError(reason)


def _check_equations(spec: UpdateSpec) -> None:
    _require(spec.next_value != "other", "the target's value is not computed in one of the ways that it knows")
    _require(spec.policy_loss != "other", "the policy's loss is not one that it knows")
    known = (spec.next_value, spec.policy_loss) in POLICIES
    _require(known, f"it has no {spec.next_value!r} target with a {spec.policy_loss!r} policy loss")


def _check_networks(spec: UpdateSpec, update: Update) -> dict[str, nn.Module]:
    """The networks by name, each of them an MLP of ours that nothing was added to."""
    _require(not update.data_parallel, "the networks are in DistributedDataParallel")
    _require(update.device.type == "cpu", f"the networks are on {update.device}")
    _require(not torch_modules._has_any_global_hook(), "all modules have hooks")  # type: ignore[no-untyped-call]
    policy_kind = POLICIES[spec.next_value, spec.policy_loss]
    critics_kind = QNetwork if policy_kind is None else TwinQ
    wanted: list[tuple[str, nn.Module | None, type[nn.Module] | None]] = [
        ("critics", update.critics, critics_kind),
        ("target_critics", update.target_critics, critics_kind),
        ("policy", update.policy, policy_kind),
        ("target_policy", update.target_policy, policy_kind if policy_kind is DeterministicPolicy else None),
    ]
    networks: dict[str, nn.Module] = {}
    shapes: dict[str, Any] = {}
    for name, network, kind in wanted:
        if network is None or kind is None:
            _require(network is None and kind is None, f"there is {'no' if network is None else 'a'} {name}")
            continue
        _require(type(network) is kind, f"{name} is a {type(network).__name__}, not exactly a {kind.__name__}")
        for module in network.modules():
            _check_module(name, module)
        parts, activations = _parts(name, network)
        own = [id(parameter) for parameter in network.parameters()]
        _require(sorted(map(id, parts)) == sorted(own), f"{name} has parameters that a {kind.__name__} has not")
        networks[name] = network
        shapes[name] = [tuple(parameter.shape) for parameter in parts], activations
    for name in ("critics", "policy"):
        slow = f"target_{name}"
        _require(slow not in shapes or shapes[slow] == shapes[name], f"{slow} is built otherwise than {name}")
    return networks


def _check_module(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    hooked = any(getattr(module, hooks, None) for hooks in MODULE_HOOKS)
    _require(not hooked, f"{name} has a hook on its {kind}")
    _require(not is_parametrized(module), f"{name} has a parametrization on its {kind}")
    replaced = METHODS & vars(module).keys()
    _require(not replaced, f"{name} has a {min(replaced, default='')} of its own on its {kind}")


def _parts(name: str, network: nn.Module) -> tuple[list[Tensor], list[str]]:
    """The parameters of one of our networks in the order of its layers, and the activations behind these."""
    if isinstance(network, TwinQ):
        return _stacked_parts(name, network)
    if isinstance(network, SquashedGaussianPolicy | DeterministicPolicy):
        layers = _layers(name, network.body)
        _check_chain(name, [*(layer.linear for layer in layers), network.head])
        return _flat(layers, [network.head])
    assert isinstance(network, QNetwork)  # by the caller
    encoder = network.encoder
    flat = type(encoder) is ObservationEncoder and encoder._paths == [()] and type(encoder.parts[0]) is VectorEncoder
    _require(flat, f"{name} encodes observations that are not flat vectors")
    shared = _layers(name, network.body)
    parameters, activations = _flat(shared, [])
    streams = [network.advantages, network.value] if network.dueling else [network.advantages]
    for stream in streams:
        members = list(stream)
        _require(bool(members), f"{name} is not built as our own")
        layers, head = _layers(name, nn.Sequential(*members[:-1])), members[-1]
        _check_chain(name, [*(layer.linear for layer in [*shared, *layers]), head])
        own = _flat(layers, [head])
        parameters, activations = parameters + own[0], activations + own[1]
    return parameters, activations


def _stacked_parts(name: str, network: TwinQ) -> tuple[list[Tensor], list[str]]:
    _require(network.critics <= MOST_CRITICS, f"{name} are {network.critics}, more than {MOST_CRITICS}")
    scales, shifts = (list(network.scales), list(network.shifts)) if network.layer_norm else ([], [])
    width, parameters = network.observation_dim + network.action_dim, list[Tensor]()
    for weight, bias in zip(network.weights, network.biases, strict=True):
        out = weight.shape[1] if weight.dim() == 3 else -1
        rows = [bias]
        if network.layer_norm and len(parameters) < 4 * len(scales):
            rows += [scales[len(parameters) // 4], shifts[len(parameters) // 4]]
        fits = tuple(weight.shape) == (network.critics, out, width)
        fits = fits and all(tuple(row.shape) == (network.critics, out) for row in rows)
        _require(fits, f"{name} has parameters of other shapes than a TwinQ")
        parameters += [weight, *rows]
        width = out
    hidden = len(network.weights) - 1
    fits = width == 1 and network.activation in ACTIVATIONS.values() and len(scales) in (0, hidden)
    _require(fits, f"{name} has parameters of other shapes than a TwinQ")
    return parameters, [network.activation] * hidden


def _layers(name: str, body: nn.Module) -> list[Hidden]:
    layers = hidden_layers(body)
    if layers is None:
        raise _RefusalError(f"{name} has hidden layers that are not built as our own")
    kinds = {kind_of(layer) for layer in layers}
    _require(len(kinds) <= 1, f"{name} has hidden layers of several kinds")
    return layers


def _check_chain(name: str, linears: Sequence[nn.Module]) -> None:
    """Each layer takes what the one before it gives."""
    width: int | None = None
    for linear in linears:
        plain = type(linear) is nn.Linear and isinstance(linear.bias, Tensor)
        _require(plain and width in (None, linear.in_features), f"{name} has layers that are not built as our own")
        width = int(linear.out_features)  # type: ignore[arg-type]


def _flat(layers: Iterable[Hidden], heads: Iterable[nn.Module]) -> tuple[list[Tensor], list[str]]:
    modules = [part for layer in layers for part in (layer.linear, layer.norm) if part is not None]
    parameters: list[Tensor] = [parameter for module in (*modules, *heads) for parameter in module.parameters()]
    return parameters, [layer.activation for layer in layers]


def _check_tensors(networks: dict[str, nn.Module], update: Update) -> None:
    """One dtype, dense, apart in memory, without hooks; online ones learn."""
    ends, dtypes = [], set()
    for name, network in networks.items():
        for parameter in network.parameters():
            plain = type(parameter) is nn.Parameter and parameter.layout == torch.strided
            _require(plain and parameter.device.type == "cpu", f"{name} has parameters that are no plain CPU tensors")
            _require(parameter.is_contiguous(), f"{name} has parameters that are not contiguous")
            learns = parameter.requires_grad or name.startswith("target_")
            _require(learns, f"{name} has parameters that do not require gradients")
            hooked = any(getattr(parameter, hooks, None) for hooks in PARAMETER_HOOKS)
            _require(not hooked, f"{name} has a hook on a parameter")
            first = parameter.data_ptr()
            ends.append((first, first + parameter.numel() * parameter.element_size()))
        dtypes |= {tensor.dtype for tensor in (*network.parameters(), *network.buffers())}
    _require(len(dtypes) == 1, f"the networks mix {', '.join(sorted(map(str, dtypes)))}")
    dtype = next(iter(dtypes))
    _require(dtype in (torch.float32, torch.float64), f"the networks are of {dtype}")
    ends.sort()
    apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    _require(apart, "networks share the memory of parameters")


def _check_optimizers(spec: UpdateSpec, update: Update) -> None:
    everywhere = (torch_optimizers._global_optimizer_pre_hooks, torch_optimizers._global_optimizer_post_hooks)
    _require(not any(everywhere), "all optimizers have hooks")
    learning: dict[str, Iterable[Any]] = {"critics": update.critics.parameters()}
    if update.policy is not None:
        learning["policy"] = update.policy.parameters()
    if spec.target_entropy is not None:
        learning["entropy_coefficient"] = [update.log_entropy_coefficient]
    for name, parameters in learning.items():
        optimizer = update.optimizers.get(name)
        if optimizer is None:
            raise _RefusalError(f"there is no optimizer of the {name}")
        what = f"the {name}' optimizer" if name.endswith("s") else f"the {name}'s optimizer"
        kind = type(optimizer)
        _require(kind in (torch.optim.Adam, torch.optim.AdamW), f"{what} is a {kind.__name__}, not Adam or AdamW")
        step = vars(optimizer).get("step")  # a scheduler of learning rates puts a wrapper there
        own = step is None or getattr(step, "_wrapped_by_lr_sched", False)
        hooked = any(getattr(optimizer, hooks, None) for hooks in OPTIMIZER_HOOKS)
        _require(own and not hooked, f"{what} has a hook or a step of its own")
        for group in optimizer.param_groups:
            for option in ("amsgrad", "maximize", "capturable", "differentiable"):
                _require(not group.get(option), f"{what} has {option} set")
            numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            _require(not any(isinstance(number, Tensor) for number in numbers), f"{what} has tensors for numbers")
        steps = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        _require(sorted(steps) == sorted(map(id, parameters)), f"{what} has other parameters than the {name}")


def _check_entropy_coefficient(spec: UpdateSpec, update: Update) -> None:
    if spec.next_value != "soft":
        return
    for tensor in (update.entropy_coefficient(), update.log_entropy_coefficient):
        if tensor is None:
            continue
        plain = tensor.numel() == 1 and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
        _require(plain, "the entropy coefficient is no CPU scalar of float32 or float64")
    _require(update.entropy_coefficient() is not None, "there is no entropy coefficient")


def _check_replay(update: Update) -> None:
    """One array of float observations, and of actions that fit the networks."""
    replay = update.replay
    own = type(replay) in (ReplayBuffer, PrioritizedReplayBuffer)
    _require(own, f"the replay is a {type(replay).__name__}, not exactly one of our own")
    _require(not getattr(replay, "resident", False), "the replay's rows are on a CUDA device")
    replaced = {"sample", "update_priorities"} & vars(replay).keys()
    _require(not replaced, f"the replay has a {min(replaced, default='')} of its own")
    schema = replay.schema
    nested = schema.observation_structure is not None or schema.action_structure is not None
    _require(not nested, "observations or actions are nested")
    observations, actions = schema.observations[0], schema.actions[0]
    dtype = next(update.critics.parameters()).dtype
    taken = (np.float32,) if dtype == torch.float32 else (np.float32, np.float64)
    for field in (observations, schema.rewards):
        _require(field.dtype in taken, f"the replay's {field.name} are {field.dtype}, the networks of {dtype}")
    critics: Any = update.critics
    width = math.prod(observations.shape) if len(observations.shape) == 1 else -1
    if isinstance(critics, QNetwork):
        _require(width == critics.encoder.width, "the replay's observations are not as wide as the critics'")
        _require(actions.dtype == np.int64 and actions.shape == (), "the replay's actions are no single int64")
        return
    policy: Any = update.policy
    first = [*(hidden_layers(policy.body) or []), Hidden(policy.head, None, "")][0].linear
    widths = {width, critics.observation_dim, first.in_features}
    _require(len(widths) == 1, "the observations of replay, critics and policy are not of one width")
    _require(actions.dtype in taken, f"the replay's actions are {actions.dtype}, the networks of {dtype}")
    fits = actions.shape == (critics.action_dim,) == (policy.action_dim,)
    _require(fits, "the actions of replay, critics and policy are not of one width")

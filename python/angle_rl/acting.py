"""A policy's actions for a few observations, computed in one compiled call.

``PolicyModel.sample_actions`` asks here before it asks torch. Whatever is not exactly an MLP of ours, or not as plain
as it can be (hooks, a subclass, a dtype, a mode of torch that wants to see the operations), is left to torch. A call
looks at everything anew: parameters may have moved, modules may have been replaced since the last.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_modules

from angle_rl import _core

ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: 1, nn.Tanh: 2, nn.SiLU: 3, nn.GELU: 4}
"""The kernels' numbers for them"""

Actions: TypeAlias = tuple[Tensor, Tensor]

PLAN = "_acting"  # a policy's attribute: its plan, never saved or copied (PolicyModel.__getstate__)
_REPLACEABLE = ("forward", "scale_actions")  # methods that an instance may have of its own
_EXCHANGE = "__dlpack_c_exchange_api__"  # DLPack's name for the functions that look at tensors; torch 2.10 and later
_are_transforms_active = torch._C._are_functorch_transforms_active
_is_autocast_enabled = torch.is_autocast_enabled
_is_tracing = torch._C._is_tracing
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_from_dlpack = getattr(torch._C, "_from_dlpack", torch.utils.dlpack.from_dlpack)


class _Plan(NamedTuple):
    """What a policy was found to be, and where to look whether it still is. Nothing in it refers to the policy."""

    network: _core.ActingNetwork
    modules: dict[str, Any]  # the policy's own
    scaled: bool
    parts: tuple[tuple[Any, ...], ...]  # places, kinds, lengths, tensors: what the network's `act` takes


def sampled(
    policy: nn.Module,
    observations: Any,
    deterministic: bool,
    noise: Tensor | None,
    log_std_range: tuple[float, float] | None,
) -> Actions | None:
    """What `sample_actions` returns, or None: torch should compute it, and nothing was drawn.

    Call it where no gradients are recorded, for a policy with a `body` of linear layers and activations, a `head` and
    bounds: a squashed Gaussian with a `log_std_range`, else one whose actions are the head's tanh. Takes float32 CPU
    observations ``[batch, width]``, batch 1 to 8. Any thread, while nobody changes the policy.
    """
    if torch.compiler.is_compiling() or type(observations) is not Tensor:
        return None
    if _function_modes() or _dispatch_modes() or _are_transforms_active() or _is_tracing():
        return None
    if _is_autocast_enabled("cpu") or forward_ad._current_level >= 0:
        return None
    own = policy.__dict__
    plan: _Plan | None = own.get(PLAN)
    for _ in range(2):
        if plan is None:
            plan = own[PLAN] = _prepared(policy, log_std_range)
            if plan is None:
                return None
        as_planned = plan.modules is own["_modules"] and plan.scaled is own["_scaled"]
        if as_planned and "forward" not in own and "scale_actions" not in own:
            found: Any = plan.network.act(plan.parts, observations, deterministic, noise)
            if found is not False:
                actions: Actions | None = found
                return actions
        plan = None
    return None


def _prepared(policy: Any, log_std_range: tuple[float, float] | None) -> _Plan | None:
    """The plan for a policy as it is now; None where it is left to torch."""
    body, head = policy._modules.get("body"), policy._modules.get("head")
    if type(body) is not nn.Sequential or type(head) is not nn.Linear or not _is_plain(policy):
        return None
    layers: list[Any] = list(body)
    linears: list[Any] = [*layers[::2], head]
    activations = layers[1::2]
    if len(layers) % 2 or any(type(linear) is not nn.Linear for linear in linears):
        return None
    if len({type(activation) for activation in activations}) > 1:
        return None
    if any(type(activation) not in ACTIVATIONS for activation in activations):
        return None
    if any(getattr(activation, "approximate", "none") != "none" for activation in activations):
        return None
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return None
    inside = [body, *layers, head]
    parameters = [linear._parameters.get(name) for linear in linears for name in ("weight", "bias")]
    if any(type(parameter) is not nn.Parameter for parameter in parameters):
        return None
    bounds = [policy._buffers.get(name) for name in ("action_scale", "action_center")]
    if not all(_is_plain(module) for module in inside) or any(type(bound) is not Tensor for bound in bounds):
        return None

    places: list[Any] = []
    for parent in (policy, body):
        for name, child in parent._modules.items():
            places += [parent._modules, name, child]
    for linear in linears:
        for name in ("weight", "bias"):
            places += [linear._parameters, name, linear._parameters[name]]
    for module in inside:
        places += [vars(module), "forward", ...]
    for activation in activations:
        if "approximate" in vars(activation):
            places += [vars(activation), "approximate", vars(activation)["approximate"]]
    for name in ("action_scale", "action_center"):
        places += [policy._buffers, name, policy._buffers[name]]
    counted: list[dict[Any, Any]] = [policy._modules, body._modules]
    counted += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
    for module in (policy, *inside):
        counted += [module._forward_hooks, module._forward_pre_hooks]
    lengths = [part for entries in counted for part in (entries, len(entries))]
    kinds = [part for module in inside for part in (module, type(module))]

    action_dim = policy.action_scale.numel()
    sizes = [linears[0].in_features, *(linear.out_features for linear in linears)]
    if sizes[-1] != action_dim * (1 if log_std_range is None else 2):
        return None
    number = ACTIVATIONS[type(activations[0])] if activations else 0
    low, high = log_std_range or (0.0, 0.0)
    exchange = getattr(Tensor, _EXCHANGE, None)
    network = _core.ActingNetwork(
        sizes, number, action_dim, log_std_range is not None, low, high, torch.float32, exchange, _from_dlpack
    )
    tensors = parameters + (bounds if policy._scaled else [])
    parts = tuple(places), tuple(kinds), tuple(lengths), tuple(tensors)
    return _Plan(network, policy._modules, policy._scaled, parts)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling it is its class's forward, without hooks."""
    replaced = any(name in vars(module) for name in _REPLACEABLE)
    return not (replaced or module._forward_hooks or module._forward_pre_hooks)

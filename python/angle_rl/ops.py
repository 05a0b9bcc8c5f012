"""Fused operations of an actor-critic update, with autograd and ``torch.compile`` support.

Dense CPU tensors of float32 or float64 go to the compiled kernels (one pass over the data; other strides are
copied first). Other devices, half-precision types, tensor subclasses and ``torch.func`` transforms take the
same formula in plain torch. Every operation is differentiable any number of times. Tensors of one call share
one device and one dtype; only float32, bfloat16 and float16 may meet, and promote as in torch.

Any thread may call; two threads must not write the same tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from angle_rl import _core

__all__ = ["squashed_gaussian", "twin_q_loss", "twin_q_target", "update_targets"]

Three: TypeAlias = tuple[Tensor, Tensor, Tensor]

_LOG_2 = math.log(2.0)
_HALF_LOG_2_PI = 0.5 * math.log(2.0 * math.pi)
_MIXABLE = {torch.float32, torch.bfloat16, torch.float16}
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def twin_q_target(
    rewards: Tensor,
    discounts: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor | None = None,
    entropy_coefficient: float | Tensor = 0.0,
) -> Tensor:
    """``rewards + discounts * (min over critics of next_q - entropy_coefficient * next_log_prob)``.

    The soft clipped double-Q target (Haarnoja et al. 2018, arXiv:1812.05905, eq. 2-3; Fujimoto et al. 2018,
    arXiv:1802.09477, eq. 10).

    Args:
        rewards: ``[batch]``.
        discounts: ``[batch]``, the factor of the bootstrap value: ``discount**steps * (1 - terminated)``.
        next_q: ``[critics, batch]``, at least one critic.
        next_log_prob: ``[batch]``, or None for no entropy term.
        entropy_coefficient: a number or a tensor of one element; read only with ``next_log_prob``.

    Returns:
        ``[batch]``. Differentiable in every argument; carries no gradient under ``torch.no_grad()``.

    Raises:
        TypeError, ValueError: naming the argument whose type, dtype, device or shape is wrong.
    """
    _check_floating("next_q", next_q)
    if next_q.dim() != 2 or next_q.shape[0] < 1:
        raise ValueError(f"next_q has shape {_shape(next_q)}; it must be [critics, batch] with at least 1 critic")
    shape = next_q.shape[1:]
    _check("rewards", rewards, shape, "next_q", next_q)
    _check("discounts", discounts, shape, "next_q", next_q)
    tensors = [next_q, rewards, discounts]
    if next_log_prob is not None:
        _check("next_log_prob", next_log_prob, shape, "next_q", next_q)
        tensors.append(next_log_prob)
    if isinstance(entropy_coefficient, Tensor):
        if entropy_coefficient.numel() != 1:
            shape_text = _shape(entropy_coefficient)
            raise ValueError(f"entropy_coefficient has shape {shape_text}; it must be a number or have 1 element")
        entropy_coefficient = entropy_coefficient.detach() if next_log_prob is None else entropy_coefficient
    differentiable = torch.is_grad_enabled() and (
        any(tensor.requires_grad for tensor in tensors)
        or (isinstance(entropy_coefficient, Tensor) and entropy_coefficient.requires_grad)
    )
    if differentiable or not _has_kernel(*tensors):
        return _twin_q_target_formula(rewards, discounts, next_q, next_log_prob, entropy_coefficient)
    if torch.compiler.is_compiling():
        if not isinstance(entropy_coefficient, Tensor):
            entropy_coefficient = torch.full((), entropy_coefficient, dtype=torch.float64)
        target: Tensor = _twin_q_target_op(rewards, discounts, next_q, next_log_prob, entropy_coefficient)
        return target
    return _run_twin_q_target(rewards, discounts, next_q, next_log_prob, entropy_coefficient)


def twin_q_loss(
    q: Tensor,
    td_target: Tensor,
    importance_weights: Tensor | None = None,
    *,
    huber_delta: float | None = None,
    critic_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted regression of every critic on one target, and the new priorities.

    ``loss = mean over batch of importance_weights * sum over critics of critic_weights * error(q - td_target)`` with
    ``error(d) = d**2`` (no half), or Huber's as in ``torch.nn.functional.huber_loss``: ``d**2 / 2`` up to
    ``huber_delta``, ``huber_delta * (|d| - huber_delta / 2)`` beyond. The gradient by ``q`` is computed in
    the forward pass. (Fujimoto et al. 2018, arXiv:1802.09477; importance weights: Schaul et al. 2016,
    arXiv:1511.05952.)

    Args:
        q: ``[critics, batch]``, at least one of each.
        td_target: ``[batch]``.
        importance_weights: ``[batch]``, or None for ones.
        huber_delta: where Huber's error turns linear, above 0 and finite; None: squared error.
        critic_weights: ``[critics]`` of any floating dtype, or None for ones. With them it is plain torch.

    Returns:
        ``loss`` (a scalar, differentiable in all tensors) and ``td_error`` (``[batch]``: the mean over
        critics of ``|td_target - q|``, without gradient).

    Raises:
        TypeError, ValueError: naming the argument whose type, dtype, device, shape or value is wrong.
    """
    _check_floating("q", q)
    if q.dim() != 2 or q.shape[0] < 1 or q.shape[1] < 1:
        raise ValueError(f"q has shape {_shape(q)}; it must be [critics, batch] with at least 1 of each")
    _check("td_target", td_target, q.shape[1:], "q", q)
    constants = [td_target]
    if importance_weights is not None:
        _check("importance_weights", importance_weights, q.shape[1:], "q", q)
        constants.append(importance_weights)
    if huber_delta is not None and not 0.0 < huber_delta < math.inf:
        raise ValueError(f"huber_delta is {huber_delta}; it must be above 0 and finite, or None for squared error")
    if critic_weights is not None:
        _check_floating("critic_weights", critic_weights)
        if critic_weights.shape != q.shape[:1]:
            raise ValueError(f"critic_weights has shape {_shape(critic_weights)}; it must be {list(q.shape[:1])}")
    grad_enabled = torch.is_grad_enabled()
    plain = critic_weights is not None or (grad_enabled and any(tensor.requires_grad for tensor in constants))
    if plain or not _has_kernel(q, *constants):
        return _twin_q_loss_formula(q, td_target, importance_weights, huber_delta, critic_weights)
    if torch.compiler.is_compiling():
        loss, td_error, _ = _twin_q_loss_op(q, td_target, importance_weights, huber_delta)
        return loss, td_error.detach()
    run = _TwinQLoss.apply if grad_enabled and q.requires_grad else _run_twin_q_loss
    loss, td_error, _ = run(q, td_target, importance_weights, huber_delta)
    return loss, td_error


def squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A sample of the tanh-squashed diagonal Gaussian and its log-density.

    ``u = mean + exp(log_std) * noise``, ``actions = tanh(u)``, and ``log_prob`` sums over the last axis
    ``-noise**2 / 2 - log_std - log(2 pi) / 2 - 2 (log 2 - u - softplus(-2 u))``, the stable form of
    ``log N(u) - log(1 - tanh(u)**2)`` (Haarnoja et al. 2018, arXiv:1801.01290, appendix C).

    Args:
        mean, log_std: ``[..., action_dim]``, of one shape.
        noise: ``[..., action_dim]`` standard normals.

    Returns:
        ``actions`` in [-1, 1] (``[..., action_dim]``) and ``log_prob`` (``[...]``) of these, both
        differentiable in all three arguments.

    Raises:
        TypeError, ValueError: naming the argument whose type, dtype, device or shape is wrong.
    """
    _check_floating("mean", mean)
    if mean.dim() < 1 or mean.shape[-1] < 1:
        raise ValueError(f"mean has shape {_shape(mean)}; it must be [..., action_dim] with action_dim at least 1")
    _check("log_std", log_std, mean.shape, "mean", mean)
    _check("noise", noise, mean.shape, "mean", mean)
    grad_enabled = torch.is_grad_enabled()
    if (grad_enabled and noise.requires_grad) or not _has_kernel(mean, log_std, noise):
        return _squashed_gaussian_formula(mean, log_std, noise)
    if torch.compiler.is_compiling():
        actions, log_prob, _ = _squashed_gaussian_op(mean, log_std, noise)
        return actions, log_prob
    differentiable = grad_enabled and (mean.requires_grad or log_std.requires_grad)
    run = _SquashedGaussian.apply if differentiable else _run_squashed_gaussian
    actions, log_prob, _ = run(mean, log_std, noise)
    return actions, log_prob


def update_targets(targets: Iterable[Tensor], online: Iterable[Tensor], tau: float) -> None:
    """``target <- tau * online + (1 - tau) * target`` in place for every pair, all in one call.

    Outside autograd: no gradient is recorded, and the version counters of ``targets`` are raised, so that a
    backward pass through their old values raises. (Lillicrap et al. 2016, arXiv:1509.02971, algorithm 1.)

    Args:
        targets, online: as many tensors each, of pairwise equal shape, dtype (floating) and device.
        tau: in [0, 1].

    Raises:
        TypeError, ValueError: naming the tensor or value that is wrong; no target has changed then.
    """
    targets, online = list(targets), list(online)
    if not 0.0 <= tau <= 1.0:
        raise ValueError(f"tau is {tau}; it must lie in [0, 1]")
    if len(targets) != len(online):
        raise ValueError(f"targets holds {len(targets)} tensors and online {len(online)}; they must pair up")
    if _has_pairs_kernel(targets, online):
        with torch.no_grad():
            if torch.compiler.is_compiling():
                _update_targets_op(targets, online, tau)
            else:
                _run_update_targets(targets, online, tau)
                for target in targets:
                    increment_version(target)
        return
    for index, (target, source) in enumerate(zip(targets, online, strict=True)):
        _check_pair(index, target, source)
    with torch.no_grad():
        for target, source in zip(targets, online, strict=True):
            target.mul_(1.0 - tau).add_(source, alpha=tau)


# Checks -----------------------------------------------------------------------------------------------------


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point type")


def _check(name: str, tensor: Tensor, shape: torch.Size, like_name: str, like: Tensor) -> None:
    """Refuses ``tensor`` unless it has this shape and goes together with ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {_shape(tensor)}; it must be {list(shape)}, as {like_name} is {_shape(like)}"
        )
    if tensor.dtype != like.dtype and not (tensor.dtype in _MIXABLE and like.dtype in _MIXABLE):
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {like.dtype}, as {like_name} is")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {like.device}, as {like_name} is")


def _check_pair(index: int, target: Tensor, source: Tensor) -> None:
    _check_floating(f"targets[{index}]", target)
    _check(f"online[{index}]", source, target.shape, f"targets[{index}]", target)
    if source.dtype != target.dtype:
        raise TypeError(f"online[{index}] has dtype {source.dtype}; it must be {target.dtype}, as its target is")


def _has_kernel(first: Tensor, *others: Tensor) -> bool:
    """Whether the compiled kernels can read these tensors: ordinary CPU memory of one supported dtype."""
    dtype = first.dtype
    if (dtype != torch.float32 and dtype != torch.float64) or not first.is_cpu:
        return False
    if any(tensor.dtype != dtype or not tensor.is_cpu for tensor in others):
        return False
    if torch.compiler.is_compiling():
        return True
    if torch._C._are_functorch_transforms_active():
        return False
    return type(first) in _PLAIN_TYPES and all(type(tensor) in _PLAIN_TYPES for tensor in others)


def _has_pairs_kernel(targets: list[Tensor], online: list[Tensor]) -> bool:
    """Whether these are well-formed pairs that the kernel can work on where they lie, all of one dtype."""
    for target, source in zip(targets, online, strict=True):
        if not isinstance(target, Tensor) or not isinstance(source, Tensor) or target.shape != source.shape:
            return False
        if not target.is_contiguous() or not source.is_contiguous():
            return False
    return bool(targets) and _has_kernel(*targets, *online)


# Plain torch ------------------------------------------------------------------------------------------------


def _twin_q_target_formula(
    rewards: Tensor,
    discounts: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor | None,
    entropy_coefficient: float | Tensor,
) -> Tensor:
    value = next_q.amin(0) if next_q.shape[0] != 2 else torch.minimum(next_q[0], next_q[1])
    if next_log_prob is not None:
        if isinstance(entropy_coefficient, Tensor):
            entropy_coefficient = entropy_coefficient.reshape(()).to(next_log_prob)
        value = value - entropy_coefficient * next_log_prob
    return rewards + discounts * value


def _twin_q_loss_formula(
    q: Tensor,
    td_target: Tensor,
    importance_weights: Tensor | None,
    huber_delta: float | None,
    critic_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    difference = q - td_target
    size = difference.abs()
    if huber_delta is None:
        error = difference.square()
    else:
        inside = 0.5 * difference.square()
        error = torch.where(size <= huber_delta, inside, huber_delta * (size - 0.5 * huber_delta))
    if critic_weights is not None:
        error = error * critic_weights.to(error).unsqueeze(1)
    error = error.sum(0)
    if importance_weights is not None:
        error = error * importance_weights
    return error.mean(), size.detach().mean(0)


def _squashed_gaussian_formula(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    u = mean + log_std.exp() * noise
    correction = 2.0 * (_LOG_2 - u - torch.nn.functional.softplus(-2.0 * u))
    log_prob = -0.5 * noise.square() - log_std - _HALF_LOG_2_PI - correction
    return u.tanh(), log_prob.sum(-1)


# Compiled kernels: fresh outputs, no autograd ---------------------------------------------------------------


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run_twin_q_target(
    rewards: Tensor,
    discounts: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor | None,
    entropy_coefficient: float | Tensor,
) -> Tensor:
    rewards, discounts, next_q = rewards.contiguous(), discounts.contiguous(), next_q.contiguous()
    next_log_prob = None if next_log_prob is None else next_log_prob.contiguous()
    critics, batch = next_q.shape
    td_target = next_q.new_empty(batch)
    kernel = _core.twin_q_target_f32 if next_q.dtype == torch.float32 else _core.twin_q_target_f64
    inputs = rewards.data_ptr(), discounts.data_ptr(), next_q.data_ptr(), _address(next_log_prob)
    kernel(*inputs, float(entropy_coefficient), td_target.data_ptr(), critics, batch)
    return td_target


def _run_twin_q_loss(
    q: Tensor, td_target: Tensor, importance_weights: Tensor | None, huber_delta: float | None
) -> Three:
    """The loss, the td error, and the gradient of the loss by ``q``."""
    q, td_target = q.contiguous(), td_target.contiguous()
    importance_weights = None if importance_weights is None else importance_weights.contiguous()
    critics, batch = q.shape
    loss, td_error, gradient = q.new_empty(()), q.new_empty(batch), q.new_empty((critics, batch))
    kernel = _core.twin_q_loss_f32 if q.dtype == torch.float32 else _core.twin_q_loss_f64
    inputs = q.data_ptr(), td_target.data_ptr(), _address(importance_weights)
    outputs = loss.data_ptr(), td_error.data_ptr(), gradient.data_ptr()
    kernel(*inputs, 0.0 if huber_delta is None else huber_delta, *outputs, critics, batch)
    return loss, td_error, gradient


def _run_squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> Three:
    """The actions, their log-density, and ``spread = exp(log_std) * noise``."""
    mean, log_std, noise = mean.contiguous(), log_std.contiguous(), noise.contiguous()
    shape = mean.shape
    columns = shape[-1]
    actions, log_prob, spread = mean.new_empty(shape), mean.new_empty(shape[:-1]), mean.new_empty(shape)
    kernel = _core.squashed_gaussian_f32 if mean.dtype == torch.float32 else _core.squashed_gaussian_f64
    inputs = mean.data_ptr(), log_std.data_ptr(), noise.data_ptr()
    outputs = actions.data_ptr(), spread.data_ptr(), log_prob.data_ptr()
    kernel(*inputs, *outputs, mean.numel() // columns, columns)
    return actions, log_prob, spread


def _run_squashed_gaussian_gradient(
    actions_gradient: Tensor | None, log_prob_gradient: Tensor | None, actions: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:
    actions_gradient = None if actions_gradient is None else actions_gradient.contiguous()
    log_prob_gradient = None if log_prob_gradient is None else log_prob_gradient.contiguous()
    columns = actions.shape[-1]
    by_mean, by_log_std = torch.empty_like(actions), torch.empty_like(actions)
    single = actions.dtype == torch.float32
    kernel = _core.squashed_gaussian_gradient_f32 if single else _core.squashed_gaussian_gradient_f64
    inputs = _address(actions_gradient), _address(log_prob_gradient), actions.data_ptr(), spread.data_ptr()
    kernel(*inputs, by_mean.data_ptr(), by_log_std.data_ptr(), actions.numel() // columns, columns)
    return by_mean, by_log_std


def _run_update_targets(targets: list[Tensor], online: list[Tensor], tau: float) -> None:
    kernel = _core.update_targets_f32 if targets[0].dtype == torch.float32 else _core.update_targets_f64
    addresses = [tensor.data_ptr() for tensor in targets], [tensor.data_ptr() for tensor in online]
    kernel(*addresses, [tensor.numel() for tensor in targets], tau)


# Autograd: a backward pass in plain torch on outputs of the forward pass can be differentiated again ------


def _save_twin_q_loss(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    q, td_target, importance_weights, huber_delta = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    # Only the second derivative reads q and td_target, and only under Huber's error.
    huber = (q, td_target) if huber_delta is not None else (None, None)
    ctx.save_for_backward(output[2], importance_weights, *huber)
    ctx.huber_delta = huber_delta


def _twin_q_loss_backward(
    ctx: Any, loss_gradient: Tensor | None, _: Tensor | None, q_gradient_gradient: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    q_gradient, importance_weights, q, td_target = ctx.saved_tensors
    result = None if loss_gradient is None else loss_gradient * q_gradient
    if q_gradient_gradient is not None:
        batch = q_gradient.shape[1]
        if ctx.huber_delta is None:
            curved = q_gradient_gradient * (2.0 / batch)
        else:
            curved = q_gradient_gradient * ((q - td_target).detach().abs() <= ctx.huber_delta) / batch
        if importance_weights is not None:
            curved = curved * importance_weights
        result = curved if result is None else result + curved
    return result, None, None, None


class _TwinQLoss(torch.autograd.Function):
    """Differentiable in ``q``; the third output is the first derivative."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Three:
        output = _run_twin_q_loss(*inputs)
        _save_twin_q_loss(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return _twin_q_loss_backward(ctx, *gradients)


def _save_squashed_gaussian(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], output[2])


def _squashed_gaussian_backward(
    ctx: Any,
    actions_gradient: Tensor | None,
    log_prob_gradient: Tensor | None,
    spread_gradient: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, None]:
    actions, spread = ctx.saved_tensors
    by_mean = by_log_std = None
    if actions_gradient is not None:
        by_mean = actions_gradient * (1.0 - actions.square())
    if log_prob_gradient is not None:
        by_density = log_prob_gradient.unsqueeze(-1)
        through_actions = 2.0 * actions * by_density
        by_mean = through_actions if by_mean is None else by_mean + through_actions
    if by_mean is not None:
        by_log_std = by_mean * spread
        if log_prob_gradient is not None:
            by_log_std = by_log_std - by_density
    if spread_gradient is not None:
        through_spread = spread_gradient * spread
        by_log_std = through_spread if by_log_std is None else by_log_std + through_spread
    return by_mean, by_log_std, None


class _SquashedGaussian(torch.autograd.Function):
    """Differentiable in ``mean`` and ``log_std``; the third output is the spread."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Three:
        output = _run_squashed_gaussian(*inputs)
        _save_squashed_gaussian(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled() or gradients[2] is not None:
            return _squashed_gaussian_backward(ctx, *gradients)
        actions, spread = ctx.saved_tensors
        return *_run_squashed_gaussian_gradient(gradients[0], gradients[1], actions, spread), None


# torch.compile: the same kernels as operators --------------------------------------------------------------


_operator: Any = partial(torch.library.custom_op, mutates_args=(), device_types="cpu")
_twin_q_target_op = _operator(
    "angle_rl::twin_q_target",
    _run_twin_q_target,
    schema="(Tensor rewards, Tensor discounts, Tensor next_q, Tensor? next_log_prob,"
    " Tensor entropy_coefficient) -> Tensor",
)
_twin_q_loss_op = _operator(
    "angle_rl::twin_q_loss",
    _run_twin_q_loss,
    schema="(Tensor q, Tensor td_target, Tensor? importance_weights, float? huber_delta) -> (Tensor, Tensor, Tensor)",
)
_squashed_gaussian_op = _operator(
    "angle_rl::squashed_gaussian",
    _run_squashed_gaussian,
    schema="(Tensor mean, Tensor log_std, Tensor noise) -> (Tensor, Tensor, Tensor)",
)
_update_targets_op = _operator(
    "angle_rl::update_targets",
    _run_update_targets,
    mutates_args=("targets",),
    schema="(Tensor(a!)[] targets, Tensor[] online, float tau) -> ()",
)

_twin_q_target_op.register_fake(lambda _r, _d, next_q, *_: next_q.new_empty(next_q.shape[1]))
_twin_q_loss_op.register_fake(
    lambda q, *_: (q.new_empty(()), q.new_empty(q.shape[1]), q.new_empty(q.shape)),
)
_squashed_gaussian_op.register_fake(
    lambda mean, *_: (
        mean.new_empty(mean.shape),
        mean.new_empty(mean.shape[:-1]),
        mean.new_empty(mean.shape),
    ),
)
_twin_q_loss_op.register_autograd(_twin_q_loss_backward, setup_context=_save_twin_q_loss)
_squashed_gaussian_op.register_autograd(_squashed_gaussian_backward, setup_context=_save_squashed_gaussian)

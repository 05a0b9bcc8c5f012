"""Fused operations of an actor-critic update, with autograd and ``torch.compile`` support.

Dense CPU tensors of float32 or float64 go to the compiled kernels (one pass over the data; other strides are
copied first), and so do CUDA tensors of float32 and bfloat16, together or apart, or of float64, where this build has
kernels for CUDA devices: one launch on torch's current stream, which waits for nothing and can be captured in a graph.
Other devices and types, tensor subclasses and ``torch.func`` transforms take the same formula in plain torch. Every
operation is differentiable any number of times. Tensors of one call share one device and one dtype; only float32,
bfloat16 and float16 may meet, and promote as in torch (the CUDA kernels calculate in float32 then).

Any thread may call; two threads must not write the same tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from angle_rl import fused

__all__ = ["squashed_gaussian", "twin_q_loss", "twin_q_target", "update_targets"]

_LOG_2 = math.log(2.0)
_HALF_LOG_2_PI = 0.5 * math.log(2.0 * math.pi)
_MIXABLE = {torch.float32, torch.bfloat16, torch.float16}


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
        entropy_coefficient: a number or a tensor of one element; read only with ``next_log_prob``. On the other
            tensors' CUDA device it is read there, when the kernel runs.

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
    if differentiable or not fused.has_kernel(*tensors):
        return _twin_q_target_formula(rewards, discounts, next_q, next_log_prob, entropy_coefficient)
    if torch.compiler.is_compiling():
        if not isinstance(entropy_coefficient, Tensor):
            entropy_coefficient = torch.full((), entropy_coefficient, dtype=torch.float64, device=next_q.device)
        target: Tensor = fused.twin_q_target_op(rewards, discounts, next_q, next_log_prob, entropy_coefficient)
        return target
    return fused.run_twin_q_target(rewards, discounts, next_q, next_log_prob, entropy_coefficient)


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
    if plain or not fused.has_kernel(q, *constants):
        return _twin_q_loss_formula(q, td_target, importance_weights, huber_delta, critic_weights)
    if torch.compiler.is_compiling():
        loss, td_error, _ = fused.twin_q_loss_op(q, td_target, importance_weights, huber_delta)
        return loss, td_error.detach()
    run = fused.TwinQLoss.apply if grad_enabled and q.requires_grad else fused.run_twin_q_loss
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
    if (grad_enabled and noise.requires_grad) or not fused.has_kernel(mean, log_std, noise):
        return _squashed_gaussian_formula(mean, log_std, noise)
    if torch.compiler.is_compiling():
        actions, log_prob, _ = fused.squashed_gaussian_op(mean, log_std, noise)
        return actions, log_prob
    differentiable = grad_enabled and (mean.requires_grad or log_std.requires_grad)
    run = fused.SquashedGaussian.apply if differentiable else fused.run_squashed_gaussian
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
    if fused.has_pairs_kernel(targets, online):
        with torch.no_grad():
            if torch.compiler.is_compiling():
                fused.update_targets_op(targets, online, tau)
            else:
                fused.run_update_targets(targets, online, tau)
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

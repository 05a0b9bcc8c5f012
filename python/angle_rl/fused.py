"""Calls of the fused kernels, on the CPU and on devices; their autograd functions and ``torch.library`` operators.

``ops`` checks the arguments and says what is calculated; this is for it alone. Outputs are fresh. A call on a device
goes to torch's current stream and waits for nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from angle_rl import _core
from angle_rl.device import CUDA_KERNELS, backend, is_emulated, launch

Three: TypeAlias = tuple[Tensor, Tensor, Tensor]

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # as csrc/cuda/ops_params.h numbers them


def has_kernel(first: Tensor, *others: Tensor) -> bool:
    """Whether compiled kernels can read these tensors: ordinary memory in one place, of dtypes that go together there.

    On the CPU that is one of float32 and float64; on a device float32 and bfloat16, which may meet, or float64.
    """
    dtype = first.dtype
    if first.is_cpu and not is_emulated():
        if dtype != torch.float32 and dtype != torch.float64:
            return False
        if any(tensor.dtype != dtype or not tensor.is_cpu for tensor in others):
            return False
    else:
        if dtype not in _KINDS or not (first.is_cpu or (first.is_cuda and CUDA_KERNELS)):
            return False
        place, wide = first.device, dtype == torch.float64
        for tensor in others:
            if tensor.device != place or tensor.dtype not in _KINDS or (tensor.dtype == torch.float64) != wide:
                return False
    if torch.compiler.is_compiling():
        return True
    if torch._C._are_functorch_transforms_active():
        return False
    return type(first) in _PLAIN_TYPES and all(type(tensor) in _PLAIN_TYPES for tensor in others)


def has_pairs_kernel(targets: list[Tensor], online: list[Tensor]) -> bool:
    """Whether these are well-formed pairs that the kernel can work on where they lie, all of one dtype."""
    for target, source in zip(targets, online, strict=True):
        if not isinstance(target, Tensor) or not isinstance(source, Tensor) or target.shape != source.shape:
            return False
        if not target.is_contiguous() or not source.is_contiguous():
            return False
        if target.dtype != targets[0].dtype or source.dtype != targets[0].dtype:
            return False
    return bool(targets) and has_kernel(*targets, *online)


# The operations ---------------------------------------------------------------------------------------------


def _on_device(tensor: Tensor) -> bool:
    return not tensor.is_cpu or is_emulated()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _together(first: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that these promote to."""
    dtype = first.dtype
    for tensor in others:
        if tensor is not None and tensor.dtype != dtype:
            return torch.float32
    return dtype


def _launch(name: str, device: torch.device, arrays: tuple[Tensor | None, ...], *numbers: float) -> None:
    """Launches a kernel with the arrays' addresses, their kinds, then ``numbers``."""
    addresses = []
    kinds = 0
    for place, tensor in enumerate(arrays):
        addresses.append(_address(tensor))
        if tensor is not None:
            kinds |= _KINDS[tensor.dtype] << 2 * place
    launch(getattr(backend(device), name), device, *addresses, kinds, *numbers)


def run_twin_q_target(
    rewards: Tensor,
    discounts: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor | None,
    entropy_coefficient: float | Tensor,
) -> Tensor:
    rewards, discounts, next_q = rewards.contiguous(), discounts.contiguous(), next_q.contiguous()
    next_log_prob = _dense(next_log_prob)
    critics, batch = next_q.shape
    td_target = next_q.new_empty(batch, dtype=_together(rewards, discounts, next_q, next_log_prob))
    if _on_device(next_q):
        given = None  # a coefficient that lies on the device: reading it here would wait for the device
        if next_log_prob is None:
            entropy_coefficient = 0.0
        elif isinstance(entropy_coefficient, Tensor) and entropy_coefficient.device == next_q.device:
            given = entropy_coefficient if entropy_coefficient.dtype in _KINDS else entropy_coefficient.float()
            entropy_coefficient = 0.0
        arrays = (rewards, discounts, next_q, next_log_prob, given, td_target)
        _launch("twin_q_target", next_q.device, arrays, float(entropy_coefficient), critics, batch)
        return td_target
    kernel = _core.twin_q_target_f32 if next_q.dtype == torch.float32 else _core.twin_q_target_f64
    inputs = rewards.data_ptr(), discounts.data_ptr(), next_q.data_ptr(), _address(next_log_prob)
    kernel(*inputs, float(entropy_coefficient), td_target.data_ptr(), critics, batch)
    return td_target


def _new_twin_q_loss(q: Tensor, td_target: Tensor, importance_weights: Tensor | None, *_: Any) -> Three:
    loss = q.new_empty((), dtype=_together(q, td_target, importance_weights))
    return loss, q.new_empty(q.shape[1], dtype=_together(q, td_target)), q.new_empty(q.shape)


def run_twin_q_loss(
    q: Tensor, td_target: Tensor, importance_weights: Tensor | None, huber_delta: float | None
) -> Three:
    """The loss, the td error, and the gradient of the loss by ``q``."""
    q, td_target = q.contiguous(), td_target.contiguous()
    importance_weights = _dense(importance_weights)
    critics, batch = q.shape
    loss, td_error, gradient = _new_twin_q_loss(q, td_target, importance_weights)
    delta = 0.0 if huber_delta is None else huber_delta
    if _on_device(q):
        blocks = -(-batch // backend(q.device).LOSS_ROWS)
        sums = q.new_empty(blocks, dtype=torch.float64) if blocks > 1 else None
        arrays = (q, td_target, importance_weights, loss, td_error, gradient)
        _launch("twin_q_loss", q.device, arrays, _address(sums), delta, critics, batch)
        return loss, td_error, gradient
    kernel = _core.twin_q_loss_f32 if q.dtype == torch.float32 else _core.twin_q_loss_f64
    inputs = q.data_ptr(), td_target.data_ptr(), _address(importance_weights)
    kernel(*inputs, delta, loss.data_ptr(), td_error.data_ptr(), gradient.data_ptr(), critics, batch)
    return loss, td_error, gradient


def _new_squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> Three:
    shape, dtype = mean.shape, _together(mean, log_std, noise)
    actions, log_prob = mean.new_empty(shape, dtype=dtype), mean.new_empty(shape[:-1], dtype=dtype)
    return actions, log_prob, mean.new_empty(shape, dtype=dtype)


def run_squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> Three:
    """The actions, their log-density, and ``spread = exp(log_std) * noise``."""
    mean, log_std, noise = mean.contiguous(), log_std.contiguous(), noise.contiguous()
    columns = mean.shape[-1]
    rows = mean.numel() // columns
    actions, log_prob, spread = _new_squashed_gaussian(mean, log_std, noise)
    if _on_device(mean):
        arrays = (mean, log_std, noise, actions, spread, log_prob)
        _launch("squashed_gaussian", mean.device, arrays, rows, columns)
        return actions, log_prob, spread
    kernel = _core.squashed_gaussian_f32 if mean.dtype == torch.float32 else _core.squashed_gaussian_f64
    inputs = mean.data_ptr(), log_std.data_ptr(), noise.data_ptr()
    kernel(*inputs, actions.data_ptr(), spread.data_ptr(), log_prob.data_ptr(), rows, columns)
    return actions, log_prob, spread


def run_squashed_gaussian_gradient(
    actions_gradient: Tensor | None, log_prob_gradient: Tensor | None, actions: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:
    actions_gradient, log_prob_gradient = _dense(actions_gradient), _dense(log_prob_gradient)
    columns = actions.shape[-1]
    rows = actions.numel() // columns
    by_mean, by_log_std = torch.empty_like(actions), torch.empty_like(actions)
    if _on_device(actions):
        arrays = (actions, spread, actions_gradient, log_prob_gradient, by_mean, by_log_std)
        _launch("squashed_gaussian_gradient", actions.device, arrays, rows, columns)
        return by_mean, by_log_std
    single = actions.dtype == torch.float32
    kernel = _core.squashed_gaussian_gradient_f32 if single else _core.squashed_gaussian_gradient_f64
    inputs = _address(actions_gradient), _address(log_prob_gradient), actions.data_ptr(), spread.data_ptr()
    kernel(*inputs, by_mean.data_ptr(), by_log_std.data_ptr(), rows, columns)
    return by_mean, by_log_std


def run_update_targets(targets: list[Tensor], online: list[Tensor], tau: float) -> None:
    first = targets[0]
    addresses = [tensor.data_ptr() for tensor in targets], [tensor.data_ptr() for tensor in online]
    sizes = [tensor.numel() for tensor in targets]
    if _on_device(first):
        launch(backend(first.device).update_targets, first.device, *addresses, sizes, _KINDS[first.dtype], tau)
        return
    kernel = _core.update_targets_f32 if first.dtype == torch.float32 else _core.update_targets_f64
    kernel(*addresses, sizes, tau)


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


class TwinQLoss(torch.autograd.Function):
    """Differentiable in ``q``; the third output is the first derivative."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Three:
        output = run_twin_q_loss(*inputs)
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


class SquashedGaussian(torch.autograd.Function):
    """Differentiable in ``mean`` and ``log_std``; the third output is the spread."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Three:
        output = run_squashed_gaussian(*inputs)
        _save_squashed_gaussian(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled() or gradients[2] is not None:
            return _squashed_gaussian_backward(ctx, *gradients)
        actions, spread = ctx.saved_tensors
        return *run_squashed_gaussian_gradient(gradients[0], gradients[1], actions, spread), None


# torch.compile: the same kernels as operators --------------------------------------------------------------


_operator: Any = partial(torch.library.custom_op, mutates_args=(), device_types=("cpu", "cuda"))
twin_q_target_op = _operator(
    "angle_rl::twin_q_target",
    run_twin_q_target,
    schema="(Tensor rewards, Tensor discounts, Tensor next_q, Tensor? next_log_prob,"
    " Tensor entropy_coefficient) -> Tensor",
)
twin_q_loss_op = _operator(
    "angle_rl::twin_q_loss",
    run_twin_q_loss,
    schema="(Tensor q, Tensor td_target, Tensor? importance_weights, float? huber_delta) -> (Tensor, Tensor, Tensor)",
)
squashed_gaussian_op = _operator(
    "angle_rl::squashed_gaussian",
    run_squashed_gaussian,
    schema="(Tensor mean, Tensor log_std, Tensor noise) -> (Tensor, Tensor, Tensor)",
)
update_targets_op = _operator(
    "angle_rl::update_targets",
    run_update_targets,
    mutates_args=("targets",),
    schema="(Tensor(a!)[] targets, Tensor[] online, float tau) -> ()",
)

twin_q_target_op.register_fake(
    lambda rewards, discounts, next_q, next_log_prob, _: next_q.new_empty(
        next_q.shape[1], dtype=_together(rewards, discounts, next_q, next_log_prob)
    ),
)
twin_q_loss_op.register_fake(_new_twin_q_loss)
squashed_gaussian_op.register_fake(_new_squashed_gaussian)
twin_q_loss_op.register_autograd(_twin_q_loss_backward, setup_context=_save_twin_q_loss)
squashed_gaussian_op.register_autograd(_squashed_gaussian_backward, setup_context=_save_squashed_gaussian)

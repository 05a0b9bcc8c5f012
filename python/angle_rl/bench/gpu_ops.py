"""The fused operations on a device, beside eager torch and the floor of their bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from angle_rl import ops
from angle_rl.bench.gpu_timing import Case, Place, all_of, bound, turns
from angle_rl.bench.rows import ACTION, OBSERVATION

OURS, TORCH = "angle", "torch"
CRITICS = 2
TAU = 0.005
COEFFICIENT = 0.2
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the norm of what is due
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One of the operations: what it works on, ours, torch's, and what it must move."""

    name: str
    make: Callable[[torch.Generator, torch.dtype, int], Tensors]  # one set of inputs, by generator, dtype and size
    ours: Callable[..., Tensors]
    torch: Callable[..., Tensors]
    numbers: Callable[[int], int]  # numbers of the dtype read and written, once each
    kernels: int  # fewest, one after the other
    in_place: bool = False  # the first half of the inputs changes


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def _target_inputs(generator: torch.Generator, dtype: torch.dtype, batch: int) -> Tensors:
    discounts = 0.99 * (torch.rand(batch, generator=generator, device=generator.device) > 0.1)
    rewards, log_prob = _normal(generator, dtype, batch), _normal(generator, dtype, batch)
    coefficient = torch.full((), COEFFICIENT, device=generator.device)
    return rewards, discounts.to(dtype), _normal(generator, dtype, CRITICS, batch), log_prob, coefficient


def _our_target(*inputs: torch.Tensor) -> Tensors:
    rewards, discounts, next_q, log_prob, coefficient = inputs
    return (ops.twin_q_target(rewards, discounts, next_q, log_prob, coefficient),)


def _torch_target(*inputs: torch.Tensor) -> Tensors:
    rewards, discounts, next_q, log_prob, coefficient = inputs
    return (rewards + discounts * (torch.minimum(next_q[0], next_q[1]) - coefficient * log_prob),)


def _loss_inputs(generator: torch.Generator, dtype: torch.dtype, batch: int) -> Tensors:
    weights = torch.rand(batch, generator=generator, device=generator.device).to(dtype)
    q = _normal(generator, dtype, CRITICS, batch).requires_grad_()
    return q, _normal(generator, dtype, batch), weights


def _our_loss(q: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> Tensors:
    loss, td_error = ops.twin_q_loss(q, target, weights)
    (gradient,) = torch.autograd.grad(loss, q)
    return loss.detach(), td_error, gradient


def _torch_loss(q: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> Tensors:
    difference = q - target
    loss = (difference.square().sum(0) * weights).mean()
    (gradient,) = torch.autograd.grad(loss, q)
    return loss.detach(), difference.detach().abs().mean(0), gradient


def _gaussian_inputs(generator: torch.Generator, dtype: torch.dtype, batch: int) -> Tensors:
    mean = _normal(generator, dtype, batch, ACTION).requires_grad_()
    log_std = (0.5 * _normal(generator, dtype, batch, ACTION) - 1).requires_grad_()
    noise, by_actions = _normal(generator, dtype, batch, ACTION), _normal(generator, dtype, batch, ACTION)
    return mean, log_std, noise, by_actions, _normal(generator, dtype, batch)


def _our_gaussian(*inputs: torch.Tensor) -> Tensors:
    mean, log_std, noise, by_actions, by_log_prob = inputs
    actions, log_prob = ops.squashed_gaussian(mean, log_std, noise)
    gradients = torch.autograd.grad((actions, log_prob), (mean, log_std), (by_actions, by_log_prob))
    return actions.detach(), log_prob.detach(), *gradients


def _torch_gaussian(*inputs: torch.Tensor) -> Tensors:
    mean, log_std, noise, by_actions, by_log_prob = inputs
    before = mean + log_std.exp() * noise
    actions = before.tanh()
    density = -0.5 * noise.square() - log_std - 0.9189385332046727
    softplus = torch.nn.functional.softplus(-2.0 * before)
    log_prob = (density - 2.0 * (0.6931471805599453 - before - softplus)).sum(-1)
    gradients = torch.autograd.grad((actions, log_prob), (mean, log_std), (by_actions, by_log_prob))
    return actions.detach(), log_prob.detach(), *gradients


def _critics(width: int) -> list[tuple[int, ...]]:
    """Shapes of the critics' parameters, stacked as ours are: two hidden layers."""
    sides = (OBSERVATION + ACTION, width, width, 1)
    layers = itertools.pairwise(sides)
    return [shape for i, o in layers for shape in ((CRITICS, o, i), (CRITICS, o))]


def _pairs(generator: torch.Generator, dtype: torch.dtype, width: int) -> Tensors:
    shapes = _critics(width)
    return tuple(_normal(generator, dtype, *shape) for shape in (*shapes, *shapes))


def _our_move(*tensors: torch.Tensor) -> Tensors:
    half = len(tensors) // 2
    ops.update_targets(tensors[:half], tensors[half:], TAU)
    return tensors[:half]


def _torch_move(*tensors: torch.Tensor) -> Tensors:
    half = len(tensors) // 2
    torch._foreach_lerp_(list(tensors[:half]), list(tensors[half:]), TAU)
    return tensors[:half]


OPERATIONS = (
    Operation(
        name="twin_q_target",
        make=_target_inputs,
        ours=_our_target,
        torch=_torch_target,
        numbers=lambda batch: (4 + CRITICS) * batch,
        kernels=1,
    ),
    Operation(  # forward: q, target, weights; td_error, gradient. The backward pass has nothing left to move.
        name="twin_q_loss",
        make=_loss_inputs,
        ours=_our_loss,
        torch=_torch_loss,
        numbers=lambda batch: (3 + 2 * CRITICS) * batch,
        kernels=1,
    ),
    Operation(  # forward: three in, actions, spread and log_prob out; backward: those two and two gradients in, two out
        name="squashed_gaussian",
        make=_gaussian_inputs,
        ours=_our_gaussian,
        torch=_torch_gaussian,
        numbers=lambda batch: (10 * ACTION + 2) * batch,
        kernels=2,
    ),
    Operation(
        name="update_targets",
        make=_pairs,
        ours=_our_move,
        torch=_torch_move,
        numbers=lambda width: 3 * sum(map(math.prod, _critics(width))),
        kernels=1,
        in_place=True,
    ),
)


def measure_ops(place: Place) -> None:
    """Every operation at every size and dtype: called from Python, and as graphs."""
    batches, widths = place.choose((256, 32_768), (256, 32_768), (32, 64)), place.choose((256, 1024), (256,), (16,))
    for operation in OPERATIONS:
        for dtype, name in DTYPES.items():
            for size in widths if operation.in_place else batches:
                with place.part(f"{operation.name}, {size:,}, {name}"):
                    _check(place, operation, dtype, size)
                    _measure(place, operation, dtype, size)


def _check(place: Place, operation: Operation, dtype: torch.dtype, size: int) -> None:
    """RuntimeError unless ours gives what torch's formula gives in float64 from the same numbers."""
    inputs = operation.make(place.generator(7), dtype, size)
    wide = tuple(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs)
    due = operation.torch(*wide)
    for number, (found, expected) in enumerate(zip(operation.ours(*inputs), due, strict=True)):
        if found.shape != expected.shape:
            raise RuntimeError(f"{operation.name}: output {number} has the shape {tuple(found.shape)}")
        error = float((found.double() - expected).norm() / expected.norm())
        if not error <= TOLERANCES[dtype]:
            raise RuntimeError(f"{operation.name}: output {number} is off by {error:.2e} of its norm")


def _measure(place: Place, operation: Operation, dtype: torch.dtype, size: int) -> None:
    count = operation.numbers(size) * dtype.itemsize
    generator = place.generator()
    sets = [operation.make(generator, dtype, size) for _ in range(place.sets(count))]
    about: dict[str, Any] = {"batch": size, "rows": DTYPES[dtype]}
    if operation.in_place:
        about = {"batch": 1, "rows": f"{DTYPES[dtype]}, width {size}"}
    floor = place.ceilings.floor_us(count, operation.kernels)
    libraries: Sequence[tuple[str, Callable[..., Tensors]]] = ((OURS, operation.ours), (TORCH, operation.torch))

    cases = [Case(library=library, call=turns(bound(call, sets))) for library, call in libraries]
    place.measure(operation.name, cases, **about)
    place.add_floor(operation.name, floor, bytes=count, **about)
    graphs = [
        Case(library=library, call=place.captured(all_of(bound(call, sets))), calls=len(sets))
        for library, call in libraries
    ]
    place.measure(f"{operation.name}_graph", graphs, **about)
    place.add_floor(f"{operation.name}_graph", floor, bytes=count, sets=len(sets), **about)

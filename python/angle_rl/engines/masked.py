"""Steps of optimisers that are left out where a number on the device says so: the host does not look at it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

ADAMS = (Adam, AdamW)


def has_switch(optimizer: Optimizer) -> bool:
    """Whether it reads the number by itself, and its learning rates from the device: the fused Adam and AdamW do."""
    return isinstance(optimizer, ADAMS) and all(group.get("fused") for group in optimizer.param_groups)


def step_refusal(optimizer: Optimizer) -> str | None:
    """Why an optimiser's steps cannot be recorded, in a few words; None where they can."""
    if has_switch(optimizer) or isinstance(optimizer, SGD):
        return None
    if all("capturable" in group for group in optimizer.param_groups):
        return None
    return f"is a {type(optimizer).__name__}, whose steps torch does not record"


def numbers_in_graph(optimizer: Optimizer) -> tuple[Any, ...]:
    """All numbers of an optimiser that a recorded step cannot learn to change."""
    left_out = {"params", "initial_lr", "capturable"} | ({"lr"} if has_switch(optimizer) else set())
    return tuple(
        (len(group["params"]), *((name, value) for name, value in group.items() if name not in left_out))
        for group in optimizer.param_groups
    )


def mark_not_finite(tensors: Iterable[Tensor], failed: Tensor, one: Tensor) -> None:
    """Set ``failed`` (float32 scalar) to 1 where any of these holds a NaN or an infinity; else it stays as it is.

    ``one`` is a float32 scalar of that value, on the same device.
    """
    of_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        of_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    for group in of_dtype.values():
        torch._amp_foreach_non_finite_check_and_unscale_(group, failed, one)


@contextmanager
def kept_where_failed(failed: Tensor, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Inside, steps of these leave parameters, moments and step counts as they are where ``failed`` is 1.

    ``failed`` is a float32 scalar, 0 or 1, on the parameters' device.
    """
    plain = [optimizer for optimizer in optimizers if not has_switch(optimizer)]
    changing = [parameter.detach() for optimizer in plain for parameter in _parameters_of(optimizer)]
    changing += [tensor for optimizer in plain for tensor in state_tensors(optimizer)]
    before = [tensor.clone() for tensor in changing]
    for optimizer in optimizers:
        if optimizer not in plain:
            optimizer.found_inf = failed  # type: ignore[attr-defined]  # where torch.amp.GradScaler leaves it
    try:
        yield
    finally:
        for optimizer in optimizers:
            vars(optimizer).pop("found_inf", None)
    known = {id(tensor) for tensor in changing}
    new = [tensor for optimizer in plain for tensor in state_tensors(optimizer) if id(tensor) not in known]
    for tensor, old in zip(changing, before, strict=True):
        tensor.copy_(torch.where(failed > 0, old, tensor))
    for tensor in new:  # made by the first step: all of torch's begin at 0
        tensor.copy_(torch.where(failed > 0, 0, tensor))


@contextmanager
def recordable(optimizers: Iterable[Optimizer], rates: Sequence[Tensor]) -> Iterator[None]:
    """Inside, steps of these may be recorded, and fused ones read their groups' learning rates from ``rates`` in turn.

    Afterwards all groups are as they were.
    """
    remaining = iter(rates)
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for optimizer in optimizers:
        optimizer._warned_capturable_if_run_uncaptured = True  # the first run is not recorded
        for group in optimizer.param_groups:
            before.append((group, {name: group[name] for name in ("lr", "capturable") if name in group}))
            if has_switch(optimizer):
                group["lr"] = next(remaining)
            if "capturable" in group:
                group["capturable"] = all(parameter.is_cuda for parameter in group["params"])
    try:
        yield
    finally:
        for group, values in before:
            group.update(values)


def learning_rates(optimizers: Iterable[Optimizer]) -> list[float]:
    """What goes into `recordable`'s ``rates``."""
    return [float(group["lr"]) for optimizer in optimizers if has_switch(optimizer) for group in optimizer.param_groups]


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """The tensors that an optimiser remembers."""
    return [
        value
        for parameter in _parameters_of(optimizer)
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor)
    ]


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

"""Observations and actions as NumPy arrays laid out as a Gymnasium space says.

A batch of a Dict or Tuple space is a dict or tuple of arrays with a leading axis. The functions that take
values return copies, and refuse what does not fit with a ValueError (shape, range) or TypeError (dtype) that
names both sides. Any thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces

from angle_rl.types import Array

Space = spaces.Space[Any]
_ARRAY_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def map_space(function: Callable[..., Any], space: Space, *trees: Any) -> Any:
    """``function(leaf_space, *leaves)`` at every leaf of the space and of trees of its structure."""
    if isinstance(space, spaces.Dict):
        return {name: map_space(function, part, *(tree[name] for tree in trees)) for name, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(map_space(function, part, *(tree[i] for tree in trees)) for i, part in enumerate(space.spaces))
    return function(space, *trees)


def check_observation_space(space: Space) -> Space:
    """``space``, if it is made of arrays alone; else TypeError."""

    def check(leaf: Space) -> None:
        if not isinstance(leaf, _ARRAY_SPACES):
            raise TypeError(
                f"observation_space holds {leaf}; observations are Box, Discrete, MultiDiscrete or "
                "MultiBinary, or Dict and Tuple of these"
            )

    map_space(check, space)
    return space


def check_action_space(space: Space) -> Space:
    """``space``, if it is one array; else TypeError."""
    if not isinstance(space, _ARRAY_SPACES):
        raise TypeError(f"action_space is {space}; actions are a Box, Discrete, MultiDiscrete or MultiBinary")
    return space


def action_space_like(action: Any) -> Space:
    """A Box in [-1, 1] of the shape and dtype of a float action."""
    array = _array(action)
    if array.dtype.kind != "f":
        raise TypeError(f"initial_action is {action!r}; actions other than floats need an action_space")
    return spaces.Box(-1.0, 1.0, array.shape, dtype=cast("type[np.floating[Any]]", array.dtype.type))


def space_like(value: Any) -> Space:
    """An unbounded space of a value's structure, shapes and dtypes."""
    if isinstance(value, Mapping):
        return spaces.Dict({name: space_like(part) for name, part in value.items()})
    if isinstance(value, tuple):
        return spaces.Tuple([space_like(part) for part in value])
    array = _array(value)
    dtype: Any = array.dtype.type
    if array.dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, array.shape, dtype=dtype)
    if array.dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return spaces.Box(limits.min, limits.max, array.shape, dtype=dtype)
    if array.dtype.kind == "b":
        return spaces.Box(0, 1, array.shape, dtype=np.uint8)
    raise TypeError(f"initial_observation holds {value!r}, which is no array of numbers")


def _array(value: Any) -> Array:
    """``value`` as an array; Python floats become float32."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype == np.float64 and not isinstance(value, (np.ndarray, np.generic)):
        return array.astype(np.float32)
    return array


def to_array(space: Space, value: Any, where: str, lead: tuple[int, ...] = ()) -> Array:
    """A copy of ``value`` as an array [*lead, *space.shape] of the space's dtype."""
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    shape = lead + tuple(space.shape or ())
    if array.shape != shape:
        raise ValueError(f"{where} has shape {list(array.shape)}; {list(shape)} is needed for {space}")
    dtype = cast("np.dtype[Any]", space.dtype)
    if array.dtype == dtype:
        return array.copy()
    whole = array.dtype.kind in "iu" and dtype.kind in "iu"
    if not whole and not np.can_cast(array.dtype, dtype, "same_kind"):
        raise TypeError(f"{where} has dtype {array.dtype}; {dtype} is needed for {space}")
    converted = array.astype(dtype)
    if whole and (converted != array).any():
        raise ValueError(f"{where} holds numbers that {dtype} cannot; it is needed for {space}")
    return converted


def empty_batch(space: Space, n: int) -> Any:
    """Arrays [n, ...] whose contents are undefined."""
    return map_space(lambda leaf: np.empty((n, *leaf.shape), dtype=leaf.dtype), space)


def write_row(space: Space, batch: Any, index: int, value: Any) -> None:
    """Put one environment's observation into row ``index``."""

    def put(leaf: Space, out: Array, part: Any) -> None:
        out[index] = to_array(leaf, part, "an observation")

    map_space(put, space, batch, value)


def to_batch(space: Space, value: Any, n: int) -> Any:
    """A copy of a batched observation in the space's structure and dtypes."""
    return map_space(lambda leaf, part: to_array(leaf, part, "a batch of observations", (n,)), space, value)


def row_of(value: Any, index: int | slice | Array | torch.Tensor) -> Any:
    """One environment's part of a batch, not copied; or several environments', given a slice or indices ``[k]``."""
    if isinstance(value, Mapping):
        return {name: row_of(part, index) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(row_of(part, index) for part in value)
    if isinstance(value, torch.Tensor) and isinstance(index, np.ndarray):
        index = torch.from_numpy(index).to(value.device, non_blocking=True)
    return value[index]


def where_rows(mask: Array, chosen: Any, other: Any) -> Any:
    """A batch of the rows of ``chosen`` where ``mask`` [n] is True, and of ``other`` elsewhere."""
    if isinstance(chosen, Mapping):
        return {name: where_rows(mask, part, other[name]) for name, part in chosen.items()}
    if isinstance(chosen, tuple):
        return tuple(where_rows(mask, part, of) for part, of in zip(chosen, other, strict=True))
    if isinstance(chosen, torch.Tensor):
        there = torch.from_numpy(mask).to(chosen.device, non_blocking=True)
        return torch.where(there.reshape(-1, *[1] * (chosen.dim() - 1)), chosen, other)
    return np.where(mask.reshape(-1, *[1] * (chosen.ndim - 1)), chosen, other)


def with_rows(space: Space, batch: Any, rows: Mapping[int, Any]) -> Any:
    """``batch`` itself, or a copy in which ``rows`` are replaced."""
    if rows:
        batch = copy.deepcopy(batch)
        for index, row in rows.items():
            write_row(space, batch, index, row)
    return batch


def to_vector(value: Any, dtype: Any, n: int | None, where: str) -> Array:
    """A copy of ``value`` as [n] of ``dtype``; where ``n`` is None, as one number (from any array of one)."""
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if n is None and array.size == 1:
        array = array.reshape(())
    if array.shape != (() if n is None else (n,)):
        wanted = "one number" if n is None else f"[{n}]"
        raise ValueError(f"{where} has shape {list(array.shape)}; {wanted} is due")
    return array.astype(dtype)

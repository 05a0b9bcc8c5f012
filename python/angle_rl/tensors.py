"""Observations and actions as tensors on a device, laid out as a Gymnasium space says.

As ``angle_rl.spaces`` for arrays, but that nothing here reads what is on the device, unless it says so: of tensors
shape and dtype are checked, and whether whole numbers fit a narrower dtype is not. Any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from angle_rl.spaces import Space, map_space, to_array


def tensor_dtype(dtype: Any) -> torch.dtype:
    """Torch's name for a NumPy dtype."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def device_of(tree: Any) -> torch.device | None:
    """Where a batch of observations made of tensors lies, by its first leaf; None where it is made of arrays."""
    while isinstance(tree, (Mapping, tuple)) and len(tree) > 0:
        tree = next(iter(tree.values())) if isinstance(tree, Mapping) else tree[0]
    return tree.device if isinstance(tree, torch.Tensor) else None


def beside(tensor: torch.Tensor, observations: Any) -> Any:
    """``tensor`` where the observations are: on their device, or as an array where they are arrays."""
    place = device_of(observations)
    return tensor.cpu().numpy() if place is None else tensor.to(place)


def as_arrays(tree: Any) -> Any:
    """A batch with its tensors as arrays, which shares memory where it can. Waits for the device."""
    if isinstance(tree, Mapping):
        return {name: as_arrays(part) for name, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(as_arrays(part) for part in tree)
    return tree.detach().cpu().numpy() if isinstance(tree, torch.Tensor) else tree


def numbers_on_host(*values: Any) -> tuple[Any, ...]:
    """The values, those that are tensors as float64 arrays: brought over in one copy, which waits for the device."""
    tensors = [value.detach() for value in values if isinstance(value, torch.Tensor)]
    if not tensors:
        return values
    brought = torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
    parts = iter(np.split(brought, ends))
    return tuple(next(parts).reshape(v.shape) if isinstance(v, torch.Tensor) else v for v in values)


def to_tensor(space: Space, value: Any, where: str, n: int, device: torch.device) -> torch.Tensor:
    """A copy of ``value`` as a tensor ``[n, *space.shape]`` of the space's dtype there; arrays are checked as
    ``to_array`` does.
    """
    if not isinstance(value, torch.Tensor):
        return torch.from_numpy(to_array(space, value, where, (n,))).to(device, non_blocking=True)
    _check(space, value, where, (n,))
    return value.detach().to(device, tensor_dtype(space.dtype), copy=True)


def to_tensors(space: Space, value: Any, n: int, device: torch.device) -> Any:
    """A copy of a batched observation there, in the space's structure and dtypes."""
    return map_space(lambda leaf, part: to_tensor(leaf, part, "a batch of observations", n, device), space, value)


def with_tensor_rows(space: Space, batch: Any, rows: Mapping[int, Any]) -> Any:
    """``batch`` itself, or a copy in which ``rows`` are replaced: by tensors on its device, or by what ``to_array``
    takes, which goes there in one copy for each leaf.
    """
    if not rows:
        return batch
    indices = torch.tensor(list(rows))

    def put(leaf: Space, tensor: torch.Tensor, *parts: Any) -> torch.Tensor:
        new = _stacked(leaf, parts, tensor.device)
        return tensor.index_copy(0, indices.to(tensor.device, non_blocking=True), new)

    return map_space(put, space, batch, *rows.values())


def _stacked(leaf: Space, parts: Sequence[Any], device: torch.device) -> torch.Tensor:
    where = "an observation"
    if all(isinstance(part, torch.Tensor) and part.device == device for part in parts):
        for part in parts:
            _check(leaf, part, where, ())
        return torch.stack([part.detach() for part in parts]).to(tensor_dtype(leaf.dtype))
    return torch.from_numpy(np.stack([to_array(leaf, part, where) for part in parts])).to(device, non_blocking=True)


def _check(space: Space, tensor: torch.Tensor, where: str, lead: tuple[int, ...]) -> None:
    shape, dtype = lead + tuple(space.shape or ()), tensor_dtype(space.dtype)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{where} has shape {list(tensor.shape)}; {list(shape)} is needed for {space}")
    if not torch.can_cast(tensor.dtype, dtype):
        raise TypeError(f"{where} has dtype {tensor.dtype}; {dtype} is needed for {space}")

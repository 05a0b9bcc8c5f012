"""What a buffer's calls do where its rows are on a device: arguments are checked there or brought over, then launched.

Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from angle_rl import _core
from angle_rl.replay.arrays import as_priorities, check_device, convert_rows, handle_tensor, host
from angle_rl.replay.arrays import column as host_column
from angle_rl.replay.device import REPLACEMENT, Arguments, DeviceCore, there
from angle_rl.schema import Schema, flatten
from angle_rl.tensors import tensor_dtype
from angle_rl.types import Array, Batch, RandomKey

_ALIGN = 16  # of columns within staged memory


def core_of(buffer: Any) -> DeviceCore:
    """The core of a buffer whose rows are on a device."""
    core = buffer._core  # made to be used as the host's is
    assert isinstance(core, DeviceCore)
    return core


def refresh(self: Any) -> None:
    """Before a captured graph of draws and updates is launched: its draws read the discount and the importance exponent
    as they are now, it comes after earlier calls, and what the device has refused is raised.
    """
    _, _, discount, exponent, _ = self._sample_arguments(1)
    core_of(self).refresh(discount, exponent)


def launched(self: Any, samples: int = 1) -> None:
    """After such a graph, of so many draws, was launched on the current stream: calls on others wait for it."""
    core_of(self).launched()


def insert(buffer: Any, transition: tuple[Any, ...], ends: tuple[Any, Any, Any, Any]) -> Array | torch.Tensor:
    """:meth:`ReplayBuffer.insert` into a buffer whose rows are on a device, from host arrays or tensors there.

    Where observations are there, everything that is stays there, and what is on the host goes over in one copy.
    """
    core: DeviceCore = buffer._core
    core.check()
    schema: Schema = buffer.schema
    leaves = _leaves(schema, transition)
    terminated, truncated, streams, priorities = ends
    if type(streams) is int:
        streams = np.int64(streams if 0 <= streams < _core.MAX_STREAMS else -1)  # with all others that are refused
    ends = terminated, truncated, streams, priorities
    if _is_there(core, leaves[0]):
        columns, flags, n = _kept_there(core, schema, leaves, ends)
    else:
        columns, flags, n = _brought_over(core, schema, transition, ends)
    check_rewards = _is_there(core, leaves[len(schema.observations) + len(schema.actions)])
    if n == 0:
        none = np.empty(0, np.int64)
        return torch.from_numpy(none).to(core.device) if core.shares_successors else none
    addresses = [0 if flag is None else flag.data_ptr() for flag in flags]
    return core.insert([column.data_ptr() for column in columns], n, addresses, check_rewards)


def sample(
    buffer: Any,
    arguments: Arguments,
    out: Batch | None,
    place: Any,
    key: RandomKey | None,
    where: torch.Tensor | None,
) -> Batch:
    """:meth:`ReplayBuffer.sample` from a buffer whose rows are on a device. Waits for nothing."""
    core: DeviceCore = buffer._core
    core.check()
    if core.inserts == 0:
        raise ValueError("the buffer is empty; insert rows before sampling")
    n = arguments[0]
    if not arguments[4] & REPLACEMENT and n > core._kernels.MOST_AT_ONCE:
        raise ValueError(f"batch_size is {n}; without replacement a batch on a device has at most 2**24 rows")
    if where is not None:
        if out is None:
            raise ValueError("where is given without out, the batch that stays as it is where nothing is drawn")
        _check_where(core, where)
    if out is not None:
        if place is not None:
            raise ValueError("out and device are both given; out is filled where it is, so leave one of them out")
        leaves = buffer._batches.leaves(out)
        buffer._batches.check_out(leaves, n, core.device)
        core.sample(arguments, leaves, key, where)
        return out
    tensors = [torch.empty(size, dtype=dtype, device=core.device) for size, dtype in buffer._batches.sizes(n)]
    core.sample(arguments, tensors, key)
    if place is not None and (place := check_device(place)) != core.device and place.type != core.device.type:
        tensors = [tensor.to(place) for tensor in tensors]
    batch: Batch = buffer._batches.assemble(tensors)
    return batch


def update_priorities(buffer: Any, handles: Any, td_errors: Any, where: torch.Tensor | None) -> torch.Tensor:
    """:meth:`PrioritizedReplayBuffer.update_priorities` on a device: how many were refused is a number there."""
    core: DeviceCore = buffer._core
    core.check()
    if not (isinstance(handles, torch.Tensor) and handles.device == core.device):
        handles = handle_tensor(handles)
    if not (isinstance(td_errors, torch.Tensor) and td_errors.device == core.device):
        td_errors = host("td_errors", td_errors)
    handles, td_errors = there(core, handles), there(core, td_errors)
    if handles.dtype != torch.int64:
        raise TypeError(f"handles has the dtype {handles.dtype}; handles are int64")
    if td_errors.dtype not in (torch.float32, torch.float64):
        if td_errors.dtype.is_complex or td_errors.dtype == torch.bool:
            raise TypeError(f"td_errors has the dtype {td_errors.dtype}; td_errors are real numbers")
        td_errors = td_errors.to(torch.float32 if td_errors.dtype.is_floating_point else torch.float64)
    if handles.dim() != 1 or handles.shape != td_errors.shape:
        raise ValueError(
            f"handles has the shape {tuple(handles.shape)} and td_errors {tuple(td_errors.shape)}; both must be (n,)"
        )
    if handles.numel() > core._kernels.MOST_AT_ONCE:
        raise ValueError(f"handles has {handles.numel()} rows; on a device a call takes at most 2**24")
    if where is not None:
        _check_where(core, where)
    return core.update(handles, td_errors, where)


def _check_where(core: DeviceCore, where: torch.Tensor) -> None:
    if where.dtype != torch.bool or where.numel() != 1 or where.device != core.device:
        raise ValueError(
            f"where is {where.dtype} {tuple(where.shape)} on {where.device}; it must be one torch.bool on {core.device}"
        )


def _leaves(schema: Schema, transition: tuple[Any, ...]) -> list[Any]:
    observations, actions, rewards, next_observations = transition
    leaves: list[Any] = []
    flatten("observations", schema.observation_structure, observations, leaves)
    flatten("actions", schema.action_structure, actions, leaves)
    leaves.append(rewards)
    flatten("next_observations", schema.observation_structure, next_observations, leaves)
    return leaves


def _require_room(core: DeviceCore, n: int) -> None:
    if n > core.capacity:
        raise ValueError(f"observations hold {n} rows; the buffer's capacity is {core.capacity}")


Columns = tuple[list[torch.Tensor], list["torch.Tensor | None"], int]


def _is_there(core: DeviceCore, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device == core.device


def _kept_there(core: DeviceCore, schema: Schema, leaves: list[Any], ends: tuple[Any, ...]) -> Columns:
    """Columns of which the first is on the device already: those that are stay there, converted where need be; those on
    the host are checked as the host's insert checks them, and copied in one piece.
    """
    batched = leaves[0].dim() == len(schema.observations[0].shape) + 1
    n = leaves[0].shape[0] if batched else 1

    def column(name: str, value: Any, shape: tuple[int, ...], kind: Any) -> Any:
        if not _is_there(core, value):
            return host_column(name, _off_device(value), shape, np.dtype(kind), n, batched)
        dtype, expected = tensor_dtype(kind), (n, *shape) if batched else shape
        if tuple(value.shape) != expected:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}; expected {expected}")
        if not torch.can_cast(value.dtype, dtype):
            raise TypeError(f"{name} has the dtype {value.dtype}, which does not convert to {dtype}")
        return there(core, value).reshape(n, *shape).to(dtype)

    columns = [column(f.name, leaf, f.shape, f.dtype) for f, leaf in zip(schema.fields, leaves, strict=True)]
    terminated, truncated, streams, priorities = ends
    if terminated is None:
        raise TypeError("terminated is None; it must be bool or [n] bool")
    terminated = column("terminated", terminated, (), np.bool_)
    truncated = None if truncated is None else column("truncated", truncated, (), np.bool_)
    streams = None if streams is None else column("streams", streams, (), np.int64)
    if priorities is not None:
        on_host = not _is_there(core, priorities)
        priorities = column("priorities", priorities, (), np.float64 if on_host else np.float32)
        priorities = as_priorities(priorities) if on_host else priorities
    _require_room(core, n)
    _require_numbers(schema, columns, streams, priorities)
    every = [*columns, terminated, truncated, streams, priorities, *_order(core, streams)]
    moved = iter(_moved(core, [value for value in every if isinstance(value, np.ndarray)]))
    tensors = [next(moved) if isinstance(value, np.ndarray) else value for value in every]
    count = len(columns)
    return tensors[:count], tensors[count:], n


def _off_device(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) and value.is_cuda else value


def _brought_over(core: DeviceCore, schema: Schema, transition: tuple[Any, ...], ends: tuple[Any, ...]) -> Columns:
    """Host arrays, checked as the host's insert checks them, and copied in one piece."""
    columns, terminated, truncated, streams, priorities = convert_rows(schema, *map(_off_device, transition), *ends)
    n = len(terminated)
    _require_room(core, n)
    _require_numbers(schema, columns, streams, priorities)
    arrays = [*columns, terminated, truncated, streams, priorities, *_order(core, streams)]
    moved = iter(_moved(core, [array for array in arrays if array is not None]))
    tensors = [None if array is None else next(moved) for array in arrays]
    count = len(columns)
    return tensors[:count], tensors[count:], n  # type: ignore[return-value]


def _require_numbers(schema: Schema, columns: Sequence[Any], streams: Any, priorities: Any) -> None:
    """ValueError for the first number on the host that no buffer takes."""
    rewards = columns[len(schema.observations) + len(schema.actions)]
    if isinstance(rewards, np.ndarray):
        _require_each("rewards", rewards, np.isfinite(rewards), "rewards must be finite in the buffer's dtype")
    if isinstance(streams, np.ndarray):
        inside = (streams >= 0) & (streams < _core.MAX_STREAMS)
        _require_each("streams", streams, inside, f"it must be between 0 and {_core.MAX_STREAMS - 1}")
    if isinstance(priorities, np.ndarray):
        fits = (priorities >= 0) & np.isfinite(priorities)
        _require_each("priorities", priorities, fits, "priorities must be finite and not negative")


def _order(core: DeviceCore, streams: Any) -> tuple[Any, ...]:
    """What the core's insert wants to know of the streams' order, where the streams are."""
    order_of, parts = (rows_before, 1) if core.shares_successors else (rows_after, 2)
    if streams is None:
        return (None,) * parts
    if isinstance(streams, np.ndarray):
        return tuple(order.numpy() for order in order_of(torch.from_numpy(streams)))
    return order_of(streams)


def _moved(core: DeviceCore, arrays: Sequence[Array]) -> list[torch.Tensor]:
    """The bytes of host arrays on the device, each as the beginning of a tensor: one copy from pinned memory."""
    places, end = [], 0
    for array in arrays:
        places.append(end)
        end += -(-array.nbytes // _ALIGN) * _ALIGN
    staged = torch.empty(end, dtype=torch.uint8, pin_memory=core._real)
    memory = staged.numpy()
    for array, place in zip(arrays, places, strict=True):
        memory[place : place + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = staged.to(core.device, non_blocking=True)
    return [moved[place:] for place in places]


def _require_each(name: str, values: Array, fits: Array, rule: str) -> None:
    if not fits.all():
        index = int(np.argmin(fits))
        raise ValueError(f"{name}[{index}] is {values[index]}; {rule}")


def rows_after(streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows of these streams ``[n]``, in time order: the index of each one's next row of the same stream, or -1; and
    of each stream's first row the index of its last, elsewhere -1. Both int32 ``[n]``. Waits for no device.
    """
    n = len(streams)
    order, starts, ends = _by_stream(streams)
    following = torch.where(ends, -1, order.roll(-1))
    positions = torch.arange(n, device=streams.device)
    end_of = torch.where(ends, positions, n).flip(0).cummin(0).values.flip(0)
    last = torch.where(starts, order[end_of], -1)
    return _in_time(order, following), _in_time(order, last)


def rows_before(streams: torch.Tensor) -> tuple[torch.Tensor]:
    """For rows of these streams ``[n]``, in time order: the index of each one's row before of the same stream, or -1;
    int32 ``[n]``. Waits for no device.
    """
    order, starts, _ = _by_stream(streams)
    return (_in_time(order, torch.where(starts, -1, order.roll(1))),)


def _by_stream(streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows' indices by stream and then by time, and which of them begin and end a stream."""
    order = torch.argsort(streams, stable=True)
    ordered = streams[order]
    starts = torch.ones(len(streams), dtype=torch.bool, device=streams.device)
    ends = starts.clone()
    if len(streams) > 1:
        changes = ordered[1:] != ordered[:-1]
        starts[1:] = changes
        ends[:-1] = changes
    return order, starts, ends


def _in_time(order: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values).scatter_(0, order, values).to(torch.int32)

"""Arguments of the buffers: numbers and arrays checked, named where they do not fit, and converted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from angle_rl.schema import Schema, flatten
from angle_rl.types import Array


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """``value`` as a float in [low, high]; TypeError or ValueError, naming the argument, where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not low <= value <= high or math.isinf(value):
        raise ValueError(
            f"{name} is {value}; it must be finite, at least {low}"
            + (f" and at most {high}" if high < math.inf else "")
        )
    return float(value)


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int in [low, high]; TypeError or ValueError, naming the argument, where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be between {low} and {high}")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """``value`` as a bool; TypeError, naming the argument, where it is none."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return bool(value)


def check_device(value: Any) -> torch.device:
    """``value`` as a device; ValueError where torch knows none of that name."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {value!r}; it must be a torch device, as 'cpu' or 'cuda:0'") from None


def available_memory() -> int:
    """Bytes that this process may still take: what the system has free, within the control group's limit."""
    available = 2**63
    try:
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            text = limit.read().strip()
            if text != "max":
                available = min(available, int(text) - int(used.read()))
    except (OSError, StopIteration):
        pass
    return available


def require_memory(rows: int, row_bytes: int, available: int | None = None) -> None:
    """Raises MemoryError where ``rows`` of ``row_bytes`` are more than is available (None: to this process)."""
    needed, available = rows * row_bytes, available_memory() if available is None else available
    if needed > available:
        raise MemoryError(
            f"capacity is {rows} rows, which need {needed / 2**30:.1f} GiB; {available / 2**30:.1f} GiB are available"
        )


def as_array(name: str, value: Any) -> Array:
    """``value`` as an array of numbers in host memory, without a copy where it is one."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on the device {value.device}; insert takes host memory ('cpu')")
        value = value.detach().numpy()
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError(f"{name} is {type(value).__name__}; it must be an array")
    return array


def column(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], n: int, batched: bool) -> Array:
    """``n`` rows of one field, contiguous and of its dtype; checked as ``insert`` promises."""
    array = as_array(name, value)
    expected = (n, *shape) if batched else shape
    if array.shape != expected:
        one_or_many = f"{shape} for one row, (n, {', '.join(map(str, shape))}{',' if shape else ''}) for n"
        raise ValueError(f"{name} has the shape {array.shape}; expected {expected} ({one_or_many})")
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise TypeError(f"{name} has the dtype {array.dtype}, which does not convert to {dtype}")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array.reshape(n, *shape), dtype=dtype)


def as_priorities(values: Array) -> Array:
    """float64 priorities as float32: one too large becomes the largest, and one that is not 0 never becomes it."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = values.astype(np.float32)
    limits = np.finfo(np.float32)
    vanished = (values != 0) & (narrow == 0)
    narrow[vanished] = np.copysign(limits.smallest_subnormal, values[vanished])
    narrow[np.isfinite(values) & (narrow == np.inf)] = limits.max
    return narrow


def host(name: str, value: Any) -> torch.Tensor:
    """Numbers as a contiguous tensor in host memory."""
    if isinstance(value, torch.Tensor):
        if value.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name} is on the device {value.device}; it must be on cpu or cuda")
        return value.detach().cpu().contiguous()
    array = np.ascontiguousarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} has the dtype {array.dtype}; it must be numbers")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def handle_tensor(handles: Any) -> torch.Tensor:
    """Handles as a contiguous int64 tensor in host memory; TypeError where they are no integers."""
    if type(handles) is torch.Tensor and handles.dtype is torch.int64 and handles.is_cpu and handles.is_contiguous():
        return handles
    tensor = host("handles", handles)
    if not np.can_cast(tensor.numpy().dtype, np.int64, "same_kind") and tensor.numel() > 0:
        raise TypeError(f"handles has the dtype {tensor.dtype}; handles are int64")
    if tensor.dim() != 1:
        raise ValueError(f"handles has the shape {tuple(tensor.shape)}; it must be (n,)")
    return tensor.to(torch.int64)


def convert_rows(
    schema: Schema,
    observations: Any,
    actions: Any,
    rewards: Any,
    next_observations: Any,
    terminated: Any,
    truncated: Any,
    streams: Any,
    priorities: Any,
) -> tuple[Any, ...]:
    """The arguments of ``insert`` as the core takes them: contiguous, of the schema's dtypes, checked."""
    values: list[Any] = []
    flatten("observations", schema.observation_structure, observations, values)
    flatten("actions", schema.action_structure, actions, values)
    values.append(rewards)
    flatten("next_observations", schema.observation_structure, next_observations, values)
    first, first_field = as_array("observations", values[0]), schema.observations[0]
    batched = first.ndim == len(first_field.shape) + 1
    n = first.shape[0] if batched else 1

    def of_rows(name: str, value: Any, dtype: type) -> Array | None:
        return None if value is None else column(name, value, (), np.dtype(dtype), n, batched)

    columns = tuple(
        column(f.name, value, f.shape, f.dtype, n, batched) for f, value in zip(schema.fields, values, strict=True)
    )
    graded = of_rows("priorities", priorities, np.float64)
    return (
        columns,
        column("terminated", terminated, (), np.dtype(np.bool_), n, batched),
        of_rows("truncated", truncated, np.bool_),
        of_rows("streams", streams, np.int64),
        None if graded is None else as_priorities(graded),
    )

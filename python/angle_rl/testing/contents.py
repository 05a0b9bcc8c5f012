"""What a state holds, leaf by leaf, copied so that it can be compared with a later look."""

from __future__ import annotations

import inspect
import random
from collections import deque
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from types import ModuleType
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch

from angle_rl.engines import NativeEngine
from angle_rl.types import Array

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Leaf(NamedTuple):
    """One value of a state."""

    kind: str  # "parameter" (of a module, or a tensor that takes gradients), "optimizer", "replay" or "other"
    value: Any  # a NumPy array (a copy) or a plain Python value


Contents = dict[str, Leaf]


def contents(value: Any) -> Contents:
    """Every array, tensor, number and text in `value`, by path: copies.

    Goes into containers, dataclasses and objects; modules and optimisers by their state_dict, replays by
    export_arrays. Functions, classes and spaces are left out, and the compiled engine, whose memory is scratch.
    """
    found: Contents = {}
    _walk(value, "", "other", found, {})
    return found


def _walk(value: Any, path: str, kind: str, found: Contents, seen: dict[int, Any]) -> None:
    if isinstance(value, _PLAIN):
        found[path] = Leaf(kind, value)
    elif isinstance(value, torch.Tensor):
        found[path] = Leaf("parameter" if value.requires_grad and value.is_leaf else kind, as_array(value))
    elif isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        found[path] = Leaf(kind, np.array(value))
    elif inspect.isroutine(value) or isinstance(value, type | ModuleType | gymnasium.Space | NativeEngine):
        return
    elif id(value) not in seen:
        seen[id(value)] = value  # kept, so that no other object gets its id meanwhile
        kind, parts = _parts(value, kind)
        for name, part in parts:
            _walk(part, f"{path}.{name}" if path else str(name), kind, found, seen)


def _parts(value: Any, kind: str) -> tuple[str, list[tuple[Any, Any]]]:
    """The kind of what is inside `value`, and its members by name."""
    if isinstance(value, torch.nn.Module):
        return "parameter", list(value.state_dict().items())
    if isinstance(value, torch.optim.Optimizer):
        return "optimizer", list(value.state_dict().items())
    if is_replay(value):
        return "replay", list(value.export_arrays().items())
    if isinstance(value, torch.Generator):
        return kind, [("generator", value.get_state())]
    if isinstance(value, np.random.Generator):
        return kind, [("generator", value.bit_generator.state)]
    if isinstance(value, random.Random):
        return kind, [("generator", value.getstate())]
    if isinstance(value, Mapping):
        return kind, list(value.items())
    if isinstance(value, tuple) and len(value) > 16 and all(type(part) is int for part in value):
        return kind, [("members", repr(value))]  # the state of a generator of `random`
    if isinstance(value, AbstractSet):
        return kind, [("members", tuple(sorted(repr(member) for member in value)))]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind, list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple | deque | np.ndarray):
        return kind, list(enumerate(value))
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    return kind, [(name, getattr(value, name)) for name in slots if hasattr(value, name)] + list(
        getattr(value, "__dict__", {}).items()
    )


def is_replay(value: Any) -> bool:
    """Whether a value's rows can be read as one of our replays' can."""
    return callable(getattr(type(value), "export_arrays", None))


def find_replay(value: Any) -> Any:
    """The first replay in a state, by the order of its fields; None where there is none."""
    seen: dict[int, Any] = {}
    waiting: deque[Any] = deque([value])
    while waiting:
        one = waiting.popleft()
        if is_replay(one):
            return one
        if id(one) in seen or isinstance(
            one, (*_PLAIN, torch.Tensor, np.ndarray, np.generic, type, ModuleType, gymnasium.Space)
        ):
            continue
        seen[id(one)] = one
        if not inspect.isroutine(one):
            waiting.extend(part for _, part in _parts(one, "other")[1])
    return None


def as_array(tensor: torch.Tensor) -> Array:
    """A copy of a tensor as a NumPy array; bfloat16 becomes float32."""
    tensor = tensor.detach().cpu()
    copy: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
    return copy


def same(first: Any, second: Any) -> bool:
    """Whether two leaves' values agree bit for bit."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (first != first and second != second)
    return type(first) is type(second) and bool(first == second)


def difference(first: Contents, second: Contents) -> str | None:
    """The first path whose values differ, with both; None where all agree."""
    for path in [*first, *(path for path in second if path not in first)]:
        if path not in first or path not in second:
            return f"{path} is there only {'before' if path in first else 'after'}"
        if not same(first[path].value, second[path].value):
            return f"{path} {both(first[path].value, second[path].value)}"
    return None


def both(first: Any, second: Any) -> str:
    """Two values that differ, in a few words; of arrays the first entry that does."""
    if not (isinstance(first, np.ndarray) and isinstance(second, np.ndarray)):
        return f"is {first!r} and {second!r}"
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return f"is {first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
    unequal = first != second
    if first.dtype.kind in "fc":
        unequal &= ~(np.isnan(first) & np.isnan(second))
    where = np.argwhere(unequal)
    index = tuple(int(i) for i in where[0]) if len(where) else ()
    return f"at {list(index)} is {first[index]!s} and {second[index]!s}"


def of_kind(found: Contents, *kinds: str) -> Contents:
    """The leaves of these kinds."""
    return {path: leaf for path, leaf in found.items() if leaf.kind in kinds}

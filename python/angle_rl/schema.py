"""What a row of a replay holds: named arrays, flattened from nested spaces, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch


class Field(NamedTuple):
    """One array of a row."""

    name: str  # nested observations are flattened to names: "observations.camera", "observations.0"
    shape: tuple[int, ...]  # of one row
    dtype: np.dtype[Any]


class Schema(NamedTuple):
    """The fields of a row, and how nested observations and actions are put together again.

    A structure is ``None`` for one array, a tuple of keys for a dict, or the number of members of a tuple, with the
    members' structures beside it.
    """

    observations: tuple[Field, ...]
    actions: tuple[Field, ...]
    rewards: Field
    observation_structure: Any
    action_structure: Any

    @property
    def fields(self) -> tuple[Field, ...]:
        """All fields in the order in which the core keeps them."""
        successors = (f._replace(name=f"next_{f.name}") for f in self.observations)
        return (*self.observations, *self.actions, self.rewards, *successors)


def make_schema(
    schema: Mapping[str, Any] | Sequence[Any] | Schema | None,
    observation_space: gym.Space[Any] | None = None,
    action_space: gym.Space[Any] | None = None,
) -> Schema:
    """The schema from a description or from two spaces.

    A description is a mapping with ``observations``, ``actions`` and optionally ``rewards``, whose values are
    ``(shape, dtype)``, a Gymnasium space, or a dict or tuple of those; or a sequence of ``(name, shape, dtype)``.
    A float64 ``Box`` is kept as float32, since that is what networks take; a description is kept to the letter.
    """
    if isinstance(schema, Schema):
        return schema
    if schema is None:
        if observation_space is None or action_space is None:
            raise ValueError("schema is None; then observation_space and action_space must both be given")
        schema = {"observations": observation_space, "actions": action_space}
    elif observation_space is not None or action_space is not None:
        raise ValueError("schema is given; then observation_space and action_space must be left out")
    elif not isinstance(schema, Mapping):
        schema = {str(item[0]): (item[1], item[2]) for item in schema}
    known = {"observations", "actions", "rewards", "next_observations"}
    for name in schema:
        if name not in known:
            raise ValueError(f"schema has a field {name!r}; a row has {', '.join(sorted(known))}")
    for name in ("observations", "actions"):
        if name not in schema:
            raise ValueError(f"schema lacks the field {name!r}")
    if "next_observations" in schema and schema["next_observations"] != schema["observations"]:
        raise ValueError("schema['next_observations'] differs from schema['observations']; they must be equal")
    observations: list[Field] = []
    actions: list[Field] = []
    rewards: list[Field] = []
    observation_structure = _describe("observations", schema["observations"], observations)
    action_structure = _describe("actions", schema["actions"], actions)
    _describe("rewards", schema.get("rewards", ((), np.float32)), rewards)
    if len(rewards) != 1 or rewards[0].shape != () or rewards[0].dtype.kind != "f":
        raise ValueError(f"schema['rewards'] is {schema['rewards']!r}; a reward is one floating-point number")
    return Schema(tuple(observations), tuple(actions), rewards[0], observation_structure, action_structure)


def _describe(name: str, described: Any, into: list[Field]) -> Any:
    """Append the fields of a description and return its structure."""
    spaces = gym.spaces
    if isinstance(described, spaces.Dict):
        described = dict(described.spaces)
    if isinstance(described, spaces.Tuple):
        described = tuple(described.spaces)
    if isinstance(described, Mapping):
        keys = tuple(described)
        return (keys, tuple(_describe(f"{name}.{key}", described[key], into) for key in keys))
    if isinstance(described, spaces.Box | spaces.MultiBinary | spaces.MultiDiscrete | spaces.Discrete):
        dtype = np.dtype(described.dtype)
        described = (described.shape or (), np.dtype(np.float32) if dtype == np.float64 else dtype)
    if isinstance(described, gym.Space):
        raise ValueError(
            f"{name} is the space {described}; the replay keeps Box, Discrete, MultiDiscrete, "
            "MultiBinary, Dict and Tuple spaces"
        )
    if isinstance(described, tuple) and not _is_leaf(described):
        return (len(described), tuple(_describe(f"{name}.{i}", d, into) for i, d in enumerate(described)))
    if not _is_leaf(described):
        raise ValueError(
            f"schema describes {name} as {described!r}; it must be (shape, dtype), a space, or a dict or tuple of those"
        )
    shape = (described[0],) if isinstance(described[0], int) else tuple(int(length) for length in described[0])
    dtype = np.dtype(described[1])
    if any(length < 1 for length in shape):
        raise ValueError(f"schema gives {name} the shape {shape}; every length must be at least 1")
    try:
        torch.from_numpy(np.empty(0, dtype))
    except TypeError:
        raise ValueError(f"schema gives {name} the dtype {dtype}, which torch does not have") from None
    into.append(Field(name, shape, dtype))
    return None


def _is_leaf(described: Any) -> bool:
    if not isinstance(described, tuple | list) or len(described) != 2:
        return False
    shape = described[0]
    return isinstance(shape, int) or (
        isinstance(shape, tuple | list) and all(isinstance(length, int | np.integer) for length in shape)
    )


def flatten(name: str, structure: Any, value: Any, into: list[Any]) -> None:
    """Append the arrays of a nested value in the structure's order. Raises ValueError where it is built otherwise."""
    if structure is None:
        into.append(value)
        return
    keys, members = structure
    if isinstance(keys, int):
        if not isinstance(value, tuple | list) or len(value) != keys:
            raise ValueError(f"{name} is {type(value).__name__}; it must be a tuple of {keys}")
        keys = tuple(range(keys))
    elif not isinstance(value, Mapping) or set(value) != set(keys):
        raise ValueError(f"{name} must be a dict with the keys {', '.join(map(str, keys))}")
    for key, member in zip(keys, members, strict=True):
        flatten(f"{name}.{key}", member, value[key], into)


def unflatten(structure: Any, values: list[Any]) -> Any:
    """A nested value from arrays, which are taken off the front of the list."""
    if structure is None:
        return values.pop(0)
    keys, members = structure
    built = [unflatten(member, values) for member in members]
    return tuple(built) if isinstance(keys, int) else dict(zip(keys, built, strict=True))

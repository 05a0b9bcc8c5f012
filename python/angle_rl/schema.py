"""What a row of a replay holds: named arrays, flattened from nested spaces, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    _check_rewards(schema.get("rewards"), rewards)
    return Schema(tuple(observations), tuple(actions), rewards[0], observation_structure, action_structure)


def _check_rewards(described: Any, rewards: list[Field]) -> None:
    if len(rewards) != 1 or rewards[0].shape != () or rewards[0].dtype.kind != "f":
        raise ValueError(f"schema['rewards'] is {described!r}; a reward is one floating-point number")


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
    except (TypeError, ValueError):  # ValueError: another byte order
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


def to_json(schema: Schema) -> dict[str, Any]:
    """The schema as JSON-able values, from which :func:`from_json` makes an equal one.

    An array is ``{"shape": [...], "dtype": "<f4"}``, a tuple ``{"tuple": [...]}``, a dict
    ``{"dict": [[key, ...], ...]}`` in its order. Raises ValueError for a dict whose keys are not strings or integers,
    and for names other than make_schema's.
    """
    return {
        "observations": _member_to_json("observations", schema.observation_structure, iter(schema.observations)),
        "actions": _member_to_json("actions", schema.action_structure, iter(schema.actions)),
        "rewards": _member_to_json("rewards", None, iter([schema.rewards])),
    }


def from_json(value: Any) -> Schema:
    """The schema that :func:`to_json` described. Raises ValueError, saying where, for anything else."""
    names = ("observations", "actions", "rewards")
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"the schema must be an object with {', '.join(names)}")
    observations: list[Field] = []
    actions: list[Field] = []
    rewards: list[Field] = []
    observation_structure = _member_from_json("observations", value["observations"], observations)
    action_structure = _member_from_json("actions", value["actions"], actions)
    _member_from_json("rewards", value["rewards"], rewards)
    _check_rewards(value["rewards"], rewards)
    return Schema(tuple(observations), tuple(actions), rewards[0], observation_structure, action_structure)


def _member_to_json(name: str, structure: Any, fields: Iterator[Field]) -> dict[str, Any]:
    if structure is None:
        field = next(fields)
        if field.name != name:
            raise ValueError(f"the schema calls {name} {field.name!r}; make_schema's names are expected")
        return {"shape": list(field.shape), "dtype": field.dtype.str}
    keys, members = structure
    if isinstance(keys, int):
        return {"tuple": [_member_to_json(f"{name}.{i}", member, fields) for i, member in enumerate(members)]}
    for key in keys:
        if not isinstance(key, str) and type(key) is not int:
            raise ValueError(f"{name} is a dict with the key {key!r}; keys are to be strings or integers")
    described = zip(keys, members, strict=True)
    return {"dict": [[key, _member_to_json(f"{name}.{key}", member, fields)] for key, member in described]}


def _member_from_json(name: str, value: Any, into: list[Field]) -> Any:
    """Append the fields of a description and return its structure."""
    if isinstance(value, dict) and set(value) == {"shape", "dtype"}:
        shape, dtype = value["shape"], value["dtype"]
        if isinstance(shape, list) and all(type(length) is int for length in shape) and isinstance(dtype, str):
            try:
                return _describe(name, (tuple(shape), np.dtype(dtype)), into)
            except (TypeError, SyntaxError) as error:
                raise ValueError(f"the schema gives {name} the dtype {dtype!r}, which NumPy does not know") from error
    elif isinstance(value, dict) and set(value) == {"tuple"} and isinstance(value["tuple"], list):
        members = value["tuple"]
        return (len(members), tuple(_member_from_json(f"{name}.{i}", m, into) for i, m in enumerate(members)))
    elif isinstance(value, dict) and set(value) == {"dict"} and isinstance(value["dict"], list):
        items = value["dict"]
        if all(isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int) for item in items):
            keys = tuple(key for key, _ in items)
            return (keys, tuple(_member_from_json(f"{name}.{key}", member, into) for key, member in items))
    raise ValueError(f"the schema describes {name} as {value!r}; it must be an array, a tuple or a dict")

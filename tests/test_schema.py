"""Schemas as JSON and back."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from angle_rl.schema import from_json, make_schema, to_json

DTYPES = ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16"]
ARRAYS = st.tuples(st.lists(st.integers(1, 5), max_size=3).map(tuple), st.sampled_from(DTYPES))
NAMES = st.text(max_size=4)
TREES = st.recursive(
    ARRAYS,
    lambda members: st.one_of(
        st.dictionaries(NAMES, members, min_size=1, max_size=3), st.lists(members, min_size=3, max_size=4).map(tuple)
    ),
    max_leaves=6,
)


@given(TREES, TREES, st.sampled_from(["f2", "f4", "f8"]))
def test_any_schema_comes_back_equal(observations, actions, rewards):
    schema = make_schema({"observations": observations, "actions": actions, "rewards": ((), rewards)})
    text = json.dumps(to_json(schema))
    again = from_json(json.loads(text))
    assert again == schema
    assert type(again.observation_structure) is type(schema.observation_structure)
    assert all(type(f.shape) is tuple and f.dtype == np.dtype(f.dtype.str) for f in again.fields)


def test_dicts_tuples_and_arrays_stay_what_they_are():
    spaces = gym.spaces
    box = spaces.Box(0, 255, (2, 3), np.uint8)
    space = spaces.Dict(a=spaces.Tuple((box, spaces.Dict(x=spaces.Discrete(3)))), b=box)
    schema = make_schema(None, space, spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(4))))
    described = to_json(schema)
    assert described["observations"] == {
        "dict": [
            [
                "a",
                {
                    "tuple": [
                        {"shape": [2, 3], "dtype": "|u1"},
                        {"dict": [["x", {"shape": [], "dtype": "<i8"}]]},
                    ]
                },
            ],
            ["b", {"shape": [2, 3], "dtype": "|u1"}],
        ]
    }
    again = from_json(described)
    assert again == schema
    assert again.observation_structure == (("a", "b"), ((2, (None, (("x",), (None,)))), None))
    assert again.action_structure == (2, (None, None))


def test_keys_are_strings_or_integers():
    leaf = ((2,), "f4")
    schema = make_schema({"observations": {"a": leaf, 3: leaf}, "actions": leaf})
    assert from_json(json.loads(json.dumps(to_json(schema)))) == schema
    for key in (True, None, 2.5, ("a", 1)):
        schema = make_schema({"observations": {"a": leaf, "b": {key: leaf}}, "actions": leaf})
        with pytest.raises(ValueError, match=r"observations\.b is a dict with the key"):
            to_json(schema)


def test_names_that_would_not_come_back_are_refused():
    schema = make_schema({"observations": ((2,), "f4"), "actions": ((2,), "f4")})
    field = schema.observations[0]._replace(name="state")
    with pytest.raises(ValueError, match="calls observations 'state'"):
        to_json(schema._replace(observations=(field,)))


LEAF = {"shape": [2], "dtype": "<f4"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must be an object"),
        ({"observations": LEAF, "actions": LEAF}, "must be an object"),
        ({"observations": LEAF, "actions": 3, "rewards": {"shape": [], "dtype": "<f4"}}, "describes actions as 3"),
        ({"observations": {"shape": 2, "dtype": "<f4"}}, "describes observations as"),
        ({"observations": {"shape": [2.0], "dtype": "<f4"}}, "describes observations as"),
        ({"observations": {"shape": [True], "dtype": "<f4"}}, "describes observations as"),
        ({"observations": {"shape": [0], "dtype": "<f4"}}, "at least 1"),
        ({"observations": {"shape": [2], "dtype": "<q9"}}, "the dtype '<q9'"),
        ({"observations": {"shape": [2], "dtype": "O"}}, "the dtype object"),
        ({"observations": {"shape": [2], "dtype": ">f4"}}, "the dtype >f4"),
        ({"observations": {"tuple": [LEAF, 4]}}, "describes observations.1 as 4"),
        ({"observations": {"dict": [["a"]]}}, "describes observations as"),
        ({"observations": {"dict": [[1.5, LEAF]]}}, "describes observations as"),
        ({"observations": {"dict": [["a", {"list": []}]]}}, "describes observations.a as"),
        ({"rewards": {"tuple": [LEAF]}}, "a reward is one floating-point number"),
        ({"rewards": {"shape": [], "dtype": "<i4"}}, "a reward is one floating-point number"),
    ],
)
def test_descriptions_that_are_none_are_refused(value, message):
    complete = {"observations": LEAF, "actions": LEAF, "rewards": {"shape": [], "dtype": "<f4"}}
    if value is not None and "actions" not in value:
        value = {**complete, **value}
    with pytest.raises(ValueError, match=message):
        from_json(value)

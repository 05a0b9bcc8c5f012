"""What the replay buffers refuse: each error names the argument, and nothing changes."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from replay_rows import SCHEMA, filled, rows

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer

pytestmark = pytest.mark.usefixtures("replay_place")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.5])
def test_bad_priorities_name_the_first_index_and_change_nothing(bad):
    buffer = filled()
    before = buffer._core.weights()
    for dtype in (np.float32, np.float64):
        with pytest.raises(ValueError, match=r"td_errors\[2\] is"):
            buffer.update_priorities(np.arange(4), np.asarray([1, 2, bad, bad], dtype))
    assert (buffer._core.weights() == before).all()
    assert buffer.stats()["updates"] == 0


def test_handles_that_were_never_issued_are_refused():
    buffer = filled()
    for bad in (-1, 100, 2**40):
        with pytest.raises(ValueError, match=r"handles\[1\] is"):
            buffer.update_priorities(np.asarray([0, bad]), np.ones(2))
    with pytest.raises(ValueError, match="shape"):
        buffer.update_priorities(np.arange(3), np.ones(2))
    with pytest.raises(TypeError, match="handles has the dtype"):
        buffer.update_priorities(np.asarray([0.5]), np.ones(1))
    with pytest.raises(TypeError, match="td_errors has the dtype"):
        buffer.update_priorities(np.asarray([0]), np.asarray(["a"]))
    with pytest.raises(ValueError, match="device meta"):
        buffer.update_priorities(torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(1))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, np.zeros((2, 4), np.float32), ValueError, "observations has the shape"),
        (0, np.zeros((2, 3), np.complex64), TypeError, "observations has the dtype complex64"),
        (0, torch.zeros(2, 3, device="meta"), ValueError, "observations is on the device meta"),
        (1, np.zeros((3, 2), np.float32), ValueError, "actions has the shape"),
        (1, np.zeros((2, 2), "U1"), TypeError, "actions has the dtype"),
        (2, np.zeros((2, 1), np.float32), ValueError, "rewards has the shape"),
        (2, np.asarray([0, np.nan], np.float32), ValueError, r"rewards\[1\] is -?nan"),
        (2, np.asarray([np.inf, 0], np.float64), ValueError, r"rewards\[0\] is inf"),
        (2, np.asarray([1e39, 0], np.float64), ValueError, r"rewards\[0\] is inf"),
        (3, np.zeros((2, 2), np.float32), ValueError, "next_observations has the shape"),
        (4, np.zeros(2, np.float32), TypeError, "terminated has the dtype"),
        (4, np.zeros(3, bool), ValueError, "terminated has the shape"),
        (5, np.zeros(3, bool), ValueError, "truncated has the shape"),
        (6, np.zeros(3, np.int64), ValueError, "streams has the shape"),
        (6, np.zeros(2), TypeError, "streams has the dtype"),
    ],
)
def test_a_bad_argument_is_named_and_nothing_is_inserted(position, value, error, message):
    buffer = filled()
    arguments = [*rows([1, 2]), np.zeros(2, bool), np.zeros(2, np.int64)]
    arguments[position] = value
    with pytest.raises(error, match=message):
        buffer.insert(*arguments)
    assert len(buffer) == 100
    assert buffer.stats()["inserts"] == 100


def test_more_rows_than_capacity_are_refused():
    buffer = ReplayBuffer(4, SCHEMA)
    with pytest.raises(ValueError, match="5 rows; the buffer's capacity is 4"):
        buffer.insert(*rows(np.arange(5)))
    assert len(buffer) == 0


def test_nan_observations_are_stored_and_counted():
    buffer = ReplayBuffer(8, SCHEMA)
    observations, actions, rewards, successors, ended = rows([0, 1, 2])
    observations[1, 2] = np.nan
    successors[1, 0] = np.nan
    successors[2, 1] = np.nan
    buffer.insert(observations, actions, rewards, successors, ended)
    assert len(buffer) == 3
    assert buffer.stats()["nan_observations"] == 2


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
def test_an_empty_buffer_says_so(kind):
    with pytest.raises(ValueError, match="empty"):
        kind(4, SCHEMA).sample(2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"batch_size": 0}, ValueError),
        ({"batch_size": -3}, ValueError),
        ({"batch_size": 2.0}, TypeError),
        ({"batch_size": True}, TypeError),
        ({"batch_size": 4, "discount": 1.5}, ValueError),
        ({"batch_size": 4, "discount": float("nan")}, ValueError),
        ({"batch_size": 4, "importance_exponent": -1.0}, ValueError),
        ({"batch_size": 4, "importance_exponent": float("inf")}, ValueError),
    ],
)
def test_bad_sample_arguments_are_named(arguments, error):
    with pytest.raises(error, match=list(arguments)[-1]):
        filled().sample(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity is 0"),
        ({"capacity": -1}, ValueError, "capacity is -1"),
        ({"capacity": 1.5}, TypeError, "capacity is 1.5"),
        ({"capacity": 10**12}, MemoryError, "capacity is 1000000000000"),
        ({"capacity": 2**62}, MemoryError, "capacity is"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"discount": 2}, ValueError, "discount is 2"),
        ({"priority_exponent": -0.1}, ValueError, "priority_exponent is -0.1"),
        ({"priority_epsilon": float("nan")}, ValueError, "priority_epsilon is nan"),
        ({"importance_exponent": "a"}, TypeError, "importance_exponent is 'a'"),
        ({"schema": None}, ValueError, "schema is None"),
        ({"schema": {"observations": ((3,), "f4")}}, ValueError, "lacks the field 'actions'"),
        ({"schema": {**SCHEMA, "extra": ((1,), "f4")}}, ValueError, "field 'extra'"),
        ({"schema": {**SCHEMA, "rewards": ((2,), "f4")}}, ValueError, "one floating-point number"),
        ({"schema": {**SCHEMA, "observations": ((0,), "f4")}}, ValueError, "at least 1"),
        ({"schema": {**SCHEMA, "observations": ((3,), "U3")}}, ValueError, "dtype"),
        ({"schema": {**SCHEMA, "next_observations": ((4,), "f4")}}, ValueError, "differs"),
        ({"observation_space": gym.spaces.Discrete(2)}, ValueError, "left out"),
        ({"schema": {**SCHEMA, "observations": gym.spaces.Text(4)}}, ValueError, "Text"),
    ],
)
def test_bad_construction_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        PrioritizedReplayBuffer(**{"capacity": 8, "schema": SCHEMA, **arguments})


def test_a_uniform_buffer_has_no_priorities_to_update():
    assert not hasattr(ReplayBuffer(4, SCHEMA), "update_priorities")

"""What the newer options refuse: each error names the argument, its value and the limit, and nothing changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from replay_rows import SCHEMA, filled, rows

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer

FLAG = r"is {}; it must be True or False"
IMAGES = {"observations": ((4, 6, 5), "u1"), "actions": ((), "i4")}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_step": 0}, ValueError, "n_step is 0; it must be between 1 and 1048576"),
        ({"n_step": 2**20 + 1}, ValueError, "n_step is 1048577; it must be between 1 and 1048576"),
        ({"n_step": 2.0}, TypeError, "n_step is 2.0; it must be an integer"),
        ({"n_step": True}, TypeError, "n_step is True; it must be an integer"),
        ({"n_step": 2, "schema": {**SCHEMA, "rewards": ((), "f2")}}, ValueError, "n_step is above 1; .*float16"),
        ({"discount": 1.01}, ValueError, "discount is 1.01; .*at most 1.0"),
        ({"discount": "a"}, TypeError, "discount is 'a'; it must be a number"),
        ({"stratified": "no"}, TypeError, "stratified " + FLAG.format("'no'")),
        ({"stratified": None}, TypeError, "stratified " + FLAG.format("None")),
        ({"replacement": 1}, TypeError, "replacement " + FLAG.format("1")),
        ({"share_successors": "yes"}, TypeError, "share_successors " + FLAG.format("'yes'")),
        ({"share_successors": True, "capacity": 1}, ValueError, "capacity is 1; with shared successors .* 2"),
        ({"frame_stack": 0}, ValueError, "frame_stack is 0; it must be between 1 and 64"),
        ({"frame_stack": 65}, ValueError, "frame_stack is 65; it must be between 1 and 64"),
        ({"frame_stack": "4"}, TypeError, "frame_stack is '4'; it must be an integer"),
        ({"frame_stack": 2.0}, TypeError, "frame_stack is 2.0; it must be an integer"),
        ({"frame_stack": 4}, ValueError, r"frame_stack is 4; no observation has the shape \(4, height, width\)"),
        ({"frame_stack": 3, "schema": IMAGES}, ValueError, r"frame_stack is 3; no observation has the shape"),
        (
            {"frame_stack": 4, "schema": IMAGES, "share_successors": False},
            ValueError,
            "frame_stack is 4 and share_succ",
        ),
        ({"default_priority": "mean"}, ValueError, "default_priority is 'mean'; it must be 'live_maximum'"),
        ({"default_priority": -1.0}, ValueError, "default_priority is -1.0; .*at least 0"),
        ({"default_priority": np.inf}, ValueError, "default_priority is inf; it must be finite"),
        ({"default_priority": np.nan}, ValueError, "default_priority is nan; it must be finite"),
        ({"default_priority": None}, TypeError, "default_priority is None; it must be a number"),
        ({"importance_bound": "row"}, ValueError, "importance_bound is 'row'; it must be 'batch' or 'buffer'"),
        ({"importance_exponent": -0.5}, ValueError, "importance_exponent is -0.5; .*at least 0"),
        ({"device": "disk"}, ValueError, "device is 'disk'; it must be a torch device"),
    ],
)
def test_a_bad_option_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        PrioritizedReplayBuffer(**{"capacity": 8, "schema": SCHEMA, **arguments})


@pytest.mark.parametrize("name", ["default_priority", "importance_bound", "priority_exponent", "importance_exponent"])
def test_a_uniform_buffer_takes_no_priority_options(name):
    with pytest.raises(TypeError, match=name):
        ReplayBuffer(8, SCHEMA, **{name: 0.5})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("n_step", 0, ValueError),
        ("n_step", 1.5, TypeError),
        ("discount", 2.0, ValueError),
        ("discount", None, TypeError),
        ("stratified", "no", TypeError),
        ("replacement", 0, TypeError),
        ("priority_exponent", -0.1, ValueError),
        ("priority_exponent", np.nan, ValueError),
        ("priority_exponent", "a", TypeError),
        ("importance_exponent", -1, ValueError),
        ("importance_exponent", "a", TypeError),
    ],
)
def test_an_attribute_that_does_not_fit_is_refused_and_stays(name, value, error):
    buffer, twin = filled(), filled()
    weights = buffer._core.weights()
    with pytest.raises(error, match=f"{name} is "):
        setattr(buffer, name, value)
    assert getattr(buffer, name) == getattr(twin, name)
    assert (buffer._core.weights() == weights).all()
    assert torch.equal(buffer.sample(16).handles, twin.sample(16).handles)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_step": 0}, ValueError, "n_step is 0; it must be between 1 and 1048576"),
        ({"n_step": 1.0}, TypeError, "n_step is 1.0; it must be an integer"),
        ({"discount": -0.1}, ValueError, "discount is -0.1; .*at most 1.0"),
        ({"stratified": "no"}, TypeError, "stratified " + FLAG.format("'no'")),
        ({"replacement": "no"}, TypeError, "replacement " + FLAG.format("'no'")),
        ({"replacement": False}, ValueError, "batch_size is 120, but only 100 rows have positive weight"),
        ({"device": "disk"}, ValueError, "device is 'disk'; it must be a torch device"),
    ],
)
def test_a_bad_sample_argument_is_named_and_nothing_is_drawn(arguments, error, message):
    buffer, twin = filled(), filled()
    with pytest.raises(error, match=message):
        buffer.sample(120, **arguments)
    assert buffer.stats() == twin.stats()
    assert torch.equal(buffer.sample(16).handles, twin.sample(16).handles)


def test_a_schedule_that_gives_no_weight_is_refused():
    for value in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"importance_exponent is {value}"):
            filled(importance_exponent=lambda inserts, value=value: value).sample(4)


def test_rewards_of_two_bytes_are_drawn_one_step_at_a_time():
    buffer = ReplayBuffer(8, {**SCHEMA, "rewards": ((), "f2")})
    buffer.insert(*rows([1, 2]))
    assert set(buffer.sample(20).rewards.tolist()) == {1.0, 2.0}
    with pytest.raises(ValueError, match=r"n_step is above 1; rewards of float16 are not summed"):
        buffer.sample(2, n_step=2)


@pytest.mark.parametrize(
    ("priorities", "error", "message"),
    [
        (np.asarray([1.0, np.nan]), ValueError, r"priorities\[1\] is -?nan; priorities must be finite"),
        (np.asarray([np.inf, 1.0]), ValueError, r"priorities\[0\] is inf"),
        (np.asarray([1.0, -0.5], np.float32), ValueError, r"priorities\[1\] is -0.5"),
        ([1.0, -1e-60], ValueError, r"priorities\[1\] is -"),
        (np.ones(3), ValueError, r"priorities has the shape \(3,\); expected \(2,\)"),
        (1.0, ValueError, r"priorities has the shape \(\); expected \(2,\)"),
        (["a", "b"], TypeError, "priorities has the dtype"),
        (np.ones(2, complex), TypeError, "priorities has the dtype complex128"),
        (torch.ones(2, device="meta"), ValueError, "priorities is on the device meta"),
    ],
)
def test_bad_given_priorities_are_named_and_nothing_is_inserted(priorities, error, message):
    buffer, twin = filled(), filled()
    with pytest.raises(error, match=message):
        buffer.insert(*rows([1, 2]), priorities=priorities)
    assert buffer.stats() == twin.stats()
    assert (buffer._core.weights() == twin._core.weights()).all()
    assert buffer.insert(*rows([1])).tolist() == [100]


def test_a_uniform_buffer_takes_no_priorities():
    buffer = ReplayBuffer(8, SCHEMA)
    with pytest.raises(ValueError, match="priorities is given; a uniform buffer has none"):
        buffer.insert(*rows([1, 2]), priorities=np.ones(2))
    assert len(buffer) == 0


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
@pytest.mark.parametrize(
    ("handles", "error", "message"),
    [
        ([3, 100], ValueError, r"handles\[1\] is 100, which was never issued; handles so far lie in \[0, 100\)"),
        ([-1], ValueError, r"handles\[0\] is -1"),
        ([0.5], TypeError, "handles has the dtype"),
        (["a"], TypeError, "handles has the dtype"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"handles has the shape \(2, 2\); it must be \(n,\)"),
        (np.zeros((2, 2), np.int64), ValueError, r"handles has the shape \(2, 2\)"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "handles is on the device meta"),
    ],
)
def test_bad_handles_are_named_and_nothing_is_removed(kind, handles, error, message):
    buffer = kind(128, SCHEMA)
    buffer.insert(*rows(np.arange(100)))
    with pytest.raises(error, match=message):
        buffer.remove(handles)
    assert buffer.stats()["removed"] == 0
    assert buffer.stats()["refused_updates"] == 0
    assert len(buffer.sample(100, replacement=False).handles) == 100


def test_options_may_be_numbers_of_numpy(tmp_path):
    buffer = PrioritizedReplayBuffer(
        np.int64(8),
        SCHEMA,
        seed=np.uint64(3),
        n_step=np.int32(2),
        discount=np.float32(0.5),
        stratified=np.bool_(False),
        priority_exponent=np.float32(0.5),
        importance_exponent=np.float64(0.25),
        default_priority=np.float32(2.0),
        frame_stack=np.int8(1),
    )
    buffer.insert(*rows([1, 2]))
    assert buffer.sample(4).discounts.max() == 0.5
    assert PrioritizedReplayBuffer.load(buffer.save(tmp_path / "replay")).discount == 0.5

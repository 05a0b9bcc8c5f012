"""Feeds from functions: every signature, where episodes begin and end, and what is refused."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from angle_rl.feed import FunctionFeed, make_evaluation_feed, make_feed
from angle_rl.types import RandomKey


def drift(observation, action):
    return observation + action, float(action[0])


def test_a_function_of_two_arguments_never_ends_by_itself():
    feed = make_feed(drift, initial_observation=np.zeros(2, np.float32), initial_action=np.zeros(2, np.float32))
    assert feed.name == "drift"
    assert feed.observation_space.dtype == np.float32
    assert feed.action_space == spaces.Box(-1, 1, (2,), np.float32)
    state, key = feed.init(RandomKey(0))
    for step in range(1, 20):
        before = state
        state, key = feed.step(key, state, np.full((1, 2), 0.5))
        assert state.observation.tolist() == [[0.5 * step, 0.5 * step]]
        assert before.observation.tolist() == [[0.5 * (step - 1)] * 2]
        assert state.reward.tolist() == [0.5]
        assert state.stepped.all()
        assert not (state.terminated | state.truncated).any()


@pytest.mark.parametrize("outputs", [2, 3, 4])
@pytest.mark.parametrize("takes_time", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_every_signature_of_a_function(outputs, takes_time, batched, n):
    seen = []

    def advance(observation, action, *time):
        seen.append(time)
        observation += 1  # in place: it must have been given a copy
        count = observation[..., 0]
        return (observation, count * 10, count == 4, count == 3)[:outputs]

    def two(observation, action):
        return advance(observation, action)

    def three(observation, action, time_step):
        return advance(observation, action, time_step)

    feed = make_feed(
        three if takes_time else two,
        num_environments=n,
        batched=batched,
        initial_observation=[0.0, 0.0],
        initial_action=0.0,
        step_limit=4,
    )
    state, key = feed.init(RandomKey(0))
    count = 0
    for _ in range(10):
        before, key = state, key
        assert before.observation[:, 0].tolist() == [count] * n
        seen.clear()
        state, key = feed.step(key, before, np.zeros(n))
        assert before.observation[:, 0].tolist() == [count] * n
        if takes_time and batched:
            assert seen[0][0].tolist() == [count] * n
        elif takes_time:
            assert seen == [(count,)] * n
        else:
            assert seen == [()] * (1 if batched else n)
        count += 1
        assert state.final_observation[:, 0].tolist() == [count] * n
        assert state.reward.tolist() == [count * 10] * n
        assert state.terminated.tolist() == [outputs >= 3 and count == 4] * n
        truncated = count == 4 or (outputs == 4 and count == 3)
        assert state.truncated.tolist() == [truncated] * n
        if truncated:
            count = 0


def test_a_third_argument_with_a_default_is_a_time_step_and_star_arguments_are_not():
    def default(observation, action, time_step=-1):
        return observation, float(time_step)

    def star(observation, action, *rest):
        return observation, float(len(rest))

    for function, expected in ((default, [0.0, 1.0]), (star, [0.0, 0.0])):
        feed = make_feed(function, initial_observation=[0.0], initial_action=[0.0])
        state, key = feed.init(RandomKey(0))
        rewards = []
        for _ in range(2):
            state, key = feed.step(key, state, np.zeros((1, 1)))
            rewards.append(state.reward[0])
        assert rewards == expected


def test_initial_observations_from_a_value_a_function_and_a_key():
    counter = iter(range(100))

    def by_key(key):
        return key.uniform(2).numpy()

    def make(initial, n=2):
        return FunctionFeed(
            lambda o, a: (o, 0.0, True),
            initial_observation=initial,
            observation_space=spaces.Box(-np.inf, np.inf, (2,), np.float64),
            action_space=spaces.Discrete(3),
            num_environments=n,
        )

    state, _ = make(np.array([1.0, 2.0])).init(RandomKey(0))
    assert state.observation.tolist() == [[1.0, 2.0], [1.0, 2.0]]
    state, _ = make(lambda: np.full(2, float(next(counter)))).init(RandomKey(0))
    assert state.observation.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    feed = make(by_key)
    state, key = feed.init(RandomKey(4))
    assert not np.array_equal(state.observation[0], state.observation[1])
    after, later = feed.step(key, state, np.zeros(2, np.int64))
    assert later != key
    assert np.array_equal(after.final_observation, state.observation)
    assert not np.isin(after.observation, state.observation).any()
    again, _ = feed.init(RandomKey(4))
    assert np.array_equal(again.observation, state.observation)


def test_functions_of_nested_observations_and_of_tensors():
    def function(observation, action):
        position = torch.as_tensor(observation["position"]) + torch.as_tensor(action)
        return (
            {"position": position, "count": (observation["count"][0] + 1,)},
            position.sum(),
            torch.tensor(False),
        )

    feed = make_feed(
        function,
        initial_observation={"position": torch.zeros(2), "count": (np.int64(0),)},
        initial_action=torch.zeros(2),
        num_environments=2,
    )
    state, key = feed.init(RandomKey(0))
    for _ in range(3):
        state, key = feed.step(key, state, np.array([[1.0, 0.0], [0.5, 0.5]], np.float32))
    assert state.observation["position"].tolist() == [[3.0, 0.0], [1.5, 1.5]]
    assert state.observation["count"][0].tolist() == [3, 3]
    assert state.observation["count"][0].dtype == np.int64
    assert make_evaluation_feed(feed).num_environments == 1


REFUSALS = [
    ({"initial_observation": None}, TypeError, "initial_observation"),
    ({"initial_action": None}, TypeError, "action_space and initial_action"),
    ({"initial_action": 3}, TypeError, "need an action_space"),
    ({"step_limit": 0}, ValueError, "step_limit is 0"),
    ({"num_environments": 0}, ValueError, "num_environments is 0"),
    ({"initial_observation": "north"}, TypeError, "initial_observation"),
    ({"action_space": spaces.Text(3)}, TypeError, "action_space"),
    ({"action_space": spaces.Box(-1, 1, (1,)), "initial_action": [2.0]}, ValueError, "not in"),
    ({"action_space": spaces.Box(-1, 1, (2,)), "initial_action": [0.0]}, ValueError, "shape"),
    ({"observation_space": spaces.Box(-1, 1, (2,))}, ValueError, "shape"),
    ({"observation_space": spaces.Sequence(spaces.Discrete(2))}, TypeError, "observation_space"),
]


@pytest.mark.parametrize(("change", "error", "match"), REFUSALS)
def test_functions_refuse_bad_arguments(change, error, match):
    options = {"initial_observation": [0.0], "initial_action": [0.0], **change}
    with pytest.raises(error, match=match):
        make_feed(lambda o, a: (o, 0.0), **options)


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (np.zeros(1), "ndarray"),
        ((np.zeros(1),), "1 values"),
        ((np.zeros(1), 0.0, False, False, {}), "5 values"),
        ((np.zeros(2), 0.0), "shape"),
        ((np.zeros(1), [0.0, 1.0]), "reward"),
        ((np.array([1j]), 0.0), "dtype"),
    ],
)
def test_functions_that_return_nonsense(result, match):
    feed = make_feed(lambda o, a: result, initial_observation=[0.0], initial_action=[0.0])
    state, key = feed.init(RandomKey(0))
    with pytest.raises((TypeError, ValueError), match=match):
        feed.step(key, state, np.zeros((1, 1)))

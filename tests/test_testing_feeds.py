"""The checks of feeds: all of ours pass, and each fault is found."""

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from angle_rl.feed import DatasetFeed, FunctionFeed, HistoryFeed, NormalizedFeed, make_feed
from angle_rl.testing import check_feed

BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)


def walk_feed():
    return FunctionFeed(
        lambda o, a: (o + a, 1.0),
        initial_observation=lambda key: key.uniform(1).numpy().astype(np.float32),
        action_space=BOX,
        step_limit=7,
        num_environments=3,
    )


@pytest.mark.parametrize(
    "make",
    [
        walk_feed,
        lambda: HistoryFeed(walk_feed(), 3),
        lambda: NormalizedFeed(walk_feed(), frozen=True),
        lambda: make_feed("CartPole-v1", num_environments=2),
        lambda: make_feed("FrozenLake-v1", num_environments=2, vectorization="sync"),
        *(lambda mode=mode: make_feed(SyncVectorEnv([CartPoleEnv] * 2, autoreset_mode=mode)) for mode in AutoresetMode),
    ],
)
def test_our_feeds_pass(make):
    check_feed(make(), steps=60)


def test_a_data_set_passes_with_its_own_actions():
    rows = np.arange(20, dtype=np.float32)[:, None]
    data = {"observations": rows, "actions": rows / 20, "rewards": rows[:, 0], "next_observations": rows + 1}
    feed = DatasetFeed(data | {"terminated": rows[:, 0] % 6 == 5}, action_space=BOX, num_environments=3)
    check_feed(feed, steps=50, actions=lambda: feed.recorded_actions)


class Faulty:
    """A good feed but for one thing."""

    def __init__(self, fault):
        self.feed, self.fault, self.time = walk_feed(), fault, 0
        self.observation_space, self.action_space = self.feed.observation_space, self.feed.action_space
        self.num_environments, self.name = 3, "faulty"
        self.buffer = np.zeros((3, 1), np.float32)

    def init(self, key):
        state, key = self.feed.init(key)
        if self.fault == "start":
            state = state._replace(stepped=np.ones(3, bool))
        return state, key

    def reset(self, key, state):
        return self.init(key)

    def step(self, key, state, actions):
        self.time += 1
        if self.fault == "count":
            actions = actions[:3]
        after, key = self.feed.step(key, state, actions)
        if self.fault == "dtype":
            after = after._replace(reward=after.reward.astype(np.float32))
        if self.fault == "shape":
            after = after._replace(observation=after.observation[:, 0])
        if self.fault == "reused":
            self.buffer[:] = after.observation
            after = after._replace(observation=self.buffer, final_observation=self.buffer)
        if self.fault == "random":
            after = after._replace(reward=after.reward + self.time)
        if self.fault == "skips":
            after = after._replace(stepped=np.zeros(3, bool), reward=np.zeros(3))
        if self.fault == "idle reward":
            after = after._replace(stepped=np.zeros(3, bool))
        if self.fault == "frozen":
            after = after._replace(observation=state.observation)
        return after, key

    def close(self):
        pass


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("start", "stepped is set after init"),
        ("count", "step took 4 actions for 3 environments"),
        ("dtype", "reward in step 0 is float32; float64 is due"),
        ("shape", r"observation in step 0 has shape \[3\]; \[3, 1\] is due"),
        ("reused", "was written to after it was handed out"),
        ("random", "reward after 1 steps differs though key and actions are the same"),
        ("skips", "a row did not step in step 1 though its episode had not ended|flags"),
        ("idle reward", "a row that did not step has a reward in step 0"),
        ("frozen", "is not where the step led"),
    ],
)
def test_faults_are_found(fault, message):
    check_feed(Faulty(None), steps=5)
    with pytest.raises(AssertionError, match=message):
        check_feed(Faulty(fault), steps=20)


def test_a_feed_without_a_method_is_none():
    with pytest.raises(AssertionError, match="has no observation_space"):
        check_feed(object())

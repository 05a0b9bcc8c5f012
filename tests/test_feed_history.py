"""Histories of observations against stacks made by hand, at every kind of boundary between episodes."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from angle_rl.feed import HistoryFeed, make_evaluation_feed, make_feed
from angle_rl.replay import ReplayBuffer
from angle_rl.spaces import map_space
from angle_rl.types import RandomKey


class Told(gymnasium.Env):
    """Shows 100 * episode + time, in a given space; episode e lasts 2 + (e + offset) % 3 steps."""

    def __init__(self, space=None, offset=0):
        self.observation_space = spaces.Box(0, 1e6, (2,), np.float32) if space is None else space
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.offset, self.episode = offset, -1

    def show(self):
        value = 10 * self.episode + self.time

        def fill(leaf):
            if isinstance(leaf, spaces.Discrete):
                return np.int64(leaf.start + value % leaf.n)
            return np.full(leaf.shape, value % 2 if isinstance(leaf, spaces.MultiBinary) else value, leaf.dtype)

        return map_space(fill, self.observation_space)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.time = 0
        return self.show(), {}

    def step(self, action):
        self.time += 1
        last = self.time == 2 + (self.episode + self.offset) % 3
        even = self.episode % 2 == 0
        return self.show(), float(self.time), last and even, last and not even, {}


NESTED = spaces.Dict(
    {
        "image": spaces.Box(0, 255, (2, 3), np.uint8),
        "rest": spaces.Tuple([spaces.Discrete(5, start=2), spaces.MultiBinary(2), spaces.MultiDiscrete([300, 300])]),
    }
)


def leaves(tree):
    if isinstance(tree, dict):
        return [x for part in tree.values() for x in leaves(part)]
    if isinstance(tree, tuple):
        return [x for part in tree for x in leaves(part)]
    return [tree]


def feeds(kind, space, n):
    """Two feeds that show the same: one to wrap, one to look at."""
    environments = [lambda i=i: Told(space, i) for i in range(n)]
    if kind == "single":
        from angle_rl.feed import GymnasiumFeed

        return [GymnasiumFeed([make() for make in environments]) for _ in range(2)]
    return [make_feed(SyncVectorEnv(environments, autoreset_mode=kind)) for _ in range(2)]


@pytest.mark.parametrize("space", [None, NESTED])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", ["single", *AutoresetMode])
def test_stacks_match_those_made_by_hand(kind, k, space):
    n = 3
    inner, plain = feeds(kind, space, n)
    feed = HistoryFeed(inner, k)
    state, key = feed.init(RandomKey(1))
    seen, plain_key = plain.init(RandomKey(1))
    episodes = [[[leaf[i] for leaf in leaves(seen.observation)]] for i in range(n)]  # what each row saw so far

    def by_hand(row):
        padded = [row[0]] * k + row
        return [np.stack(parts) for parts in zip(*padded[-k:], strict=True)]

    ends = resets = 0
    for _ in range(25):
        actions = np.zeros((n, 1), np.float32)
        state, key = feed.step(key, state, actions)
        seen, plain_key = plain.step(plain_key, seen, actions)
        for name in ("reward", "terminated", "truncated", "stepped"):
            assert np.array_equal(getattr(state, name), getattr(seen, name))
        for i in range(n):
            shown, final = ([leaf[i] for leaf in leaves(part)] for part in (state.observation, state.final_observation))
            new, true = ([leaf[i] for leaf in leaves(part)] for part in (seen.observation, seen.final_observation))
            if not seen.stepped[i]:
                resets += 1
                episodes[i] = [new]
                assert all(np.array_equal(a, b) for a, b in zip(final, by_hand([new]), strict=True))
            else:
                episodes[i].append(true)
                expected = by_hand(episodes[i])
                assert all(np.array_equal(a, b) for a, b in zip(final, expected, strict=True))
                assert all(a.dtype == b.dtype for a, b in zip(final, expected, strict=True))
                if seen.terminated[i] or seen.truncated[i]:
                    ends += 1
                    episodes[i] = [new]
            assert all(np.array_equal(a, b) for a, b in zip(shown, by_hand(episodes[i]), strict=True))
            assert feed.observation_space.contains(_row(state.observation, i))
    assert ends >= 15
    assert (resets > 0) == (kind is AutoresetMode.NEXT_STEP)


def _row(tree, i):
    if isinstance(tree, dict):
        return {name: _row(part, i) for name, part in tree.items()}
    return tuple(_row(part, i) for part in tree) if isinstance(tree, tuple) else tree[i]


def test_the_oldest_stands_first():
    feed = HistoryFeed(make_feed(lambda: Told(offset=2)), 3)
    state, key = feed.init(RandomKey(0))
    assert state.observation[0, :, 0].tolist() == [0, 0, 0]
    shown = []
    for _ in range(5):
        state, key = feed.step(key, state, np.zeros((1, 1), np.float32))
        shown.append((state.observation[0, :, 0].tolist(), state.final_observation[0, :, 0].tolist()))
    assert shown == [
        ([0, 0, 1], [0, 0, 1]),
        ([0, 1, 2], [0, 1, 2]),
        ([1, 2, 3], [1, 2, 3]),
        ([10, 10, 10], [2, 3, 4]),
        ([10, 10, 11], [10, 10, 11]),
    ]


def test_nothing_handed_out_is_overwritten():
    feed = HistoryFeed(make_feed(lambda: Told(), num_environments=2), 2)
    state, key = feed.init(RandomKey(0))
    kept = []
    for _ in range(8):
        kept.append((state.observation, state.observation.copy(), state.final_observation.copy(), state))
        state, key = feed.step(key, state, np.zeros((2, 1), np.float32))
    for observation, copied, final, state in kept:
        assert np.array_equal(observation, copied)
        assert np.array_equal(state.final_observation, final)


def test_a_reset_in_mid_episode_begins_a_new_history():
    feed = HistoryFeed(make_feed(lambda: Told(offset=2), num_environments=2), 3)
    state, key = feed.init(RandomKey(0))
    state, key = feed.step(key, state, np.zeros((2, 1), np.float32))
    state, key = feed.reset(key, state)
    assert state.observation[:, :, 0].tolist() == [[10] * 3] * 2
    assert not state.stepped.any()
    state, key = feed.step(key, state, np.zeros((2, 1), np.float32))
    assert state.observation[0, :, 0].tolist() == [10, 10, 11]


def test_a_function_sees_single_observations():
    def move(observation, action):
        assert observation.shape == (2,)
        return observation + 1.0, 0.0

    feed = HistoryFeed(make_feed(move, initial_observation=[0.0, 5.0], initial_action=[0.0]), 2)
    state, key = feed.init(RandomKey(0))
    for _ in range(3):
        state, key = feed.step(key, state, np.zeros((1, 1)))
    assert state.observation[0].tolist() == [[2.0, 7.0], [3.0, 8.0]]


def test_a_replay_keeps_each_frame_of_the_stacks_once_and_gives_them_back():
    image = spaces.Box(0, 255, (6, 7), np.uint8)
    feed = HistoryFeed(make_feed(lambda: Told(image)), 3)
    assert feed.observation_space == spaces.Box(0, 255, (3, 6, 7), np.uint8)
    replay = ReplayBuffer(64, observation_space=feed.observation_space, action_space=feed.action_space, frame_stack=3)
    state, key = feed.init(RandomKey(0))
    rows = []
    for i in range(20):
        before = state
        actions = np.full((1, 1), i / 20, np.float32)
        state, key = feed.step(key, before, actions)
        replay.insert(
            before.observation, actions, state.reward, state.final_observation, state.terminated, state.truncated
        )
        rows.append((before.observation[0], state.final_observation[0]))
    batch = replay.sample(200)
    drawn = set()
    for action, observation, successor in zip(
        batch.actions[:, 0], batch.observations, batch.next_observations, strict=True
    ):
        index = round(float(action) * 20)
        drawn.add(index)
        assert np.array_equal(observation, rows[index][0])
        assert np.array_equal(successor, rows[index][1])
    assert len(drawn) >= 15


def test_evaluation_feeds_have_the_same_history():
    feed = HistoryFeed(make_feed(Told, num_environments=2), 3)
    evaluation = make_evaluation_feed(feed)
    assert evaluation.num_environments == 1
    assert evaluation.observation_space == feed.observation_space
    state, _ = evaluation.init(RandomKey(0))
    assert state.observation.shape == (1, 3, 2)
    other = feed.around(make_feed(Told()))
    assert other.observation_space == feed.observation_space

    class Stuck(Told):
        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

    assert make_evaluation_feed(HistoryFeed(make_feed(Stuck()), 2)) is None


def test_refusals():
    feed = make_feed(Told)
    with pytest.raises(ValueError, match="k is 0"):
        HistoryFeed(feed, 0)
    for k in (2.0, True, None):
        with pytest.raises(TypeError, match=f"k is {k!r}"):
            HistoryFeed(feed, k)
    history = HistoryFeed(feed, 2)
    state, key = feed.init(RandomKey(0))
    with pytest.raises(ValueError, match=r"has shape \[1, 2\]; it must be \[1, 2, 2\]"):
        history.step(key, state, np.zeros((1, 1), np.float32))

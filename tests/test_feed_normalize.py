"""Normalised feeds against statistics taken over all rows at once."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from angle_rl.feed import (
    HistoryFeed,
    NormalizedFeed,
    RunningStatistics,
    export_feed_state,
    import_feed_state,
    make_evaluation_feed,
    make_feed,
    unscaled_reward,
    wrap_feed,
)
from angle_rl.types import RandomKey


class Drifting(gymnasium.Env):
    """Observations far from 0 and of unequal scale; episodes of unequal length; rewards with a mean."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def show(self):
        return np.array([1000.0, -5.0, 0.0]) + np.array([0.01, 100.0, 1.0]) * self.np_random.normal(size=3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 6))
        return self.show(), {}

    def step(self, action):
        self.left -= 1
        ended = self.left == 0
        return self.show(), 3.0 + float(self.np_random.normal()), ended and bool(self.np_random.integers(2)), ended, {}


def drifting(kind, n=3):
    if kind == "single":
        return make_feed(Drifting, num_environments=n)
    return make_feed(SyncVectorEnv([Drifting] * n, autoreset_mode=kind))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2), min_size=2, max_size=30),
    st.lists(st.integers(0, 30), max_size=5),
)
def test_statistics_in_pieces_are_those_of_the_whole(rows, cuts):
    rows = np.array(rows)
    statistics = RunningStatistics((2,))
    for part in np.split(rows, sorted(min(cut, len(rows)) for cut in cuts)):
        statistics.count_rows(part)
    assert statistics.count == len(rows)
    assert np.allclose(statistics.mean, rows.mean(axis=0), rtol=1e-9, atol=1e-6)
    assert np.allclose(statistics.variance, rows.var(axis=0), rtol=1e-9, atol=1e-6)


def test_statistics_far_from_zero_keep_their_digits():
    rows = np.random.default_rng(0).normal(1e8, 1e-2, (4000, 1))
    statistics = RunningStatistics((1,))
    for row in rows:
        statistics.count_rows(row[None])
    assert abs(statistics.variance[0] / rows.var() - 1) < 1e-6


def test_rows_that_are_not_finite_are_not_counted():
    statistics = RunningStatistics((2,))
    statistics.count_rows(np.array([[1.0, 2.0], [np.nan, 0.0], [0.0, np.inf], [3.0, 4.0]]))
    assert statistics.count == 2
    assert statistics.mean.tolist() == [2.0, 3.0]
    statistics.count_rows(np.zeros((0, 2)))
    assert statistics.count == 2


@pytest.mark.parametrize("kind", ["single", *AutoresetMode])
def test_observations_and_rewards_against_all_rows_at_once(kind):
    n, discount = 3, 0.9
    feed = NormalizedFeed(drifting(kind, n), discount=discount, observation_clip=None, reward_clip=None)
    plain = drifting(kind, n)
    state, key = feed.init(RandomKey(2))
    seen, plain_key = plain.init(RandomKey(2))
    assert np.allclose(state.observation, seen.observation)  # nothing counted yet
    acted_in, returns, running = [], [], np.zeros(n)
    resets = 0
    for _ in range(60):
        before = seen
        actions = np.zeros((n, 1), np.float32)
        state, key = feed.step(key, state, actions)
        seen, plain_key = plain.step(plain_key, seen, actions)
        resets += int((~seen.stepped).sum())
        acted_in.extend(before.observation[seen.stepped])
        running = np.where(seen.stepped, discount * running + seen.reward, 0.0)
        returns.extend(running[seen.stepped])
        running[seen.terminated | seen.truncated] = 0.0
        if len(acted_in) < 2:
            continue
        mean, deviation = np.mean(acted_in, axis=0), np.sqrt(np.var(acted_in, axis=0) + 1e-8)
        assert state.observation.dtype == state.final_observation.dtype == np.float32
        assert np.allclose(state.observation, (seen.observation - mean) / deviation, rtol=1e-4, atol=1e-4)
        assert np.allclose(state.final_observation, (seen.final_observation - mean) / deviation, rtol=1e-4, atol=1e-4)
        assert state.reward.dtype == np.float64
        assert np.allclose(state.reward, seen.reward / np.sqrt(np.var(returns) + 1e-8))
        assert np.array_equal(unscaled_reward(feed, state.reward), seen.reward)
        assert np.array_equal(state.stepped, seen.stepped)
    assert feed.statistics["observations"].count == feed.statistics["rewards"].count == len(acted_in)
    assert (resets > 0) == (kind is AutoresetMode.NEXT_STEP)
    assert len(acted_in) + resets == 60 * n


def test_clips():
    feed = NormalizedFeed(drifting("single"), observation_clip=0.5, reward_clip=0.25)
    assert feed.observation_space == spaces.Box(-0.5, 0.5, (3,), np.float32)
    state, key = feed.init(RandomKey(2))
    observations, rewards = [], []
    for _ in range(30):
        state, key = feed.step(key, state, np.zeros((3, 1), np.float32))
        observations.append(state.observation)
        rewards.append(state.reward)
    assert np.abs(observations).max() == 0.5
    assert np.abs(rewards).max() == 0.25
    assert np.abs(observations).min() < 0.5


def test_only_boxes_of_floats_are_normalised():
    space = spaces.Dict(
        {
            "image": spaces.Box(0, 255, (2, 2), np.uint8),
            "rest": spaces.Tuple([spaces.Box(-9, 9, (1,), np.float32), spaces.Discrete(4)]),
        }
    )

    def move(observation, action):
        observation["rest"][0][:] = observation["rest"][0] + 2.0
        return observation, 1.0

    first = {"image": np.full((2, 2), 200, np.uint8), "rest": (np.zeros(1, np.float32), 3)}
    feed = NormalizedFeed(
        make_feed(move, initial_observation=first, observation_space=space, initial_action=[0.0]), rewards=False
    )
    assert set(feed.statistics) == {"observations.rest.0"}
    assert feed.observation_space["image"] == space["image"]
    state, key = feed.init(RandomKey(0))
    for _ in range(3):
        state, key = feed.step(key, state, np.zeros((1, 1)))
    assert state.observation["image"].tolist() == [[[200, 200], [200, 200]]]
    assert state.observation["rest"][1].tolist() == [3]
    assert np.allclose(state.observation["rest"][0], (6 - 2) / np.std([0, 2, 4]))
    assert state.reward.tolist() == [1.0]


def test_what_is_not_finite_reaches_the_trainer_and_spoils_nothing():
    rewards = iter([1.0, float("nan"), 2.0, float("inf"), 3.0])
    feed = NormalizedFeed(
        make_feed(lambda o, a: (o + 1, next(rewards)), initial_observation=[0.0], initial_action=[0.0])
    )
    state, key = feed.init(RandomKey(0))
    seen = []
    for _ in range(5):
        state, key = feed.step(key, state, np.zeros((1, 1)))
        seen.append(state.reward[0])
    assert np.isfinite(seen).tolist() == [True, False, True, False, True]
    assert np.isinf(seen[3])
    assert feed.statistics["rewards"].count == 3
    assert np.isfinite(feed.statistics["rewards"].variance)


def run(feed, steps, key=None, state=None):
    state, key = feed.init(RandomKey(5) if key is None else key)
    for _ in range(steps):
        state, key = feed.step(key, state, np.zeros((feed.num_environments, 1), np.float32))
    return state


@pytest.mark.parametrize("history", [1, 2])
def test_statistics_are_saved_and_restored(history):
    options = {"normalize_observations": True, "normalize_rewards": True, "observation_history": history}
    feed = wrap_feed(drifting("single"), **options)
    run(feed, 40)
    saved = export_feed_state(feed)
    other = wrap_feed(drifting("single"), **options)
    import_feed_state(other, saved)
    assert {name: array.tolist() for name, array in export_feed_state(other).items()} == {
        name: array.tolist() for name, array in saved.items()
    }
    one, two = run(feed, 10, RandomKey(9)), run(other, 10, RandomKey(9))
    assert np.array_equal(one.observation, two.observation)
    assert np.array_equal(one.reward, two.reward)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    feed = NormalizedFeed(drifting("single"))
    run(feed, 10)
    saved = feed.export_state()
    bad = [
        ({name: a for name, a in saved.items() if name != "rewards/mean"}, "rewards.mean is missing"),
        (saved | {"other/mean": np.zeros(3)}, "other/mean was saved"),
        (saved | {"observations/mean": np.zeros(4)}, r"needed"),
        (saved | {"observations/mean": np.zeros(3, np.float32)}, r"float32 \[3\]; float64 \[3\]"),
        (saved | {"rewards/deviations": np.array(-1.0)}, "negative or not finite"),
        (saved | {"rewards/deviations": np.array(np.nan)}, "negative or not finite"),
        (saved | {"inner.x": np.zeros(1)}, "GymnasiumFeed keeps nothing"),
    ]
    fresh = NormalizedFeed(drifting("single"))
    for arrays, message in bad:
        with pytest.raises(ValueError, match=message):
            fresh.import_state(arrays)
        assert fresh.statistics["observations"].count == fresh.statistics["rewards"].count == 0
    with pytest.raises(ValueError, match="GymnasiumFeed keeps nothing"):
        import_feed_state(drifting("single"), saved)
    import_feed_state(drifting("single"), {})


@pytest.mark.parametrize("given", [False, True])
def test_evaluation_takes_the_statistics_frozen_and_the_rewards_as_they_are(given):
    feed = wrap_feed(drifting("single"), normalize_observations=True, normalize_rewards=True, observation_history=2)
    run(feed, 40)
    evaluation = feed.around(drifting("single", 1)) if given else make_evaluation_feed(feed)
    assert evaluation.observation_space == feed.observation_space
    assert evaluation.num_environments == 1
    before = feed.export_state()
    statistics = feed.feed.statistics["observations"]
    plain = drifting("single", 1)
    state, key = evaluation.init(RandomKey(3))
    seen, plain_key = plain.init(RandomKey(3))
    for _ in range(10):
        state, key = evaluation.step(key, state, np.zeros((1, 1), np.float32))
        seen, plain_key = plain.step(plain_key, seen, np.zeros((1, 1), np.float32))
        assert np.array_equal(state.reward, seen.reward)
        expected = (seen.observation - statistics.mean) / np.sqrt(statistics.variance + 1e-8)
        assert np.allclose(state.observation[:, -1], np.clip(expected, -10, 10), atol=1e-5)
    after = feed.export_state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    run(feed, 5)
    assert evaluation.feed.statistics["observations"].count == before["observations/count"]


def test_rewards_alone_leave_observations_alone():
    feed = NormalizedFeed(drifting("single"), observations=False)
    assert feed.observation_space == Drifting.observation_space
    state = run(feed, 5)
    assert state.observation.dtype == np.float64
    assert isinstance(feed.around(drifting("single")), type(drifting("single")))


def test_refusals():
    feed = drifting("single")
    with pytest.raises(ValueError, match="both False"):
        NormalizedFeed(feed, observations=False, rewards=False)
    with pytest.raises(ValueError, match=r"discount is 1\.5"):
        NormalizedFeed(feed, discount=1.5)
    for clip in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="observation_clip"):
            NormalizedFeed(feed, observation_clip=clip)
    with pytest.raises(ValueError, match="no Box of floats"):
        NormalizedFeed(make_feed("FrozenLake-v1"))
    with pytest.raises(RuntimeError, match="call init first"):
        NormalizedFeed(feed).step(RandomKey(0), None, np.zeros((3, 1)))
    with pytest.raises(ValueError, match="was trained on"):
        NormalizedFeed(feed).around(make_feed("CartPole-v1"))
    with pytest.raises(ValueError, match="without the training feed's wrappers"):
        HistoryFeed(feed, 2).around(HistoryFeed(feed, 2))


def test_nothing_asked_for_is_nothing_wrapped():
    feed = drifting("single")
    assert wrap_feed(feed) is feed
    assert isinstance(wrap_feed(feed, observation_history=2), HistoryFeed)

"""Feeds against hand-made loops over the same environment: every transition, in every mode."""

import sys
import types

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from angle_rl.feed import (
    DataFeed,
    GymnasiumFeed,
    VectorFeed,
    make_evaluation_feed,
    make_feed,
)
from angle_rl.types import RandomKey

MODES = list(AutoresetMode)
LIMIT = 5


class Counting(gymnasium.Env):
    """Shows (episode, time, a random number drawn at reset); every transition can be told from every other.

    Episodes end by turns: terminated after 3 steps, truncated at LIMIT, both at once at LIMIT.
    """

    def __init__(self, nested=False, reuse=False, fail_at=None):
        box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.observation_space = (
            spaces.Dict({"a": box, "b": spaces.Tuple([spaces.Discrete(9), spaces.Box(0, 255, (2, 2), np.uint8)])})
            if nested
            else box
        )
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.nested, self.reuse, self.fail_at = nested, reuse, fail_at
        self.buffer = np.zeros(3, np.float32)
        self.episode, self.total = -1, 0
        self.closed = False

    def show(self):
        values = np.array([self.episode, self.time, self.drawn], np.float32)
        if self.reuse:
            self.buffer[:] = values
            return self.buffer
        if self.nested:
            return {"a": values, "b": (self.time, np.full((2, 2), self.episode, np.uint8))}
        return values

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.episode = -1
        self.episode += 1
        self.time = 0
        self.drawn = int(self.np_random.integers(1000))
        return self.show(), {}

    def step(self, action):
        self.time += 1
        self.total += 1
        if self.fail_at == self.total:
            raise RuntimeError("the simulator blew up")
        kind = self.episode % 3
        terminated = (kind == 0 and self.time == 3) or (kind == 2 and self.time == LIMIT)
        truncated = self.time == LIMIT
        reward = 100.0 * self.episode + self.time + float(action[0])
        action *= 0  # an environment may spoil what it is given
        return self.show(), reward, terminated, truncated, {"note": self.time}

    def close(self):
        self.closed = True


def flat(observation, row):
    if isinstance(observation, dict):
        return [x for part in observation.values() for x in flat(part, row)]
    if isinstance(observation, tuple):
        return [x for part in observation for x in flat(part, row)]
    array = np.asarray(observation if row is None else observation[row])
    return [float(x) for x in array.ravel()]


def policy(values):
    return np.array([np.sin(sum(values)), 0.5], np.float32)


def by_hand(environment, seed, count):
    """A plain loop's first (observation, action, reward, next_observation, terminated, truncated)."""
    rows = []
    observation = flat(environment.reset(seed=seed)[0], None)
    while len(rows) < count:
        action = policy(observation)
        successor, reward, terminated, truncated, _ = environment.step(action.copy())
        rows.append((observation, action.tolist(), reward, flat(successor, None), terminated, truncated))
        ended = terminated or truncated
        observation = flat(environment.reset()[0] if ended else successor, None)
    return rows


def run(feed, key, steps):
    """What a trainer would store, by environment, and how many rows were resets."""
    state, key = feed.init(key)
    assert not state.stepped.any()
    assert not (state.terminated | state.truncated).any()
    rows = [[] for _ in range(feed.num_environments)]
    resets = 0
    history = []
    for _ in range(steps):
        before = state
        actions = np.stack([policy(flat(before.observation, i)) for i in range(feed.num_environments)])
        state, key = feed.step(key, before, actions)
        history.append((before, actions))
        assert state.reward.dtype == np.float64
        assert state.terminated.dtype == state.truncated.dtype == state.stepped.dtype == np.bool_
        for i in range(feed.num_environments):
            if not state.stepped[i]:
                resets += 1
                assert not state.terminated[i]
                assert not state.truncated[i]
                assert state.reward[i] == 0
                continue
            rows[i].append(
                (
                    before,
                    actions[i].tolist(),
                    float(state.reward[i]),
                    state,
                    state.terminated[i],
                    state.truncated[i],
                )
            )
    # Read only now: nothing that was handed out may have been overwritten since.
    return [
        [(flat(b.observation, i), a, r, flat(s.final_observation, i), t, c) for b, a, r, s, t, c in part]
        for i, part in enumerate(rows)
    ], resets


def check_against_hand(rows, make, seeds):
    for part, seed in zip(rows, seeds, strict=True):
        expected = by_hand(make(), seed, len(part))
        assert part == expected
    ends = [(t, c) for part in rows for *_, t, c in part]
    assert {(True, False), (False, True), (True, True)} <= {(bool(t), bool(c)) for t, c in ends}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_vector_environments_match_a_hand_made_loop(kind, mode, nested):
    functions = [lambda: Counting(nested=nested)] * 3
    if kind == "sync":
        environment = SyncVectorEnv(functions, autoreset_mode=mode)
    else:
        environment = AsyncVectorEnv(functions, autoreset_mode=mode)
    try:
        feed = make_feed(environment)
        key = RandomKey(7)
        rows, resets = run(feed, key, 40)
        seed = key.split(2)[0].seed()
        check_against_hand(rows, lambda: Counting(nested=nested), [seed + i for i in range(3)])
        assert (resets > 0) == (mode is AutoresetMode.NEXT_STEP)
        assert sum(map(len, rows)) + resets == 3 * 40
        again, _ = run(feed, key, 40)  # seeding makes the same episodes
        assert again == rows
    finally:
        environment.close()


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_end_at_different_times(mode):
    class Uneven(Counting):
        def __init__(self, offset):
            super().__init__()
            self.offset = offset

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            if seed is not None:
                self.episode = self.offset
            return self.show(), {}

    environment = SyncVectorEnv([lambda i=i: Uneven(i) for i in range(3)], autoreset_mode=mode)
    key = RandomKey(3)
    rows, _ = run(make_feed(environment), key, 60)
    seed = key.split(2)[0].seed()
    for i in range(3):
        assert rows[i] == by_hand(Uneven(i), seed + i, len(rows[i]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_vector_environments_that_reuse_their_buffers(kind, mode):
    functions = [Counting] * 2
    if kind == "sync":
        environment = SyncVectorEnv(functions, copy=False, autoreset_mode=mode)
    else:
        environment = AsyncVectorEnv(functions, copy=False, shared_memory=True, autoreset_mode=mode)
    try:
        key = RandomKey(11)
        rows, _ = run(make_feed(environment), key, 30)
        seed = key.split(2)[0].seed()
        check_against_hand(rows, Counting, [seed, seed + 1])
    finally:
        environment.close()


@pytest.mark.parametrize("options", [{}, {"nested": True}, {"reuse": True}])
@pytest.mark.parametrize("number", [1, 3])
def test_single_environments_match_a_hand_made_loop(number, options):
    feed = make_feed(lambda: Counting(**options), num_environments=number)
    key = RandomKey(5)
    rows, resets = run(feed, key, 40)
    seeds = [k.seed() for k in key.split(number + 1)[:number]]
    fresh = {k: v for k, v in options.items() if k != "reuse"}
    check_against_hand(rows, lambda: Counting(**fresh), seeds)
    assert resets == 0
    assert all(len(part) == 40 for part in rows)


def test_the_observation_after_an_end_begins_the_next_episode():
    feed = make_feed(Counting())
    state, key = feed.init(RandomKey(1))
    for _ in range(3):
        assert np.array_equal(state.observation, state.final_observation)
        state, key = feed.step(key, state, np.zeros((1, 2), np.float32))
    assert state.terminated[0]
    assert state.final_observation[0, :2].tolist() == [0, 3]
    assert state.observation[0, :2].tolist() == [1, 0]


def test_a_registered_id_with_its_time_limit():
    feed = make_feed("Pendulum-v1", num_environments=2)
    assert isinstance(feed, DataFeed)
    assert (feed.name, feed.num_environments) == ("Pendulum-v1", 2)
    state, key = feed.init(RandomKey(0))
    actions = np.zeros((2, 1))
    for _ in range(200):
        assert not state.truncated.any()
        state, key = feed.step(key, state, actions)
    assert state.truncated.all()
    assert not state.terminated.any()
    assert not np.array_equal(state.observation, state.final_observation)
    assert not np.array_equal(state.observation[0], state.observation[1])
    same, _ = feed.init(RandomKey(0))
    again, _ = feed.reset(RandomKey(0), state)
    assert np.array_equal(same.observation, again.observation)
    feed.close()
    feed.close()


def test_options_reach_the_environment():
    feed = make_feed("Pendulum-v1", max_episode_steps=2)
    state, key = feed.init(RandomKey(0))
    for _ in range(2):
        state, key = feed.step(key, state, np.zeros((1, 1)))
    assert state.truncated[0]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("Pendulm-v1", "Pendulum-v1"), ("cartpole-v1", "CartPole-v1"), ("halfcheeta-v5", "HalfCheetah-v5")],
)
def test_an_unknown_id_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=nearest):
        make_feed(name)


def test_an_id_like_no_other_is_refused_too():
    with pytest.raises(ValueError, match="no registered name is like it"):
        make_feed("zzzzqqqq-v0")


class Modeless(VectorEnv):
    def __init__(self, metadata):
        self.metadata = metadata
        self.num_envs = 2
        self.single_observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.single_action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space = spaces.Box(-1, 1, (2, 1), np.float32)
        self.action_space = spaces.Box(-1, 1, (2, 1), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros((2, 1), np.float32), {}

    def step(self, actions):
        infos = {} if self.final is None else {"final_obs": self.final}
        ended = np.array([True, False])
        return np.zeros((2, 1), np.float32), np.ones(2), ended, ~ended & False, infos


@pytest.mark.parametrize("metadata", [{}, {"autoreset_mode": None}, {"autoreset_mode": "Sometimes"}])
def test_an_unknown_autoreset_mode_is_refused(metadata):
    with pytest.raises(ValueError, match="NEXT_STEP, SAME_STEP or DISABLED"):
        make_feed(Modeless(metadata))


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_a_mode_may_be_spelled_as_a_string(mode):
    assert isinstance(make_feed(Modeless({"autoreset_mode": mode})), VectorFeed)


def test_same_step_takes_final_observations_batched_and_refuses_their_absence():
    environment = Modeless({"autoreset_mode": AutoresetMode.SAME_STEP})
    feed = make_feed(environment)
    state, key = feed.init(RandomKey(0))
    environment.final = np.array([[0.5], [0.0]], np.float32)
    after, _ = feed.step(key, state, np.zeros((2, 1)))
    assert after.final_observation.ravel().tolist() == [0.5, 0.0]
    assert after.observation.ravel().tolist() == [0.0, 0.0]
    environment.final = None
    with pytest.raises(ValueError, match="final_obs"):
        feed.step(key, state, np.zeros((2, 1)))
    environment.final = np.array([None, None], dtype=object)
    with pytest.raises(ValueError, match="final_obs"):
        feed.step(key, state, np.zeros((2, 1)))


@pytest.mark.parametrize("vector", [False, True])
def test_what_an_environment_raises_passes_through(vector):
    source = SyncVectorEnv([lambda: Counting(fail_at=2)]) if vector else Counting(fail_at=2)
    feed = make_feed(source)
    state, key = feed.init(RandomKey(0))
    state, key = feed.step(key, state, np.zeros((1, 2), np.float32))
    with pytest.raises(RuntimeError, match="the simulator blew up"):
        feed.step(key, state, np.zeros((1, 2), np.float32))


def test_a_reward_that_is_not_finite_passes_through():
    feed = make_feed(lambda o, a: (o, float("nan")), initial_observation=[0.0], initial_action=[0.0])
    state, key = feed.init(RandomKey(0))
    state, _ = feed.step(key, state, np.zeros((1, 1)))
    assert np.isnan(state.reward[0])


def test_given_environments_stay_open_and_made_ones_are_closed():
    environment = Counting()
    make_feed(environment).close()
    assert not environment.closed
    made = []

    def factory():
        made.append(Counting())
        return made[-1]

    make_feed(factory, num_environments=2).close()
    assert [e.closed for e in made] == [True, True]


def test_evaluation_feeds_are_independent_and_alike():
    sources = [
        "Pendulum-v1",
        gymnasium.make("Pendulum-v1"),
        SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1")] * 3),
        gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point"),
        gymnasium.wrappers.vector.RecordEpisodeStatistics(gymnasium.make_vec("Pendulum-v1", num_envs=2)),
        Counting(),
    ]
    for source in sources:
        feed = make_feed(source)
        state, key = feed.init(RandomKey(0))
        evaluation = make_evaluation_feed(feed)
        assert evaluation.num_environments == 1
        assert evaluation.name == feed.name
        assert evaluation.observation_space == feed.observation_space
        other, other_key = evaluation.init(RandomKey(9))
        actions = np.zeros((1, *feed.action_space.shape), feed.action_space.dtype)
        for _ in range(3):
            other, other_key = evaluation.step(other_key, other, actions)
        evaluation.close()
        actions = np.zeros((feed.num_environments, *feed.action_space.shape), feed.action_space.dtype)
        after, _ = feed.step(key, state, actions)
        fresh, key = feed.init(RandomKey(0))
        undisturbed, _ = feed.step(key, fresh, actions)
        assert np.array_equal(after.observation, undisturbed.observation)
        feed.close()


def test_no_evaluation_feed_where_none_can_be_made():
    class Stuck(Counting):
        def __deepcopy__(self, memo):
            raise TypeError("a live connection cannot be copied")

    assert make_evaluation_feed(make_feed(Stuck())) is None
    wrapped = gymnasium.wrappers.vector.ClipReward(SyncVectorEnv([Counting]), 0.0, 1.0)
    assert make_evaluation_feed(make_feed(wrapped)) is None


def test_an_environment_is_copied_with_the_statistics_of_its_wrappers():
    environment = gymnasium.wrappers.NormalizeObservation(gymnasium.make("Pendulum-v1"))
    feed = make_feed(environment)
    state, key = feed.init(RandomKey(0))
    for _ in range(20):
        state, key = feed.step(key, state, np.ones((1, 1)))
    evaluation = make_evaluation_feed(feed)
    copied = evaluation._environments[0].obs_rms
    assert copied is not environment.obs_rms
    assert np.array_equal(copied.mean, environment.obs_rms.mean)


def test_make_feed_refuses_what_is_no_source():
    with pytest.raises(TypeError, match="source is a int"):
        make_feed(3)
    with pytest.raises(TypeError, match="4 positional"):
        make_feed(lambda a, b, c, d: None, initial_observation=[0.0])
    with pytest.raises(TypeError, match="1 positional"):
        make_feed(lambda a: None, initial_observation=[0.0])
    with pytest.raises(TypeError, match="must make an Env"):
        make_feed(lambda: 3)
    with pytest.raises(TypeError, match="gravity"):
        make_feed(Counting(), gravity=3)
    with pytest.raises(ValueError, match="num_environments is 2"):
        make_feed(Counting(), num_environments=2)
    with pytest.raises(ValueError, match="num_environments is 0"):
        make_feed("Pendulum-v1", num_environments=0)
    with pytest.raises(ValueError, match="environments is empty"):
        GymnasiumFeed([])
    with pytest.raises(ValueError, match="other spaces"):
        GymnasiumFeed([Counting(), Counting(nested=True)])


def test_a_feed_is_its_own_feed():
    feed = make_feed(Counting)
    assert make_feed(feed) is feed


@pytest.mark.parametrize(
    ("actions", "error"),
    [(np.zeros(2), ValueError), (np.zeros((2, 2)), ValueError), (np.zeros((1, 2), complex), TypeError)],
)
def test_actions_of_a_wrong_shape_or_dtype(actions, error):
    feed = make_feed(Counting())
    state, key = feed.init(RandomKey(0))
    with pytest.raises(error, match="actions"):
        feed.step(key, state, actions)
    discrete = make_feed("CartPole-v1")
    state, key = discrete.init(RandomKey(0))
    with pytest.raises(TypeError, match="actions has dtype float64"):
        discrete.step(key, state, np.zeros(1))


def test_minatar_is_registered_when_asked_for(monkeypatch):
    registered = []

    def register():
        registered.append(True)
        gymnasium.register("MinAtar/Made-up-v1", entry_point="gymnasium.envs.classic_control:CartPoleEnv")

    package, module = types.ModuleType("minatar"), types.ModuleType("minatar.gym")
    module.register_envs = register
    package.gym = module
    monkeypatch.setitem(sys.modules, "minatar", package)
    monkeypatch.setitem(sys.modules, "minatar.gym", module)
    try:
        for _ in range(2):
            assert make_feed("MinAtar/Made-up-v1").name == "MinAtar/Made-up-v1"
        assert registered == [True]
    finally:
        gymnasium.registry.pop("MinAtar/Made-up-v1", None)
    monkeypatch.setitem(sys.modules, "minatar", None)
    with pytest.raises(ImportError, match="pip install minatar"):
        make_feed("MinAtar/Breakout-v9")

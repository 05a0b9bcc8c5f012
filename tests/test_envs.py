"""Our own environments: by hand, against each other (single and vectorised), through Gymnasium and through a feed."""

import itertools
import math
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from angle_rl.envs import Gridworld, GridworldVector, Turtleworld, TurtleworldVector, optimal_return, optimal_steps
from angle_rl.feed import VectorFeed, make_feed
from angle_rl.types import RandomKey

IDS = ["angle/Gridworld-v0", "angle/Turtleworld-v0"]
SINGLES = [Gridworld, Turtleworld]
VECTORS = [GridworldVector, TurtleworldVector]
PAIRS = list(zip(SINGLES, VECTORS, strict=True))
MODES = ["NextStep", "SameStep"]
UP, DOWN, RIGHT, LEFT = range(4)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


# Gymnasium


@pytest.mark.parametrize("name", IDS)
def test_gymnasium_finds_nothing_to_complain_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(name).unwrapped)
        check_env(gymnasium.make(name, render_mode="ansi").unwrapped)
        assert gymnasium.make(name).spec.max_episode_steps == 100
        vector = gymnasium.make_vec(name, num_envs=3, vectorization_mode="vector_entry_point")
        assert isinstance(vector, tuple(VECTORS))
        assert vector.max_episode_steps == 100
        assert isinstance(gymnasium.make_vec(name, num_envs=3), type(vector))
        assert vector.single_observation_space == gymnasium.make(name).observation_space
        assert vector.single_action_space == gymnasium.make(name).action_space


@pytest.mark.parametrize(
    "imports",
    [
        "import angle_rl; import gymnasium",
        "import gymnasium; import angle_rl",
        "import angle_rl.envs; import gymnasium",
        "import importlib, angle_rl; importlib.reload(angle_rl); import gymnasium; importlib.reload(angle_rl)",
        "import angle_rl; from importlib.util import find_spec; find_spec('gymnasium'); import gymnasium.spaces",
    ],
)
def test_either_order_of_imports_registers_once_and_leaves_no_finder(imports):
    code = f"""import warnings
warnings.simplefilter("error", UserWarning)
{imports}
import sys
print(*sorted(name for name in gymnasium.registry if name.startswith("angle/")))
print(sum(type(finder).__module__.startswith("angle_rl") for finder in sys.meta_path))"""
    assert run_python(code) == [*IDS, "0"]


def test_gymnasium_imports_the_package_that_an_id_names():
    code = """import gymnasium
print(gymnasium.make("angle_rl:angle/Gridworld-v0").spec.id)
print(gymnasium.make_vec("angle_rl.envs:angle/Turtleworld-v0", num_envs=2).num_envs)"""
    assert run_python(code) == ["angle/Gridworld-v0", "2"]


def test_importing_the_package_imports_neither_numpy_nor_gymnasium():
    code = "import sys, angle_rl, angle_rl.envs; print(*({'numpy', 'gymnasium', 'torch'} & set(sys.modules)), 'end')"
    assert run_python(code) == ["end"]


def test_a_worker_process_that_makes_an_environment_needs_no_torch():
    code = "import sys, gymnasium; gymnasium.make('angle_rl:angle/Turtleworld-v0'); print('torch' in sys.modules)"
    assert run_python(code) == ["False"]


# Gridworld


@pytest.mark.parametrize(
    ("state", "action", "successor", "reward"),
    [
        ((2, 2, 0, 0), UP, (1, 2, 0, 0), -3.0),
        ((2, 2, 0, 0), DOWN, (3, 2, 0, 0), -5.0),
        ((2, 2, 0, 0), RIGHT, (2, 3, 0, 0), -5.0),
        ((2, 2, 0, 0), LEFT, (2, 1, 0, 0), -3.0),
        ((0, 2, 4, 4), UP, (0, 2, 4, 4), -6.0),
        ((4, 2, 1, 3), DOWN, (4, 2, 1, 3), -4.0),
        ((2, 4, 1, 3), RIGHT, (2, 4, 1, 3), -2.0),
        ((2, 0, 1, 3), LEFT, (2, 0, 1, 3), -4.0),
        ((2, 2, 2, 3), RIGHT, (2, 3, 2, 3), 0.0),
    ],
)
def test_moves_and_rewards(state, action, successor, reward):
    single, vector = Gridworld(), GridworldVector(2)
    first, infos = single.reset(options={"state": state})
    assert first.tolist() == list(state)
    assert infos == {}
    observation, got, terminated, truncated, _ = single.step(action)
    assert first.tolist() == list(state), "what was handed out has changed"
    assert (observation.tolist(), got, terminated, truncated) == (list(successor), reward, reward == 0, False)
    assert observation.dtype == np.int64
    assert type(got) is float
    vector.reset(options={"state": [state, (0, 0, 4, 4)]})
    observation, rewards, terminations, truncations, _ = vector.step(np.array([action, RIGHT]))
    assert observation.tolist() == [list(successor), [0, 1, 4, 4]]
    assert rewards.tolist() == [reward, -7.0]
    assert math.copysign(1.0, rewards[0]) == math.copysign(1.0, reward), "a negative zero"
    assert terminations.tolist() == [reward == 0, False]
    assert truncations.tolist() == [False, False]


@pytest.mark.parametrize("make", [Gridworld, lambda **options: GridworldVector(1, **options)])
def test_targets_and_starts_are_drawn_from_all_that_are_allowed(make):
    targets = [(1, 1), (3, 0)]
    environment = make(targets=targets)
    environment.reset(seed=0)
    drawn = np.array([environment.reset()[0].ravel() for _ in range(4800)])
    cells = list(itertools.product(range(5), repeat=2))
    expected = {(*start, *target) for target in targets for start in cells if start != target}
    values, counts = np.unique(drawn, axis=0, return_counts=True)
    assert {tuple(value) for value in values.tolist()} == expected  # 48 of them, 100 times each on average
    assert ((counts - 100) ** 2 / 100).sum() < 47 + 5 * math.sqrt(2 * 47)  # chi-squared, five standard deviations


def test_corners_are_the_targets_unless_told_and_a_start_may_be_fixed():
    environment = Gridworld(size=3, start=(1, 1))
    environment.reset(seed=0)
    drawn = {tuple(environment.reset()[0].tolist()) for _ in range(100)}
    assert drawn == {(1, 1, row, column) for row in (0, 2) for column in (0, 2)}
    observation, _ = GridworldVector(50, size=3, start=(1, 1)).reset(seed=0)
    assert {tuple(row) for row in observation.tolist()} == drawn


@pytest.mark.parametrize("make", [Gridworld, lambda *a, **options: GridworldVector(2, *a, **options)])
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"size": 1}, "size is 1; at least 2"),
        ({"size": 2.0}, "size is 2.0"),
        ({"targets": []}, "targets is empty"),
        ({"targets": [(0, 0), (5, 0)]}, r"targets\[1\] is \(5, 0\)"),
        ({"targets": [(0, 0, 1)]}, r"targets\[0\] is \(0, 0, 1\)"),
        ({"targets": [(0.5, 0)]}, r"targets\[0\]"),
        ({"start": (0, -1)}, r"start is \(0, -1\); two whole numbers \(row, column\) in \[0, 4\]"),
        ({"start": (0, 4)}, "start is .* one of targets"),
        ({"render_mode": "human"}, "render_mode is 'human'"),
    ],
)
def test_wrong_grids_are_refused(make, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        make(**options)


def best_returns(environment, discount):
    """Value iteration over what the environment itself does, for one target."""
    cells = list(itertools.product(range(environment.size), repeat=2))
    (target,) = environment.targets
    outcomes = {}
    for cell in cells:
        for action in range(4):
            if cell != target:
                environment.reset(options={"state": (*cell, *target)})
                observation, reward, terminated, _, _ = environment.step(action)
                outcomes[cell, action] = (tuple(observation[:2].tolist()), reward, terminated)
    values = dict.fromkeys(cells, 0.0)
    for _ in range(4 * environment.size):
        for cell in cells:
            if cell != target:
                values[cell] = max(
                    reward + (0.0 if terminated else discount * values[successor])
                    for successor, reward, terminated in (outcomes[cell, action] for action in range(4))
                )
    return np.array([values[cell] for cell in cells])


@pytest.mark.parametrize("target", [(0, 0), (2, 3)])
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_the_optimal_return_is_what_value_iteration_finds(target, discount):
    states = np.array([(*cell, *target) for cell in itertools.product(range(5), repeat=2)])
    np.testing.assert_allclose(
        optimal_return(states, discount), best_returns(Gridworld(targets=[target]), discount), atol=1e-12
    )


def test_optimal_steps_and_returns_of_one_state_and_of_none():
    assert optimal_steps((4, 4, 0, 1)) == 7
    assert optimal_return((4, 4, 0, 1)) == -21
    assert optimal_return((1, 1, 1, 1)) == 0
    assert optimal_steps(np.zeros((0, 4))).shape == optimal_return(np.zeros((0, 4))).shape == (0,)
    assert optimal_steps(np.zeros((3, 2, 4))).shape == (3, 2)
    with pytest.raises(ValueError, match=r"discount is 1\.5"):
        optimal_return((0, 0, 1, 1), discount=1.5)


def towards_target(observation):
    row, column, target_row, target_column = observation.T
    sideways = np.where(column < target_column, RIGHT, LEFT)
    return np.where(row > target_row, UP, np.where(row < target_row, DOWN, sideways))


def test_walking_straight_from_every_start_earns_the_optimal_return():
    cells = list(itertools.product(range(5), repeat=2))
    states = np.array([(*start, *target) for start in cells for target in cells if start != target])
    environment = GridworldVector(len(states), autoreset_mode="NextStep")
    observation, _ = environment.reset(options={"state": states})
    returns, running = np.zeros(len(states)), np.ones(len(states), dtype=bool)
    lengths = np.zeros(len(states), dtype=int)
    while running.any():
        observation, rewards, terminations, _, _ = environment.step(towards_target(observation))
        returns += np.where(running, rewards, 0.0)
        lengths += running
        running &= ~terminations
    assert (lengths == optimal_steps(states)).all()
    assert (returns == optimal_return(states)).all()


# Turtleworld


def turtle(state, **options):
    environment = Turtleworld(**options)
    observation, _ = environment.reset(options={"state": state})
    return environment, observation


def test_a_turtle_turns_then_strides():
    environment, observation = turtle((0.0, 0.0, 0.0, 0.0, 0.5))
    np.testing.assert_allclose(observation, [0, 0, 1, 0, 0, 0.5], atol=1e-7)  # the target lies to the left
    observation, reward, terminated, truncated, _ = environment.step(np.array([1.0, 0.5], np.float32))
    angle = math.pi / 12
    x, y = 0.1 * math.cos(angle), 0.1 * math.sin(angle)
    np.testing.assert_allclose(observation[:4], [x, y, math.cos(angle), math.sin(angle)], rtol=1e-6)
    distance = math.hypot(x, 0.5 - y)
    assert reward == pytest.approx((0.5 - distance) / 0.1 - 1)
    assert math.hypot(*observation[4:]) == pytest.approx(distance)
    assert (terminated, truncated) == (False, False)
    vector = TurtleworldVector(2)
    vector.reset(options={"state": [(0.0, 0.0, 0.0, 0.0, 0.5)] * 2})
    assert vector.step(np.array([[1.0, 0.5], [0.0, 1.0]]))[1].tolist() == pytest.approx([reward, -1.0])
    environment, _ = turtle((0.0, 0.0, math.pi / 2, 0.0, -0.25))
    assert environment.step(np.array([-1.0, 0.0]))[1] == pytest.approx(0.0), "backwards is as fast"
    observation, reward, terminated, _, _ = environment.step(np.array([-0.7, 0.0]))
    assert (reward, terminated) == (pytest.approx(-0.3), True)


def test_a_wall_stops_along_its_axis_only():
    environment, _ = turtle((0.98, 0.0, math.pi / 4, 0.0, 0.9))
    observation = environment.step(np.array([1.0, 0.0]))[0]
    np.testing.assert_allclose(observation[:2], [1.0, 0.1 * math.sqrt(0.5)], rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), radius=st.floats(0.02, 0.98))
def test_turtles_stay_in_their_spaces_and_rewards_add_up(seed, radius):
    environment = TurtleworldVector(16, radius=radius, max_episode_steps=None)
    random = np.random.default_rng(seed)
    observation, _ = environment.reset(seed=seed)
    first = np.hypot(observation[:, 4], observation[:, 5])
    assert (first > radius * (1 - 1e-6)).all()
    total, running, steps, last = np.zeros(16), np.ones(16, dtype=bool), np.zeros(16), first
    for _ in range(30):
        actions = np.where(random.random((16, 2)) < 0.5, random.uniform(-1, 1, (16, 2)), 1.0).astype(np.float32)
        observation, rewards, terminations, _, _ = environment.step(actions)
        assert observation in environment.observation_space
        assert (rewards <= 1e-9).all()
        assert (rewards >= -2 - 1e-9).all()
        total += rewards * running
        steps += running
        last = np.where(running, np.hypot(observation[:, 4], observation[:, 5]), last)
        running &= ~terminations
    np.testing.assert_allclose(total, (first - last) / 0.1 - steps, atol=1e-4)


def steer(observation):
    ahead, left = observation[..., 4], observation[..., 5]
    turn = np.clip(np.arctan2(left, ahead) / (math.pi / 6), -1.0, 1.0)
    speed = np.where(np.abs(np.arctan2(left, ahead)) < math.pi / 3, 1.0, 0.0)
    return np.stack([speed, turn], axis=-1).astype(np.float32)


def test_a_turtle_that_steers_by_what_it_sees_always_arrives():
    environment = TurtleworldVector(500, autoreset_mode="NextStep")
    observation, _ = environment.reset(seed=5)
    returns, running = np.zeros(500), np.ones(500, dtype=bool)
    for _ in range(40):
        observation, rewards, terminations, _, _ = environment.step(steer(observation))
        returns += rewards * running
        running &= ~terminations
    assert not running.any()
    assert returns.min() > -8
    assert returns.max() < 1e-9


def test_beyond_the_bounds_counts_as_the_bound():
    one, two = (turtle((0.0, 0.0, 0.0, 0.9, 0.9))[0] for _ in range(2))
    assert one.step(np.array([3.0, -9.0]))[0].tolist() == two.step(np.array([1.0, -1.0]))[0].tolist()


@pytest.mark.parametrize("radius", [0.0, 1.0, -0.1, float("nan")])
def test_a_radius_that_leaves_no_room_is_refused(radius):
    for make in (Turtleworld, TurtleworldVector):
        with pytest.raises(ValueError, match="radius is"):
            make(radius=radius)


# Both, single and vectorised


def actions_for(space, random, n):
    if isinstance(space, gymnasium.spaces.Discrete):
        return random.integers(space.n, size=n)
    return random.uniform(-1.0, 1.0, size=(n, *space.shape)).astype(np.float32)


def assert_same(observation, other):
    np.testing.assert_allclose(observation, other, rtol=1e-6, atol=1e-6)
    assert observation.dtype == other.dtype


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("single", "vector"), PAIRS)
def test_vectorised_equals_looped(single, vector, mode):
    n, limit = 7, 12
    batch = vector(n, max_episode_steps=limit, autoreset_mode=mode)
    singles = [gymnasium.wrappers.TimeLimit(single(), limit) for _ in range(n)]
    random = np.random.default_rng(1)
    batch.reset(seed=2)

    def restart(row):
        return singles[row].reset(options={"state": batch._state[:, row].copy()})[0]

    for row in range(n):
        restart(row)
    ended = np.zeros(n, dtype=bool)
    kinds = set()
    for _ in range(300):
        actions = actions_for(batch.single_action_space, random, n)
        observation, rewards, terminations, truncations, infos = batch.step(actions)
        assert rewards.dtype == np.float64
        assert terminations.dtype == truncations.dtype == np.bool_
        for row in range(n):
            if ended[row] and mode == "NextStep":
                assert_same(observation[row], restart(row))
                assert (rewards[row], terminations[row], truncations[row]) == (0.0, False, False)
                continue
            successor, reward, terminated, truncated, _ = singles[row].step(actions[row])
            assert rewards[row] == pytest.approx(reward, abs=1e-9)
            assert (terminations[row], truncations[row]) == (terminated, truncated)
            kinds.add((terminated, truncated))
            if mode == "SameStep" and (terminated or truncated):
                assert infos["_final_obs"][row]
                assert_same(infos["final_obs"][row], successor)
                assert_same(observation[row], restart(row))
            else:
                assert_same(observation[row], successor)
                assert mode == "NextStep" or "final_obs" not in infos or infos["final_obs"][row] is None
        ended = terminations | truncations
        assert (mode == "SameStep" and ended.any()) == bool(infos)
    assert {(False, False), (True, False), (False, True)} <= kinds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "vector"), list(zip(IDS, VECTORS, strict=True)))
def test_a_feed_of_one_gives_the_single_environments_episodes(name, vector, mode):
    def transitions(feed, count):
        state, key = feed.init(RandomKey(7))
        random = np.random.default_rng(3)
        rows = []
        while len(rows) < count:
            # The same action for the same observation, whether or not a step was spent on a reset before it.
            actions = actions_for(feed.action_space, random, 1)
            after, key = feed.step(key, state, actions)
            while not after.stepped[0]:
                state = after
                after, key = feed.step(key, state, actions)
            rows.append((state.observation, actions, after.reward, after.final_observation))
            rows[-1] += (after.terminated, after.truncated)
            state = after
        return rows

    ours = transitions(VectorFeed(vector(1, autoreset_mode=mode)), 400)
    theirs = transitions(make_feed(name), 400)
    assert sum(bool(row[4][0] | row[5][0]) for row in ours) > 3
    for row, other in zip(ours, theirs, strict=True):
        for part, expected in zip(row, other, strict=True):
            np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", IDS)
def test_a_feed_evaluates_on_one_more_such_environment(name):
    feed = make_feed(gymnasium.make_vec(name, num_envs=5))
    assert (feed.name, feed.num_environments) == (name, 5)
    evaluation = feed.evaluation_feed()
    assert evaluation.num_environments == 1
    state, _ = evaluation.init(RandomKey(0))
    assert state.observation.shape == (1, *feed.observation_space.shape)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vector", VECTORS)
def test_what_was_handed_out_is_never_overwritten(vector, mode, n):
    environment = vector(n, max_episode_steps=3, autoreset_mode=mode)
    given = [environment.reset(seed=0)[0]]
    copies = [given[0].copy()]
    random = np.random.default_rng(0)
    for _ in range(20):
        actions = actions_for(environment.single_action_space, random, n)
        before = actions.copy()
        *arrays, infos = environment.step(actions)
        assert (actions == before).all()
        arrays += [row for row in infos.get("final_obs", []) if row is not None]
        given += arrays
        copies += [array.copy() for array in arrays]
    given.append(environment.reset()[0])
    copies.append(given[-1].copy())
    for array, copy in zip(given, copies, strict=True):
        assert (array == copy).all()
        assert not np.shares_memory(array, environment._state)
    for array, other in itertools.combinations(given, 2):
        assert not np.shares_memory(array, other)


@pytest.mark.parametrize("vector", VECTORS)
def test_a_seed_decides_everything_and_rows_differ(vector):
    def run(seed):
        environment = vector(20)
        random = np.random.default_rng(0)
        shown = [environment.reset(seed=seed)[0]]
        shown += [environment.step(actions_for(environment.single_action_space, random, 20))[0] for _ in range(150)]
        return np.array(shown)

    one, two = run(4), run(4)
    assert (one == two).all()
    assert (one != run(5)).any()
    assert len(np.unique(one[0], axis=0)) > 10


@pytest.mark.parametrize("vector", VECTORS)
def test_no_limit_means_no_truncation_and_a_reset_restarts_the_count(vector):
    still = np.zeros(1, np.int64) if vector is GridworldVector else np.zeros((1, 2), np.float32)
    state = [[0, 4, 4, 0]] if vector is GridworldVector else [[0.0, 0.0, 0.0, 0.9, 0.9]]
    endless = vector(1, max_episode_steps=None)
    endless.reset(options={"state": state})
    assert not any(endless.step(still)[3][0] for _ in range(300))
    limited = vector(1, max_episode_steps=3)
    limited.reset(options={"state": state})
    limited.step(still)
    limited.reset(options={"state": state})
    assert [bool(limited.step(still)[3][0]) for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_envs": 0}, "num_envs is 0"),
        ({"num_envs": True}, "num_envs is True"),
        ({"num_envs": 2, "max_episode_steps": 0}, "max_episode_steps is 0"),
        ({"num_envs": 2, "autoreset_mode": "Disabled"}, "autoreset_mode is DISABLED"),
        ({"num_envs": 2, "autoreset_mode": AutoresetMode.DISABLED}, "autoreset_mode is DISABLED"),
        ({"num_envs": 2, "autoreset_mode": "sometimes"}, "sometimes"),
        ({"num_envs": 2, "render_mode": "human"}, "render_mode is 'human'"),
    ],
)
@pytest.mark.parametrize("vector", VECTORS)
def test_wrong_vector_options_are_refused(vector, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        vector(**options)


@pytest.mark.parametrize("make", [*SINGLES, lambda: GridworldVector(1), lambda: TurtleworldVector(1)])
def test_a_step_needs_a_reset(make):
    environment = make()
    with pytest.raises(gymnasium.error.ResetNeeded, match="before reset"):
        environment.step(environment.action_space.sample())


GRID_ACTIONS = [
    (np.array([0, 4]), ValueError, r"actions\[1\] is 4"),
    (np.array([-1, 0]), ValueError, r"actions\[0\] is -1"),
    (np.array([0, 1, 2]), ValueError, r"shape \[3\]; \[2\] is due"),
    (np.array([0.0, 1.0]), TypeError, "dtype float64"),
    (np.array([True, False]), TypeError, "dtype bool"),
]
TURTLE_ACTIONS = [
    (np.array([[0, 0], [0, np.nan]]), ValueError, r"actions\[1, 1\] is nan"),
    (np.array([[np.inf, 0], [0, 0]]), ValueError, r"actions\[0, 0\] is inf"),
    (np.zeros(2), ValueError, r"shape \[2\]; \[2, 2\]"),
    (np.array([["a", "b"], ["c", "d"]]), TypeError, "dtype"),
]


@pytest.mark.parametrize(
    ("vector", "actions", "error", "complaint"),
    [(GridworldVector, *case) for case in GRID_ACTIONS] + [(TurtleworldVector, *case) for case in TURTLE_ACTIONS],
)
def test_wrong_actions_are_refused_before_anything_moves(vector, actions, error, complaint):
    environment, twin = vector(2), vector(2)
    environment.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(error, match=complaint):
        environment.step(actions)
    good = actions_for(environment.single_action_space, np.random.default_rng(0), 2)
    for mine, other in zip(environment.step(good)[:4], twin.step(good)[:4], strict=True):
        assert (mine == other).all()


@pytest.mark.parametrize(
    ("environment", "action"),
    [
        (Gridworld(), 4),
        (Gridworld(), -1),
        (Gridworld(), 0.0),
        (Turtleworld(), np.array([0.0, np.nan])),
        (Turtleworld(), np.zeros(3)),
    ],
)
def test_a_single_environment_refuses_wrong_actions_too(environment, action):
    environment.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        environment.step(action)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_any_whole_numbers_are_moves(dtype):
    environment = GridworldVector(4)
    environment.reset(options={"state": [[2, 2, 0, 0]] * 4})
    assert environment.step(np.arange(4, dtype=dtype))[0][:, :2].tolist() == [[1, 2], [3, 2], [2, 3], [2, 1]]


@pytest.mark.parametrize(
    ("environment", "options", "complaint"),
    [
        (Gridworld(), {"states": (0, 0, 1, 1)}, "'states'.*knows only 'state'"),
        (Gridworld(), {"state": (0, 0, 1)}, r"of shape \[3\]; numbers of \[4\]"),
        (Gridworld(), {"state": (0, 0, 1, 5)}, "not on the grid"),
        (Gridworld(), {"state": (0, 0, 1, 0.5)}, "not on the grid"),
        (Gridworld(), {"state": (3, 2, 3, 2)}, "at its target"),
        (GridworldVector(2), {"state": (0, 0, 1, 1)}, r"of shape \[4\]; numbers of \[2, 4\]"),
        (GridworldVector(2), {"state": [(0, 0, 1, 1), (0, -1, 1, 1)]}, "not on the grid"),
        (GridworldVector(2), {"reset_mask": np.array([True, False])}, "'reset_mask'"),
        (Turtleworld(), {"state": (0, 0, 0, 1.1, 0)}, "outside the arena"),
        (Turtleworld(), {"state": (0, 0, math.nan, 1, 0)}, "outside the arena"),
        (Turtleworld(), {"state": (0, 0, 0, 0.05, 0)}, "within 0.1 of its target"),
        (TurtleworldVector(2), {"state": [(0, 0, 0, 1, 0), (0, 0, 0, 0, math.nan)]}, "outside the arena"),
    ],
)
def test_wrong_options_of_a_reset_are_refused_and_change_nothing(environment, options, complaint):
    environment.reset(seed=3)
    with pytest.raises(ValueError, match=complaint):
        environment.reset(seed=4, options=options)
    environment_twin = type(environment)(2) if hasattr(environment, "num_envs") else type(environment)()
    environment_twin.reset(seed=3)
    assert (environment.reset()[0] == environment_twin.reset()[0]).all()


def test_pictures():
    grid = Gridworld(size=3, render_mode="ansi")
    assert grid.render() is None
    grid.reset(options={"state": (0, 1, 2, 2)})
    assert grid.render() == ". A .\n. . .\n. . T"
    assert Gridworld().render() is None
    grids = GridworldVector(2, size=2, render_mode="ansi")
    grids.reset(options={"state": [(0, 0, 1, 1), (1, 0, 0, 1)]})
    assert grids.render() == ("A .\n. T", ". T\nA .")
    arena = Turtleworld(render_mode="ansi")
    for heading, arrow in [(0.0, "→"), (math.pi / 2, "↑"), (-3 * math.pi / 4, "↙"), (math.pi, "←"), (-math.pi, "←")]:
        arena.reset(options={"state": (-1.0, 1.0, heading, 1.0, -1.0)})
        lines = arena.render().split("\n")
        assert (lines[0][0], lines[-1][-1], len(lines)) == (arrow, "T", 21)
    arenas = TurtleworldVector(2, render_mode="ansi")
    arenas.reset(seed=0)
    assert [picture.count("T") for picture in arenas.render()] == [1, 1]

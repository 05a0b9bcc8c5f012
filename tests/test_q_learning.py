"""Q-learning: against a loop in NumPy, the end of episodes, keys, checkpoints, and a chain that it solves."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from angle_rl.agents import Agent, QLearning
from angle_rl.agents.discrete import epsilon_greedy, first_exploration, random_share
from angle_rl.agents.q_learning import StateIndex
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.spaces import map_space
from angle_rl.trainer import AgentTrainer
from angle_rl.types import EnvironmentState, RandomKey, RLState, reset_state


def config(folder="runs", *, training=None, **hyperparameters):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            **{"agent": "q_learning", "learning_rate": 0.5, "learning_starts": 0} | hyperparameters
        ),
        training=Training(**{"steps": 2_000, "evaluation_interval": None, "evaluation_episodes": 1} | (training or {})),
        service=Service(run_folder=str(folder), tensorboard=False, progress=False),
    )


def made(observation_space=spaces.Discrete(4), action_space=spaces.Discrete(2), **hyperparameters):  # noqa: B008
    agent = QLearning(config(**hyperparameters))
    state, _ = agent.init(RandomKey(1), observation_space=observation_space, action_space=action_space)
    return agent, state


def seen(observation, *, reward=0.0, terminated=False, truncated=False, final=None, stepped=True):
    """What environments showed, from numbers or lists."""
    observation = np.atleast_1d(np.asarray(observation))
    n = len(observation)

    def row(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), (n,)).copy()

    return EnvironmentState(
        observation,
        row(reward, float),
        row(terminated, bool),
        row(truncated, bool),
        observation if final is None else np.atleast_1d(np.asarray(final)),
        row(stepped, bool),
    )


def taught(agent, state, before, action, after):
    """The state after one step of the environments."""
    old = RLState(state, before, RandomKey(0), 0, 0, None)
    new = old._replace(environment_state=after)
    return agent.optimize_model(
        agent.record_observation(old, np.atleast_1d(action), after.reward, after.terminated, new)
    )


# The update ---------------------------------------------------------------------------------------------------


def test_it_is_an_agent():
    assert isinstance(QLearning(config()), Agent)


def test_the_table_equals_a_loop_s_over_several_environments():
    """4 environments on 5 states and 3 actions: with repeated states, ends of both kinds and reset rows."""
    rng = np.random.default_rng(3)
    agent, state = made(spaces.Discrete(5), spaces.Discrete(3), learning_rate=0.3, discount=0.9)
    table, updates = np.zeros((5, 3)), 0
    before = reset_state(rng.integers(0, 5, 4), 4)
    for _ in range(200):
        actions = rng.integers(0, 3, 4)
        after = seen(
            rng.integers(0, 5, 4),
            reward=rng.normal(size=4),
            terminated=rng.random(4) < 0.2,
            truncated=rng.random(4) < 0.2,
            final=rng.integers(0, 5, 4),
            stepped=rng.random(4) < 0.8,
        )
        taught(agent, state, before, actions, after)
        for i in range(4):
            if after.stepped[i]:
                s, a, s2 = before.observation[i], actions[i], after.final_observation[i]
                future = 0.0 if after.terminated[i] else 0.9 * table[s2].max()
                table[s, a] = table[s, a] + 0.3 * (after.reward[i] + future - table[s, a])
                updates += 1
        before = after
    assert np.array_equal(state.policy.table.numpy(), table)
    assert state.steps == state.updates == updates
    assert state.policy.table.dtype == torch.float64


def test_a_linear_learning_rate_falls_to_nothing_at_the_last_step():
    agent, state = made(learning_rate=0.5, learning_rate_schedule="linear")
    steps, entry = agent.config.training.steps, 0.0
    for step, share in ((1, 1 - 1 / steps), (steps // 2, 0.5), (steps, 0.0), (steps + 5, 0.0)):
        state.steps = step - 1
        taught(agent, state, seen(0), 1, seen(1, reward=1.0, terminated=True))
        entry += 0.5 * share * (1.0 - entry)
        assert state.policy.table[0, 1] == pytest.approx(entry)


@pytest.mark.parametrize(("flags", "value"), [({"terminated": True}, 1.0), ({"truncated": True}, 10.0), ({}, 10.0)])
def test_only_a_true_end_cuts_the_future_off_and_the_final_observation_counts(flags, value):
    agent, state = made(learning_rate=1.0, discount=0.9)
    state.policy.table[3] = 10.0
    taught(agent, state, seen(0), 1, seen(1, reward=1.0, final=3, **flags))
    assert state.policy.table[0].tolist() == [0.0, 1.0 if value == 1.0 else 1.0 + 0.9 * 10.0]


def test_actions_and_observations_count_from_their_start():
    agent, state = made(spaces.Discrete(3, start=5), spaces.Discrete(2, start=-1))
    taught(agent, state, seen(7), 0, seen(5, reward=2.0, terminated=True))
    assert state.policy.table.nonzero().tolist() == [[2, 1]]
    actions, log_prob = state.policy.sample_actions(torch.tensor([5, 7]), True)
    assert actions.tolist() == [-1, 0]
    assert actions.dtype == torch.int64
    assert log_prob.tolist() == [0, 0]


def test_nothing_is_learned_until_learning_starts_and_then_from_each():
    agent, state = made(learning_starts=3)
    for _ in range(5):
        taught(agent, state, seen(0), 0, seen(1, reward=1.0))
    assert (state.steps, state.updates) == (5, 2)


def test_what_does_not_fit_is_refused_and_nothing_kept():
    agent, state = made()
    for before, action, after in [
        (seen(4), 0, seen(0)),
        (seen(0), 2, seen(0)),
        (seen(0), 0, seen(0, final=-1)),
        (seen(0), 0, seen(0, reward=np.nan)),
    ]:
        with pytest.raises(ValueError, match=r"lies outside|there are 2 actions|must be finite"):
            taught(agent, state, before, action, after)
    assert state.steps == 0
    assert state.waiting == []


# Which spaces ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3))
def test_every_observation_has_a_number_of_its_own(counts, n):
    space = spaces.Dict(
        a=spaces.Tuple([spaces.MultiDiscrete(counts), spaces.Discrete(n, start=-2)]), b=spaces.MultiBinary(2)
    )
    index = StateIndex(space)
    grid = np.indices((*counts, n, 2, 2)).reshape(len(counts) + 3, -1).T
    observations = {"b": grid[:, -2:], "a": (grid[:, : len(counts)], grid[:, len(counts)] - 2)}
    assert index(observations).tolist() == list(range(index.size))
    assert index.size == len(grid)
    tensors = map_space(lambda _, leaf: torch.as_tensor(leaf.copy()), space, observations)
    assert index(tensors).tolist() == list(range(index.size))


@pytest.mark.parametrize(
    ("observation_space", "action_space", "says"),
    [
        (spaces.Box(-1, 1, (2,)), spaces.Discrete(2), "needs Discrete, MultiDiscrete or MultiBinary"),
        (spaces.Discrete(2), spaces.MultiDiscrete([2, 2]), "needs finitely many actions"),
        (spaces.MultiBinary(40), spaces.Discrete(2), "at most 268435456 entries"),
    ],
)
def test_other_spaces_are_refused(observation_space, action_space, says):
    with pytest.raises(ValueError, match=says):
        made(observation_space, action_space)


def test_options_without_a_meaning_are_refused():
    for option in ({"learning_rate": 1.5}, {"n_step": 2}, {"updates_per_step": 0.5}):
        with pytest.raises(ValueError, match=next(iter(option))):
            QLearning(config(**option))
    with pytest.raises(ValueError, match="device is 'meta'"):
        QLearning(config(training={"device": "meta"}))
    with pytest.raises(ValueError, match="q_future is given"):
        QLearning(config(), q_future=max)
    for part in ("policy", "critics", "replay", "meta"):
        with pytest.raises(ValueError, match=f"{part} is given; Q-learning has no {part}"):
            QLearning(config()).init(
                RandomKey(0), observation_space=spaces.Discrete(2), action_space=spaces.Discrete(2), **{part: 1}
            )


# Exploration -------------------------------------------------------------------------------------------------


def test_the_share_of_random_actions_follows_the_schedule():
    exploration = first_exploration(
        Hyperparameters(
            exploration_schedule="linear", exploration_epsilon=0.9, exploration_minimum=0.1, exploration_steps=40
        )
    )
    shares = [random_share(exploration, steps, 10) for steps in (0, 9, 10, 20, 40, 1000)]
    assert shares == pytest.approx([1.0, 1.0, 0.7, 0.5, 0.1, 0.1])
    with pytest.raises(ValueError, match=r"minimum is 0.2"):
        QLearning(config(exploration_schedule="linear", exploration_minimum=0.2))


def test_a_plateau_lets_epsilon_grow_and_a_checkpoint_keeps_it():
    options = {"exploration_schedule": "plateau", "exploration_window": 2, "exploration_growth": 2.0}
    agent, state = made(**options)
    for _ in range(3):
        taught(agent, state, seen(0), 0, seen(1, reward=1.0, terminated=True))
    assert state.exploration.scale(state.steps) == pytest.approx(0.4)  # grew with the second episode and the third
    tensors, values = agent.export_state(state)
    other_agent, other = made(**options)
    other_agent.import_state(other, tensors, values)
    assert other.exploration.scale(0) == pytest.approx(0.4)


def test_epsilon_greedy_mixes_in_uniform_actions():
    greedy = torch.full((40_000,), 2)
    actions = epsilon_greedy(greedy, 5, 0.4, RandomKey(0))
    shares = torch.bincount(actions, minlength=5) / len(greedy)
    assert shares.tolist() == pytest.approx([0.08, 0.08, 0.68, 0.08, 0.08], abs=0.006)
    assert torch.equal(epsilon_greedy(greedy, 5, 0.0, RandomKey(0)), greedy)


def test_the_same_key_gives_the_same_actions_and_equals_are_chosen_among():
    agent, state = made(spaces.Discrete(2), spaces.Discrete(4), exploration_epsilon=0.0)
    state.policy.table[0] = torch.tensor([1.0, 3.0, 3.0, 2.0])
    here = RLState(state, seen(np.zeros(2_000, np.int64)), RandomKey(7), 0, 0, None)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    actions, after = agent.select_action(here, 0)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert actions.dtype == np.int64
    assert set(actions.tolist()) == {1, 2}
    assert 900 < np.count_nonzero(actions == 1) < 1100
    assert np.array_equal(agent.select_action(here, 0)[0], actions)
    assert after.random_key != here.random_key
    assert not np.array_equal(agent.select_action(after, 0)[0], actions)
    assert state.policy.sample_actions(torch.zeros(3, dtype=torch.int64))[0].tolist() == [1, 1, 1]


# Whole runs --------------------------------------------------------------------------------------------------


class Chain(gymnasium.Env):
    """States 0 to 3: right leads on, left pays 0.1 and stays; right in the last one pays 1 and ends."""

    observation_space = spaces.Discrete(4)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = 0, 0
        return self.state, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        ended = action == 1 and self.state == 3
        reward = 0.1 if action == 0 else float(ended)
        self.state = min(self.state + int(action), 3)
        return self.state, reward, ended, self.steps >= 20 and not ended, {}


def optimal_values(discount):
    q = np.zeros((4, 2))
    for _ in range(10_000):
        value = q.max(1)
        q = np.array([[0.1 + discount * value[s], 1.0 if s == 3 else discount * value[s + 1]] for s in range(4)])
    return q


@pytest.mark.parametrize(
    ("environments", "discount", "best_actions", "best_return"),
    [
        (1, 0.8, [1, 1, 1, 1], 1.0),  # 0.1 / (1 - 0.8) is less than 0.8 ** 3
        (3, 0.5, [0, 1, 1, 1], 20 * 0.1),  # 0.1 / (1 - 0.5) is more than 0.5 ** 3 and less than 0.5 ** 2
    ],
)
def test_a_chain_is_solved_to_its_optimal_values(tmp_path, environments, discount, best_actions, best_return):
    trainer = AgentTrainer(
        config(
            tmp_path,
            training={"steps": 3_000, "parallel_environments": environments},
            discount=discount,
            exploration_epsilon=0.5,
        ),
        feed=Chain,
    )
    evaluation = trainer.train()
    best = optimal_values(discount)
    assert best.argmax(1).tolist() == best_actions
    assert trainer.policy.table.numpy() == pytest.approx(best, abs=1e-4)
    assert trainer.policy.table.argmax(1).tolist() == best_actions
    assert evaluation.returns == pytest.approx([best_return])
    assert trainer.updates == trainer.steps == 3_000


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Each environment begins a new episode where a run was cut, so that the cut lies at an episode's end."""

    class FiveSteps(Chain):
        def step(self, action):
            observation, reward, _, _, infos = super().step(action)
            return observation, reward, False, self.steps >= 5, infos

    whole = AgentTrainer(config(tmp_path / "whole", training={"steps": 100}), feed=FiveSteps)
    whole.train()
    part = AgentTrainer(config(tmp_path / "part", training={"steps": 50}), feed=FiveSteps)
    part.train()
    rest = AgentTrainer(config(tmp_path / "rest", training={"steps": 100}), feed=FiveSteps)
    rest.load(part.run_folder)
    assert torch.equal(rest.policy.table, part.policy.table)
    rest.train()
    assert (rest.steps, rest.updates) == (100, 100)
    assert torch.equal(rest.policy.table, whole.policy.table)


def test_transitions_not_yet_learned_from_are_saved_too():
    agent, state = made()
    before, after = seen([0, 1]), seen([2, 3], reward=[1.5, -2.0], terminated=[True, False])
    old = RLState(state, before, RandomKey(0), 0, 0, None)
    following = old._replace(environment_state=after)
    for _ in range(2):
        recorded = agent.record_observation(old, np.array([1, 0]), after.reward, after.terminated, following)
    tensors, values = agent.export_state(state)
    other_agent, other = made()
    other_agent.import_state(other, {name: t.clone() for name, t in tensors.items()}, values)
    agent.optimize_model(recorded)
    other_agent.optimize_model(recorded._replace(agent_state=other))
    assert torch.equal(other.policy.table, state.policy.table)
    assert state.policy.table.abs().sum() > 0
    assert (other.steps, other.updates) == (state.steps, state.updates) == (4, 4)


def test_an_import_that_does_not_fit_changes_nothing():
    agent, state = made()
    state.policy.table += 1.0
    tensors, values = agent.export_state(state)
    for bad_tensors, bad_values, says in [
        ({"table": tensors["table"]}, values, "has no waiting"),
        (tensors | {"table": torch.zeros(3, 2)}, values, "table has shape"),
        (tensors | {"waiting": torch.zeros(3, 2)}, values, "waiting has shape"),
        (tensors | {"critics.weight": torch.zeros(1)}, values, "holds critics.weight"),
        (tensors | {"table": torch.zeros(4, 2)}, {}, "no counters"),
    ]:
        with pytest.raises(ValueError, match=says):
            agent.import_state(state, bad_tensors, bad_values)
    assert bool((state.policy.table == 1.0).all())

"""Schedules of exploration: the plateau rule against a plain one, whose returns count, what JSON keeps."""

import dataclasses
import json
import math
from collections import deque

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from angle_rl.agents import DDPG, SAC, TD3
from angle_rl.agents.exploration import Exploration, Schedule, linear_scale, make_schedule, plateau_scale
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.feed import FunctionFeed
from angle_rl.trainer import AgentTrainer
from angle_rl.types import EnvironmentState, reset_state


def plateau(**fields):
    return Schedule(**{"kind": "plateau", "start": 0.2, "window": 4, "growth": 1.5, "decay": 0.5} | fields)


def seen(rewards, terminated=(), truncated=(), stepped=None):
    n = len(rewards)
    rows = np.arange(n)
    observation = np.zeros((n, 1), np.float32)
    return EnvironmentState(
        observation,
        np.array(rewards, np.float64),
        np.isin(rows, terminated),
        np.isin(rows, truncated),
        observation,
        np.ones(n, np.bool_) if stepped is None else np.isin(rows, stepped),
    )


# Schedules ----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-2, 2) | st.sampled_from([0.0, 0.01, 0.02]), max_size=60),
    st.integers(1, 6),
    st.floats(0, 0.5),
    st.floats(1, 2),
    st.floats(0.1, 1),
)
def test_the_plateau_rule_agrees_with_a_plain_one(returns, half, gap, growth, decay):
    schedule = Schedule(
        start=0.2, kind="plateau", minimum=0.05, maximum=0.6, window=2 * half, gap=gap, growth=growth, decay=decay
    )
    exploration = Exploration(schedule)
    scale, memory = 0.2, deque(maxlen=2 * half)
    for one in returns:
        exploration.episode_ended(one)
        memory.append(one)
        if len(memory) == 2 * half:
            values = list(memory)
            difference = math.fsum(values[half:]) / half - math.fsum(values[:half]) / half
            scale *= growth if abs(difference) < gap else decay
            scale = max(0.05, min(0.6, scale))
        assert exploration.scale(0) == scale
        assert exploration.returns == list(memory)


def test_the_plateau_rule_by_hand():
    exploration = Exploration(plateau())
    for one in (1.0, 1.0, 1.0):
        exploration.episode_ended(one)
    assert exploration.scale(0) == 0.2  # three returns of four
    exploration.episode_ended(1.005)
    assert exploration.scale(0) == pytest.approx(0.3)  # 1 and 1.0025: no more than 0.01 apart
    exploration.episode_ended(2.0)
    assert exploration.scale(0) == pytest.approx(0.15)  # 1 and 1.5
    exploration.episode_ended(-9.0)
    assert exploration.scale(0) == pytest.approx(0.075)  # it fell: that is no plateau either


def test_the_defaults_are_the_last_500_returns_and_a_gap_of_a_hundredth():
    schedule = make_schedule(Hyperparameters(exploration_schedule="plateau"), 0.2)
    returns = [0.0] * 250 + [0.0099] * 250
    assert plateau_scale(schedule, 0.2, returns[1:]) == 0.2
    assert plateau_scale(schedule, 0.2, returns) > 0.2
    assert plateau_scale(schedule, 0.2, [*returns[:250], *[0.0101] * 250]) < 0.2
    assert plateau_scale(schedule, 0.2, [1e9, *returns]) > 0.2  # the 501st no longer counts


def test_the_scale_stays_within_its_limits():
    exploration = Exploration(plateau(minimum=0.1, maximum=0.5))
    for _ in range(20):
        exploration.episode_ended(1.0)
    assert exploration.scale(0) == 0.5
    for index in range(20):
        exploration.episode_ended(float(index))
    assert exploration.scale(0) == 0.1


def test_a_line_falls_to_the_minimum_and_stays():
    exploration = Exploration(Schedule(start=1.0, kind="linear", minimum=0.2, steps=100))
    assert [exploration.scale(steps) for steps in (0, 50, 100, 10_000)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert linear_scale(exploration.schedule, 100) == 0.2  # to the bit
    exploration.episode_ended(5.0)
    assert exploration.returns == []


def test_a_constant_stays():
    exploration = Exploration(Schedule(start=0.3))
    for _ in range(1000):
        exploration.episode_ended(1.0)
    assert exploration.scale(0) == exploration.scale(10**9) == 0.3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "cosine"}, "kind is 'cosine'; it must be one of constant, linear, plateau"),
        ({"start": -0.1}, r"start is -0.1; it must be in \[0, inf\)"),
        ({"start": math.nan}, "start is nan"),
        ({"start": 0.5, "kind": "linear", "minimum": 0.6}, r"minimum is 0.6; it must be in \[0, start\], .* 0.5"),
        ({"kind": "linear", "steps": 0}, "steps is 0"),
        ({"kind": "plateau", "minimum": 0.0}, "minimum is 0.0; .* could never grow"),
        ({"kind": "plateau", "start": 2.0}, r"start is 2.0; it must be in \[minimum, maximum\].*\[0.01, 1.0\]"),
        ({"kind": "plateau", "minimum": 0.3}, "start is 0.2"),
        ({"kind": "plateau", "window": 5}, "window is 5; it must be even"),
        ({"kind": "plateau", "growth": 0.9}, "growth is 0.9"),
        ({"kind": "plateau", "decay": 0.0}, "decay is 0.0"),
        ({"kind": "plateau", "gap": -1.0}, "gap is -1.0"),
    ],
)
def test_contradictory_schedules_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Schedule(**{"start": 0.2} | fields)


def test_a_return_that_is_not_finite_is_refused():
    exploration = Exploration(plateau())
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"episode_return is {bad}; it must be finite"):
            exploration.episode_ended(bad)
    assert exploration.returns == []


# Whose returns ------------------------------------------------------------------------------------------------


def test_each_environments_episodes_count_once_with_their_own_return():
    exploration = Exploration(plateau(window=10))
    exploration.record(seen([1.0, 10.0]))
    exploration.record(seen([2.0, 20.0], terminated=[1]))
    exploration.reset(seen([2.0, 20.0], terminated=[1]))  # says nothing new
    assert exploration.returns == [30.0]
    exploration.record(seen([4.0, 99.0], truncated=[0], stepped=[0]))  # row 1 spends the step on its reset
    assert exploration.returns == [30.0, 7.0]
    exploration.record(seen([0.0, 5.0], terminated=[0, 1]))
    assert exploration.returns == [30.0, 7.0, 0.0, 5.0]


def test_an_episode_that_is_cut_short_counts_and_one_that_never_began_does_not():
    exploration = Exploration(plateau(window=10))
    exploration.record(seen([1.0, 2.0, 3.0], terminated=[1]))
    exploration.record(seen([1.0, 0.0, 3.0], stepped=[0, 2]))  # 1 waits for the others
    exploration.reset(reset_state(np.zeros((3, 1), np.float32), 3))
    assert exploration.returns == [2.0, 2.0, 6.0]
    exploration.reset(reset_state(np.zeros((3, 1), np.float32), 3))
    assert exploration.returns == [2.0, 2.0, 6.0]


# JSON ---------------------------------------------------------------------------------------------------------


def test_schedule_and_state_go_through_json():
    exploration = Exploration(plateau())
    for one in (0.1, 0.2, 1 / 3, 0.4, 0.5):
        exploration.episode_ended(one)
    exploration.record(seen([7.0]))
    text = json.dumps([dataclasses.asdict(exploration.schedule), exploration.export_state()])
    fields, values = json.loads(text)
    restored = Exploration(Schedule(**fields))
    restored.import_state(values)
    assert restored.schedule == exploration.schedule
    assert restored.returns == exploration.returns
    assert restored.scale(0) == exploration.scale(0) != 0.2
    restored.record(seen([1.0], terminated=[0]))
    assert restored.returns[-1] == 1.0  # a load begins new episodes


def test_a_damaged_state_is_refused_and_nothing_changes():
    exploration = Exploration(plateau())
    for wrong in ({}, {"scale": 0.1}, {"scale": 0.1, "returns": 3}, {"scale": None, "returns": []}):
        with pytest.raises(ValueError, match="must have a scale and returns"):
            exploration.import_state(wrong)
    with pytest.raises(ValueError, match="not finite"):
        exploration.import_state({"scale": 0.1, "returns": [math.nan]})
    assert (exploration.scale(0), exploration.returns) == (0.2, [])


def test_another_schedule_takes_what_it_can():
    saved = {"scale": 0.9, "returns": [1.0, 2.0, 3.0]}
    narrow = Exploration(plateau(window=2, maximum=0.5))
    narrow.import_state(saved)
    assert (narrow.scale(0), narrow.returns) == (0.5, [2.0, 3.0])
    constant = Exploration(Schedule(start=0.1))
    constant.import_state(saved)
    assert (constant.scale(0), constant.returns) == (0.1, [])


# In the agents ------------------------------------------------------------------------------------------------


def config(folder, steps=60, **hyperparameters):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            **{"hidden_sizes": (8,), "batch_size": 8, "learning_starts": 10, "replay_capacity": 500} | hyperparameters
        ),
        training=Training(steps=steps, evaluation_interval=None, evaluation_episodes=1),
        service=Service(run_folder=str(folder), tensorboard=False),
    )


def feed(reward=lambda observation: 1.0, **options):
    def function(observation, action):
        observation = np.clip(observation + 0.1 * action, -1, 1).astype(np.float32)
        return observation, reward(observation)

    return FunctionFeed(
        function,
        initial_observation=np.array([0.5], np.float32),
        action_space=spaces.Box(-1.0, 1.0, (1,), np.float32),
        step_limit=5,
        **options,
    )


PLATEAU = {"exploration_schedule": "plateau", "exploration_window": 4, "exploration_growth": 1.5}


@pytest.mark.parametrize("agent", ["td3", "ddpg"])
def test_returns_that_stand_still_make_the_noise_grow(tmp_path, agent):
    trainer = AgentTrainer(config(tmp_path, agent=agent, **PLATEAU), feed(num_environments=2))
    trainer.train()
    exploration = trainer.rl_state.agent_state.exploration
    assert exploration.returns == [5.0] * 4
    first = {"td3": 0.1, "ddpg": 0.2}[agent]
    assert exploration.scale(60) == pytest.approx(min(1.0, first * 1.5**9))  # 12 episodes, 3 before the window is full


def test_the_noise_has_the_schedules_scale(tmp_path):
    options = {"agent": "ddpg", "exploration_schedule": "linear", "exploration_minimum": 0.0, "exploration_steps": 30}
    trainer = AgentTrainer(config(tmp_path, **options), feed())
    trainer.train()
    state = trainer.rl_state
    before = state.agent_state.noise
    trainer.agent.select_action(state, 0)
    # With sigma 0 only the pull is left.
    np.testing.assert_allclose(state.agent_state.noise, 0.85 * before, rtol=1e-6)


def test_an_agent_without_noise_refuses_a_schedule():
    with pytest.raises(
        ValueError, match=r"exploration_schedule is 'plateau', but SAC adds no noise.*exploration_process"
    ):
        SAC(AgentConfig(hyperparameters=Hyperparameters(**PLATEAU)))
    with pytest.raises(ValueError, match="but TD3 adds no noise"):
        TD3(AgentConfig(hyperparameters=Hyperparameters(agent="td3", exploration_process="none", **PLATEAU)))
    SAC(AgentConfig(hyperparameters=Hyperparameters(exploration_process="ou", **PLATEAU)))
    with pytest.raises(ValueError, match=r"start is 3\.0"):
        DDPG(AgentConfig(hyperparameters=Hyperparameters(agent="ddpg", exploration_noise=3.0, **PLATEAU)))


@pytest.mark.parametrize("agent", ["td3", "ddpg"])
def test_a_resumed_run_explores_as_an_uninterrupted_one(tmp_path, agent):
    options = {"agent": agent} | PLATEAU | {"exploration_decay": 0.8}
    distance = lambda observation: -float(np.abs(observation).sum())  # noqa: E731
    whole = AgentTrainer(config(tmp_path / "whole", steps=100, **options), feed(distance))
    whole.train()
    half = AgentTrainer(config(tmp_path / "half", steps=50, **options), feed(distance))
    half.train()
    resumed = AgentTrainer.resume(half.run_folder, config(tmp_path / "half", steps=100, **options), feed=feed(distance))
    resumed.train()
    first, second = (trainer.rl_state.agent_state for trainer in (whole, resumed))
    assert first.exploration.export_state() == second.exploration.export_state()
    assert first.exploration.scale(0) != half.rl_state.agent_state.exploration.scale(0)
    tensors, again = (trainer.agent.export_state(state)[0] for trainer, state in ((whole, first), (resumed, second)))
    assert tensors.keys() == again.keys()
    for name, tensor in tensors.items():
        if name.startswith("replay."):  # after a resume its rows go to new streams
            continue
        np.testing.assert_array_equal(tensor.numpy(), again[name].numpy(), err_msg=name)

"""Running by episodes: the order of calls, who takes part, and what is left behind."""

import dataclasses
import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.feed import FunctionFeed, GymnasiumFeed
from angle_rl.trainer import AgentTrainer
from angle_rl.types import EnvironmentState, reset_state

BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)


class Counting:
    """Environments that show [episode, step] and end after so many steps each; they write down what they are asked."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = BOX
    name = "counting"

    def __init__(self, lengths, calls=None):
        self.lengths, self.calls = np.array(lengths), [] if calls is None else calls
        self.num_environments = len(lengths)
        self.shown = np.zeros((len(lengths), 2), np.float32)

    def _begin(self, call, random_key):
        self.calls.append(call)
        random_key = random_key.split(1)[0]
        self.shown = np.stack([self.shown[:, 0] + 1, np.zeros(len(self.lengths))], 1).astype(np.float32)
        return reset_state(self.shown.copy(), self.num_environments), random_key

    def init(self, random_key):
        return self._begin("feed.init", random_key)

    def reset(self, random_key, environment_state):
        return self._begin("feed.reset", random_key)

    def step(self, random_key, environment_state, actions):
        self.calls.append("feed.step")
        final = self.shown + np.array([0, 1], np.float32)
        ended = final[:, 1] >= self.lengths
        self.shown = np.where(ended[:, None], np.stack([final[:, 0] + 1, 0 * final[:, 1]], 1), final)
        none = np.zeros(len(ended), bool)
        seen = EnvironmentState(self.shown.copy(), final[:, 1].astype(np.float64), ended, none, final, ~none)
        return seen, random_key

    def close(self):
        pass


class Recorder:
    """An agent that does nothing and writes down what it is asked."""

    def __init__(self, calls):
        self.calls = calls

    def init(self, random_key, **options):
        self.calls.append("agent.init")
        return {"told": 0}, random_key.split(1)[0]

    def reset(self, random_key, rl_state):
        self.calls.append(("agent.reset", rl_state.episode, rl_state.environment_state.observation[0].tolist()))
        return {"told": rl_state.agent_state["told"] + 1}, random_key.split(1)[0]

    def select_action(self, rl_state, iteration):
        assert iteration == rl_state.iteration
        self.calls.append(("select_action", iteration))
        n = len(rl_state.environment_state.reward)
        return np.zeros((n, 1), np.float32), rl_state._replace(random_key=rl_state.random_key.split(1)[0])

    def record_observation(self, rl_state, action, reward, terminated, next_rl_state):
        before, after = rl_state.environment_state, next_rl_state.environment_state
        assert reward is after.reward
        assert terminated is after.terminated
        assert rl_state.iteration == next_rl_state.iteration
        self.calls.append(("record", before.observation[:, 1].tolist(), after.stepped.tolist()))
        return rl_state  # it records nothing: what comes next is the runner's to take

    def optimize_model(self, rl_state):
        self.calls.append("optimize_model")
        return rl_state


def config(folder, steps=1000, **hyperparameters):
    small = {"hidden_sizes": (8,), "batch_size": 4, "learning_starts": 6, "replay_capacity": 500}
    return AgentConfig(
        hyperparameters=Hyperparameters(**small | hyperparameters),
        training=Training(steps=steps, evaluation_interval=None, evaluation_episodes=1),
        service=Service(run_folder=str(folder), tensorboard=False, progress=False),
    )


def recorded(tmp_path, lengths=(2,), **options):
    calls = []
    feed = Counting(lengths, calls)
    trainer = AgentTrainer(config(tmp_path), feed, agent=Recorder(calls))
    with pytest.warns(UserWarning, match="without evaluation"):
        trainer.train(**options)
    return trainer, calls


def test_the_order_of_calls(tmp_path):
    noted = []
    trainer, calls = recorded(
        tmp_path,
        num_episodes=2,
        state_to_trajectory=lambda state: (state.iteration, state.environment_state.observation[0].tolist()),
        episode_completed=lambda state, episode, iteration: noted.append((episode, iteration, state.trajectory)),
    )
    step = lambda i: [("select_action", i), "feed.step", ("record", [i], [True]), "optimize_model"]  # noqa: E731
    assert calls == [
        "agent.init",
        "feed.init",
        ("agent.reset", 0, [1, 0]),
        "feed.reset",
        ("agent.reset", 0, [2, 0]),
        *step(0),
        *step(1),
        "feed.reset",
        ("agent.reset", 1, [4, 0]),  # 3 began by itself when 2 ended
        *step(0),
        *step(1),
    ]
    assert noted == [
        (1, 2, [(0, [2, 0]), (0, [2, 1]), (1, [3, 0])]),
        (2, 2, [(0, [4, 0]), (0, [4, 1]), (1, [5, 0])]),
    ]
    assert (trainer.rl_state.episode, trainer.rl_state.iteration, trainer.steps) == (2, 2, 4)
    assert trainer.rl_state.agent_state == {"told": 3}


def test_those_that_ended_neither_step_nor_are_recorded(tmp_path):
    trainer, calls = recorded(tmp_path, lengths=(1, 3), num_episodes=1)
    assert [call for call in calls if call[0] == "record"] == [
        ("record", [0, 0], [True, True]),
        ("record", [0, 1], [False, True]),
        ("record", [0, 2], [False, True]),
    ]
    seen = trainer.rl_state.environment_state
    assert seen.terminated.tolist() == [True, True]
    assert seen.reward.tolist() == [0.0, 3.0]
    assert trainer.steps == 4


class Timed(gymnasium.Env):
    """Ends after so many steps, and counts all that it is asked for."""

    observation_space, action_space = spaces.Box(0, 100, (1,), np.float32), BOX

    def __init__(self, length):
        self.length, self.now, self.steps, self.resets = length, 0, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now, self.resets = 0, self.resets + 1
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.now, self.steps = self.now + 1, self.steps + 1
        return np.full(1, self.now, np.float32), 1.0, self.now == self.length, False, {}


@pytest.mark.parametrize("options", [{}, {"normalize_observations": True}])
def test_an_environment_that_ended_is_not_asked_for_more(tmp_path, options):
    environments = [Timed(1), Timed(4)]
    settings = config(tmp_path)
    settings = dataclasses.replace(settings, training=dataclasses.replace(settings.training, **options))
    trainer = AgentTrainer(settings, GymnasiumFeed(environments), evaluation_feed=GymnasiumFeed([Timed(2)]))
    trainer.train(num_episodes=3)
    assert [one.steps for one in environments] == [3, 12]
    assert trainer.steps == len(trainer.replay) == 15


def test_nor_is_a_function(tmp_path):
    asked = []

    def function(observation, action, time_step):
        asked.append(float(observation[0]))
        return observation, 1.0, bool(observation[0] < 0.5) or time_step == 3

    starts = itertools.cycle([0.0, 1.0])
    feed = FunctionFeed(
        function,
        initial_observation=lambda key: np.array([next(starts)], np.float32),
        action_space=BOX,
        num_environments=2,
    )
    evaluation = walk_feed()
    AgentTrainer(config(tmp_path), feed, evaluation_feed=evaluation).train(num_episodes=1)
    assert sorted(asked) == [0.0] + [1.0] * 4


def test_a_limit_cuts_the_episode_and_its_last_step_is_learned_from(tmp_path):
    trainer, calls = recorded(tmp_path, lengths=(2, 9), num_episodes=2, max_iterations=3)
    assert calls.count("optimize_model") == calls.count("feed.step") == 6
    seen = trainer.rl_state.environment_state
    assert (seen.terminated.tolist(), seen.truncated.tolist()) == ([True, False], [False, True])
    assert trainer.rl_state.iteration == 3


def walk_feed(n=1, step_limit=10):
    return FunctionFeed(
        lambda observation, action: ((observation + 1).astype(np.float32), 1.0),
        initial_observation=np.zeros(1, np.float32),
        action_space=BOX,
        step_limit=step_limit,
        num_environments=n,
    )


def test_the_replay_keeps_episodes_apart(tmp_path):
    trainer = AgentTrainer(config(tmp_path, n_step=5, discount=1.0, replay="uniform"), walk_feed(2))
    trainer.train(num_episodes=3, max_iterations=4)
    trainer.train(num_episodes=1, max_iterations=2)
    arrays = trainer.replay.export_arrays()
    assert len(arrays["rewards"]) == trainer.steps == 2 * (3 * 4 + 2)
    assert arrays["truncated"].sum() == 2 * 4
    batch = trainer.replay.sample(400)
    # A window begun at observation k of an episode of length 4 or 2 ends with it.
    assert (batch.steps <= 4 - batch.observations[:, 0]).all()
    assert torch.equal(batch.rewards, batch.steps.float())
    assert torch.equal(batch.next_observations[:, 0], batch.observations[:, 0] + batch.steps)


def test_the_rows_before_and_after_a_resume_are_in_no_window_together(tmp_path):
    first = AgentTrainer(config(tmp_path, steps=23, n_step=5, replay="uniform"), walk_feed())
    first.train()
    again = AgentTrainer.resume(
        first.run_folder, config(tmp_path, steps=40, n_step=5, replay="uniform"), feed=walk_feed()
    )
    again.train()
    batch = again.replay.sample(500)
    assert torch.equal(batch.next_observations[:, 0], batch.observations[:, 0] + batch.steps)
    assert batch.steps.max() == 5


def test_it_learns_by_episodes_and_by_steps_with_one_loop(tmp_path):
    by_steps = AgentTrainer(config(tmp_path, steps=30), walk_feed(step_limit=10))
    by_steps.train()
    by_episodes = AgentTrainer(config(tmp_path, steps=30), walk_feed(step_limit=10))
    evaluation = by_episodes.train(num_episodes=3)
    assert (by_episodes.steps, by_episodes.updates) == (by_steps.steps, by_steps.updates) == (30, 24)
    assert evaluation.lengths == (10,)
    by_episodes.train(num_episodes=2)
    assert (by_episodes.steps, by_episodes.rl_state.episode) == (50, 5)


def test_checkpoints_of_episodes_are_numbered_on(tmp_path):
    numbers = []
    trainer = AgentTrainer(config(tmp_path / "runs"), walk_feed(step_limit=3))
    trainer.train(
        num_episodes=4,
        accumulated_episodes=10,
        episode_completed=lambda state, episode, iteration: numbers.append((state.episode, episode, iteration)),
        checkpoint_filter=lambda state, episode: episode % 2 == 0,
        checkpoint_path=tmp_path / "kept",
        model_name="walker",
    )
    assert numbers == [(number, number, 3) for number in (11, 12, 13, 14)]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["walker-000012", "walker-000014"]
    resumed = AgentTrainer(config(tmp_path / "runs"), walk_feed(step_limit=3))
    resumed.load(tmp_path / "kept" / "walker-000012")
    assert (resumed.rl_state.episode, resumed.steps) == (12, 6)
    resumed.train(num_episodes=1, checkpoint_filter=lambda state, episode: True)  # into the run's own folder
    assert resumed.rl_state.episode == 13
    assert list((resumed.run_folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_episodes": 0}, "num_episodes is 0"),
        ({"num_episodes": True}, "num_episodes is True"),
        ({"num_episodes": 1, "max_iterations": 0}, "max_iterations is 0"),
        ({"num_episodes": 1, "accumulated_episodes": -1}, "accumulated_episodes is -1"),
        ({"num_episodes": 1, "checkpoint_path": "x"}, "without checkpoint_filter"),
        ({"num_episodes": 1, "episode_completed": 3}, "episode_completed is a int"),
        ({"max_iterations": 3}, "num_episodes is None"),
        ({"model_name": "x"}, "num_episodes is None"),
    ],
)
def test_options_without_sense_are_refused(tmp_path, options, message):
    trainer = AgentTrainer(config(tmp_path), walk_feed())
    with pytest.raises((ValueError, TypeError), match=message):
        trainer.train(**options)
    assert not list(tmp_path.iterdir())
    assert trainer.steps == 0


def test_an_agent_that_cannot_be_saved_cannot_be_asked_for_checkpoints(tmp_path):
    trainer = AgentTrainer(config(tmp_path), Counting((2,)), agent=Recorder([]))
    with pytest.raises(TypeError, match="no export_state"):
        trainer.train(num_episodes=1, checkpoint_filter=lambda state, episode: True)


def test_many_episodes_of_many_environments(tmp_path):
    lengths = list(itertools.chain.from_iterable([[1, 2, 5]] * 4))
    trainer, _ = recorded(tmp_path, lengths=lengths, num_episodes=7)
    assert trainer.steps == 7 * sum(lengths)

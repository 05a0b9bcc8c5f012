"""What a config asks for of its feed: history and normalisation, saved with the run and used in evaluations."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from angle_rl import checkpoint
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.feed import FunctionFeed, GymnasiumFeed, HistoryFeed, NormalizedFeed
from angle_rl.models import SquashedGaussianPolicy, TwinQ
from angle_rl.trainer import AgentTrainer

BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)


def walk_feed(seen=None, step_limit=10):
    """A point far from 0 that the action moves; it costs its distance from 100, 1000 times."""

    def walk(observation, action):
        if seen is not None:
            seen.append(observation.copy())
        observation = np.clip(observation + 0.1 * action, 99, 101).astype(np.float32)
        return observation, -1000.0 * float(np.abs(observation - 100).sum())

    return FunctionFeed(
        walk, initial_observation=np.array([100.5], np.float32), action_space=BOX, step_limit=step_limit
    )


def small(folder, steps=120, seed=0, hyperparameters=None, **training):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            **{"hidden_sizes": (16,), "batch_size": 8, "learning_starts": 20, "replay_capacity": 1000}
            | (hyperparameters or {})
        ),
        training=Training(
            **{"steps": steps, "seed": seed, "evaluation_interval": None, "evaluation_episodes": 2} | training
        ),
        service=Service(run_folder=str(folder), tensorboard=False),
    )


BOTH = {"normalize_observations": True, "normalize_rewards": True}


def test_the_defaults_wrap_nothing(tmp_path):
    feed = walk_feed()
    assert AgentTrainer(small(tmp_path), feed).feed is feed


def test_normalised_training_logs_and_evaluates_in_the_environments_rewards(tmp_path):
    trainer = AgentTrainer(small(tmp_path, **BOTH), walk_feed())
    assert isinstance(trainer.feed, NormalizedFeed)
    evaluation = trainer.train()
    assert trainer.feed.statistics["observations"].count == 120
    assert abs(trainer.feed.statistics["observations"].mean[0] - 100) < 1
    stored = trainer.replay.sample(200)
    assert float(stored.rewards.min()) >= -10  # normalised
    assert float(stored.observations.abs().max()) <= 10
    assert all(-10 * 1000 <= value < -100 for value in evaluation.returns)  # and these are not
    logged = [float(value) for value in trainer._recent_returns]
    assert all(-10 * 1000 <= value < -100 for value in logged)
    before = trainer.feed.export_state()
    trainer.evaluate()
    assert all(np.array_equal(before[name], array) for name, array in trainer.feed.export_state().items())
    given = AgentTrainer(small(tmp_path, **BOTH), walk_feed(), evaluation_feed=walk_feed())
    assert given._make_evaluation_feed().frozen


def test_a_resumed_normalised_run_equals_an_uninterrupted_one(tmp_path):
    whole = AgentTrainer(small(tmp_path / "whole", **BOTH), walk_feed())
    whole.train()
    half = AgentTrainer(small(tmp_path / "half", steps=70, **BOTH), walk_feed())
    half.train()
    resumed = AgentTrainer.resume(half.run_folder, small(tmp_path / "half", **BOTH), feed=walk_feed())
    assert resumed.feed.statistics["observations"].count == 70
    resumed.train()
    for name, array in whole.feed.export_state().items():
        assert np.array_equal(array, resumed.feed.export_state()[name]), name
    for one, two in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_with_other_statistics_is_refused_and_nothing_changes(tmp_path):
    trainer = AgentTrainer(small(tmp_path, **BOTH), walk_feed())
    trainer.train()
    trainer.save(tmp_path / "with")
    assert "feed.observations/mean" in checkpoint.load(tmp_path / "with")[0]
    plain = AgentTrainer(small(tmp_path), walk_feed())
    plain.save(tmp_path / "without")
    fresh = AgentTrainer(small(tmp_path, **BOTH), walk_feed())
    wide = AgentTrainer(small(tmp_path, hyperparameters={"hidden_sizes": (32,)}, **BOTH), walk_feed())
    for other, source, message in [
        (plain, "with", "FunctionFeed keeps nothing"),
        (fresh, "without", "missing"),
        (wide, "with", "has shape"),
    ]:
        weights = [parameter.clone() for parameter in other.policy.parameters()]
        with pytest.raises(ValueError, match=message):
            other.load(tmp_path / source)
        assert all(torch.equal(one, two) for one, two in zip(weights, other.policy.parameters(), strict=True))
        if isinstance(other.feed, NormalizedFeed):
            assert other.feed.statistics["observations"].count == 0
        assert other.steps == 0


class FlatPolicy(SquashedGaussianPolicy):
    def forward(self, observations):
        return super().forward(observations.flatten(1))


class FlatQ(TwinQ):
    def forward(self, observations, actions):
        return super().forward(observations.flatten(1), actions)


def test_a_history_reaches_policy_and_replay(tmp_path):
    seen = []
    config = small(tmp_path, hyperparameters={"observation_history": 3}, normalize_observations=True)
    trainer = AgentTrainer(
        config, walk_feed(seen), policy=FlatPolicy(3, BOX.low, BOX.high, (16,)), critics=FlatQ(3, 1, (16,))
    )
    assert isinstance(trainer.feed, HistoryFeed)
    evaluation = trainer.train()
    assert evaluation.lengths == (10, 10)
    assert all(observation.shape == (1,) for observation in seen)
    batch = trainer.replay.sample(50)
    assert batch.observations.shape == batch.next_observations.shape == (50, 3, 1)
    assert torch.equal(batch.observations[:, 1:], batch.next_observations[:, :-1])


def test_by_episodes_environments_that_have_ended_are_not_counted(tmp_path):
    def walk(observation, action, time_step):  # the first environment's episodes take 3 steps, the other's 10
        ended = time_step + 1 >= np.where(observation[:, 0] > 100, 3, 10)
        return observation, np.ones(len(observation)), ended

    firsts = iter([101.0, 99.0] * 1000)
    feed = FunctionFeed(
        walk,
        initial_observation=lambda: np.array([next(firsts)], np.float32),
        observation_space=spaces.Box(-np.inf, np.inf, (1,), np.float32),
        action_space=BOX,
        batched=True,
        num_environments=2,
    )
    trainer = AgentTrainer(small(tmp_path, parallel_environments=2, **BOTH), feed)
    trainer.train(num_episodes=1)
    assert trainer.steps == 13
    assert trainer.feed.statistics["observations"].count == trainer.feed.statistics["rewards"].count == 13


def test_the_options_are_checked():
    with pytest.raises(ValueError, match="observation_history is 0"):
        Hyperparameters(observation_history=0)
    with pytest.raises(TypeError, match="normalize_rewards is 1"):
        Training(normalize_rewards=1)
    config = AgentConfig(training=dataclasses.replace(Training(), **BOTH))
    assert AgentConfig.from_toml(config.to_toml()) == AgentConfig.from_json(config.to_json()) == config


def test_a_replay_keeps_each_frame_of_a_history_once(tmp_path):
    class Pictures(gymnasium.Env):
        observation_space, action_space = spaces.Box(0, 255, (12, 12), np.uint8), BOX

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.now = 0
            return np.zeros((12, 12), np.uint8), {}

        def step(self, action):
            self.now += 1
            return np.full((12, 12), self.now, np.uint8), 0.0, False, self.now == 20, {}

    settings = small(tmp_path, hyperparameters={"observation_history": 3})
    trainer = AgentTrainer(settings, GymnasiumFeed([Pictures()], factory=Pictures))
    assert trainer.replay.nbytes - 2**20 < 2 * 12 * 12 * trainer.replay.capacity
    trainer.train(num_episodes=2, max_iterations=10)
    batch = trainer.replay.sample(50)
    shown = batch.observations[:, :, 0, 0].int()
    newest = shown[:, 2]
    assert torch.equal(shown, torch.stack([(newest - 2).clamp(0), (newest - 1).clamp(0), newest], 1))
    assert torch.equal(batch.next_observations[:, 2, 0, 0].int(), newest + 1)

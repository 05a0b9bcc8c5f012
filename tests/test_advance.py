"""Steps of a trainer without a run: what is learned from them, and when."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from angle_rl import AgentConfig, AgentTrainer, Hyperparameters, Service, Training
from angle_rl.agents.state import learned_tensors
from angle_rl.feed import FunctionFeed


def walk(observation, action):
    """A point that the action moves, punished for its distance from 0."""
    observation = np.clip(observation + 0.1 * action, -1, 1).astype(np.float32)
    return observation, -float(np.abs(observation).sum())


def made(folder, **fields):
    config = AgentConfig(
        hyperparameters=Hyperparameters(hidden_sizes=(8,), batch_size=8, learning_starts=10, replay_capacity=1000),
        training=Training(steps=80, evaluation_interval=None, evaluation_episodes=1, threads=1, learner_threads=1),
        service=Service(run_folder=str(folder), tensorboard=False, progress=False),
    )
    space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    start = np.array([0.5], np.float32)
    feed = FunctionFeed(walk, initial_observation=start, action_space=space, step_limit=10)
    return AgentTrainer(config.replace(**fields), feed)


@pytest.mark.parametrize("updates_per_call", [1, 7])
def test_advancing_is_training_without_a_run(tmp_path, updates_per_call):
    trained, advanced = (made(tmp_path, updates_per_call=updates_per_call) for _ in range(2))
    trained.train()
    for steps in (1, 29, 50) if updates_per_call == 1 else (80,):
        advanced.advance(steps)
    assert advanced.run_folder is None
    assert (advanced.steps, advanced.updates) == (trained.steps, trained.updates) == (80, 70)
    learned, expected = (learned_tensors(one.rl_state.agent_state) for one in (advanced, trained))
    assert all(learned[name].equal(tensor) for name, tensor in expected.items())


def test_steps_that_are_recorded_only_are_learned_from_later(tmp_path):
    trainer = made(tmp_path)
    trainer.advance(30, learn=False)
    assert (trainer.steps, trainer.updates, len(trainer.replay)) == (30, 0, 30)
    trainer.advance(10)
    assert (trainer.steps, trainer.updates) == (40, 30)


def test_no_steps_and_a_learner_apart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps is 0"):
        made(tmp_path).advance(0)
    with pytest.raises(ValueError, match="overlap is True"):
        made(tmp_path, overlap=True).advance(5)

"""Presets reach what they are for: five seeds of five."""

import gymnasium
import numpy as np
import pytest
import torch

from angle_rl import AgentTrainer
from angle_rl.envs import optimal_steps
from angle_rl.presets import find_preset


def trained(tmp_path, environment, agent, seed):
    config = find_preset(environment, agent).config
    trainer = AgentTrainer(config.replace(seed=seed, run_folder=str(tmp_path), evaluation_interval=None, threads=1))
    return trainer, trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_table_takes_the_shortest_path_from_every_start(tmp_path, seed):
    trainer, _ = trained(tmp_path, "angle/Gridworld-v0", "q_learning", seed)
    env = gymnasium.make("angle/Gridworld-v0")
    starts = [np.array(start) for start in np.ndindex(5, 5, 5, 5) if start[2:] in env.unwrapped.targets]
    starts = [start for start in starts if optimal_steps(start) > 0]
    assert len(starts) == 96
    for start in starts:
        observation, _ = env.reset(options={"state": start})
        taken, ended = 0, False
        while not ended and taken < 10:
            action, _ = trainer.policy.sample_actions(torch.as_tensor(observation)[None], deterministic=True)
            observation, _, ended, _, _ = env.step(int(action[0]))
            taken += 1
        assert taken == optimal_steps(start), start


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_dqn_balances_the_pole(tmp_path, seed):
    _, evaluation = trained(tmp_path, "CartPole-v1", "dqn", seed)
    assert len(evaluation.returns) == 20
    assert evaluation.mean_return >= 475

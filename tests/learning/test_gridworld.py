"""The table of the grid's preset: five seeds of five."""

import gymnasium
import numpy as np
import pytest
import torch

from angle_rl import AgentTrainer
from angle_rl.envs import optimal_steps
from angle_rl.presets import find_preset


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_table_takes_the_shortest_path_from_every_start(tmp_path, seed):
    config = find_preset("angle/Gridworld-v0", "q_learning").config
    trainer = AgentTrainer(config.replace(seed=seed, run_folder=str(tmp_path), evaluation_interval=None, threads=1))
    trainer.train()
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

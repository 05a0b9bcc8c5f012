"""The pole's preset: DQN holds it up to the end of training, five seeds of five."""

import pytest

from angle_rl import AgentTrainer
from angle_rl.presets import find_preset


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_dqn_holds_the_pole_up(tmp_path, seed):
    config = find_preset("CartPole-v1", "dqn").config
    trainer = AgentTrainer(config.replace(seed=seed, run_folder=str(tmp_path), evaluation_interval=None, threads=1))
    evaluation = trainer.train()
    assert len(evaluation.returns) == 20
    assert evaluation.mean_return >= 475

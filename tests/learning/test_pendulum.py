"""SAC, TD3 and DDPG swing up the pendulum: five seeds of five, within 10,000 steps."""

import pytest

from angle_rl import AgentConfig, AgentTrainer, Hyperparameters, Service, Training


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("agent", ["sac", "td3", "ddpg"])
def test_pendulum(tmp_path, agent, seed):
    # TD3's targets move with every second update: twice the step keeps them as quick as SAC's.
    tau = {"sac": 0.005, "td3": 0.01, "ddpg": 0.005}[agent]
    config = AgentConfig(
        hyperparameters=Hyperparameters(agent=agent, tau=tau),
        training=Training(environment="Pendulum-v1", steps=10_000, seed=seed, evaluation_episodes=20),
        service=Service(run_folder=str(tmp_path)),
    )
    evaluation = AgentTrainer(config).train()
    assert len(evaluation.returns) == 20
    assert evaluation.mean_return >= -200

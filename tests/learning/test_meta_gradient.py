"""A discount learned from a bad start on, in a corridor where 0.9 is wrong and 0.99 right: five seeds of five."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from angle_rl import AgentConfig, AgentTrainer, Hyperparameters, Service, Training
from angle_rl.feed import FunctionFeed
from angle_rl.meta import MetaGradient
from angle_rl.meta_trainer import MetaLearnerTrainer

LENGTH, NEAR = 20, 0.3  # steps to a reward of 1, and a reward that ends the episode at once


ACTIONS = {"dqn": spaces.Discrete(2), "sac": spaces.Box(-1, 1, (1,), np.float32)}
OWN = {
    "dqn": {"exploration_epsilon": 0.5, "learning_starts": 500},
    "sac": {"entropy_coefficient": 0.01, "learning_starts": 2_000},
}
STEPS = {"dqn": 6_000, "sac": 8_000}


def feed(agent):
    """In the first place the lower action takes the near reward; all else leads one place on."""

    def corridor(observation, action):
        place = int(observation.argmax())
        lower = action == 0 if agent == "dqn" else action[0] < 0
        if place == 0 and lower:
            return observation, NEAR, True
        return np.eye(LENGTH + 1, dtype=np.float32)[place + 1], float(place + 1 == LENGTH), place + 1 == LENGTH

    first = np.eye(LENGTH + 1, dtype=np.float32)[0]
    return FunctionFeed(corridor, initial_observation=first, action_space=ACTIONS[agent])


def config(folder, agent, seed, discount):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            agent=agent,
            discount=discount,
            hidden_sizes=(64,),
            batch_size=64,
            learning_rate=1e-3,
            replay="uniform",
            replay_capacity=20_000,
            tau=0.02,
            **OWN[agent],
        ),
        training=Training(
            steps=STEPS[agent], seed=seed, evaluation_interval=None, evaluation_episodes=1, learner_threads=1
        ),
        service=Service(run_folder=str(folder), tensorboard=False, progress=False),
    )


def values_at_the_start(trainer, agent):
    """Of the near reward and of the corridor."""
    critics, start = trainer.rl_state.agent_state.critics, torch.eye(LENGTH + 1)[:1]
    with torch.no_grad():
        if agent == "dqn":
            return critics(start)[0].tolist()
        return critics(start.repeat(2, 1), torch.tensor([[-0.5], [0.5]])).amin(0).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("agent", ["dqn", "sac"])
def test_the_discount_comes_from_0_9_to_0_99_and_the_policy_right_by_it(tmp_path, agent, seed):
    fixed = AgentTrainer(config(tmp_path / "fixed", agent, seed, 0.9), feed(agent))
    assert fixed.train().mean_return == pytest.approx(NEAR)
    near, far = values_at_the_start(fixed, agent)
    assert far < near == pytest.approx(NEAR, abs=0.02)

    right = AgentTrainer(config(tmp_path / "right", agent, seed, 0.99), feed(agent))
    assert right.train().mean_return == 1.0

    learner = MetaGradient(("discount",), learning_rate=0.01, reference={"discount": 0.99})
    learned = MetaLearnerTrainer(config(tmp_path / "learned", agent, seed, 0.9), learner, feed(agent))
    assert learned.train().mean_return == 1.0
    assert learned.skipped_meta_steps == 0
    assert learned.replay.discount == learner.hyperparameters()["discount"]
    assert 0.985 <= learned.replay.discount <= 0.995
    assert values_at_the_start(learned, agent) == pytest.approx(values_at_the_start(right, agent), abs=0.05)

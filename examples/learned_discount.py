"""A discount that is learned: 0.3 is paid at once for one action, 1 after a corridor of 20 steps for the other.

At a discount of 0.9 the first is worth more, at 0.99 the second. Learning begins with 0.9; MetaGradient moves it so
that the critics' steps lower their loss at 0.99.

python examples/learned_discount.py [--steps N]
"""

import argparse

import numpy as np
import torch
from gymnasium import spaces

from angle_rl import AgentConfig, FunctionFeed
from angle_rl.meta import MetaGradient
from angle_rl.meta_trainer import MetaLearnerTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=6_000)

LENGTH = 20


def corridor(observation, action):
    """(one-hot place, action) -> (next place, reward, whether it ends)"""
    place = int(observation.argmax())
    if place == 0 and action == 0:
        return observation, 0.3, True
    return np.eye(LENGTH + 1, dtype=np.float32)[place + 1], float(place + 1 == LENGTH), place + 1 == LENGTH


start = np.eye(LENGTH + 1, dtype=np.float32)[0]
feed = FunctionFeed(corridor, initial_observation=start, action_space=spaces.Discrete(2))
config = AgentConfig().replace(
    agent="dqn",
    discount=0.9,
    hidden_sizes=(64,),
    batch_size=64,
    learning_rate=1e-3,
    tau=0.02,
    replay="uniform",
    learning_starts=500,
    exploration_epsilon=0.5,
    steps=parser.parse_args().steps,
    evaluation_interval=None,
)
trainer = MetaLearnerTrainer(config, MetaGradient(learning_rate=0.01, reference={"discount": 0.99}), feed)
evaluation = trainer.train()
near, far = trainer.rl_state.agent_state.critics(torch.from_numpy(start)[None])[0].tolist()
print(
    f"the near reward is worth {near:.2f} and the far one {far:.2f} under a discount of {trainer.replay.discount:.4f}"
)
print(f"mean return {evaluation.mean_return:.1f}")

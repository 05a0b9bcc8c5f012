"""Offline: learn from recorded transitions alone, then see what was learned.

python examples/dataset.py [--steps N]
"""

import argparse

import gymnasium
import numpy as np

from angle_rl import AgentConfig, AgentTrainer
from angle_rl.agents import TD3
from angle_rl.feed import DatasetFeed, offline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=6_000)
steps = parser.parse_args().steps

env = gymnasium.make("Pendulum-v1")
env.action_space.seed(0)
rows = {name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")}
observation, _ = env.reset(seed=0)
for _ in range(steps):  # at random, for the example's sake
    action = env.action_space.sample()
    successor, reward, terminated, truncated, _ = env.step(action)
    for name, value in zip(rows, (observation, action, reward, successor, terminated, truncated), strict=True):
        rows[name].append(value)
    observation = env.reset()[0] if truncated else successor

feed = DatasetFeed({name: np.array(values) for name, values in rows.items()}, action_space=env.action_space)
config = AgentConfig().replace(
    agent="td3", tau=0.01, learning_starts=len(feed) // 2, steps=2 * len(feed), evaluation_interval=None
)
trainer = AgentTrainer(config, feed, agent=offline(TD3(config), feed), evaluation_feed="Pendulum-v1")
evaluation = trainer.train()
print(f"mean return {evaluation.mean_return:.1f} over {len(evaluation.returns)} episodes")

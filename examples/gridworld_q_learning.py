"""Q-learning on a grid: after 30,000 moves its table takes the shortest path from every start.

python examples/gridworld_q_learning.py [--steps N]
"""

import argparse

import gymnasium
import numpy as np
import torch

from angle_rl import AgentTrainer
from angle_rl.envs import optimal_steps
from angle_rl.presets import find_preset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=30_000)
steps = parser.parse_args().steps

config = find_preset("angle/Gridworld-v0", "q_learning").config
trainer = AgentTrainer(config.replace(steps=steps))
trainer.train()

env = gymnasium.make("angle/Gridworld-v0")
shortest = tried = 0
for row, column, target_row, target_column in np.ndindex(5, 5, 5, 5):
    start = np.array([row, column, target_row, target_column])
    if (target_row, target_column) not in env.unwrapped.targets or optimal_steps(start) == 0:
        continue
    observation, _ = env.reset(options={"state": start})
    taken, ended = 0, False
    while not ended and taken < 100:
        action, _ = trainer.policy.sample_actions(torch.as_tensor(observation)[None], deterministic=True)
        observation, _, terminated, truncated, _ = env.step(int(action[0]))
        taken, ended = taken + 1, terminated or truncated
    tried += 1
    shortest += taken == optimal_steps(start)
print(f"the shortest path from {shortest} of {tried} starts")

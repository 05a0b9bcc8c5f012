"""A plain function as the environment: a point is pushed towards 0, and each step costs its distance.

python examples/function.py [--steps N]
"""

import argparse

import gymnasium
import numpy as np

from angle_rl import AgentConfig, AgentTrainer, FunctionFeed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=3_000)


def push(observation, action):
    """(observation, action) -> (next observation, reward)"""
    observation = np.clip(observation + 0.1 * action, -1, 1).astype(np.float32)
    return observation, -float(np.abs(observation).sum())


feed = FunctionFeed(
    push,
    initial_observation=lambda key: (2 * key.uniform(2).numpy() - 1).astype(np.float32),
    action_space=gymnasium.spaces.Box(-1, 1, (2,), np.float32),
    step_limit=30,
)
config = AgentConfig().replace(
    agent="td3", hidden_sizes=(64, 64), learning_starts=200, steps=parser.parse_args().steps, evaluation_interval=None
)
evaluation = AgentTrainer(config, feed).train()
print(f"mean return {evaluation.mean_return:.1f} over {len(evaluation.returns)} episodes")

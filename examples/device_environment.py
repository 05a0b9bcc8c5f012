"""Pendulums by the hundred that live where the agent learns: observations, actions and replay never leave the device.

python examples/device_environment.py [--steps N] [--device cuda] [--pendulums N]
"""

import argparse
import math

import gymnasium
import numpy as np
import torch

from angle_rl import AgentTrainer, FunctionFeed
from angle_rl.presets import find_preset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20_000)
parser.add_argument("--device", default="cpu")
parser.add_argument("--pendulums", type=int, default=16)
arguments = parser.parse_args()


def swing(observation, torque):
    """Pendulum-v1 on tensors: ``[n, 3]`` cosine, sine and speed, ``[n, 1]`` -> the next ones, and rewards ``[n]``."""
    cosine, sine, speed = observation.unbind(1)
    torque = torque[:, 0]
    angle = torch.atan2(sine, cosine)
    reward = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = (speed + 0.05 * (15.0 * sine + 3.0 * torque)).clamp(-8.0, 8.0)
    angle = angle + 0.05 * speed
    return torch.stack((angle.cos(), angle.sin(), speed), 1), reward


def start(key):
    """Any angle, any speed up to 1."""
    angle, speed = (2.0 * key.uniform(2) - 1.0).tolist()
    return np.array([math.cos(math.pi * angle), math.sin(math.pi * angle), speed], np.float32)


feed = FunctionFeed(
    swing,
    batched=True,
    num_environments=arguments.pendulums,
    device=arguments.device,
    initial_observation=start,
    action_space=gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32),
    step_limit=200,
)
config = find_preset("Pendulum-v1", "sac").config.replace(
    steps=arguments.steps,
    device=arguments.device,
    parallel_environments=arguments.pendulums,
    evaluation_interval=None,
)
trainer = AgentTrainer(config, feed)
evaluation = trainer.train()
observation = trainer.rl_state.environment_state.observation
print(f"observations on {observation.device}, replay {'there, too' if trainer.replay.resident else 'in host memory'}")
print(f"mean return {evaluation.mean_return:.1f} over {len(evaluation.returns)} episodes")

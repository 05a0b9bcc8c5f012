"""A pendulum whose speed is hidden: three observations in a row tell it, brought to unit variance.

python examples/history_and_normalisation.py [--steps N]
"""

import argparse

import gymnasium

from angle_rl import AgentConfig, AgentTrainer
from angle_rl.feed import GymnasiumFeed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=10_000)


class WithoutSpeed(gymnasium.ObservationWrapper):
    """The pendulum's position alone."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2,))

    def observation(self, observation):
        return observation[:2]


def make():
    return WithoutSpeed(gymnasium.make("Pendulum-v1"))


config = AgentConfig().replace(
    observation_history=3, normalize_observations=True, steps=parser.parse_args().steps, evaluation_interval=None
)
feed = GymnasiumFeed([make()], factory=make, owned=True)
evaluation = AgentTrainer(config, feed).train()
print(f"mean return {evaluation.mean_return:.1f} over {len(evaluation.returns)} episodes")

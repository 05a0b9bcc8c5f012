"""DDPG swings up the pendulum.

python examples/pendulum_ddpg.py [--steps N]
"""

import argparse

from angle_rl import AgentTrainer
from angle_rl.presets import find_preset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=10_000)
config = find_preset("Pendulum-v1", "ddpg").config.replace(steps=parser.parse_args().steps)
trainer = AgentTrainer(config)
evaluation = trainer.train()
print(f"mean return {evaluation.mean_return:.1f} over {len(evaluation.returns)} episodes, in {trainer.run_folder}")

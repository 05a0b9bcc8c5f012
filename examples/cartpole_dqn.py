"""DQN balances the pole: double Q, uniform replay, targets copied every 256 steps.

python examples/cartpole_dqn.py [--steps N]
"""

import argparse

from angle_rl import AgentTrainer
from angle_rl.presets import find_preset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50_000)
config = find_preset("CartPole-v1", "dqn").config.replace(steps=parser.parse_args().steps)
trainer = AgentTrainer(config)
evaluation = trainer.train()
print(f"mean return {evaluation.mean_return:.1f} over {len(evaluation.returns)} episodes, in {trainer.run_folder}")

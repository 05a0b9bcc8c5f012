"""Many environments at once: 64 vectorised grids feed one table.

python examples/vector.py [--steps N]
"""

import argparse

import gymnasium

from angle_rl import AgentTrainer
from angle_rl.presets import find_preset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60_000)
grids = gymnasium.make_vec("angle/Gridworld-v0", num_envs=64, vectorization_mode="vector_entry_point")
config = find_preset("angle/Gridworld-v0", "q_learning").config.replace(steps=parser.parse_args().steps)
evaluation = AgentTrainer(config, grids).train()
grids.close()
print(f"mean return {evaluation.mean_return:.1f} over {len(evaluation.returns)} episodes")

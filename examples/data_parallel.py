"""SAC on the pendulum in several processes: each has an environment and a replay of its own, and all learn one policy.

torchrun --nproc-per-node 2 examples/data_parallel.py [--steps N]

Every process takes so many steps, and an update with each. On GPUs: "nccl", `training.device` f"cuda:{LOCAL_RANK}",
the networks on it.
"""

import argparse

from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from angle_rl import AgentTrainer
from angle_rl.models import SquashedGaussianPolicy, TwinQ
from angle_rl.presets import find_preset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=5_000)
steps = parser.parse_args().steps
distributed.init_process_group("gloo")
rank = distributed.get_rank()
config = find_preset("Pendulum-v1", "sac").config.replace(steps=steps, seed=rank, threads=1, evaluation_interval=None)
widths = config.hyperparameters.hidden_sizes
trainer = AgentTrainer(
    config,
    critics=DistributedDataParallel(TwinQ(3, 1, widths)),  # all processes begin with the first one's networks
    policy=DistributedDataParallel(SquashedGaussianPolicy(3, [-2.0], [2.0], widths)),
)
evaluation = trainer.train()
distributed.destroy_process_group()
print(f"process {rank}: mean return {evaluation.mean_return:.1f} over {len(evaluation.returns)} episodes")

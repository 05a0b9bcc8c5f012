"""What each process of tests/test_distributed.py does: distributed_ranks.py FOLDER PORT, in torchrun's environment."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces
from safetensors.torch import save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from angle_rl import AgentConfig, Hyperparameters, Training
from angle_rl.agents import DQN, SAC, TD3
from angle_rl.models import DeterministicPolicy, QNetwork, SquashedGaussianPolicy, TwinQ
from angle_rl.types import Batch, RandomKey

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))
KINDS = {"sac": SAC, "td3": TD3, "dqn": DQN}
ROWS = 64
UPDATES = 3
EXAMPLE = Path(__file__).parents[1] / "examples" / "data_parallel.py"


class FixedReplay:
    """Gives the same rows every time; in sample number `broken` the last reward is infinite."""

    discount, n_step = 0.99, 1

    def __init__(self, kind: str, rows: slice, broken: int | None = None) -> None:
        random = torch.Generator().manual_seed(0)
        observations, following = (torch.randn(ROWS, 3, generator=random) for _ in range(2))
        share = torch.rand(ROWS, 2, generator=random)
        actions = torch.lerp(torch.from_numpy(ACTIONS.low), torch.from_numpy(ACTIONS.high), share)
        if kind == "dqn":
            actions = (share[:, 0] * 4).long()
        rewards = torch.randn(ROWS, generator=random)
        whole = (observations, actions, rewards, following, torch.full((ROWS,), 0.99), torch.ones(ROWS))
        handles = torch.arange(ROWS)
        self._batch = Batch(*(field[rows] for field in (*whole, handles, torch.ones_like(handles))))
        self._broken, self._sampled = broken, 0

    def insert(self, *rows: object, **options: object) -> None:
        raise NotImplementedError

    def sample(self, batch_size: int, **options: object) -> Batch:
        assert batch_size == len(self._batch.rewards)
        self._sampled += 1
        if self._sampled - 1 != self._broken:
            return self._batch
        rewards = self._batch.rewards.clone()
        rewards[-1] = torch.inf
        return self._batch._replace(rewards=rewards)


class NoiseOfRows(SquashedGaussianPolicy):
    """Takes its noise from the observations, so that a row's is the same in every batch."""

    def sample_actions(self, observations, deterministic=False, *, noise=None):
        return super().sample_actions(observations, deterministic, noise=torch.sin(37 * observations[:, :2]))


def networks_of(kind: str) -> dict[str, torch.nn.Module]:
    torch.manual_seed(3)
    if kind == "dqn":
        return {"critics": QNetwork(OBSERVATIONS, 4, (32, 32))}
    policy = NoiseOfRows if kind == "sac" else DeterministicPolicy
    return {"critics": TwinQ(3, 2, (32, 32)), "policy": policy(3, ACTIONS.low, ACTIONS.high, (32, 32))}


def learned(kind, networks, rows, *, broken=None):
    """The agent's state after some updates on these rows."""
    replay = FixedReplay(kind, rows, broken)
    config = AgentConfig(
        hyperparameters=Hyperparameters(
            agent=kind,
            batch_size=len(range(ROWS)[rows]),
            replay="uniform",
            learning_rate=0.01,
            target_noise=0.0,
            max_gradient_norm=1.0,
        ),
        training=Training(engine="torch"),
    )
    agent = KINDS[kind](config)
    actions = spaces.Discrete(4) if kind == "dqn" else ACTIONS
    state, _ = agent.init(RandomKey(1), observation_space=OBSERVATIONS, action_space=actions, replay=replay, **networks)
    for update in range(UPDATES):
        skipped = update == broken
        result = state.engine.update(RandomKey(update), 0 if kind == "dqn" else 1)
        assert result.finite != skipped, update
    return state


def tensors_of(state) -> dict[str, torch.Tensor]:
    """What was learned, and the gradients of the last update, by name."""
    networks = {name: getattr(state, name) for name in state.networks if getattr(state, name) is not None}
    found = {f"{name}.{key}": t for name, network in networks.items() for key, t in network.state_dict().items()}
    for name, network in networks.items():
        found |= {f"{name}.{key}.grad": p.grad for key, p in network.named_parameters() if p.grad is not None}
    if getattr(state, "log_entropy_coefficient", None) is not None:
        found["log_entropy_coefficient"] = state.log_entropy_coefficient.detach()
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def in_parallel(networks: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    return {name: DistributedDataParallel(network) for name, network in networks.items()}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    for kind in KINDS:
        state = learned(kind, in_parallel(networks_of(kind)), own)
        save_file(tensors_of(state), folder / f"{kind}-{rank}.safetensors")
    # One process's loss becomes infinite: none takes the step.
    state = learned("sac", in_parallel(networks_of("sac")), own, broken=1)
    save_file(tensors_of(state), folder / f"broken-{rank}.safetensors")
    distributed.destroy_process_group()

    # A group of its own begins and ends there; under the old port a process could still meet the group that ends here.
    os.environ["MASTER_PORT"] = sys.argv[2]
    sys.argv[1:] = ["--steps", "1150"]
    torch.manual_seed(rank)
    os.chdir(folder)
    trainer = runpy.run_path(str(EXAMPLE), run_name="__main__")["trainer"]
    save_file(tensors_of(trainer.rl_state.agent_state), folder / f"trained-{rank}.safetensors")
    observations = trainer.replay.sample(64).observations
    save_file({"observations": observations.contiguous()}, folder / f"rows-{rank}.safetensors")


if __name__ == "__main__":
    main()

"""Other libraries' SAC at HalfCheetah's sizes. Each is imported when it is made.

Their updates are their own code, on their own replay; the loop around them (act, step, store) is the plain one of the
eager implementations, which costs less than their own collectors.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch

from angle_rl.bench.eager import CRITIC_RATE, DISCOUNT, POLICY_RATE, TARGET_ENTROPY, TAU
from angle_rl.bench.learners import USUAL, Learner, Sizes, StableBaselines3, environment_steps
from angle_rl.bench.libraries import spaces
from angle_rl.bench.peers import in_short
from angle_rl.bench.rows import ACTION, OBSERVATION, Rows
from angle_rl.bench.timing import Clock


class Tianshou:
    """Tianshou's SAC with learned entropy coefficient, on its prioritised replay."""

    name = "tianshou"
    multiple = 1
    updates = 1

    def __init__(self, capacity: int, sizes: Sizes = USUAL) -> None:
        from tianshou.algorithm.modelfree.sac import SAC, AutoAlpha, SACPolicy
        from tianshou.algorithm.optim import AdamOptimizerFactory
        from tianshou.data import Batch, PrioritizedReplayBuffer, ReplayBuffer
        from tianshou.utils.net.common import Net
        from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
        from tianshou.utils.torch_utils import policy_within_training_step

        self._batch_of, self._rows_of, self._within = Batch, ReplayBuffer.from_data, policy_within_training_step
        self.batch = sizes.batch
        observation_space, action_space = spaces()
        hidden = {"hidden_sizes": list(sizes.hidden_sizes)}

        def critic() -> Any:
            net = Net(state_shape=(OBSERVATION,), action_shape=(ACTION,), concat=True, **hidden)
            return ContinuousCritic(preprocess_net=net)

        actor = ContinuousActorProbabilistic(
            preprocess_net=Net(state_shape=(OBSERVATION,), **hidden),
            action_shape=(ACTION,),
            unbounded=True,
            conditioned_sigma=True,
        )
        self.algorithm = SAC(
            policy=SACPolicy(actor=actor, action_space=action_space, observation_space=observation_space),
            policy_optim=AdamOptimizerFactory(lr=POLICY_RATE),
            critic=critic(),
            critic_optim=AdamOptimizerFactory(lr=CRITIC_RATE),
            critic2=critic(),
            critic2_optim=AdamOptimizerFactory(lr=CRITIC_RATE),
            tau=TAU,
            gamma=DISCOUNT,
            alpha=AutoAlpha(TARGET_ENTROPY, 0.0, AdamOptimizerFactory(lr=CRITIC_RATE)),
        )
        self.replay = PrioritizedReplayBuffer(capacity, alpha=0.6, beta=0.4)

    def fill(self, rows: Rows) -> None:
        self.replay.update(
            self._rows_of(
                obs=rows.observations,
                act=rows.actions,
                rew=rows.rewards,
                obs_next=rows.next_observations,
                terminated=rows.terminated,
                truncated=np.zeros_like(rows.terminated),
                done=rows.terminated,
            )
        )

    def update(self) -> object:
        with self._within(self.algorithm.policy):
            return self.algorithm.update(buffer=self.replay, sample_size=self.batch)

    def critics(self) -> list[torch.Tensor]:
        return [*self.algorithm.critic.parameters(), *self.algorithm.critic2.parameters()]

    def targets(self) -> list[torch.Tensor]:
        return [*self.algorithm.critic_old.parameters(), *self.algorithm.critic2_old.parameters()]

    def policy(self) -> list[torch.Tensor]:
        return list(self.algorithm.policy.actor.parameters())

    def choose(self, observation: Any) -> Any:
        policy = self.algorithm.policy
        with torch.no_grad(), self._within(policy):
            asked = self._batch_of(obs=np.asarray(observation, np.float32)[None], info={})
            return policy.map_action(policy(asked).act)[0]

    act = choose

    def store(self, observation: Any, action: Any, reward: float, next_observation: Any, terminated: bool) -> None:
        """Stores one row."""
        self.replay.add(
            self._batch_of(
                obs=observation.astype(np.float32),
                act=action,
                rew=reward,
                obs_next=next_observation.astype(np.float32),
                terminated=terminated,
                truncated=False,
            )
        )

    def steps(self) -> Clock:
        return environment_steps(self, self.update)

    def close(self) -> None:
        pass


class TorchRL:
    """TorchRL's SACLoss and SoftUpdate on its uniform replay, as its SAC example puts them together."""

    name = "torchrl"
    multiple = 1
    updates = 1

    def __init__(self, capacity: int, sizes: Sizes = USUAL) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._make(capacity, sizes)

    def _make(self, capacity: int, sizes: Sizes) -> None:
        from tensordict import TensorDict
        from tensordict.nn import InteractionType, TensorDictModule
        from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
        from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
        from torchrl.objectives import SoftUpdate
        from torchrl.objectives.sac import SACLoss

        logging.getLogger("torchrl").setLevel(logging.ERROR)
        self._dictionary = TensorDict
        cells = list(sizes.hidden_sizes)
        body = MLP(in_features=OBSERVATION, num_cells=cells, out_features=2 * ACTION, activation_class=torch.nn.ReLU)
        extractor = NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1)
        low, high = -torch.ones(ACTION), torch.ones(ACTION)
        self.actor = ProbabilisticActor(
            spec=Bounded(low=low, high=high, shape=(ACTION,)),
            in_keys=["loc", "scale"],
            module=TensorDictModule(
                torch.nn.Sequential(body, extractor), in_keys=["observation"], out_keys=["loc", "scale"]
            ),
            distribution_class=TanhNormal,
            distribution_kwargs={"low": low, "high": high, "tanh_loc": False},
            default_interaction_type=InteractionType.RANDOM,
            return_log_prob=False,
        )
        value = ValueOperator(
            in_keys=["action", "observation"],
            module=MLP(
                in_features=ACTION + OBSERVATION, num_cells=cells, out_features=1, activation_class=torch.nn.ReLU
            ),
        )
        self.loss = SACLoss(
            actor_network=self.actor, qvalue_network=value, num_qvalue_nets=sizes.critics, loss_function="l2"
        )
        self.loss.make_value_estimator(gamma=DISCOUNT)
        self.target_updater = SoftUpdate(self.loss, tau=TAU)
        self.optimizers = [
            torch.optim.Adam(self.critics(), lr=CRITIC_RATE),
            torch.optim.Adam(self.policy(), lr=POLICY_RATE),
            torch.optim.Adam([self.loss.log_alpha], lr=CRITIC_RATE),
        ]
        self.replay = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity), batch_size=sizes.batch)

    def _row(self, values: list[torch.Tensor], count: list[int]) -> Any:
        observation, action, reward, next_observation, terminated = values
        following = {
            "observation": next_observation,
            "reward": reward[..., None],
            "terminated": terminated[..., None],
            "done": terminated[..., None],
        }
        return self._dictionary({"observation": observation, "action": action, "next": following}, count)

    def fill(self, rows: Rows) -> None:
        self.replay.extend(self._row([torch.as_tensor(array) for array in rows], [len(rows.rewards)]))

    def update(self) -> object:
        found = self.loss(self.replay.sample())
        (found["loss_actor"] + found["loss_qvalue"] + found["loss_alpha"]).sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.target_updater.step()
        return None

    def critics(self) -> list[torch.Tensor]:
        return list(self.loss.qvalue_network_params.flatten_keys().values())

    def targets(self) -> list[torch.Tensor]:
        return list(self.loss.target_qvalue_network_params.flatten_keys().values())

    def policy(self) -> list[torch.Tensor]:
        return list(self.loss.actor_network_params.flatten_keys().values())

    def choose(self, observation: Any) -> Any:
        asked = self._dictionary({"observation": torch.as_tensor(observation, dtype=torch.float32)}, [])
        with torch.no_grad():
            return self.actor(asked)["action"].numpy()

    act = choose

    def store(self, observation: Any, action: Any, reward: float, next_observation: Any, terminated: bool) -> None:
        """Stores one row."""
        arrays = (observation.astype(np.float32), action, np.float32(reward), next_observation.astype(np.float32))
        values = [*map(torch.as_tensor, arrays), torch.tensor(terminated)]
        self.replay.add(self._row(values, []))

    def steps(self) -> Clock:
        return environment_steps(self, self.update)

    def close(self) -> None:
        pass


def peers(capacity: int, batch: int) -> tuple[list[Learner], list[str]]:
    """The other libraries' learners that can be made, and a line for each other and for what to know of them."""
    made: list[Learner] = []
    notes: list[str] = []
    for kind in (StableBaselines3, Tianshou, TorchRL):
        learner, why = _made(kind, capacity, Sizes(batch=batch))
        if learner is not None:
            made.append(learner)
        if why is not None:
            notes.append(f"{kind.name}: {why}")
        elif kind is TorchRL:
            notes += _without_priorities()
    return made, notes


def _made(kind: Callable[[int, Sizes], Learner], capacity: int, sizes: Sizes) -> tuple[Learner | None, str | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(capacity, sizes), None
    except Exception as failure:  # a peer may fail in any way of its own
        return None, in_short(failure)


def _without_priorities() -> list[str]:
    """A line where TorchRL's prioritised replay cannot be had."""
    try:
        import torchrl._torchrl  # noqa: F401
    except Exception as failure:
        return [f"torchrl with its prioritised replay, whose extension does not load: {in_short(failure)}"]
    return []


def environment_missing(name: str) -> str | None:
    """Why an environment cannot be made, in short; None where it can."""
    try:
        gymnasium.make(name).close()
    except Exception as failure:  # the simulator may be missing or fail in any way of its own
        return in_short(failure)
    return None

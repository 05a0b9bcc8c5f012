"""SAC at HalfCheetah's sizes, by our library and by others: one update, one action, a whole step of training."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch

from angle_rl.agents import SAC
from angle_rl.bench.eager import TAU, CleanRLStyle, TunedTorch
from angle_rl.bench.libraries import spaces
from angle_rl.bench.rows import ACTION, OBSERVATION, Rows
from angle_rl.bench.timing import Clock
from angle_rl.bench.update_training import TrainerSteps
from angle_rl.config import AgentConfig, Hyperparameters, Training
from angle_rl.types import EnvironmentState, RandomKey, RLState

ENVIRONMENT = "HalfCheetah-v5"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What one update works on."""

    batch: int = 256  # rows an update learns on, >= 1
    hidden_sizes: tuple[int, ...] = (256, 256)  # units of each hidden layer, in all networks
    critics: int = 2  # in the ensemble, >= 2


USUAL = Sizes()


class Learner(Protocol):
    """One SAC under test."""

    name: str
    multiple: int  # calls after which its mix of critic and policy steps repeats
    updates: int  # updates one call takes, and environment steps one iteration of `steps`

    def fill(self, rows: Rows) -> None:
        """Fills the replay with as many rows as it holds."""

    def update(self) -> object:
        """`updates` times, on average, one step each of critics, policy, entropy coefficient and targets."""

    def critics(self) -> list[torch.Tensor]:
        """The critics' parameters."""

    def targets(self) -> list[torch.Tensor]:
        """The target critics' parameters, in the critics' order."""

    def policy(self) -> list[torch.Tensor]:
        """The policy's parameters."""

    def choose(self, observation: Any) -> Any:
        """One random action of the policy, NumPy [6], for one NumPy observation [17]."""

    def steps(self) -> Clock:
        """A clock of whole training steps, `updates` an iteration: act, step the environment, store, update."""

    def close(self) -> None:
        """Ends what `steps` began."""


def random_rows(count: int) -> Rows:
    """Rows as a standardised HalfCheetah might give them."""
    generator = np.random.default_rng(0)
    return Rows(
        observations=generator.standard_normal((count, OBSERVATION), dtype=np.float32),
        actions=generator.uniform(-1, 1, (count, ACTION)).astype(np.float32),
        rewards=generator.standard_normal(count, dtype=np.float32),
        next_observations=generator.standard_normal((count, OBSERVATION), dtype=np.float32),
        terminated=np.zeros(count, dtype=np.bool_),
    )


def known_fields(**fields: Any) -> dict[str, Any]:
    """Those of these fields that this version's config has."""
    known = {entry.name for part in (Hyperparameters, Training) for entry in dataclasses.fields(part)}
    return {name: value for name, value in fields.items() if name in known}


class Angle:
    """Ours: agents.SAC with its defaults, so with prioritised replay, on one of its engines."""

    multiple = 1

    def __init__(
        self,
        capacity: int,
        sizes: Sizes = USUAL,
        *,
        engine: str = "torch",
        updates: int = 1,
        threads: int = 1,
        device: str = "cpu",
        replay: Any = None,
        meta: Any = None,
        **fields: Any,
    ) -> None:
        """RuntimeError where this version has no such engine, or it does not take these networks.

        `device`: where the networks are, and a replay of its own. `replay`: another of ours, to learn from its rows;
        None: one of its own. `meta`: a meta trainer. `fields`: more of the config.
        """
        self.name, self.updates = f"angle-{engine}", updates
        absent = set(fields) - set(known_fields(**fields))
        if updates > 1 and not known_fields(updates_per_call=updates):
            absent.add("updates_per_call")
        if absent:
            raise RuntimeError(f"not in this version: {', '.join(sorted(absent))}")
        try:
            training = Training(environment=ENVIRONMENT, engine=engine, device=device)  # type: ignore[arg-type]
            self.config = AgentConfig(training=training).replace(
                agent="sac",
                batch_size=sizes.batch,
                hidden_sizes=sizes.hidden_sizes,
                critics=sizes.critics,
                tau=TAU,
                replay_capacity=capacity,
                learning_starts=0,
                **known_fields(updates_per_call=updates, learner_threads=threads),
                **fields,
            )
            self.agent = SAC(self.config)
            observation_space, action_space = spaces()
            self.state, key = self.agent.init(
                RandomKey(0), observation_space=observation_space, action_space=action_space, replay=replay, meta=meta
            )
        except ValueError as refusal:
            raise RuntimeError(f"not in this version: {refusal}") from refusal
        self.threads = threads
        found = getattr(self.state.engine, "name", engine)
        if not found.startswith(engine):  # under MetaCritic, native critics only
            raise RuntimeError(f"the engine is {found}")
        nobody: Any = np.zeros(1, np.bool_)
        seen = EnvironmentState(
            observation=np.zeros((1, OBSERVATION), np.float32),
            reward=np.zeros(1),
            terminated=nobody,
            truncated=nobody,
            final_observation=np.zeros((1, OBSERVATION), np.float32),
            stepped=np.ones(1, np.bool_),
        )
        self._rl_state = RLState(self.state, seen, key, iteration=0, episode=0, trajectory=None)
        self._training: TrainerSteps | None = None

    def fill(self, rows: Rows) -> None:
        if len(self.state.replay) == 0:  # another's, perhaps, and filled
            self.state.replay.insert(*rows)

    def update(self) -> object:
        self.state.steps += self.updates  # as if so many rows had been recorded: as many updates are due
        self._rl_state = self.agent.optimize_model(self._rl_state)
        return None

    def critics(self) -> list[torch.Tensor]:
        return list(self.state.critics.parameters())

    def targets(self) -> list[torch.Tensor]:
        return list(self.state.target_critics.parameters())

    def policy(self) -> list[torch.Tensor]:
        return list(self.state.policy.parameters())

    def choose(self, observation: Any) -> Any:
        seen = self._rl_state.environment_state._replace(observation=observation[None])
        actions, self._rl_state = self.agent.select_action(self._rl_state._replace(environment_state=seen), 0)
        return actions[0]

    def forward(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """Calls of the policy for one observation, noise given: as the library has it, and in plain torch."""
        policy: Any = self.state.policy
        generator = torch.Generator().manual_seed(0)
        observation = torch.randn(1, OBSERVATION, generator=generator)
        noise = torch.randn(1, ACTION, generator=generator)

        def ours() -> Any:
            with torch.no_grad():
                return policy.sample_actions(observation, noise=noise)[0]

        def plain() -> Any:
            with torch.no_grad():
                mean, log_std = policy(observation)
                return torch.tanh(mean + noise * log_std.exp())

        if not torch.allclose(ours(), plain(), rtol=1e-4, atol=1e-5):
            raise RuntimeError(f"{self.name}: the actions are {ours()}, torch's {plain()}")
        return ours, plain

    def steps(self, **options: Any) -> TrainerSteps:
        """The whole AgentTrainer, in a thread; `options` are more of its arguments."""
        config = self.config.replace(threads=self.threads, evaluation_interval=None, steps=1 << 40)
        if options.get("overlap"):  # the environment wants a core, too: the engine chooses
            config = config.replace(**known_fields(learner_threads=None))
        self._training = TrainerSteps(config, self.state.replay, self.updates, **options)
        return self._training

    def close(self) -> None:
        if self._training is not None:
            self._training.close()
            self._training = None


def environment_steps(learner: Any, update: Callable[[], object]) -> Clock:
    """A clock of training steps for whoever has ``act(observation)`` and ``store(...)``."""
    environment = gymnasium.make(ENVIRONMENT)
    observation, _ = environment.reset(seed=0)

    def run(iterations: int) -> float:
        nonlocal observation
        start = time.perf_counter()
        for _ in range(iterations):
            action = learner.act(observation)
            following, reward, terminated, truncated, _ = environment.step(action)
            learner.store(observation, action, float(reward), following, terminated)
            observation = environment.reset()[0] if terminated or truncated else following
            update()
        return time.perf_counter() - start

    return run


class Eager:
    """One of the eager implementations."""

    updates = 1

    def __init__(self, kind: type[CleanRLStyle] | type[TunedTorch], capacity: int, batch: int) -> None:
        self.batch = batch
        self.learner = kind(capacity)
        self.name = kind.name
        self.multiple = 2 if kind is CleanRLStyle else 1
        self.fill, self.critics = self.learner.fill, self.learner.critics
        self.targets, self.policy = self.learner.targets, self.learner.policy

    def update(self) -> object:
        self.learner.update(self.batch)
        return None

    def choose(self, observation: Any) -> Any:
        return self.learner.act(observation)

    def steps(self) -> Clock:
        return environment_steps(self.learner, self.update)

    def close(self) -> None:
        pass


class StableBaselines3:
    """Stable-Baselines3's SAC at its defaults, without learning starts."""

    name = "stable-baselines3"
    multiple = 1
    updates = 1

    def __init__(self, capacity: int, sizes: Sizes = USUAL) -> None:
        from stable_baselines3 import SAC as PeerSAC
        from stable_baselines3.common.logger import configure

        self.batch = sizes.batch
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self.model = PeerSAC(
                "MlpPolicy",
                gymnasium.make(ENVIRONMENT),
                buffer_size=capacity,
                batch_size=sizes.batch,
                tau=TAU,
                learning_starts=0,
                policy_kwargs={"net_arch": list(sizes.hidden_sizes), "n_critics": sizes.critics},
                device="cpu",
                seed=0,
            )
        self.model.set_logger(configure(None, []))

    def fill(self, rows: Rows) -> None:
        buffer = self.model.replay_buffer
        n = len(rows.rewards)
        buffer.observations[:n, 0], buffer.next_observations[:n, 0] = (
            rows.observations,
            rows.next_observations,
        )
        buffer.actions[:n, 0], buffer.rewards[:n, 0], buffer.dones[:n, 0] = rows.actions, rows.rewards, 0.0
        buffer.pos, buffer.full = n % buffer.buffer_size, n == buffer.buffer_size

    def update(self) -> object:
        return self.model.train(gradient_steps=1, batch_size=self.batch)

    def critics(self) -> list[torch.Tensor]:
        return list(self.model.critic.parameters())

    def targets(self) -> list[torch.Tensor]:
        return list(self.model.critic_target.parameters())

    def policy(self) -> list[torch.Tensor]:
        return list(self.model.actor.parameters())

    def choose(self, observation: Any) -> Any:
        return self.model.predict(observation, deterministic=False)[0]

    def steps(self) -> Clock:
        model = self.model

        def run(iterations: int) -> float:
            start = time.perf_counter()
            model.learn(total_timesteps=iterations, reset_num_timesteps=False, log_interval=None)
            return time.perf_counter() - start

        return run

    def close(self) -> None:
        pass


def eager(capacity: int, batch: int) -> list[Learner]:
    """The learners that need nothing but this package and torch; two hidden layers of 256."""
    return [Eager(CleanRLStyle, capacity, batch), Eager(TunedTorch, capacity, batch)]


def check_learner(learner: Learner) -> None:
    """RuntimeError unless updates change everything, stay finite, and move the targets by tau.

    The last is asked of learners that take one update a call; one action must be finite and within its bounds.
    """
    parts = {"policy": learner.policy(), "critics": learner.critics(), "targets": learner.targets()}
    before = {name: [tensor.detach().clone() for tensor in tensors] for name, tensors in parts.items()}
    for _ in range(learner.multiple):
        slow = [tensor.detach().clone() for tensor in learner.targets()]
        learner.update()
        for target, old, online in zip(learner.targets(), slow, learner.critics(), strict=True):
            moved = torch.allclose(target, TAU * online + (1 - TAU) * old, rtol=1e-4, atol=1e-6)
            if learner.updates == 1 and not moved:
                raise RuntimeError(f"{learner.name}: the targets did not move by tau")
    for name, tensors in parts.items():
        changed = [not torch.equal(tensor, old) for tensor, old in zip(tensors, before[name], strict=True)]
        if not all(changed) or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise RuntimeError(f"{learner.name}: an update left the {name} unchanged or not finite")
    action = np.asarray(learner.choose(np.zeros(OBSERVATION, np.float32)))
    if action.shape != (ACTION,) or not (np.abs(action) <= 1).all():
        raise RuntimeError(f"{learner.name}: the action for one observation is {action}")


def check_engine(engine: str, batch: int = 64, updates: int = 4, tolerance: float = 0.02, **fields: Any) -> None:
    """RuntimeError unless an engine's first updates are torch's, from the same rows, networks and noise.

    Compared is the change of each tensor, relative to its norm. Adam's first steps are of one size whatever the
    gradient's, so where that is near 0, rounding turns an element around: hence the wide tolerance. The engine's tests
    compare more closely.
    """
    rows = random_rows(1024)
    sizes = Sizes(batch=batch)
    pair = [Angle(1024, sizes, engine="torch"), Angle(1024, sizes, engine=engine, **fields)]
    changes = []
    for learner in pair:
        learner.fill(rows)
        tensors = [*learner.critics(), *learner.targets(), *learner.policy()]
        before = [tensor.detach().clone() for tensor in tensors]
        for _ in range(updates):
            learner.update()
        changes.append([(tensor.detach() - old).double() for tensor, old in zip(tensors, before, strict=True)])
    for expected, found in zip(*changes, strict=True):
        if float((expected - found).norm()) > tolerance * float(expected.norm()) + 1e-9:
            raise RuntimeError(
                f"angle-{engine}: {updates} updates changed a tensor of shape {list(expected.shape)} by "
                f"{float(found.norm()):.3g} where torch changed it by {float(expected.norm()):.3g}, "
                f"{float((expected - found).norm()):.3g} apart"
            )

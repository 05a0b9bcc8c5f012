"""Agents of any kind with transitions to learn from, for the tests of what engines take and do."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces

from angle_rl.agents import DDPG, DQN, SAC, TD3, DiscreteSAC
from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
from angle_rl.feed import FunctionFeed
from angle_rl.types import RandomKey

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))
NAMES = {SAC: "sac", DiscreteSAC: "sac_discrete", TD3: "td3", DDPG: "ddpg", DQN: "dqn"}


def made(
    kind=SAC, *, q_future=None, rows=200, buffer=None, networks=None, device="cpu", compile=False, **hyperparameters
):
    """An agent and its first state, on the torch engine, with random transitions in the replay.

    `buffer` makes the replay and `networks` a dict of policy and critics, where these are not to be the agent's own.
    """
    base = next(base for base in kind.__mro__ if base in NAMES)
    config = AgentConfig(
        hyperparameters=Hyperparameters(
            **{"agent": NAMES[base], "hidden_sizes": (16,), "batch_size": 32, "replay_capacity": 1000} | hyperparameters
        ),
        training=Training(engine="torch", device=device, compile=compile),
    )
    discrete = base in (DQN, DiscreteSAC)
    action_space = spaces.Discrete(4, start=-1) if discrete else ACTIONS
    agent = kind(config) if q_future is None else kind(config, q_future)
    spaces_of_it = {"observation_space": OBSERVATIONS, "action_space": action_space}
    replay = None if buffer is None else buffer(config.hyperparameters.replay_capacity, **spaces_of_it, seed=5)
    own = {} if networks is None else networks()
    state, _ = agent.init(RandomKey(1), **spaces_of_it, replay=replay, **own)
    generator = np.random.default_rng(0)
    if rows > 0:
        state.replay.insert(
            generator.normal(size=(rows, 3)).astype(np.float32),
            generator.integers(-1, 3, rows)
            if discrete
            else generator.uniform(ACTIONS.low, ACTIONS.high, (rows, 2)).astype(np.float32),
            generator.normal(size=rows).astype(np.float32),
            generator.normal(size=(rows, 3)).astype(np.float32),
            generator.random(rows) < 0.2,
        )
    return agent, state


def spec_of(agent, state):
    return agent._spec() if isinstance(agent, DQN) else agent._spec(state)


def tensors_of(agent, state):
    return {name: tensor.clone() for name, tensor in agent.export_state(state)[0].items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def walk(observation, action):
    return np.float32(0.9) * observation + np.float32(0.1) * action[:1], float(-(observation[0] ** 2))


def walk_feed():
    return FunctionFeed(
        walk,
        initial_observation=np.array([0.5], np.float32),
        action_space=spaces.Box(-1, 1, (1,), np.float32),
        step_limit=10,
    )


def small(folder, steps, **hyperparameters):
    return AgentConfig(
        hyperparameters=Hyperparameters(
            **{"agent": "ddpg", "hidden_sizes": (16,), "batch_size": 8, "learning_starts": 20, "replay_capacity": 1000}
            | hyperparameters
        ),
        training=Training(steps=steps, evaluation_interval=None, evaluation_episodes=1, engine="torch"),
        service=Service(run_folder=str(folder), tensorboard=False, checkpoint_interval=None),
    )

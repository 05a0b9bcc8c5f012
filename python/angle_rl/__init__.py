"""Angle RL: off-policy reinforcement learning on a compiled core.

The names below are imported when they are first used, so that `import angle_rl` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from angle_rl._core import __version__
from angle_rl.envs.registration import register_with_gymnasium

if TYPE_CHECKING:
    from angle_rl.agents import DQN, SAC, TD3, Agent, QLearning
    from angle_rl.config import AgentConfig, Hyperparameters, Service, Training
    from angle_rl.evaluation import Evaluation
    from angle_rl.feed import DataFeed, FunctionFeed, make_feed
    from angle_rl.meta_trainer import MetaLearnerTrainer
    from angle_rl.models import DeterministicPolicy, PolicyModel, QNetwork, SquashedGaussianPolicy, TwinQ
    from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer
    from angle_rl.trainer import AgentTrainer
    from angle_rl.types import Batch, RandomKey, RLState

__all__ = [
    "DQN",
    "SAC",
    "TD3",
    "Agent",
    "AgentConfig",
    "AgentTrainer",
    "Batch",
    "DataFeed",
    "DeterministicPolicy",
    "Evaluation",
    "FunctionFeed",
    "Hyperparameters",
    "MetaLearnerTrainer",
    "PolicyModel",
    "PrioritizedReplayBuffer",
    "QLearning",
    "QNetwork",
    "RLState",
    "RandomKey",
    "ReplayBuffer",
    "Service",
    "SquashedGaussianPolicy",
    "Training",
    "TwinQ",
    "__version__",
    "make_feed",
]

_MODULES = {
    "agents": ("DQN", "SAC", "TD3", "Agent", "QLearning"),
    "config": ("AgentConfig", "Hyperparameters", "Service", "Training"),
    "feed": ("DataFeed", "FunctionFeed", "make_feed"),
    "models": ("DeterministicPolicy", "PolicyModel", "QNetwork", "SquashedGaussianPolicy", "TwinQ"),
    "replay": ("PrioritizedReplayBuffer", "ReplayBuffer"),
    "evaluation": ("Evaluation",),
    "meta_trainer": ("MetaLearnerTrainer",),
    "trainer": ("AgentTrainer",),
    "types": ("Batch", "RandomKey", "RLState"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'angle_rl' has no attribute {name!r}")
    value = getattr(import_module(f"angle_rl.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_gymnasium()

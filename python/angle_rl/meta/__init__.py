"""Meta-learning: learners of an agent's own hyperparameters and losses, by gradients through its updates."""

from __future__ import annotations

from angle_rl.meta.base import Learning, MetaInputs, MetaLearner
from angle_rl.meta.bootstrapped import Bootstrapped
from angle_rl.meta.critic import MetaCritic
from angle_rl.meta.entropy import MetaEntropy
from angle_rl.meta.gradient import MetaGradient
from angle_rl.meta.initialization import MAML, Reptile

__all__ = [
    "MAML",
    "Bootstrapped",
    "Learning",
    "MetaCritic",
    "MetaEntropy",
    "MetaGradient",
    "MetaInputs",
    "MetaLearner",
    "Reptile",
]

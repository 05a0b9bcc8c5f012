"""How one update is executed. An engine takes an UpdateSpec and an Update's callables, and knows no agent."""

from __future__ import annotations

from angle_rl.engines.base import Bounds, Engine, NextValues, PolicyLoss, Update, UpdateResult
from angle_rl.engines.torch import TorchEngine
from angle_rl.types import UpdateSpec

__all__ = [
    "Bounds",
    "Engine",
    "NextValues",
    "PolicyLoss",
    "TorchEngine",
    "Update",
    "UpdateResult",
    "describe_engine",
    "make_engine",
]


def make_engine(spec: UpdateSpec, update: Update) -> Engine:
    """The fastest engine that supports the update's networks: torch, the one there is."""
    return TorchEngine(spec, update)


def describe_engine(requested: str) -> str:
    """One line: which engine `requested` ("auto" or a name) resolves to, and why."""
    if requested == "auto":
        return "engine torch (auto: it takes any network on any device, and is the only engine of this version)"
    return f"engine {requested} (as configured)"

"""How one update is executed. An engine takes an UpdateSpec and an Update's callables, and knows no agent."""

from __future__ import annotations

from collections.abc import Callable

from angle_rl.engines.base import Bounds, Engine, NextValues, PolicyLoss, Update, UpdateResult
from angle_rl.engines.recognize import native_refusal
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
    "native_refusal",
]

NativeEngine = Callable[[UpdateSpec, Update, "int | None", str], Engine]
"""``f(spec, update, learner_threads, precision)``"""

NATIVE: NativeEngine | None = None
"""The native engine's class; None: this version has none"""


def make_engine(
    spec: UpdateSpec,
    update: Update,
    requested: str = "auto",
    *,
    learner_threads: int | None = None,
    precision: str = "float32",
) -> Engine:
    """The engine of this name, or under "auto" the fastest that takes the update: native, else torch.

    `learner_threads` and `precision` are the native engine's. ValueError where "native" does not take the update,
    saying why.
    """
    if requested == "torch":
        return TorchEngine(spec, update, why="as configured")
    refusal = "this version has none" if NATIVE is None else native_refusal(spec, update)
    if NATIVE is not None and refusal is None:
        return NATIVE(spec, update, learner_threads, precision)
    if requested == "native":
        raise ValueError(f"engine is 'native', which does not take this update: {refusal}; 'torch' takes any")
    return TorchEngine(spec, update, why=f"auto: not native, since {refusal}")


def describe_engine(requested: str, engine: Engine | None = None) -> str:
    """One line: which engine was taken, and why; of None, which one `requested` ("auto" or a name) leads to."""
    if engine is not None:
        return f"engine {engine.name} ({engine.why})"
    if requested != "auto":
        return f"engine {requested} (as configured)"
    if NATIVE is None:
        return "engine torch (auto: it takes any network on any device, and is the only engine of this version)"
    return "engine native (auto: where it takes the networks, and torch elsewhere)"

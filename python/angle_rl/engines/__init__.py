"""How one update is executed. An engine takes an UpdateSpec and an Update's callables, and knows no agent."""

from __future__ import annotations

from angle_rl.engines.base import Bounds, Engine, NextValues, PolicyLoss, Update, UpdateResult
from angle_rl.engines.native import NativeEngine
from angle_rl.engines.native_critics import NativeCriticsEngine, critics_refusal
from angle_rl.engines.recognize import bfloat16_refusal, native_refusal
from angle_rl.engines.torch import TorchEngine
from angle_rl.types import UpdateSpec

__all__ = [
    "Bounds",
    "Engine",
    "NativeCriticsEngine",
    "NativeEngine",
    "NextValues",
    "PolicyLoss",
    "TorchEngine",
    "Update",
    "UpdateResult",
    "describe_engine",
    "make_engine",
    "native_refusal",
]


def make_engine(
    spec: UpdateSpec,
    update: Update,
    requested: str = "auto",
    *,
    learner_threads: int | None = None,
    precision: str = "float32",
) -> Engine:
    """The engine of this name, or under "auto" the fastest that takes the update: native, else torch.

    Where only the policy's loss is none that the native engine knows, that one takes the critics nevertheless, and
    torch the policy. `learner_threads` and `precision` are the native engine's. ValueError where "native" does not take
    the update, saying why.
    """
    if requested == "torch":
        return TorchEngine(spec, update, why="as configured")
    own_loss = spec.policy_loss == "other"
    refusal = critics_refusal(spec, update) if own_loss else native_refusal(spec, update)
    if precision == "bfloat16" and refusal is None:
        refusal = bfloat16_refusal(update)
    if refusal is None and own_loss:
        return NativeCriticsEngine(spec, update, learner_threads, precision=precision, why=requested)
    if refusal is None:
        return NativeEngine(spec, update, learner_threads, precision=precision, why=requested)
    if requested == "native":
        raise ValueError(f"engine is 'native', which does not take this update: {refusal}; 'torch' takes any")
    return TorchEngine(spec, update, why=f"auto: not native, since {refusal}")


def describe_engine(requested: str, engine: Engine | None = None) -> str:
    """One line: which engine was taken, and why; of None, which one `requested` ("auto" or a name) leads to."""
    if engine is not None:
        return f"engine {engine.name} ({engine.why})"
    if requested != "auto":
        return f"engine {requested} (as configured)"
    return "engine native (auto: where it takes the networks, and torch elsewhere)"

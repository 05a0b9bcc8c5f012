"""How one update is executed. An engine takes an UpdateSpec and an Update's callables, and knows no agent."""

from __future__ import annotations

from angle_rl.engines.base import Bounds, Engine, NextValues, PolicyLoss, Update, UpdateResult
from angle_rl.engines.cuda_graph import CudaGraphEngine, graph_refusal
from angle_rl.engines.native import NativeEngine
from angle_rl.engines.native_critics import NativeCriticsEngine, critics_refusal
from angle_rl.engines.recognize import bfloat16_refusal, native_refusal
from angle_rl.engines.torch import TorchEngine
from angle_rl.types import UpdateSpec

__all__ = [
    "Bounds",
    "CudaGraphEngine",
    "Engine",
    "NativeCriticsEngine",
    "NativeEngine",
    "NextValues",
    "PolicyLoss",
    "TorchEngine",
    "Update",
    "UpdateResult",
    "describe_engine",
    "graph_refusal",
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
    """The engine of this name, or under "auto" the fastest that takes the update: native on a CPU, cuda_graph on a CUDA
    device, else torch.

    Where only the policy's loss is none that the native engine knows, that one takes the critics nevertheless, and
    torch the policy. Equations of the user's own go into a graph only where "cuda_graph" is asked for, since what they
    read on the host would stay what it was. `learner_threads` and `precision` are the native engine's. ValueError where
    the engine asked for does not take the update, saying why.
    """
    if requested == "torch":
        return TorchEngine(spec, update, why="as configured")
    if requested == "cuda_graph" or (requested == "auto" and update.device.type == "cuda"):
        refused = graph_refusal(spec, update)
        if refused is None and requested == "cuda_graph":
            return CudaGraphEngine(spec, update, why="as configured")
        if requested == "cuda_graph":
            raise ValueError(f"engine is 'cuda_graph', which does not take this update: {refused}; 'torch' takes any")
        if refused is None and "other" in (spec.next_value, spec.policy_loss):
            refused = "it has equations of its own, which are recorded where engine is 'cuda_graph'"
        if refused is None:
            return CudaGraphEngine(spec, update, why="auto: networks and replay on a CUDA device")
        return TorchEngine(spec, update, why=f"auto: not cuda_graph, since {refused}")
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


def describe_engine(requested: str, engine: Engine | None = None, *, device: str = "cpu") -> str:
    """One line: which engine was taken, and why; of None, which one `requested` ("auto" or a name) leads to on a device
    that holds the networks.
    """
    if engine is not None:
        return f"engine {engine.name} ({engine.why})"
    if requested != "auto":
        return f"engine {requested} (as configured)"
    if device.startswith("cuda"):
        return "engine cuda_graph (auto: where it can record the update, and torch elsewhere)"
    return "engine native (auto: where it takes the networks, and torch elsewhere)"

"""What an actor-critic learns and counts, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from angle_rl.agents.exploration import Exploration
from angle_rl.agents.noise import ActionBounds
from angle_rl.engines.base import Engine, UpdateResult

SKIPS_ALLOWED = 2
NOISE = "noise"  # the exploration noise's name in a checkpoint


class LossNotFiniteError(ArithmeticError):
    """The third update in a row had a NaN or infinite loss."""


@dataclass(kw_only=True)
class ActorCriticState:
    """All that an actor-critic learns and counts. Changed in place by its agent."""

    policy: torch.nn.Module
    target_policy: torch.nn.Module | None  # None: the target's actions come from the policy itself
    critics: torch.nn.Module
    target_critics: torch.nn.Module
    optimizers: dict[str, torch.optim.Optimizer]  # "critics", "policy", and SAC's "entropy_coefficient" if learned
    replay: Any  # ReplayBuffer or PrioritizedReplayBuffer
    meta: Any  # has update_meta_learning_model(states, q); None: no meta step
    bounds: ActionBounds
    device: torch.device
    exploration: Exploration  # the scale of the exploration noise
    noise: torch.Tensor | None = None  # [n, *action_shape], Ornstein-Uhlenbeck noise, in halves of the action range
    log_entropy_coefficient: torch.Tensor | None = None  # scalar, SAC's parameter; None: fixed, or no entropy term
    entropy_coefficient: torch.Tensor | None = None  # scalar, its exponential, without gradient
    steps: int = 0  # transitions recorded
    first_stream: int = 0  # the replay's stream of the first environment
    learned_steps: int = 0  # what `steps` was when optimize_model last ran
    updates: int = 0  # updates taken
    policy_updates: int = 0  # policy steps taken
    skipped_updates: int = 0  # updates left out for a loss that was not finite
    skipped_in_a_row: int = 0  # since critic and policy losses were last finite
    policy_skipped: int = 0  # 1 if the newest policy loss was not finite
    last_update: UpdateResult | None = None  # the newest update's batch, values and losses
    engine: Engine = field(init=False)


def count_update(state: ActorCriticState, result: UpdateResult, policy_steps: int) -> None:
    """Count an update, taken or skipped. LossNotFiniteError at the third skip in a row."""
    if result.finite:
        state.updates += 1
        state.policy_updates += policy_steps
        state.policy_skipped = 0 if policy_steps > 0 else state.policy_skipped
        state.skipped_in_a_row = state.skipped_in_a_row if state.policy_skipped else 0
        state.last_update = result
        return
    state.skipped_updates += 1
    state.skipped_in_a_row += 1
    state.policy_skipped = 0 if result.policy_loss is None else 1
    if state.skipped_in_a_row > SKIPS_ALLOWED:
        which = "critic loss" if result.policy_loss is None else "policy loss"
        value = float(result.critic_loss if result.policy_loss is None else result.policy_loss)
        raise LossNotFiniteError(f"the {which} is {value} in {state.skipped_in_a_row} updates in a row")


COUNTERS = (
    "steps",
    "first_stream",
    "learned_steps",
    "updates",
    "policy_updates",
    "skipped_updates",
    "skipped_in_a_row",
    "policy_skipped",
)


def export_state(state: ActorCriticState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state as named tensors (not copied: write them before the next step) and JSON-able values."""
    tensors = _own_tensors(state)
    for name, optimizer in state.optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizers.{name}.{index}.{slot}": tensor for slot, tensor in slots.items()}
    arrays, replay = state.replay.export_state()
    tensors |= {f"replay.{name}": torch.as_tensor(array) for name, array in arrays.items()}
    if state.noise is not None:
        tensors[NOISE] = state.noise
    return tensors, {
        "counters": {name: getattr(state, name) for name in COUNTERS},
        "exploration": state.exploration.export_state(),
        "replay": replay,
    }


def import_state(state: ActorCriticState, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Put back what `export_state` gave. ValueError where it does not fit, and nothing changes then."""
    own = _own_tensors(state)
    for name, tensor in own.items():
        if name not in tensors:
            raise ValueError(f"the checkpoint has no {name}; it belongs to another agent or other networks")
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {list(tensors[name].shape)} in the checkpoint; here it must be {list(tensor.shape)}"
            )
    for name in tensors:
        if name not in own and name != NOISE and not name.startswith(("optimizers.", "replay.")):
            raise ValueError(f"the checkpoint holds {name}, which these networks do not have")
    noise = tensors.get(NOISE)
    if noise is not None and (noise.dim() == 0 or noise.shape[1:] != state.bounds.shape):
        shape = ", ".join(["n", *map(str, state.bounds.shape)])
        raise ValueError(f"{NOISE} has shape {list(noise.shape)} in the checkpoint; here it must be [{shape}]")
    exploration = Exploration(state.exploration.schedule)
    if "exploration" in values:
        exploration.import_state(values["exploration"])
    state.replay.import_state(
        {name.removeprefix("replay."): t.numpy() for name, t in tensors.items() if name.startswith("replay.")},
        values["replay"],
    )
    state.noise = None if noise is None else noise.clone()
    state.exploration = exploration
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    for name, optimizer in state.optimizers.items():
        _import_optimizer(optimizer, f"optimizers.{name}.", tensors)
    if state.log_entropy_coefficient is not None:
        state.entropy_coefficient = state.log_entropy_coefficient.detach().exp()
    for name in COUNTERS:
        setattr(state, name, int(values["counters"][name]))


def _own_tensors(state: ActorCriticState) -> dict[str, torch.Tensor]:
    """The networks' tensors and the entropy coefficient's, by name, sharing memory with the state."""
    tensors: dict[str, torch.Tensor] = {}
    for name in ("policy", "target_policy", "critics", "target_critics"):
        network = getattr(state, name)
        if network is not None:
            tensors |= {f"{name}.{key}": tensor for key, tensor in network.state_dict().items()}
    if state.log_entropy_coefficient is not None:
        tensors["log_entropy_coefficient"] = state.log_entropy_coefficient.detach()
    return tensors


def _import_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, slot = name.removeprefix(prefix).split(".")
            slots.setdefault(int(index), {})[slot] = tensor.clone()
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})

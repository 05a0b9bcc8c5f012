"""What an agent with critics learns and counts, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from angle_rl._core import MAX_STREAMS
from angle_rl.agents.base import crossings
from angle_rl.agents.exploration import Exploration
from angle_rl.agents.noise import ActionBounds
from angle_rl.agents.optimizers import moments_of
from angle_rl.config import AgentConfig
from angle_rl.engines.base import Engine, UpdateResult
from angle_rl.spaces import row_of
from angle_rl.tensors import as_arrays, device_of
from angle_rl.types import Array, EnvironmentState, RandomKey, RLState

SKIPS_ALLOWED = 2
META_INTERVAL = 10  # environment steps, what meta_update_interval="auto" means
NOISE = "noise"  # the exploration noise's name in a checkpoint


class LossNotFiniteError(ArithmeticError):
    """The third update in a row had a NaN or infinite loss or gradient."""


class Learner(Protocol):
    """Takes the updates in a thread of its own. Its methods belong to the thread that acts and records."""

    def submit(self, works: list[Work]) -> None:
        """Have these done in order, after what came before; wait while too many updates wait.

        Raises what earlier work raised.
        """
        ...

    def rest(self) -> None:
        """Wait until all is done. Raises what it raised."""
        ...

    def acting(self) -> torch.nn.Module:
        """A copy of the network that acts, with the newest weights; the same module every time."""
        ...


Work = tuple[int, Callable[[], None]]
"""So many updates, and the call that takes them"""


@dataclass(kw_only=True)
class LearnerState:
    """All that an agent with critics and a replay learns and counts. Changed in place by its agent.

    While there is a `learner`, the networks, optimisers, engine, `updates` and all that is counted with them, and
    `last_update` are its thread's, unless it is at rest; the rest belongs to the thread that acts and records.
    """

    networks: ClassVar[tuple[str, ...]] = ("critics", "target_critics")  # the fields that hold what is learned
    acts_by: ClassVar[str] = "critics"  # the network among them that chooses actions

    critics: torch.nn.Module
    target_critics: torch.nn.Module
    optimizers: dict[str, torch.optim.Optimizer]  # "critics", "policy", and SAC's "entropy_coefficient" if learned
    replay: Any  # ReplayBuffer or PrioritizedReplayBuffer
    meta: Any  # has update_meta_learning_model(states, q); None: no meta step
    device: torch.device
    exploration: Exploration  # the scale of the exploration noise, or the share of random actions
    steps: int = 0  # transitions recorded
    first_stream: int = 0  # the replay's stream of the first environment
    learned_steps: int = 0  # what `steps` was when optimize_model last ran
    held_back: int = 0  # updates that were due then and wait for more, to be taken in one call
    updates: int = 0  # updates taken
    policy_updates: int = 0  # policy steps taken
    skipped_updates: int = 0  # updates left out for a loss or gradient that was not finite
    skipped_in_a_row: int = 0  # since critic and policy losses and gradients were last finite
    policy_skipped: int = 0  # 1 if the newest policy loss, or its gradient, was not finite
    reward_scale: float = 1.0  # what all rewards are multiplied by
    last_update: UpdateResult | None = None  # the newest update's batch, values and losses
    learner: Learner | None = None  # takes the updates apart from the steps; None: they are taken where they are due
    # "critics" and "policy" in DistributedDataParallel, where they were passed so; the fields hold what is inside
    data_parallel: dict[str, DistributedDataParallel] = field(default_factory=dict)
    engine: Engine = field(init=False)

    def acting(self) -> Any:
        """The network to choose actions by: the one that learns, or the learner's copy of it."""
        return getattr(self, self.acts_by) if self.learner is None else self.learner.acting()


@dataclass(kw_only=True)
class ActorCriticState(LearnerState):
    """All that an actor-critic learns and counts. Changed in place by its agent."""

    networks: ClassVar[tuple[str, ...]] = ("policy", "target_policy", "critics", "target_critics")
    acts_by: ClassVar[str] = "policy"

    policy: torch.nn.Module
    target_policy: torch.nn.Module | None  # None: the target's actions come from the policy itself
    bounds: ActionBounds
    noise: torch.Tensor | None = None  # [n, *action_shape], Ornstein-Uhlenbeck noise, in halves of the action range
    log_entropy_coefficient: torch.Tensor | None = None  # scalar, SAC's parameter; None: fixed, or no entropy term
    entropy_coefficient: torch.Tensor | None = None  # scalar, its exponential, without gradient
    loss_weights: torch.Tensor | None = None  # [critics] float64, on each critic's part of the loss; None: 1 each

    def set_entropy_coefficient(self, coefficient: torch.Tensor) -> None:
        """Take a new coefficient, a scalar without gradient."""
        self.entropy_coefficient = coefficient


def begin_streams(state: LearnerState, seen: EnvironmentState) -> None:
    """Where all environments begin anew, their rows go to streams of their own from now on.

    So no window of n steps runs from a row before to one after.
    """
    n = len(seen.stepped)
    if state.steps > 0 and not seen.stepped.any():
        state.first_stream = (state.first_stream + n) % max(1, MAX_STREAMS - n)


def insert_stepped(rl_state: RLState, action: Any, reward: Array, terminated: Array, next_rl_state: RLState) -> None:
    """Insert the transitions of the environments that stepped, and count them.

    Tensors go to a replay on a device as they are, to any other as arrays.
    """
    state: LearnerState = next_rl_state.agent_state
    streams, rows = stepped_rows(rl_state, action, reward, terminated, next_rl_state)
    if len(streams) > 0:
        if device_of(rows[0]) is not None and not getattr(state.replay, "resident", False):
            rows = as_arrays(rows)
        state.replay.insert(*rows, streams=streams + state.first_stream)
        state.steps += len(streams)
        state.exploration.record(next_rl_state.environment_state)


def stepped_rows(
    rl_state: RLState, action: Any, reward: Array, terminated: Array, next_rl_state: RLState
) -> tuple[Array, tuple[Any, ...]]:
    """The environments that stepped, ``[k]``, and their transitions, each ``[k, ...]``.

    These are observations, actions, rewards, next observations, terminated and truncated.
    """
    before, after = rl_state.environment_state, next_rl_state.environment_state
    streams = np.flatnonzero(after.stepped)
    rows = (before.observation, action, reward, after.final_observation, terminated, after.truncated)
    if len(streams) < len(after.stepped):
        rows = tuple(row_of(row, streams) for row in rows)
    return streams, rows


def count_update(state: LearnerState, result: UpdateResult, policy_steps: int) -> None:
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
        which = "critic" if result.policy_loss is None else "policy"
        loss = float(result.critic_loss if result.policy_loss is None else result.policy_loss)
        what = f"{which} gradient is not finite" if math.isfinite(loss) else f"{which} loss is {loss}"
        raise LossNotFiniteError(f"the {what} in {state.skipped_in_a_row} updates in a row")


Plan = Callable[[int, int], tuple[int, bool]]
"""``f(index, updates)`` -> how many policy steps an update takes, and whether it copies the targets. `index` counts
updates from the first environment step on, those left out before `learning_starts` too; `updates` those taken before.
"""


def learning_rate_share(config: AgentConfig, steps: int) -> float:
    """The share of the config's learning rates that is left after so many environment steps, in [0, 1]."""
    if config.hyperparameters.learning_rate_schedule == "constant":
        return 1.0
    return max(0.0, 1.0 - steps / config.training.steps)


def scale_learning_rates(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set every parameter group's ``lr`` to this share of what it was at first."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])


def optimize_when_due(
    rl_state: RLState, config: AgentConfig, updates_per_step: Fraction, plan: Plan, *, finish: bool = False
) -> RLState:
    """The updates that are due since the last call, `updates_per_call` of them at a time, then the meta steps.

    Fewer than that wait for the next call, if this is not to `finish`. What is due, and each update's key, is decided
    here and now; where the state has a `learner`, that takes the updates, in this order. The meta steps wait for it.
    """
    state: LearnerState = rl_state.agent_state
    hyperparameters = config.hyperparameters
    before, state.learned_steps = state.learned_steps, state.steps
    if state.steps <= hyperparameters.learning_starts:
        return rl_state
    works: list[Work] = []
    if hyperparameters.learning_rate_schedule != "constant":
        # From the counter alone: so a resumed run needs no more than that, also where it is to be a longer one.
        share = learning_rate_share(config, state.steps)
        works.append((0, partial(scale_learning_rates, state.optimizers.values(), share)))
    random_key = rl_state.random_key
    first = math.floor(max(before, hyperparameters.learning_starts) * updates_per_step) - state.held_back
    last = math.floor(state.steps * updates_per_step)
    at_a_time = hyperparameters.updates_per_call
    state.held_back = 0 if finish else (last - first) % at_a_time
    last -= state.held_back
    for index in range(first, last, at_a_time):
        keys = []
        for _ in range(index, min(index + at_a_time, last)):
            update_key, random_key = random_key.split(2)
            keys.append(update_key)
        works.append((len(keys), partial(_take_updates, state, keys, index, plan)))
    if state.learner is None:
        for _, work in works:
            work()
    elif works:
        state.learner.submit(works)
    interval = META_INTERVAL if hyperparameters.meta_update_interval == "auto" else hyperparameters.meta_update_interval
    meta_steps = 0 if state.meta is None else crossings(interval, before, state.steps)
    if meta_steps > 0 and state.learner is not None:
        state.learner.rest()
    newest = state.last_update if meta_steps > 0 else None  # read where the learner is at rest only
    if newest is not None:
        for _ in range(meta_steps):
            state.meta.update_meta_learning_model(newest.batch.observations, newest.q)
    return rl_state._replace(random_key=random_key)


def _take_updates(state: LearnerState, keys: list[RandomKey], index: int, plan: Plan) -> None:
    """So many updates, the first numbered `index`, in one call of the engine. After one that is skipped the rest are
    planned anew, since it does not count.
    """
    done = 0
    while done < len(keys):
        calls = [(key, *plan(index + done + n, state.updates + n)) for n, key in enumerate(keys[done:])]
        for result, (_, policy_steps, _) in zip(state.engine.update_many(calls), calls, strict=False):
            done += 1
            count_update(state, result, policy_steps)


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
LATER_COUNTERS = ("held_back",)
"""Counters that older checkpoints do not have: 0 there"""


def export_state(state: LearnerState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state as named tensors (not copied: write them before the next step) and JSON-able values."""
    tensors = learned_tensors(state)
    for name, optimizer in state.optimizers.items():
        for index, slots in moments_of(optimizer).items():
            tensors |= {f"optimizers.{name}.{index}.{slot}": tensor for slot, tensor in slots.items()}
    arrays, replay = state.replay.export_state()
    tensors |= {f"replay.{name}": torch.as_tensor(array) for name, array in arrays.items()}
    if isinstance(state, ActorCriticState) and state.noise is not None:
        tensors[NOISE] = state.noise
    return tensors, {
        "counters": {name: getattr(state, name) for name in (*COUNTERS, *LATER_COUNTERS)},
        "exploration": state.exploration.export_state(),
        "replay": replay,
    }


def import_state(state: LearnerState, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Put back what `export_state` gave. ValueError where it does not fit, and nothing changes then."""
    own = learned_tensors(state)
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
    noise = _checked_noise(state, tensors)
    optimizer_slots = {name: _optimizer_slots(name, optimizer, tensors) for name, optimizer in state.optimizers.items()}
    missing = [name for name in COUNTERS if name not in values.get("counters", {})]
    if missing or "replay" not in values:
        raise ValueError(f"the checkpoint has no {missing[0] if missing else 'replay'}; it belongs to another agent")
    counters = {name: int(values["counters"].get(name, 0)) for name in (*COUNTERS, *LATER_COUNTERS)}
    exploration = Exploration(state.exploration.schedule)
    if "exploration" in values:
        exploration.import_state(values["exploration"])
    state.replay.import_state(
        {name.removeprefix("replay."): t.numpy() for name, t in tensors.items() if name.startswith("replay.")},
        values["replay"],
    )
    state.exploration = exploration
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    for name, optimizer in state.optimizers.items():
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": optimizer_slots[name], "param_groups": groups})
    if isinstance(state, ActorCriticState):
        state.noise = noise
        if state.log_entropy_coefficient is not None:
            state.entropy_coefficient = state.log_entropy_coefficient.detach().exp()
    for name, count in counters.items():
        setattr(state, name, count)


def _checked_noise(state: LearnerState, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """A copy of the exploration noise in a checkpoint. ValueError where it does not fit the actions."""
    noise = tensors.get(NOISE)
    if noise is None:
        return None
    if not isinstance(state, ActorCriticState):
        raise ValueError(f"the checkpoint holds {NOISE}, which this agent does not have")
    if noise.dim() == 0 or noise.shape[1:] != state.bounds.shape:
        shape = ", ".join(["n", *map(str, state.bounds.shape)])
        raise ValueError(f"{NOISE} has shape {list(noise.shape)} in the checkpoint; here it must be [{shape}]")
    return noise.clone()


def learned_tensors(state: LearnerState) -> dict[str, torch.Tensor]:
    """The networks' tensors and the entropy coefficient's, by name, sharing memory with the state."""
    tensors: dict[str, torch.Tensor] = {}
    for name in state.networks:
        network = getattr(state, name)
        if network is not None:
            tensors |= {f"{name}.{key}": tensor for key, tensor in network.state_dict().items()}
    if isinstance(state, ActorCriticState) and state.log_entropy_coefficient is not None:
        tensors["log_entropy_coefficient"] = state.log_entropy_coefficient.detach()
    return tensors


def _optimizer_slots(
    name: str, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> dict[int, dict[str, torch.Tensor]]:
    """Copies of an optimiser's tensors by parameter and slot. ValueError where they do not fit its parameters."""
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(f"optimizers.{name}."):
            continue
        index, _, slot = key.removeprefix(f"optimizers.{name}.").partition(".")
        if not index.isdigit() or int(index) >= len(shapes):
            raise ValueError(f"the checkpoint holds {key}; the optimizer has {len(shapes)} parameters here")
        shape = shapes[int(index)]
        if tensor.dim() > 0 and tensor.shape != shape:
            raise ValueError(f"{key} has shape {list(tensor.shape)} in the checkpoint; here it must be {list(shape)}")
        slots.setdefault(int(index), {})[slot] = tensor.clone()
    return slots

"""Q-learning with a table (Watkins and Dayan 1992, doi:10.1007/BF00992698)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces

from angle_rl.agents.discrete import discrete_actions, epsilon_greedy, first_exploration, random_share, refuse_options
from angle_rl.agents.exploration import Exploration
from angle_rl.agents.state import learning_rate_share, stepped_rows
from angle_rl.config import AgentConfig
from angle_rl.spaces import Space, map_space
from angle_rl.types import Array, RandomKey, RLState

LARGEST_TABLE = 2**28
"""Entries that a table may have: 2 GiB of float64."""


class StateIndex:
    """The numbers of a space's observations: 0 to `size` - 1, in the order of the space with the last one fastest.

    Args:
        space: Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these; else ValueError.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        counts: list[int] = []
        map_space(lambda leaf: counts.extend(_counts(leaf, space)), space)
        self.size = math.prod(counts)

    def __call__(self, observations: Any) -> Array:
        """Observations ``[n, ...]`` as the space nests, arrays or tensors -> ``[n]`` int64.

        ValueError where one lies outside its space.
        """
        total: Any = 0

        def add(leaf: Space, values: Any) -> None:
            nonlocal total
            values = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
            counts, starts = np.array(_counts(leaf, self._space), np.int64), _starts(leaf)
            numbers = values.reshape(len(values), len(counts)).astype(np.int64) - starts
            if ((numbers < 0) | (numbers >= counts)).any():
                worst = int(np.flatnonzero(((numbers < 0) | (numbers >= counts)).any(1))[0])
                raise ValueError(f"observation {values[worst].tolist()} lies outside of its space, {leaf}")
            for column, count in zip(numbers.T, counts, strict=True):
                total = total * count + column

        map_space(add, self._space, observations)
        index: Array = total
        return index


class TablePolicy(torch.nn.Module):
    """The action of the largest entry; of equal ones the first.

    Attributes:
        table: ``[states, actions]`` float64.
    """

    table: torch.Tensor

    def __init__(self, index: StateIndex, actions: int, first_action: int = 0) -> None:
        super().__init__()
        self.index = index
        self.first_action = first_action
        self.register_buffer("table", torch.zeros(index.size, actions, dtype=torch.float64))

    def forward(self, observations: Any) -> torch.Tensor:
        """Observations, each ``[batch, ...]`` -> q, ``[batch, actions]`` float64."""
        return self.table[torch.as_tensor(self.index(observations))]

    def sample_actions(
        self, observations: Any, deterministic: bool = False, *, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``actions`` (``[batch]`` int64) and ``log_prob`` (``[batch]`` zeros).

        Deterministic either way: exploration is the agent's. `noise` is not read.
        """
        q = self(observations)
        return q.argmax(1) + self.first_action, torch.zeros(len(q))


class Step(NamedTuple):
    """A transition that is still to be learned from, in the table's numbers."""

    state: int
    action: int
    reward: float
    next_state: int
    terminated: bool


class TableUpdate(NamedTuple):
    """What the newest updates leave to look at."""

    q: torch.Tensor  # [1, n] float64, the entries before their update
    critic_loss: torch.Tensor  # scalar, mean square of the td errors
    policy_loss: None = None


@dataclass(kw_only=True)
class QLearningState:
    """All that Q-learning learns and counts. Changed in place by its agent."""

    policy: TablePolicy  # holds the table
    exploration: Exploration  # the share of random actions
    waiting: list[Step] = field(default_factory=list)  # recorded and not yet learned from
    steps: int = 0  # transitions recorded
    updates: int = 0  # updates taken
    last_update: TableUpdate | None = None


class QLearning:
    """Q-learning: one update of a table for every transition, epsilon-greedy actions.

    ``Q[s, a] += learning_rate * (r + discount * (1 - terminated) * max Q[s'] - Q[s, a])``: a truncated episode is
    bootstrapped, a terminated one is not. The table is float64 ``[states, actions]``, zeros at first, on the CPU, with
    a row for every observation of a space of Discrete, MultiDiscrete or MultiBinary numbers, or of Dict and Tuple of
    these. Transitions of several environments are learned from one after the other, in the environments' order.
    Until `learning_starts` actions are uniform and nothing is learned; from then on the share of random actions is
    `exploration_epsilon` at first and changes as `exploration_schedule` says. While exploring, equal entries are chosen
    among at random; the policy, for evaluation, takes the first of them.

    ValueError where the config asks for what it cannot do, a part is passed that it does not have (networks, replay,
    meta), or the space is another one.
    """

    name = "Q-learning"

    def __init__(self, config: AgentConfig, q_future: None = None) -> None:
        refuse_options({"q_future": q_future}, ("q_future",), self.name)
        hyperparameters = config.hyperparameters
        if hyperparameters.learning_rate > 1.0:
            raise ValueError(f"learning_rate is {hyperparameters.learning_rate}; Q-learning's must lie in (0, 1]")
        for name in ("n_step", "updates_per_step"):
            value = getattr(hyperparameters, name)
            if value != 1:
                raise ValueError(f"{name} is {value}; Q-learning learns once from each single step, so it must be 1")
        if torch.device(config.training.device).type != "cpu":
            raise ValueError(f"device is {config.training.device!r}; Q-learning's table lies on the cpu")
        first_exploration(hyperparameters)  # refuses what contradicts itself
        self.config = config
        self._hyperparameters = hyperparameters

    # The five callbacks ----------

    def init(self, random_key: RandomKey, **options: Any) -> tuple[QLearningState, RandomKey]:
        """An empty table for `observation_space` and `action_space` (of one environment). The key is not used."""
        refuse_options(options, ("policy", "critics", "replay", "meta"), self.name)
        actions, first_action = discrete_actions(options["action_space"], self.name)
        index = StateIndex(options["observation_space"])
        if index.size * actions > LARGEST_TABLE:
            raise ValueError(
                f"observation_space has {index.size} observations and action_space {actions} actions; "
                f"a table may have at most {LARGEST_TABLE} entries"
            )
        policy = TablePolicy(index, actions, first_action)
        return QLearningState(policy=policy, exploration=first_exploration(self._hyperparameters)), random_key

    def reset(self, random_key: RandomKey, rl_state: RLState) -> tuple[QLearningState, RandomKey]:
        """Nothing but what exploration goes by. The key is not used."""
        state: QLearningState = rl_state.agent_state
        state.exploration.reset(rl_state.environment_state)
        return state, random_key

    def select_action(self, rl_state: RLState, iteration: int) -> tuple[Array, RLState]:
        """``[n]`` actions, uniform until `learning_starts`, epsilon-greedy from then on."""
        state: QLearningState = rl_state.agent_state
        key, random_key = rl_state.random_key.split(2)
        explore_key, tie_key = key.split(2)
        q = state.policy(rl_state.environment_state.observation)
        # Below 0 where not largest: so the largest draw is a uniform choice among the equals.
        ties = torch.where(q == q.max(1, keepdim=True).values, tie_key.uniform(*q.shape), -1.0)
        epsilon = random_share(state.exploration, state.steps, self._hyperparameters.learning_starts)
        actions = epsilon_greedy(ties.argmax(1), q.shape[1], epsilon, explore_key) + state.policy.first_action
        return actions.numpy(), rl_state._replace(random_key=random_key)

    def record_observation(
        self, rl_state: RLState, action: Array, reward: Array, terminated: Array, next_rl_state: RLState
    ) -> RLState:
        """Keep the transitions of the environments that stepped until they are learned from.

        ValueError, and nothing is kept, where a reward is not finite or an observation or action not of its space.
        """
        state: QLearningState = next_rl_state.agent_state
        streams, (before, action, reward, after, terminated, _) = stepped_rows(
            rl_state, action, reward, terminated, next_rl_state
        )
        if len(streams) == 0:
            return next_rl_state
        policy, actions = state.policy, np.asarray(action) - state.policy.first_action
        states, next_states, rewards = policy.index(before), policy.index(after), np.asarray(reward, np.float64)
        if not np.isfinite(rewards).all():
            worst = int(np.flatnonzero(~np.isfinite(rewards))[0])
            raise ValueError(f"reward is {rewards[worst]} in row {worst}; rewards must be finite")
        if ((actions < 0) | (actions >= policy.table.shape[1])).any():
            raise ValueError(f"action is {np.asarray(action).tolist()}; there are {policy.table.shape[1]} actions")
        if state.steps >= self._hyperparameters.learning_starts:
            columns = (states, actions, rewards, next_states, np.asarray(terminated, np.bool_))
            state.waiting += [Step(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        state.steps += len(streams)
        state.exploration.record(next_rl_state.environment_state)
        return next_rl_state

    def optimize_model(self, rl_state: RLState) -> RLState:
        """One update for each transition recorded since the last call, in their order."""
        state: QLearningState = rl_state.agent_state
        if not state.waiting:
            return rl_state
        rate = self._hyperparameters.learning_rate * learning_rate_share(self.config, state.steps)
        discount = self._hyperparameters.discount
        table = state.policy.table.numpy()  # the same memory
        q, errors = [], []
        for step in state.waiting:
            row = table[step.state]
            future = 0.0 if step.terminated else discount * table[step.next_state].max()
            q.append(row[step.action])
            errors.append(step.reward + future - row[step.action])
            row[step.action] += rate * errors[-1]
        state.updates += len(state.waiting)
        state.waiting = []
        loss = torch.tensor(np.square(errors).mean())
        state.last_update = TableUpdate(torch.from_numpy(np.array([q])), loss)
        return rl_state

    # Checkpoints ----------

    def export_state(self, state: QLearningState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The state as named tensors (not copied: write them before the next step) and JSON-able values."""
        waiting = torch.tensor(state.waiting, dtype=torch.float64).reshape(-1, len(Step._fields))
        return (
            {"table": state.policy.table, "waiting": waiting},
            {
                "counters": {"steps": state.steps, "updates": state.updates},
                "exploration": state.exploration.export_state(),
            },
        )

    def import_state(self, state: QLearningState, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Put back what `export_state` gave. ValueError where it does not fit, and nothing changes then."""
        shapes = {"table": list(state.policy.table.shape), "waiting": [-1, len(Step._fields)]}
        for name, shape in shapes.items():
            if name not in tensors:
                raise ValueError(f"the checkpoint has no {name}; it belongs to another agent")
            found = list(tensors[name].shape)
            if len(found) != 2 or found[1] != shape[1] or shape[0] not in (-1, found[0]):
                raise ValueError(f"{name} has shape {found} in the checkpoint; here it must be {shape}")
        for name in tensors:
            if name not in shapes:
                raise ValueError(f"the checkpoint holds {name}, which Q-learning does not have")
        counters = values.get("counters", {})
        if "steps" not in counters or "updates" not in counters or "exploration" not in values:
            raise ValueError("the checkpoint has no counters or exploration; it belongs to another agent")
        exploration = Exploration(state.exploration.schedule)
        exploration.import_state(values["exploration"])
        rows = tensors["waiting"].tolist()
        waiting = [Step(int(s), int(a), float(r), int(s2), bool(end)) for s, a, r, s2, end in rows]
        state.policy.table.copy_(tensors["table"])
        state.exploration = exploration
        state.waiting, state.steps, state.updates = waiting, int(counters["steps"]), int(counters["updates"])


def _counts(leaf: Space, space: Space) -> list[int]:
    """How many values each number of an array has."""
    if isinstance(leaf, spaces.Discrete):
        return [int(leaf.n)]
    if isinstance(leaf, spaces.MultiDiscrete):
        return [int(count) for count in leaf.nvec.flatten()]
    if isinstance(leaf, spaces.MultiBinary):
        return [2] * math.prod(leaf.shape)
    raise ValueError(
        f"observation_space is {space}; Q-learning's table needs Discrete, MultiDiscrete or MultiBinary "
        "observations, or Dict and Tuple of these"
    )


def _starts(leaf: Space) -> Array:
    """The smallest value of each number of an array, ``[numbers]``, or one for all."""
    return np.array(getattr(leaf, "start", 0), np.int64).reshape(-1)

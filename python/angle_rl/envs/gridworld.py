"""A walk over a square grid to a target, whose best return is known.

State and observation: (row, column, target row, target column), int64 ``[4]``, a MultiDiscrete space; row 0 is
at the top. Actions: 0 up, 1 down, 2 right, 3 left; a move against a wall stays. Reward: minus the Manhattan
distance to the target after the move. The episode terminates at the target, and is truncated by the time limit
it was registered with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from angle_rl.envs.registration import STEP_LIMIT
from angle_rl.envs.vector import Array, VectorWorld, check_options, check_render_mode

Cell: TypeAlias = tuple[int, int]

MOVES = ((-1, 0), (1, 0), (0, 1), (0, -1))  # (rows, columns) of the actions 0 up, 1 down, 2 right, 3 left


def optimal_steps(observation: Any) -> Any:
    """The fewest moves from ``observation`` ``[..., 4]`` to its target: int64 ``[...]``, the Manhattan distance."""
    row, column, target_row, target_column = np.moveaxis(np.asarray(observation, dtype=np.int64), -1, 0)
    return np.abs(row - target_row) + np.abs(column - target_column)


def optimal_return(observation: Any, discount: float = 1.0) -> Any:
    """The largest (discounted) sum of rewards from ``observation`` ``[..., 4]``: float64 ``[...]``.

    From distance d every move of a best path comes one nearer: R(d) = -(d - 1) + discount * R(d - 1), R(0) = 0;
    undiscounted that is -d(d - 1) / 2. The time limit must allow d steps.
    """
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount is {discount}; it lies in [0, 1]")
    steps = optimal_steps(observation)
    returns = np.zeros(int(np.max(steps, initial=0)) + 1)
    for distance in range(1, returns.size):
        returns[distance] = 1 - distance + discount * returns[distance - 1]
    return returns[steps]


class Gridworld(gymnasium.Env[Array, np.int64]):
    """One grid of ``size`` x ``size`` cells.

    ``targets``: (row, column) pairs, one of which is drawn for each episode (one given twice is twice as
    likely); by default the four corners. ``start``: where every episode begins, by default a cell drawn
    uniformly from those that are not the target. ``render_mode`` "ansi": ``render`` returns a picture in
    letters, A the agent, T the target.

    ``reset(options={"state": (row, column, target_row, target_column)})`` begins the episode there; the
    target need not be one of ``targets``. Raises ValueError for what does not lie on the grid, and for an
    episode that would begin at its target. One thread.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's name and kind)

    def __init__(
        self,
        size: int = 5,
        *,
        targets: Sequence[Cell] | None = None,
        start: Cell | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.size = _checked_size(size)
        self.targets = _checked_targets(self.size, targets)
        self.start = _checked_start(self.size, start, self.targets)
        self.render_mode = check_render_mode(render_mode)
        self.observation_space = spaces.MultiDiscrete([self.size] * 4)
        self.action_space = spaces.Discrete(len(MOVES))
        self._state: tuple[int, int, int, int] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode. Returns the observation and an empty dict."""
        state = check_options(options, (4,))
        if state is not None:
            state = _checked_states(self.size, state)
        super().reset(seed=seed)
        if state is None:
            row, column, target_row, target_column = self._drawn()
        else:
            row, column, target_row, target_column = state.tolist()
        self._state = (row, column, target_row, target_column)
        return np.array(self._state, dtype=np.int64), {}

    def _drawn(self) -> tuple[int, int, int, int]:
        target_row, target_column = self.targets[int(self.np_random.integers(len(self.targets)))]
        if self.start is not None:
            return (*self.start, target_row, target_column)
        cell = int(self.np_random.integers(self.size**2 - 1))
        if cell >= target_row * self.size + target_column:
            cell += 1
        return (*divmod(cell, self.size), target_row, target_column)

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move. Returns the observation, the reward, whether the target is reached, False and an empty dict."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("step was called before reset")
        if not self.action_space.contains(action):
            raise ValueError(f"action is {action!r}; 0 (up), 1 (down), 2 (right) or 3 (left) is possible")
        row, column, target_row, target_column = self._state
        down, right = MOVES[int(action)]
        row = min(max(row + down, 0), self.size - 1)
        column = min(max(column + right, 0), self.size - 1)
        self._state = (row, column, target_row, target_column)
        distance = abs(row - target_row) + abs(column - target_column)
        return np.array(self._state, dtype=np.int64), float(-distance), distance == 0, False, {}

    def render(self) -> str | None:
        """The grid in letters, or None without ``render_mode``."""
        if self.render_mode is None or self._state is None:
            return None
        return _picture(self.size, self._state)


class GridworldVector(VectorWorld):
    """``num_envs`` grids stepped together; see ``Gridworld`` for the options and ``VectorWorld`` for the rest.

    Observations int64 ``[num_envs, 4]``, actions whole numbers ``[num_envs]``, states ``[num_envs, 4]``. One
    environment draws as ``Gridworld`` does, so with one seed its episodes are the same.
    """

    def __init__(
        self,
        num_envs: int = 1,
        size: int = 5,
        *,
        targets: Sequence[Cell] | None = None,
        start: Cell | None = None,
        max_episode_steps: int | None = STEP_LIMIT,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        self.size = _checked_size(size)
        self.targets = _checked_targets(self.size, targets)
        self.start = _checked_start(self.size, start, self.targets)
        super().__init__(
            num_envs,
            spaces.MultiDiscrete([self.size] * 4),
            spaces.Discrete(len(MOVES)),
            state_size=4,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            render_mode=render_mode,
        )
        self._target_choices = np.array(self.targets, dtype=np.int64)
        self._down, self._right = np.array(MOVES, dtype=np.int64).T.copy()
        # One contiguous row for each of: row, column, target row, target column.
        self._state = np.zeros((4, num_envs), dtype=np.int64)
        self._rows_off, self._columns_off = np.empty((2, num_envs), dtype=np.int64)

    def render(self) -> tuple[str, ...] | None:
        """Every grid in letters, or None without ``render_mode``."""
        if self.render_mode is None or self._ended is None:
            return None
        return tuple(_picture(self.size, state) for state in self._state.T.tolist())

    def _checked_state(self, state: Array) -> Array:
        return _checked_states(self.size, state)

    def _checked_actions(self, actions: Array) -> Array:
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions has shape {list(actions.shape)}; [{self.num_envs}] is due")
        if actions.dtype.kind not in "iu":
            raise TypeError(f"actions has dtype {actions.dtype}; whole numbers are due")
        if int(actions.max()) >= len(MOVES) or int(actions.min()) < 0:
            row = int(np.flatnonzero((actions >= len(MOVES)) | (actions < 0))[0])
            raise ValueError(f"actions[{row}] is {actions[row]}; 0 (up), 1 (down), 2 (right) or 3 (left) is possible")
        return actions.astype(np.int64, copy=False)

    def _place(self, state: Array) -> None:
        self._state[:] = state.T

    def _begin(self, rows: Array) -> None:
        targets = self._target_choices[self.np_random.integers(len(self.targets), size=rows.size)]
        target_row, target_column = targets.T
        if self.start is not None:
            self._state[:2, rows] = np.reshape(self.start, (2, 1))
        else:
            cell = self.np_random.integers(self.size**2 - 1, size=rows.size)
            cell += cell >= target_row * self.size + target_column
            self._state[0, rows], self._state[1, rows] = np.divmod(cell, self.size)
        self._state[2, rows], self._state[3, rows] = target_row, target_column

    def _move(self, actions: Array) -> tuple[Array, Array]:
        position, target, off = self._state[:2], self._state[2:], (self._rows_off, self._columns_off)
        for axis, moves in enumerate((self._down, self._right)):
            moves.take(actions, out=off[axis], mode="clip")  # checked before; this mode needs no second buffer
            position[axis] += off[axis]
            np.maximum(position[axis], 0, out=position[axis])
            np.minimum(position[axis], self.size - 1, out=position[axis])
            np.subtract(position[axis], target[axis], out=off[axis])
            np.abs(off[axis], out=off[axis])
        distance = np.add(*off, out=off[0])
        return 0.0 - distance, distance == 0

    def _observe(self) -> Array:
        return self._state.T.copy()


def _checked_size(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"size is {size!r}; at least 2 is needed, for a cell beside the target")
    return size


def _checked_cell(size: int, cell: Any, where: str) -> Cell:
    array = np.asarray(cell)
    if array.shape != (2,) or array.dtype.kind not in "iu" or not ((array >= 0) & (array < size)).all():
        raise ValueError(f"{where} is {cell!r}; two whole numbers (row, column) in [0, {size - 1}] are due")
    return int(array[0]), int(array[1])


def _checked_targets(size: int, targets: Sequence[Cell] | None) -> tuple[Cell, ...]:
    if targets is None:
        return ((0, 0), (0, size - 1), (size - 1, 0), (size - 1, size - 1))
    if len(targets) == 0:
        raise ValueError("targets is empty; at least 1 is needed")
    return tuple(_checked_cell(size, cell, f"targets[{index}]") for index, cell in enumerate(targets))


def _checked_start(size: int, start: Cell | None, targets: Sequence[Cell]) -> Cell | None:
    if start is None:
        return None
    start = _checked_cell(size, start, "start")
    if start in targets:
        raise ValueError(f"start is {start}, which is one of targets; an episode needs a first step")
    return start


def _checked_states(size: int, state: Array) -> Array:
    """``state`` ``[..., 4]`` as int64, if every episode may begin there."""
    if state.dtype.kind not in "iu" or ((state < 0) | (state >= size)).any():
        raise ValueError(f"options['state'] holds cells that are not on the grid; rows and columns are 0 to {size - 1}")
    if (optimal_steps(state) == 0).any():
        raise ValueError("options['state'] begins an episode at its target; an episode needs a first step")
    return state.astype(np.int64)


def _picture(size: int, state: Sequence[int]) -> str:
    rows = [["."] * size for _ in range(size)]
    rows[state[2]][state[3]] = "T"
    rows[state[0]][state[1]] = "A"
    return "\n".join(" ".join(row) for row in rows)

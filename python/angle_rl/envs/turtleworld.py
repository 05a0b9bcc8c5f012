"""A turtle in a square arena that steers to a target by speed and turn.

The arena is [-1, 1] x [-1, 1]. State: (x, y, heading, target x, target y); the heading is an angle from the
x axis, anticlockwise. A step with action (speed, turn) in [-1, 1] first turns by turn * ``TURN``, then moves by
speed * ``STRIDE`` along the new heading, backwards if negative; walls stop it along their axis only.

Observation, float32 ``[6]``: x, y, cos heading, sin heading, and the target as the turtle sees it: how far
ahead and how far to the left it lies. So good behaviour is nearly linear in what is seen.

Reward: (distance before - distance after) / ``STRIDE`` - 1, in [-2, 0]. The -1 asks for the fewest steps; the
difference is a shaping by the potential -distance / ``STRIDE`` (Ng, Harada and Russell 1999), which says at
every step what it was worth and adds up to a constant over an episode that ends at the target. So a return is,
but for its end within ``radius``, minus the steps lost against a straight run at full speed: near 0 for a good
turtle, about -100 for one that goes nowhere in 100 steps. The episode terminates when the distance is at most
``radius``, and is truncated by the time limit it was registered with.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from angle_rl.envs.registration import STEP_LIMIT
from angle_rl.envs.vector import Array, VectorWorld, check_options, check_render_mode

STRIDE = 0.1  # the longest step
TURN = math.pi / 6  # the largest turn of a step
REACH = 2 * math.sqrt(2)  # the arena's diagonal: how far a target can be
ARROWS = "→↗↑↖←↙↓↘"


class Turtleworld(gymnasium.Env[Array, Array]):
    """One turtle.

    ``radius``: how near counts as reached, in (0, 1). Each episode's target and start are drawn uniformly from
    the arena, the start anew while it lies within ``radius``, and the heading from all directions.
    ``render_mode`` "ansi": ``render`` returns a picture in letters, an arrow the turtle, T the target.

    ``reset(options={"state": (x, y, heading, target_x, target_y)})`` begins the episode there. Raises
    ValueError for places outside the arena, and for an episode that would begin at its target. Actions beyond
    [-1, 1] count as the nearest possible ones; those that are not finite are refused. One thread.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's name and kind)

    def __init__(self, *, radius: float = 0.1, render_mode: str | None = None) -> None:
        self.radius = _checked_radius(radius)
        self.render_mode = check_render_mode(render_mode)
        self.observation_space = _observation_space()
        self.action_space = _action_space()
        self._state: tuple[float, float, float, float, float] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode. Returns the observation and an empty dict."""
        state = check_options(options, (5,))
        if state is not None:
            state = _checked_states(self.radius, state)
        super().reset(seed=seed)
        if state is None:
            state = _drawn_states(self.np_random, 1, self.radius)[:, 0]
        x, y, heading, target_x, target_y = state.tolist()
        self._state = (x, y, heading, target_x, target_y)
        return self._observation(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Turn and move. Returns the observation, reward, whether the target is reached, False and an empty dict."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("step was called before reset")
        speed, turn = _checked_actions(action, ()).tolist()
        x, y, heading, target_x, target_y = self._state
        before = math.hypot(target_x - x, target_y - y)
        heading += turn * TURN
        x = min(max(x + speed * STRIDE * math.cos(heading), -1.0), 1.0)
        y = min(max(y + speed * STRIDE * math.sin(heading), -1.0), 1.0)
        self._state = (x, y, heading, target_x, target_y)
        after = math.hypot(target_x - x, target_y - y)
        return self._observation(), (before - after) / STRIDE - 1.0, after <= self.radius, False, {}

    def _observation(self) -> Array:
        assert self._state is not None
        x, y, heading, target_x, target_y = self._state
        cosine, sine = math.cos(heading), math.sin(heading)
        ahead = (target_x - x) * cosine + (target_y - y) * sine
        left = (target_y - y) * cosine - (target_x - x) * sine
        return np.array([x, y, cosine, sine, ahead, left], dtype=np.float32)

    def render(self) -> str | None:
        """The arena in letters, or None without ``render_mode``."""
        if self.render_mode is None or self._state is None:
            return None
        return _picture(*self._state)


class TurtleworldVector(VectorWorld):
    """``num_envs`` turtles stepped together; see ``Turtleworld`` for the option and ``VectorWorld`` for the rest.

    Observations float32 ``[num_envs, 6]``, actions numbers ``[num_envs, 2]``, states ``[num_envs, 5]``. One
    environment draws as ``Turtleworld`` does, so with one seed its episodes are the same up to rounding.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        radius: float = 0.1,
        max_episode_steps: int | None = STEP_LIMIT,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        self.radius = _checked_radius(radius)
        super().__init__(
            num_envs,
            _observation_space(),
            _action_space(),
            state_size=5,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            render_mode=render_mode,
        )
        self._state = np.zeros((5, num_envs))  # one contiguous row for each of x, y, heading, target x, target y
        self._distance = np.zeros(num_envs)

    def render(self) -> tuple[str, ...] | None:
        """Every arena in letters, or None without ``render_mode``."""
        if self.render_mode is None or self._ended is None:
            return None
        return tuple(_picture(*state) for state in self._state.T.tolist())

    def _checked_state(self, state: Array) -> Array:
        return _checked_states(self.radius, state)

    def _checked_actions(self, actions: Array) -> Array:
        return _checked_actions(actions, (self.num_envs,))

    def _place(self, state: Array) -> None:
        self._state[:] = state.T
        self._distance[:] = _distance(self._state)

    def _begin(self, rows: Array) -> None:
        state = _drawn_states(self.np_random, rows.size, self.radius)
        self._state[:, rows] = state
        self._distance[rows] = _distance(state)

    def _move(self, actions: Array) -> tuple[Array, Array]:
        x, y, heading = self._state[:3]
        stride = actions[:, 0] * STRIDE
        heading += actions[:, 1] * TURN
        x += stride * np.cos(heading)
        y += stride * np.sin(heading)
        self._state[:2].clip(-1.0, 1.0, out=self._state[:2])
        distance = _distance(self._state)
        rewards = (self._distance - distance) / STRIDE - 1.0
        self._distance = distance
        return rewards, distance <= self.radius

    def _observe(self) -> Array:
        x, y, heading, target_x, target_y = self._state
        cosine, sine = np.cos(heading), np.sin(heading)
        out = np.empty((self.num_envs, 6), dtype=np.float32)
        out[:, 0], out[:, 1], out[:, 2], out[:, 3] = x, y, cosine, sine
        out[:, 4] = (target_x - x) * cosine + (target_y - y) * sine
        out[:, 5] = (target_y - y) * cosine - (target_x - x) * sine
        return out


def _observation_space() -> spaces.Box:
    high = np.array([1.0, 1.0, 1.0, 1.0, REACH, REACH], dtype=np.float32)
    high[4:] = np.nextafter(high[4:], np.float32(np.inf))  # as wide as rounding may need
    return spaces.Box(-high, high, dtype=np.float32)


def _action_space() -> spaces.Box:
    return spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)


def _distance(state: Array) -> Array:
    distance: Array = np.hypot(state[3] - state[0], state[4] - state[1])
    return distance


def _drawn_states(random: np.random.Generator, count: int, radius: float) -> Array:
    """How ``count`` episodes begin: ``[5, count]``."""
    state = random.uniform(-1.0, 1.0, size=(5, count))
    state[2] *= math.pi
    near = np.flatnonzero(_distance(state) <= radius)
    while near.size:
        state[:2, near] = random.uniform(-1.0, 1.0, size=(2, near.size))
        near = near[_distance(state[:, near]) <= radius]
    return state


def _checked_radius(radius: float) -> float:
    if not 0.0 < radius < 1.0:
        raise ValueError(f"radius is {radius!r}; it lies in (0, 1)")
    return float(radius)


def _checked_actions(actions: Any, lead: tuple[int, ...]) -> Array:
    """``actions`` ``[*lead, 2]`` as float64 within [-1, 1]."""
    actions = np.asarray(actions)
    shape = (*lead, 2)
    if actions.shape != shape:
        raise ValueError(f"actions has shape {list(actions.shape)}; {list(shape)}, (speed, turn), is due")
    if actions.dtype.kind not in "iuf":
        raise TypeError(f"actions has dtype {actions.dtype}; numbers are due")
    finite = np.isfinite(actions)
    if not finite.all():
        index = np.argwhere(~finite)[0].tolist()
        raise ValueError(f"actions{index} is {actions[tuple(index)]}; finite numbers are due")
    clipped: Array = np.clip(actions, -1.0, 1.0, dtype=np.float64)
    return clipped


def _checked_states(radius: float, state: Array) -> Array:
    """``state`` ``[..., 5]`` as float64, if every episode may begin there."""
    state = state.astype(np.float64)
    if not (np.abs(state[..., [0, 1, 3, 4]]) <= 1.0).all() or not np.isfinite(state).all():
        raise ValueError("options['state'] holds places outside the arena; x and y lie in [-1, 1], headings are finite")
    if (_distance(np.moveaxis(state, -1, 0)) <= radius).any():
        raise ValueError(f"options['state'] begins an episode within {radius} of its target; it needs a first step")
    return state


def _picture(x: float, y: float, heading: float, target_x: float, target_y: float) -> str:
    side = 21
    rows = [["."] * side for _ in range(side)]

    def put(at_x: float, at_y: float, letter: str) -> None:
        rows[round((1.0 - at_y) / 2 * (side - 1))][round((at_x + 1.0) / 2 * (side - 1))] = letter

    put(target_x, target_y, "T")
    put(x, y, ARROWS[round(heading / (math.pi / 4)) % 8])
    return "\n".join(" ".join(row) for row in rows)

"""What our vectorised environments have in common: counting steps, ending episodes, beginning new ones."""

from __future__ import annotations

from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def check_options(options: dict[str, Any] | None, shape: tuple[int, ...]) -> Array | None:
    """``options["state"]`` as an array of ``shape``, or None without it. ValueError for anything else in there."""
    if not options:
        return None
    unknown = sorted(set(options) - {"state"})
    if unknown:
        raise ValueError(f"options holds {unknown}; reset knows only 'state'")
    state = np.asarray(options["state"])
    if state.shape != shape or state.dtype.kind not in "iuf":
        raise ValueError(
            f"options['state'] is {state.dtype} of shape {list(state.shape)}; numbers of {list(shape)} are due"
        )
    return state


def check_render_mode(render_mode: str | None) -> str | None:
    """``render_mode``, if it is None or "ansi"; else ValueError."""
    if render_mode not in (None, "ansi"):
        raise ValueError(f"render_mode is {render_mode!r}; 'ansi' or None is possible")
    return render_mode


class VectorWorld(VectorEnv[Array, Array, Array]):
    """``num_envs`` environments side by side. A world says how they move (``_move``), begin (``_begin``, ``_place``)
    and look (``_observe``).

    ``max_episode_steps``: an episode of so many steps is truncated, as by Gymnasium's ``TimeLimit`` (where it
    reaches its target then, both flags stand); None: no limit. ``autoreset_mode``: NEXT_STEP (the step after
    an episode's end begins the next one: its action is ignored, its reward 0, its flags False) or SAME_STEP
    (the new episode's first observation comes with the old one's last reward; ``infos["final_obs"]``, an
    object array with None where nothing ended, and its mask ``infos["_final_obs"]`` have the last one).

    ``reset(seed=…)`` seeds one generator for all of them, so how episodes begin depends on ``num_envs`` and on
    when the others end. ``reset(options={"state": …})`` begins the first episodes in given states.

    Every array handed out is new and the caller's. Wrong actions are refused before anything moves. One thread.
    """

    def __init__(
        self,
        num_envs: int,
        single_observation_space: gymnasium.Space[Any],
        single_action_space: gymnasium.Space[Any],
        *,
        state_size: int,
        max_episode_steps: int | None,
        autoreset_mode: AutoresetMode | str,
        render_mode: str | None,
    ) -> None:
        if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"num_envs is {num_envs!r}; at least 1 is needed")
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps is {max_episode_steps}; at least 1, or None for no limit")
        mode = AutoresetMode(autoreset_mode)
        if mode is AutoresetMode.DISABLED:
            raise ValueError("autoreset_mode is DISABLED; NEXT_STEP or SAME_STEP is possible")
        self.render_mode = check_render_mode(render_mode)
        self.metadata = {"render_modes": ["ansi"], "render_fps": 10, "autoreset_mode": mode}
        self.num_envs = num_envs
        self.single_observation_space = single_observation_space
        self.single_action_space = single_action_space
        self.observation_space = batch_space(single_observation_space, num_envs)
        self.action_space = batch_space(single_action_space, num_envs)
        self.max_episode_steps = max_episode_steps
        self._state_size = state_size
        self._same_step = mode is AutoresetMode.SAME_STEP
        self._steps = np.zeros(num_envs, dtype=np.int64)  # of the running episode
        self._ended: Array | None = None  # rows that the next step begins anew; None before the first reset

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode everywhere. Returns observations ``[num_envs, ...]`` and an empty dict.

        ``options["state"]``: ``[num_envs, state_size]``, what the world's single environment takes there, for
        each. ValueError if it does not fit; nothing has then changed.
        """
        state = check_options(options, (self.num_envs, self._state_size))
        if state is not None:
            state = self._checked_state(state)
        super().reset(seed=seed)
        if state is None:
            self._begin(np.arange(self.num_envs))
        else:
            self._place(state)
        self._steps[:] = 0
        self._ended = np.empty(0, dtype=np.int64)
        return self._observe(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Take ``actions`` ``[num_envs, *action_shape]``.

        Returns observations ``[num_envs, ...]``, rewards float64 ``[num_envs]``, terminations and truncations
        bool ``[num_envs]``, infos. Raises ValueError or TypeError for actions that the space does not hold, and
        ``gymnasium.error.ResetNeeded`` before the first reset.
        """
        if self._ended is None:
            raise gymnasium.error.ResetNeeded("step was called before reset")
        rewards, terminations = self._move(self._checked_actions(actions))
        self._steps += 1
        if self.max_episode_steps is None:
            truncations = np.zeros(self.num_envs, dtype=np.bool_)
        else:
            truncations = self._steps >= self.max_episode_steps
        if self._same_step:
            return self._restart_now(rewards, terminations, truncations)
        if self._ended.size:
            self._restart(self._ended)
            rewards[self._ended] = 0.0
            terminations[self._ended] = False
            truncations[self._ended] = False
        self._ended = np.flatnonzero(terminations | truncations)
        return self._observe(), rewards, terminations, truncations, {}

    def _restart_now(
        self, rewards: Array, terminations: Array, truncations: Array
    ) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        observations = self._observe()
        ended = terminations | truncations
        rows = np.flatnonzero(ended)
        if not rows.size:
            return observations, rewards, terminations, truncations, {}
        final = np.full(self.num_envs, None, dtype=np.object_)
        for row, last in zip(rows.tolist(), observations[rows], strict=True):
            final[row] = last
        self._restart(rows)
        infos = {"final_obs": final, "_final_obs": ended}
        return self._observe(), rewards, terminations, truncations, infos

    def _restart(self, rows: Array) -> None:
        self._begin(rows)
        self._steps[rows] = 0

    def _checked_state(self, state: Array) -> Array:
        """``state`` ``[num_envs, state_size]``, if episodes may begin there; else ValueError."""
        raise NotImplementedError

    def _checked_actions(self, actions: Array) -> Array:
        """``actions``, if the space holds them; else ValueError or TypeError."""
        raise NotImplementedError

    def _place(self, state: Array) -> None:
        """Put all of them into the states ``[num_envs, state_size]``."""
        raise NotImplementedError

    def _begin(self, rows: Array) -> None:
        """Draw how the episodes of ``rows`` ``[k]`` begin."""
        raise NotImplementedError

    def _move(self, actions: Array) -> tuple[Array, Array]:
        """Move all of them. Returns rewards and terminations, new arrays."""
        raise NotImplementedError

    def _observe(self) -> Array:
        """What all of them look like now, a new array."""
        raise NotImplementedError

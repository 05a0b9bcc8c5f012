"""How much an agent explores, and how that changes: a schedule that any agent can take.

What is scheduled is one number, the scale: the deviation of an agent's noise, or the share of its random actions.
A `Schedule` is plain data, an `Exploration` its state, and both go into JSON as they are. One thread at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from angle_rl.config import Hyperparameters
from angle_rl.types import Array, EnvironmentState

KINDS = ("constant", "linear", "plateau")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the scale changes. ValueError where the fields contradict each other; `dataclasses.asdict` makes JSON of it.

    - ``constant``: it stays.
    - ``linear``: in a straight line from `start` to `minimum`, where it stays.
    - ``plateau``: it grows while the episodes' returns stand still, and decays while they change.
    """

    start: float  # the first scale, >= 0
    kind: str = "constant"  # one of KINDS
    minimum: float = 0.01  # linear: the last scale, at most `start`; plateau: the smallest, above 0
    maximum: float = 1.0  # plateau: the largest
    steps: int = 10_000  # linear: environment steps from the first scale to the last, >= 1
    window: int = 500  # plateau: newest returns that are compared, an even number >= 2
    gap: float = 0.01  # plateau: the halves' means stand still when they are less apart, in units of return
    growth: float = 1.005  # plateau: factor per episode while they stand still, >= 1
    decay: float = 0.995  # plateau: factor per episode while they do not, in (0, 1]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the exploration's kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        _check("start", self.start, 0 <= self.start < math.inf, "in [0, inf)")
        if self.kind == "linear":
            _check(
                "minimum", self.minimum, 0 <= self.minimum <= self.start, f"in [0, start], and start is {self.start}"
            )
            _check("steps", self.steps, self.steps >= 1, "at least 1")
        if self.kind == "plateau":
            _check("minimum", self.minimum, 0 < self.minimum < math.inf, "in (0, inf), or the scale could never grow")
            limits = f"in [minimum, maximum], which is [{self.minimum}, {self.maximum}]"
            _check("start", self.start, self.minimum <= self.start <= self.maximum, limits)
            _check("window", self.window, self.window >= 2 and self.window % 2 == 0, "even and at least 2")
            _check("gap", self.gap, self.gap >= 0, "at least 0")
            _check("growth", self.growth, 1 <= self.growth < math.inf, "in [1, inf)")
            _check("decay", self.decay, 0 < self.decay <= 1, "in (0, 1]")


def make_schedule(hyperparameters: Hyperparameters, start: float) -> Schedule:
    """The schedule that the config asks for, from the first scale on. ValueError as of `Schedule`."""
    return Schedule(
        start=start,
        kind=hyperparameters.exploration_schedule,
        minimum=hyperparameters.exploration_minimum,
        maximum=hyperparameters.exploration_maximum,
        steps=hyperparameters.exploration_steps,
        window=hyperparameters.exploration_window,
        gap=hyperparameters.exploration_gap,
        growth=hyperparameters.exploration_growth,
        decay=hyperparameters.exploration_decay,
    )


def linear_scale(schedule: Schedule, steps: int) -> float:
    """The scale of a ``linear`` schedule after so many environment steps."""
    share = min(1.0, steps / schedule.steps)
    return (1.0 - share) * schedule.start + share * schedule.minimum


def plateau_scale(schedule: Schedule, scale: float, returns: Sequence[float]) -> float:
    """The scale that follows `scale` in a ``plateau`` schedule, given the newest returns, the oldest first.

    As long as there are fewer returns than `window` it stays.
    """
    if len(returns) < schedule.window:
        return scale
    half = schedule.window // 2
    older, newer = returns[-schedule.window : -half], returns[-half:]
    # fsum is exact: the answer does not hang on the order of summation.
    if abs(math.fsum(newer) / half - math.fsum(older) / half) < schedule.gap:
        return min(scale * schedule.growth, schedule.maximum)
    return max(scale * schedule.decay, schedule.minimum)


class Exploration:
    """A schedule's state, and the returns that it goes by.

    An agent calls `record` for every step and `reset` at every start, and asks for `scale`. Whoever knows the
    returns calls `episode_ended` instead of those two.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.returns: list[float] = []  # the newest `window`, the oldest first; kept by a plateau schedule only
        self._plateau = schedule.start
        self._running: Array = np.zeros(0)  # [n] float64, what each environment's episode has given so far
        self._begun: Array = np.zeros(0, np.bool_)  # [n], whether it has taken a step

    def scale(self, steps: int) -> float:
        """The scale after so many environment steps."""
        if self.schedule.kind == "linear":
            return linear_scale(self.schedule, steps)
        return self._plateau

    def episode_ended(self, episode_return: float) -> None:
        """Take in an episode's undiscounted return. ValueError where it is not finite."""
        if not math.isfinite(episode_return):
            raise ValueError(f"episode_return is {episode_return}; it must be finite")
        if self.schedule.kind != "plateau":
            return
        self.returns = [*self.returns, float(episode_return)][-self.schedule.window :]
        self._plateau = plateau_scale(self.schedule, self._plateau, self.returns)

    def record(self, seen: EnvironmentState) -> None:
        """Take in what a step of ``n`` environments showed: their rewards, and the episodes that it ended."""
        if self.schedule.kind != "plateau":
            return
        if len(seen.reward) != len(self._running):
            self._running, self._begun = np.zeros(len(seen.reward)), np.zeros(len(seen.reward), np.bool_)
        self._running += np.where(seen.stepped, seen.reward, 0.0)
        self._begun |= seen.stepped
        self._end(np.flatnonzero((seen.terminated | seen.truncated) & seen.stepped))

    def reset(self, seen: EnvironmentState) -> None:
        """Where all environments begin anew, count what was cut short as episodes too."""
        if not seen.stepped.any():
            self._end(np.flatnonzero(self._begun))

    def _end(self, rows: Array) -> None:
        for row in rows:
            self.episode_ended(float(self._running[row]))
            self._running[row], self._begun[row] = 0.0, False

    def export_state(self) -> dict[str, Any]:
        """The state as JSON-able values. Episodes under way are left out: after a load, new ones begin."""
        return {"scale": self._plateau, "returns": self.returns}

    def import_state(self, values: dict[str, Any]) -> None:
        """Put back what `export_state` gave. ValueError where it is something else, and nothing changes then.

        A schedule with other limits, a shorter window or of another kind takes of it what it can.
        """
        try:
            scale, returns = float(values["scale"]), [float(one) for one in values["returns"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the exploration's state is {values!r}; it must have a scale and returns") from error
        if not all(map(math.isfinite, [scale, *returns])):
            raise ValueError("the exploration's state holds numbers that are not finite")
        schedule = self.schedule
        if schedule.kind == "plateau":
            self._plateau = min(max(scale, schedule.minimum), schedule.maximum)
            self.returns = returns[-schedule.window :]
        self._running, self._begun = np.zeros(0), np.zeros(0, np.bool_)


def _check(name: str, value: float, holds: bool, limit: str) -> None:
    if not holds:
        raise ValueError(f"the exploration's {name} is {value}; it must be {limit}")

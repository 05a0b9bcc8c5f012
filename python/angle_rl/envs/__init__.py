"""Small environments of our own, on which a learner shows within seconds whether it learns.

``angle/Gridworld-v0``: walk to a cell of a square grid; whole numbers, four moves, and a known best return.
``angle/Turtleworld-v0``: steer a turtle to a target; real numbers, speed and turn.

Importing ``angle_rl`` registers both with Gymnasium, whichever of the two packages is imported first;
``gymnasium.make("angle_rl:angle/Gridworld-v0")`` imports it in passing. (Since 1.0 Gymnasium looks for no
plugins, so an environment of another package needs its import.) ``gymnasium.make_vec("angle/Gridworld-v0",
num_envs=4096)`` makes the NumPy-vectorised version, which steps all of them with a few array operations.

The names below are imported when they are first used: registering costs neither NumPy nor Gymnasium.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from angle_rl.envs.gridworld import Gridworld, GridworldVector, optimal_return, optimal_steps
    from angle_rl.envs.turtleworld import Turtleworld, TurtleworldVector

__all__ = ["Gridworld", "GridworldVector", "Turtleworld", "TurtleworldVector", "optimal_return", "optimal_steps"]

_MODULES = {
    "gridworld": ("Gridworld", "GridworldVector", "optimal_return", "optimal_steps"),
    "turtleworld": ("Turtleworld", "TurtleworldVector"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'angle_rl.envs' has no attribute {name!r}")
    value = getattr(import_module(f"angle_rl.envs.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

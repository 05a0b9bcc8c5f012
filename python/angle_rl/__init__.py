"""Angle RL: off-policy reinforcement learning on a compiled core."""

from angle_rl._core import __version__

__all__ = ["__version__"]

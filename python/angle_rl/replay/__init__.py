"""Replay buffers over the compiled core: :class:`PrioritizedReplayBuffer` and :class:`ReplayBuffer`."""

from angle_rl.replay.buffer import ImportanceExponent, ReplayBuffer
from angle_rl.replay.prioritized import PrioritizedReplayBuffer

__all__ = ["ImportanceExponent", "PrioritizedReplayBuffer", "ReplayBuffer"]

"""Replay buffers over the compiled core: :class:`PrioritizedReplayBuffer` and :class:`ReplayBuffer`."""

from angle_rl.replay.buffer import ImportanceExponent, ReplayBuffer
from angle_rl.replay.files import ReplayFileError
from angle_rl.replay.prefetch import Prefetcher
from angle_rl.replay.prioritized import DefaultPriority, PrioritizedReplayBuffer

__all__ = [
    "DefaultPriority",
    "ImportanceExponent",
    "Prefetcher",
    "PrioritizedReplayBuffer",
    "ReplayBuffer",
    "ReplayFileError",
]

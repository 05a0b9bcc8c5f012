"""The agents: SAC and TD3, and the protocol for others."""

from angle_rl.agents.base import Agent
from angle_rl.agents.sac import SAC
from angle_rl.agents.td3 import TD3

__all__ = ["SAC", "TD3", "Agent"]

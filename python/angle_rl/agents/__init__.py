"""The agents: SAC for continuous and for discrete actions, TD3, DDPG, DQN and Q-learning; the protocol for others."""

from angle_rl.agents.base import Agent
from angle_rl.agents.ddpg import DDPG
from angle_rl.agents.dqn import DQN
from angle_rl.agents.q_learning import QLearning
from angle_rl.agents.sac import SAC
from angle_rl.agents.sac_discrete import DiscreteSAC
from angle_rl.agents.td3 import TD3

__all__ = ["DDPG", "DQN", "SAC", "TD3", "Agent", "DiscreteSAC", "QLearning"]

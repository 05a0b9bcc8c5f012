"""The replay that a config asks for, where it is to lie, and whether one that was given fits the config."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

from angle_rl import device as devices
from angle_rl.config import AgentConfig
from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer
from angle_rl.replay.images import frames_of, record_bytes, shares_successors
from angle_rl.schema import make_schema

_SHARE_OF_MEMORY = 0.8  # of what is free on a device; networks and what they compute need some, too


def make_replay(
    config: AgentConfig,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> ReplayBuffer | PrioritizedReplayBuffer:
    """The replay that the config asks for: on the device that learns, where `rows_on_device` says so.

    Of stacked images (`observation_history`) it keeps each frame once.
    """
    hyperparameters = config.hyperparameters
    options: dict[str, Any] = {
        "observation_space": observation_space,
        "action_space": action_space,
        "n_step": hyperparameters.n_step,
        "discount": hyperparameters.discount,
        "frame_stack": _frame_stack(config, observation_space),
        "seed": seed,
        "device": config.training.device if rows_on_device(config, observation_space, action_space) else "cpu",
    }
    if hyperparameters.replay == "uniform":
        return ReplayBuffer(hyperparameters.replay_capacity, **options)
    return PrioritizedReplayBuffer(
        hyperparameters.replay_capacity,
        priority_exponent=hyperparameters.priority_exponent,
        importance_exponent=hyperparameters.importance_exponent,
        priority_epsilon=hyperparameters.priority_epsilon,
        **options,
    )


def _frame_stack(config: AgentConfig, observation_space: gymnasium.Space[Any]) -> int | None:
    """The buffers' `frame_stack`: None leaves it to them."""
    history = config.hyperparameters.observation_history
    stacked = history > 1 and observation_space.dtype == np.uint8 and len(observation_space.shape or ()) == 3
    return history if stacked else None


def rows_on_device(
    config: AgentConfig, observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]
) -> bool:
    """Whether the replay's rows are to lie on the CUDA device that learns, and not in the host's memory.

    Not where this build has no kernels for it, nor where they take more than four fifths of the memory that is free
    there, nor under `overlap`, where one thread inserts while another samples.
    """
    training = config.training
    if not training.device.startswith("cuda") or training.overlap:
        return False
    try:
        devices.backend(training.device)
    except RuntimeError:
        return False
    free = devices.free_memory(training.device)
    schema = make_schema(None, observation_space, action_space)
    stack = _frame_stack(config, observation_space)
    shares = shares_successors(schema, None, stack)
    needed = config.hyperparameters.replay_capacity * record_bytes(schema, shares, frames_of(schema, stack, shares))
    return free is None or needed <= _SHARE_OF_MEMORY * free


def check_replay(replay: Any, config: AgentConfig) -> None:
    """ValueError where a replay contradicts the config, naming both values; TypeError where it is none."""
    hyperparameters = config.hyperparameters
    for name in ("insert", "sample", "discount"):
        if not hasattr(replay, name):
            raise TypeError(f"replay is a {type(replay).__name__}, which has no {name}; it must be a ReplayBuffer")
    for name in ("discount", "n_step"):
        own, configured = getattr(replay, name, 1), getattr(hyperparameters, name)
        if own != configured:
            raise ValueError(f"replay has {name} {own}, the config {configured}; they must agree")
    kind = "prioritized" if hasattr(replay, "update_priorities") else "uniform"
    if kind != hyperparameters.replay:
        raise ValueError(f"replay is {kind} and the config says {hyperparameters.replay!r}; they must agree")
    if getattr(replay, "resident", False):
        training = config.training
        if replay.memory_device.type != torch.device(training.device).type:
            raise ValueError(f"replay is on {replay.memory_device} and device is {training.device!r}; they must agree")
        if training.overlap:
            raise ValueError(f"replay is on {replay.memory_device}, where one thread uses it, and overlap takes two")

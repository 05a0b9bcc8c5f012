"""What of a run goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from angle_rl import checkpoint, runs
from angle_rl.config import AgentConfig
from angle_rl.feed import DataFeed, export_feed_state, import_feed_state
from angle_rl.feed.resets import RESETS
from angle_rl.types import RandomKey, RLState

FEED = "feed."  # before the names of the feed's arrays
META = "meta."  # before the names of the meta trainer's tensors


class Progress(NamedTuple):
    """How far a run is, and the random state of its two halves."""

    steps: int
    rl_state: RLState
    feed_key: RandomKey


def saves(agent: Any) -> bool:
    """Whether an agent's state can be written."""
    return hasattr(agent, "export_state")


def exported(
    config: AgentConfig, agent: Any, feed: DataFeed, meta: Any, progress: Progress
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A run as named tensors, some of them the run's own (write them before the next step), and JSON-able values."""
    state = progress.rl_state
    tensors, values = agent.export_state(state.agent_state)
    tensors |= {FEED + name: torch.as_tensor(array) for name, array in export_feed_state(feed).items()}
    saved = {
        "agent": type(agent).__name__,
        "agent_state": values,
        "steps": progress.steps,
        "iteration": state.iteration,
        "episode": state.episode,
        "random_key": state.random_key.value,
        "feed_key": progress.feed_key.value,
        "config": dataclasses.asdict(config),
    }
    if hasattr(meta, "export_meta_state"):
        meta_tensors, saved["meta"] = meta.export_meta_state()
        tensors |= {META + name: tensor for name, tensor in meta_tensors.items()}
    return tensors, saved


def checkpoint_in(path: Path) -> Path:
    """The checkpoint at a path: itself, or a run folder's newest one. ValueError where that has none."""
    found = runs.newest_checkpoint(path) if (path / runs.CONFIG_FILE).exists() else path
    if found is None:
        raise ValueError(f"{path} has no checkpoint yet")
    return found


def restored(
    path: Path, agent: Any, feed: DataFeed, meta: Any, rl_state: RLState, *, without_meta: bool = False
) -> Progress:
    """Put a checkpoint's contents back into agent, feed and meta trainer. ValueError where it is damaged or does not
    fit; nothing changes then. `without_meta` leaves out what meta-learners saved, and what was kept for them.
    """
    tensors, saved = checkpoint.load(path)
    if saved.get("agent") != type(agent).__name__:
        raise ValueError(f"{path} was saved by {saved.get('agent')}; the agent is {type(agent).__name__}")
    feed_state, meta_state = _taken_out(tensors, FEED), _taken_out(tensors, META)
    keeps = hasattr(meta, "import_meta_state")
    if without_meta:
        saved.pop("meta", None)
        feed_state = {name: tensor for name, tensor in feed_state.items() if not name.startswith(RESETS)}
    if keeps != ("meta" in saved):
        there, here = ("no meta-learners", "some") if keeps else ("meta-learners", "none")
        raise ValueError(f"{path} has {there}, and this trainer has {here}")
    before = export_feed_state(feed)
    import_feed_state(feed, feed_state)
    undo = None
    try:
        if keeps:
            undo = meta.export_meta_state()
            meta.import_meta_state(meta_state, saved["meta"])
        agent.import_state(rl_state.agent_state, tensors, saved["agent_state"])
    except BaseException:
        import_feed_state(feed, before)
        if undo is not None:
            meta.import_meta_state(*undo)
        raise
    if keeps:
        meta.apply_hyperparameters()
    nothing_seen: Any = None
    state = rl_state._replace(
        environment_state=nothing_seen,
        random_key=RandomKey(saved["random_key"]),
        iteration=saved["iteration"],
        episode=saved["episode"],
    )
    return Progress(saved["steps"], state, RandomKey(saved["feed_key"]))


def _taken_out(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}

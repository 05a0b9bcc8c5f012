"""Rows of Atari's size: stacks of four frames of 84 x 84 bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
import numpy.typing as npt
import torch

from angle_rl import _core
from angle_rl.bench import libraries
from angle_rl.bench.peers import in_short
from angle_rl.bench.replay_cases import Case, Settings, measure
from angle_rl.bench.report import FLOOR, OURS, Row
from angle_rl.bench.timing import clock, one_setting
from angle_rl.replay import PrioritizedReplayBuffer

ROWS = "atari"  # how tables name such rows
CAPACITY, QUICK_CAPACITY = 20_000, 2_000
FRAMES, SIDE, ACTIONS = 4, 84, 18
CHUNK = 256  # rows made at a time

Bytes = npt.NDArray[np.uint8]


class Rows(NamedTuple):
    """``n`` transitions of one endless episode, in time order."""

    observations: Bytes  # [n, 4, 84, 84], the newest frame last
    actions: npt.NDArray[np.int64]  # [n] in [0, 18)
    rewards: npt.NDArray[np.float32]  # [n]
    next_observations: Bytes  # [n, 4, 84, 84]
    terminated: npt.NDArray[np.bool_]  # [n], all False


def _stacks(numbers: npt.NDArray[np.int64]) -> Bytes:
    """Stacks [n, 4, 84, 84] whose newest frames have these numbers. The first frame repeats where none came before.

    A frame shows its number in its first four bytes, and its remainder by 251 everywhere else.
    """
    frames = np.maximum(numbers[:, None] - np.arange(FRAMES - 1, -1, -1), 0)
    stacks = np.empty((len(numbers), FRAMES, SIDE, SIDE), np.uint8)
    stacks[...] = (frames % 251).astype(np.uint8)[:, :, None, None]
    stacks[:, :, 0, :4] = frames.astype("<u4")[..., None].view(np.uint8)
    return stacks


def make_rows(numbers: npt.NDArray[np.int64]) -> Rows:
    """The rows with these numbers."""
    return Rows(
        observations=_stacks(numbers),
        actions=numbers % ACTIONS,
        rewards=(numbers % 1021).astype(np.float32),
        next_observations=_stacks(numbers + 1),
        terminated=np.zeros(len(numbers), np.bool_),
    )


def check_rows(sampled: Rows, oldest: int, newest: int, name: str) -> None:
    """RuntimeError unless every sampled row is whole and numbered ``oldest`` to ``newest``."""
    shown = np.ascontiguousarray(sampled.observations[:, FRAMES - 1, 0, :4]).view("<u4")[:, 0].astype(np.int64)
    if shown.min() < oldest or shown.max() > newest:
        raise RuntimeError(f"{name}: a sampled row is not one of those kept, {oldest} to {newest}")
    truth = make_rows(shown)
    for field in Rows._fields:
        if not np.array_equal(getattr(sampled, field), getattr(truth, field)):
            raise RuntimeError(f"{name}: sampled {field} do not belong to the sampled observations")


class Atari(Protocol):
    """A prioritised replay of such rows, empty when it is made with ``(capacity)``."""

    name: str
    gives: str

    def insert_many(self, rows: Rows) -> object: ...
    def sample(self, batch: int) -> Any: ...
    def arrays(self, batch: Any) -> Rows: ...


class Angle(libraries.Angle):
    """Our prioritised replay at its defaults, which keep each frame once, unless ``arguments`` say otherwise."""

    def __init__(self, capacity: int, name: str = "angle", **arguments: Any) -> None:
        self.name = name
        self.buffer: Any = PrioritizedReplayBuffer(
            capacity,
            observation_space=gymnasium.spaces.Box(0, 255, (FRAMES, SIDE, SIDE), np.uint8),
            action_space=gymnasium.spaces.Discrete(ACTIONS),
            **arguments,
        )
        self.out: Any = None

    def arrays(self, batch: Any) -> Any:
        return Rows(
            batch.observations.numpy(),
            batch.actions.numpy(),
            batch.rewards.numpy(),
            batch.next_observations.numpy(),
            batch.discounts.numpy() == 0.0,
        )


class Cpprb:
    """cpprb's prioritised replay."""

    name, gives = "cpprb", "numpy"

    def __init__(self, capacity: int) -> None:
        import cpprb

        frames = {"shape": (FRAMES, SIDE, SIDE), "dtype": np.uint8}
        fields = {"obs": frames, "act": {"dtype": np.int64}, "rew": {}, "next_obs": frames, "done": {}}
        self.buffer = cpprb.PrioritizedReplayBuffer(capacity, fields)

    def insert_many(self, rows: Rows) -> object:
        return self.buffer.add(
            obs=rows.observations,
            act=rows.actions,
            rew=rows.rewards,
            next_obs=rows.next_observations,
            done=rows.terminated.astype(np.float32),
        )

    def sample(self, batch: int) -> Any:
        return self.buffer.sample(batch)

    def arrays(self, batch: Any) -> Rows:
        return Rows(batch["obs"], batch["act"][:, 0], batch["rew"][:, 0], batch["next_obs"], batch["done"][:, 0] != 0)


class Tianshou:
    """Tianshou's prioritised replay."""

    name, gives = "tianshou", "numpy"

    def __init__(self, capacity: int) -> None:
        from tianshou import data

        self.data = data
        self.buffer = data.PrioritizedReplayBuffer(capacity, alpha=0.6, beta=0.4)

    def insert_many(self, rows: Rows) -> object:
        return self.buffer.update(
            self.data.ReplayBuffer.from_data(
                obs=rows.observations,
                act=rows.actions,
                rew=rows.rewards,
                obs_next=rows.next_observations,
                terminated=rows.terminated,
                truncated=np.zeros_like(rows.terminated),
                done=rows.terminated,
            )
        )

    def sample(self, batch: int) -> Any:
        return self.buffer.sample(batch)

    def arrays(self, batch: Any) -> Rows:
        values = batch[0]
        return Rows(values.obs, values.act, values.rew.astype(np.float32), values.obs_next, values.terminated)


class TorchRL:
    """TorchRL's prioritised replay."""

    name, gives = "torchrl", "torch"

    def __init__(self, capacity: int) -> None:
        logging.getLogger("torchrl").setLevel(logging.ERROR)
        import torchrl._torchrl  # noqa: F401 - its failure says why there are no priorities
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer

        self.dictionary = TensorDict
        self.buffer = TensorDictPrioritizedReplayBuffer(
            alpha=0.6, beta=0.4, storage=LazyTensorStorage(capacity), priority_key="td_error"
        )

    def insert_many(self, rows: Rows) -> object:
        observation, action, reward, next_observation, terminated = map(torch.from_numpy, rows)
        following = {
            "observation": next_observation,
            "reward": reward[:, None],
            "terminated": terminated[:, None],
        }
        count = [len(rows.rewards)]
        return self.buffer.extend(
            self.dictionary({"observation": observation, "action": action, "next": following}, count)
        )

    def sample(self, batch: int) -> Any:
        return self.buffer.sample(batch)

    def arrays(self, batch: Any) -> Rows:
        return Rows(
            batch["observation"].numpy(),
            batch["action"].numpy(),
            batch["next", "reward"].numpy()[:, 0],
            batch["next", "observation"].numpy(),
            batch["next", "terminated"].numpy()[:, 0],
        )


KINDS: dict[str, Callable[[int], Atari]] = {
    "angle": Angle,
    "angle-shared": partial(Angle, name="angle-shared", share_successors=True, frame_stack=1),
    "angle-plain": partial(Angle, name="angle-plain", share_successors=False),
    "cpprb": Cpprb,
    "tianshou": Tianshou,
    "torchrl": TorchRL,
}


def _filled(name: str, kind: Callable[[int], Atari], capacity: int, batch: int) -> Atari | str:
    """A replay filled past its end and checked, or a line saying why there is none."""
    try:
        library = kind(capacity)
        _fill(name, library, capacity, batch)
    except Exception as failure:  # a peer may fail in any way of its own
        if name in OURS:
            raise
        return f"{name} with Atari rows: {in_short(failure)}"
    return library


def _fill(name: str, library: Atari, capacity: int, batch: int) -> None:
    inserted = capacity + CHUNK
    for first in range(0, inserted, CHUNK):
        library.insert_many(make_rows(np.arange(first, min(first + CHUNK, inserted), dtype=np.int64)))
    for _ in range(3):
        sampled = library.arrays(library.sample(batch))
        check_rows(sampled, inserted - capacity, inserted - 1, name)


def _cases(library: Atari, capacity: int, batch: int) -> Sequence[Case]:
    extra: dict[str, Any] = {"gives": library.gives}
    if isinstance(library, Angle):
        extra["bytes_a_row"] = library.buffer.nbytes / capacity
    case = partial(Case, library=library.name, batch=batch, capacity=capacity, rows=ROWS, extra=extra)
    cases = [case(operation="sample", run=clock(partial(library.sample, batch)))]
    if isinstance(library, Angle):
        cases.append(case(operation="sample_out", run=clock(partial(library.sample_out, batch))))
    return cases


def atari_rows(settings: Settings) -> tuple[list[Row], list[str]]:
    """``sample`` and ``sample_out`` of a batch of such rows, over the floor: a copy of as many bytes from random rows.

    ``angle`` keeps each frame once, ``angle-shared`` each observation, ``angle-plain`` both observations of each row.
    Rows, and a line for each replay there is not.
    """
    capacity = QUICK_CAPACITY if settings.quick else CAPACITY
    batch = min(settings.batches[0], capacity)
    cases: list[Case] = []
    notes = []
    with one_setting(settings.threads):
        for name, kind in KINDS.items():
            library = _filled(name, kind, capacity, batch)
            if isinstance(library, str):
                notes.append(library)
            else:
                cases += _cases(library, capacity, batch)
        floor = _core.CopyFloor(capacity, FRAMES * SIDE * SIDE)
        floor.sample(batch, 1)
        if not floor.copies_agree():
            raise RuntimeError("floor: a copy is not its row's")
        copies = partial(floor.sample, batch)
        cases += [
            Case(library=FLOOR, operation=operation, batch=batch, run=copies, capacity=capacity, rows=ROWS)
            for operation in ("sample", "sample_out")
        ]
        rows = measure(cases, repeats=settings.repeats, seconds=settings.seconds, threads=settings.threads)
    return rows, notes

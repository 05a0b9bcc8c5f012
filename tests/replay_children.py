"""What the child processes of the replay tests run: a module of its own, so that spawned children can import it."""

from __future__ import annotations

import mmap
import os
import time

import numpy as np
import torch
from replay_rows import rows, values_of

from angle_rl.replay import PrioritizedReplayBuffer


class OwnBuffer(PrioritizedReplayBuffer):
    """A user's subclass."""


def insert_into(buffers, queue, first):
    """Insert five rows into each buffer given at the start, then into each that comes through the queue."""
    for buffer in buffers:
        buffer.insert(*rows(np.arange(first, first + 5)))
    for _ in buffers:
        passed = queue.get(timeout=60)
        passed.insert(*rows(np.arange(first + 5, first + 10)))


def create_named(cls, schema, name):
    """Make a named buffer and end with it open."""
    buffer = cls(16, schema, shared=name)
    buffer.insert(*rows(np.arange(3)))
    assert os.path.exists(f"/dev/shm/{name}")


def whole(batch) -> bool:
    """Whether every array of every row agrees on the value behind it. Faster than `values_of`."""
    v = batch.rewards.numpy()[:, None]
    shift = np.array([0, 0.25, 0.5], np.float32)
    return (
        np.array_equal(batch.observations.numpy(), v + shift)
        and np.array_equal(batch.next_observations.numpy(), v + shift + 1)
        and np.array_equal(batch.actions.numpy(), v * np.array([-1, 2], np.float32))
    )


def insert_many(buffer, first, count, batch):
    """Insert `count` batches of rows that count up from `first`."""
    for start in range(first, first + count * batch, batch):
        buffer.insert(*rows(np.arange(start, start + batch)))


def sample_and_update(buffer, count, seed):
    """Sample and update `count` times; fails at the first row that is not whole."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        batch = buffer.sample(64)
        assert whole(batch), values_of(batch)
        buffer.update_priorities(batch.handles, rng.random(64))


class Control:
    """A few numbers in memory that parent and forked children share: who has done how much, and whether to pause."""

    def __init__(self, workers: int) -> None:
        self._memory = mmap.mmap(-1, 8 * (1 + 2 * workers))
        numbers = np.frombuffer(self._memory, np.int64)
        self._pause = numbers[:1]  # 0: go on; otherwise the number of the pause
        self.progress = numbers[1 : 1 + workers]
        self._seen = numbers[1 + workers :]  # the pause that each worker is in, or was in last
        self._pauses = 0

    def rest(self, worker: int) -> None:
        """A worker's: if the parent asks for a pause, stay in it."""
        pause = self._pause[0]
        if pause != 0:
            self._seen[worker] = pause
            while self._pause[0] == pause:
                time.sleep(1e-4)

    def pause(self, workers) -> None:
        """The parent's: returns when every one of these workers is at rest."""
        self._pauses += 1
        self._pause[0] = self._pauses
        self.wait(lambda: all(self._seen[worker] == self._pauses for worker in workers), "the workers to pause")

    def resume(self) -> None:
        """The parent's: let the workers go on."""
        self._pause[0] = 0

    def wait_for_progress(self, workers, count: int = 1) -> None:
        """The parent's: returns when each of these workers has done `count` more pieces of work."""
        goals = {worker: self.progress[worker] + count for worker in workers}
        self.wait(lambda: all(self.progress[w] >= goal for w, goal in goals.items()), f"workers {list(workers)}")

    @staticmethod
    def wait(done, what: str) -> None:
        end = time.monotonic() + 60
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(f"waited in vain for {what}")
            time.sleep(2e-4)


INSERTED_AT_ONCE = 128
ROLES = ("insert", "insert", "learn", "update")


STACK = {"observations": ((4, 2, 3), np.float32), "actions": ((2,), np.float32)}


def stacked(values):
    """Rows as of `rows`, one time step each, whose observations are stacks of frames: the value, and those before."""
    observations, actions, rewards, _, ended = rows(values)
    frames = observations[:, :1] + np.arange(-3, 1, dtype=np.float32)  # [n, 4]
    stacks = np.broadcast_to(frames[:, :, None, None], (*frames.shape, 2, 3))
    return stacks, actions, rewards, stacks + 1, ended


def whole_stacks(batch) -> bool:
    """`whole`, for rows of `stacked`."""
    v = batch.rewards.numpy()
    stacks, actions, _, successors, _ = stacked(v)
    return (
        np.array_equal(batch.observations.numpy(), stacks)
        and np.array_equal(batch.next_observations.numpy(), successors)
        and np.array_equal(batch.actions.numpy(), actions)
    )


def work(buffer, control: Control, worker: int, seed: int) -> None:
    """The endless work of one process of the kill loop, by its role; nearly all of its time is spent in the core."""
    rng = np.random.default_rng(seed)
    role = ROLES[worker]
    make, check = (stacked, whole_stacks) if buffer.schema.observations[0].shape == (4, 2, 3) else (rows, whole)
    blocks = [make(first + np.arange(INSERTED_AT_ONCE)) for first in rng.integers(0, 100_000, 16)]
    streams = np.full(INSERTED_AT_ONCE, worker)
    td_errors = torch.from_numpy(rng.random((16, 256)))
    handles = buffer.sample(256).handles
    while True:
        control.rest(worker)
        turn = int(control.progress[worker]) % 16
        if role == "insert":
            buffer.insert(*blocks[turn], streams=streams)
        elif role == "learn":
            batch = buffer.sample(256)
            if not check(batch):
                os._exit(3)
            buffer.update_priorities(batch.handles, td_errors[turn])
        else:  # the same rows again and again: beside the learner's updates and the writers that overwrite them
            if turn == 0:
                handles = buffer.sample(256).handles
            buffer.update_priorities(handles, td_errors[turn])
        control.progress[worker] += 1


def start_worker(buffer, control: Control, worker: int, seed: int) -> int:
    """Fork a worker; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            work(buffer, control, worker, seed)
        finally:
            os._exit(4)  # an error: work never ends by itself
    return child

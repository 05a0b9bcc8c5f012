"""Runs flashbax in an interpreter of its own, which needs jax and flashbax, but not torch or this package.

Started by path; reads one JSON command a line from standard input and answers one JSON line. The command
``{"make": capacity, "batch": n}`` makes, fills and checks; ``{"run": operation, "iterations": k}`` answers
seconds that so many calls took.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import sys
import time
from functools import partial
from typing import Any


def _rows(numbers: Any) -> dict[str, Any]:
    import numpy as np

    column = np.arange(3, 20)
    observations = ((numbers[:, None] * column) % 251).astype(np.float32) / np.float32(256)
    observations[:, 0] = numbers % 4096
    observations[:, 1] = numbers // 4096
    actions = ((numbers[:, None] * column[:6]) % 127).astype(np.float32) / np.float32(64) - np.float32(1)
    return {
        "observation": observations,
        "action": actions,
        "reward": (numbers % 1021).astype(np.float32),
        "terminated": numbers % 1000 == 999,
    }


class Worker:
    """flashbax's prioritised and uniform flat buffers; the next observation is the next row's observation."""

    def __init__(self, capacity: int, batch: int) -> None:
        import flashbax
        import jax
        import numpy as np

        self.jax, self.np, self.batch = jax, np, batch
        donate = partial(jax.jit, donate_argnums=0)
        common = {"max_length": capacity, "min_length": batch, "sample_batch_size": batch}
        prioritized = flashbax.make_prioritised_flat_buffer(**common, priority_exponent=0.6)
        uniform = flashbax.make_flat_buffer(**common)
        rows = _rows(np.arange(capacity))
        self.row = jax.tree_util.tree_map(lambda values: jax.numpy.asarray(values[0]), rows)
        self.chunk = jax.tree_util.tree_map(lambda values: jax.numpy.asarray(values[:1024]), rows)
        sequences = flashbax.make_prioritised_flat_buffer(**common, add_sequences=True, priority_exponent=0.6)
        flat = flashbax.make_flat_buffer(**common, add_sequences=True)
        self.add_many = donate(sequences.add)
        add_flat = donate(flat.add)
        self.state, self.uniform = prioritized.init(self.row), uniform.init(self.row)
        for first in range(0, capacity, 8192):
            part = {name: values[first : first + 8192] for name, values in rows.items()}
            self.state, self.uniform = self.add_many(self.state, part), add_flat(self.uniform, part)
        self.add, self.set = donate(prioritized.add), donate(prioritized.set_priorities)

        def draw(buffer: Any, state: Any, key: Any) -> Any:
            key, now = jax.random.split(key)
            return key, buffer.sample(state, now)

        self.draw, self.draw_uniform = jax.jit(partial(draw, prioritized)), jax.jit(partial(draw, uniform))
        self.key = jax.random.PRNGKey(0)
        self.everywhere = np.arange(capacity - 1)
        self.check()
        spread = np.random.default_rng(0).exponential(size=capacity).astype(np.float32)
        self.state = self.set(self.state, self.everywhere, spread[:-1])
        self.errors = jax.numpy.asarray(spread[:batch])
        self.indices = itertools.cycle([self.sample().indices for _ in range(16)])

    def sample(self) -> Any:
        self.key, sampled = self.draw(self.state, self.key)
        return sampled

    def insert(self) -> Any:
        self.state = self.add(self.state, self.row)
        return self.state

    def insert_batch(self) -> Any:
        self.state = self.add_many(self.state, self.chunk)
        return self.state

    def update(self) -> Any:
        self.state = self.set(self.state, next(self.indices), self.errors)
        return self.state

    def cycle(self) -> Any:
        self.insert()
        self.state = self.set(self.state, self.sample().indices, self.errors)
        return self.state

    def uniform_sample(self) -> Any:
        self.key, sampled = self.draw_uniform(self.uniform, self.key)
        return sampled

    def check(self) -> None:
        """RuntimeError unless sampled rows are whole and follow their priorities.

        Its float32 sums let a draw now and then run past the last row; up to one in a thousand is let pass and
        counted in ``faults``.
        """
        np = self.np
        for sampled in (self.sample(), self.uniform_sample()):
            first = {name: np.asarray(values) for name, values in sampled.experience.first.items()}
            numbers = (first["observation"][:, 0] + 4096 * first["observation"][:, 1]).astype(np.int64)
            for name, truth in _rows(numbers).items():
                if not np.array_equal(first[name], truth):
                    raise RuntimeError(f"sampled {name} do not belong to the sampled observations")
            following = np.asarray(sampled.experience.second["observation"])
            if not np.array_equal(following, _rows(numbers + 1)["observation"]):
                raise RuntimeError("sampled next observations are not the next rows'")
        groups = np.array([0.25, 1.0, 2.0, 4.0], dtype=np.float32)
        self.state = self.set(self.state, self.everywhere, groups[self.everywhere % 4])
        counts, self.faults = np.zeros(4), 0
        while counts.sum() < 25_000:
            sampled = self.sample()
            self.faults += int((np.asarray(sampled.probabilities) <= 0).sum())
            first = np.asarray(sampled.experience.first["observation"])
            counts += np.bincount(first[:, 0].astype(np.int64) % 4, minlength=4)
        if self.faults > counts.sum() / 1000:
            raise RuntimeError(f"{self.faults} of {counts.sum():.0f} sampled probabilities are not positive")
        due = groups**0.6 / (groups**0.6).sum()
        if (np.abs(counts / counts.sum() - due) > 0.02).any():
            raise RuntimeError(f"drew groups {counts / counts.sum()} where {due} was due")

    def run(self, operation: str, iterations: int) -> float:
        call = getattr(self, operation)
        start = time.perf_counter()
        for _ in range(iterations):
            last = call()
            if operation in ("sample", "uniform_sample"):
                self.jax.block_until_ready(last)
        self.jax.block_until_ready(last)
        return time.perf_counter() - start


def main() -> None:
    sys.path.pop(0)  # this file's folder, whose names are not meant for this interpreter
    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if "make" in command:
                worker = Worker(command["make"], command["batch"])
                answer: dict[str, Any] = {name: importlib.metadata.version(name) for name in ("jax", "flashbax")}
                answer["draws_without_weight"] = worker.faults
            elif worker is None:
                answer = {"error": "no buffer has been made"}
            else:
                answer = {"seconds": worker.run(command["run"], command["iterations"])}
        except Exception as failure:
            answer = {"error": (str(failure).strip() or type(failure).__name__).splitlines()[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

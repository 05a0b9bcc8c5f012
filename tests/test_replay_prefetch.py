"""Prefetching: the sequence of the seed, errors, closing, threads, forks and the interpreter's end."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from replay_rows import SCHEMA, filled, rows, values_of

from angle_rl import _core
from angle_rl.replay import Prefetcher, PrioritizedReplayBuffer, ReplayBuffer


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def threads_of_this_process():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_alone_it_gives_the_batches_of_sample(kind, depth):
    buffer, twin = (kind(128, SCHEMA, seed=5) for _ in range(2))
    for each in (buffer, twin):
        each.insert(*rows(np.arange(100)))
    with buffer.prefetch(32, depth) as batches:
        assert isinstance(batches, Prefetcher)
        for _ in range(20):
            batch = next(batches)
            values_of(batch)
            assert equal(batch, twin.sample(32))


def test_closing_gives_back_what_nobody_took():
    buffer, twin = filled(seed=1), filled(seed=1)
    for round_ in range(4):
        with buffer.prefetch(16, depth=5) as batches:
            for _ in range(round_):
                assert equal(next(batches), twin.sample(16))
            time.sleep(0.01)  # let it run ahead
        assert buffer.stats()["samples"] == twin.stats()["samples"]
        assert equal(buffer.sample(16), twin.sample(16))


def test_batches_that_others_drew_after_are_not_given_back():
    buffer = filled(seed=2)
    with buffer.prefetch(16, depth=3) as batches:
        first = next(batches)
        while buffer.stats()["samples"] < 4 * 16:
            time.sleep(0.001)
        between = buffer.sample(16)
    sequence = filled(seed=2)
    drawn = [sequence.sample(16) for _ in range(6)]
    assert equal(first, drawn[0])
    assert equal(between, drawn[4])
    assert equal(buffer.sample(16), drawn[5])


def test_arguments_are_those_of_sample():
    buffer, twin = filled(seed=3), filled(seed=3)
    errors = np.linspace(0, 3, 100, dtype=np.float32)
    for each in (buffer, twin):
        each.update_priorities(np.arange(100), errors)
    with buffer.prefetch(64, discount=0.5, importance_exponent=1.0) as batches:
        assert equal(next(batches), twin.sample(64, discount=0.5, importance_exponent=1.0))
    with buffer.prefetch(8, device="cpu") as batches:
        assert all(t.device.type == "cpu" for t in next(batches))


def test_a_schedule_is_asked_for_every_batch():
    asked = []
    buffer = filled(importance_exponent=lambda inserted: asked.append(inserted) or 0.5)
    with buffer.prefetch(8, depth=2) as batches:
        for _ in range(3):
            next(batches)
    assert asked[-1] == 100
    assert len(asked) >= 5


def test_nested_observations_come_as_they_are():
    space = gym.spaces.Dict({"a": gym.spaces.Box(-1, 1, (2,)), "b": gym.spaces.Discrete(3)})
    buffer = ReplayBuffer(8, observation_space=space, action_space=gym.spaces.Discrete(2))
    one = {"a": np.ones(2, np.float32), "b": np.int64(2)}
    buffer.insert(one, np.int64(1), 1.0, one, False)
    with buffer.prefetch(4) as batches:
        assert next(batches).observations["b"].tolist() == [2] * 4


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((0,), ValueError, "batch_size"),
        ((1.5,), TypeError, "batch_size"),
        ((4, 0), ValueError, "depth"),
        ((4, 1025), ValueError, "depth"),
        ((4, True), TypeError, "depth"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, error, named):
    with pytest.raises(error, match=named):
        filled().prefetch(*arguments)
    with pytest.raises(ValueError, match="discount"):
        filled().prefetch(4, discount=2.0)


def test_a_batch_is_never_written_again():
    buffer = filled()
    with buffer.prefetch(64, depth=3) as batches:
        kept = [next(batches) for _ in range(10)]
        copies = [[t.clone() for t in batch] for batch in kept]
        for _ in range(50):
            next(batches)
        assert all(equal(batch, copy) for batch, copy in zip(kept, copies, strict=True))


def test_an_empty_buffer_is_an_error_and_then_no_more():
    buffer, twin = (PrioritizedReplayBuffer(8, SCHEMA, seed=4) for _ in range(2))
    with buffer.prefetch(4, depth=3) as batches:
        for _ in range(5):
            with pytest.raises(ValueError, match="empty"):
                next(batches)
        for each in (buffer, twin):
            each.insert(*rows([1, 2, 3]))
        for _ in range(10):
            assert equal(next(batches), twin.sample(4))


def test_an_error_that_has_gone_by_is_not_raised():
    buffer = PrioritizedReplayBuffer(8, SCHEMA)
    with buffer.prefetch(4) as batches:
        time.sleep(0.02)  # the thread meets the empty buffer
        buffer.insert(*rows([1, 2, 3]))
        values_of(next(batches))


def test_a_closed_prefetcher_ends():
    buffer = filled()
    batches = buffer.prefetch(4)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []
    with pytest.raises(StopIteration):
        next(batches)


def test_a_loop_ends_where_it_is_closed():
    with filled().prefetch(4) as batches:
        seen = 0
        for _ in batches:
            seen += 1
            if seen == 3:
                batches.close()
    assert seen == 3


def test_dropping_it_ends_its_thread():
    buffer = filled()
    before = threads_of_this_process()
    batches = [buffer.prefetch(4) for _ in range(3)]
    assert threads_of_this_process() == before + 3
    next(batches[0])
    del batches
    gc.collect()
    assert threads_of_this_process() == before


def test_it_outlives_the_name_of_its_buffer():
    batches = filled(seed=6).prefetch(16, depth=4)
    gc.collect()
    twin = filled(seed=6)
    for _ in range(10):
        assert equal(next(batches), twin.sample(16))
    batches.close()


def test_many_threads_take_and_one_closes():
    buffer = filled()
    batches = buffer.prefetch(128, depth=1)
    counts, failures = [], []

    def take():
        try:
            count = 0
            for batch in batches:
                values_of(batch)
                count += 1
            counts.append(count)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=take) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    batches.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not failures
    assert sum(counts) > 5


def test_a_wait_ends_when_another_thread_closes():
    """A draw of many rows of a slow kind keeps the taker waiting until close comes."""
    buffer = filled(n=1000, capacity=1024)
    for _ in range(20):
        batches = buffer.prefetch(200_000, depth=1)
        closer = threading.Thread(target=batches.close)
        closer.start()
        with contextlib.suppress(StopIteration):
            next(batches)
        closer.join(20)
        assert not closer.is_alive()


def test_rows_stay_whole_while_others_insert_and_update():
    buffer = filled(capacity=128)
    failures = []
    stop = threading.Event()

    def insert(stream):
        try:
            value = 0
            while not stop.is_set():
                arguments = rows(np.arange(value, value + 16) % 4096)
                buffer.insert(*arguments, streams=np.full(16, stream))
                value += 16
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=insert, args=(stream,)) for stream in range(2)]
    for thread in threads:
        thread.start()
    try:
        with buffer.prefetch(64, depth=4) as batches, buffer.prefetch(2000, depth=2) as large:
            for turn in range(400):
                batch = next(large if turn % 10 == 0 else batches)
                values_of(batch)
                assert (batch.importance_weights > 0).all()
                buffer.update_priorities(batch.handles, batch.rewards.abs() + 1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert buffer._core.sums_are_exact()


def _in_child(batches, buffer, answers):
    try:
        next(batches)
    except RuntimeError as error:
        answers.put(str(error))
    batches.close()
    with buffer.prefetch(8) as own:
        values_of(next(own))
    answers.put("took")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_fork_is_told_and_can_make_its_own():
    buffer = filled(seed=7)
    twin = filled(seed=7)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with buffer.prefetch(8) as batches:
        assert equal(next(batches), twin.sample(8))
        child = context.Process(target=_in_child, args=(batches, buffer, answers))
        child.start()
        assert "after the fork" in answers.get(timeout=30)
        assert answers.get(timeout=30) == "took"
        child.join(30)
        assert child.exitcode == 0
        assert equal(next(batches), twin.sample(8))


@pytest.mark.parametrize(
    "ending", ["pass", "raise SystemExit(0)", "import os; os._exit(0)", "del buffer", "del batches"]
)
def test_the_interpreter_ends_with_the_thread_running(ending):
    script = f"""
import numpy as np
from angle_rl.replay import ReplayBuffer
buffer = ReplayBuffer(1000, {{"observations": ((64,), np.float32), "actions": ((2,), np.float32)}})
zeros = lambda *shape: np.zeros((1000, *shape), np.float32)
buffer.insert(zeros(64), zeros(2), zeros(), zeros(64), zeros().astype(bool))
batches = buffer.prefetch(20000, depth=3)
next(batches)
{ending}
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned_and_reach_the_device():
    buffer, twin = filled(seed=8), filled(seed=8)
    with buffer.prefetch(64) as batches:
        batch = next(batches)
        assert all(t.is_pinned() for t in batch)
        assert equal(batch, twin.sample(64))
    with buffer.prefetch(64, depth=4, device="cuda") as batches:
        for _ in range(20):
            batch, expected = next(batches), twin.sample(64)
            assert all(t.is_cuda for t in batch)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(batch, expected, strict=True))


def test_the_core_refuses_addresses_of_another_batch():
    buffer = filled()
    with pytest.raises(ValueError, match="one address"):
        _core.Prefetch(buffer._core).submit(0, (1, 2), 4, 1, 0.9, 0.0, 3)

"""Rows of n steps: rewards summed, where windows end, and what they bootstrap from."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.n_step import History, Row
from replay_rows import SCHEMA, each_row, rows

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer

pytestmark = pytest.mark.usefixtures("replay_place")

KINDS = [ReplayBuffer, PrioritizedReplayBuffer]


def nested_schema(reward: str) -> dict:
    part = {"place": ((2,), "f4"), "senses": (((), "f8"), ((3,), "u1"))}
    return {"observations": part, "actions": ((), "i8"), "rewards": ((), reward)}


def nested(numbers) -> dict:
    """Observations from which their number can be read in every part."""
    n = np.asarray(numbers)
    place = np.stack([n, -n], axis=-1).astype(np.float32)
    return {"place": place, "senses": (n * 0.5, np.stack([n % 251, n // 251, n * 0 + 7], axis=-1).astype(np.uint8))}


def numbers_of(observations: dict) -> list[int]:
    numbers = observations["place"][:, 0].long()
    expected = nested(numbers.numpy())
    np.testing.assert_array_equal(observations["place"], expected["place"])
    for got, wanted in zip(observations["senses"], expected["senses"], strict=True):
        np.testing.assert_array_equal(got, wanted)
    return numbers.tolist()


class Streams:
    """Environments side by side; `breaks`: some episodes end without a flag."""

    def __init__(self, count: int, seed: int, number_of_next: itertools.count | None = None) -> None:
        self.random = np.random.default_rng(seed)
        self.fresh = itertools.count() if number_of_next is None else number_of_next
        self.now = [next(self.fresh) for _ in range(count)]

    def step(self, stream: int, end: int) -> Row:
        row = Row(stream, self.now[stream], next(self.fresh), float(np.float32(self.random.normal())))
        row.terminated, row.truncated = end in (0, 2), end in (1, 2)
        self.now[stream] = row.successor if end > 3 else next(self.fresh)  # 3: broken off, without a flag
        return row


def check(batch, history: History, n_step: int, discount: float, exact: float) -> None:
    observations, successors = numbers_of(batch.observations), numbers_of(batch.next_observations)
    for i, handle in enumerate(batch.handles.tolist()):
        expected = history.window(handle, n_step, discount)
        assert observations[i] == history.rows[handle].observation
        assert successors[i] == expected.successor
        assert int(batch.actions[i]) == observations[i]
        assert int(batch.steps[i]) == expected.steps
        assert float(batch.rewards[i]) == pytest.approx(expected.reward, rel=exact, abs=exact)
        assert float(batch.discounts[i]) == pytest.approx(expected.discount, rel=1e-6, abs=0)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    capacity=st.integers(2, 24),
    reward=st.sampled_from(["f4", "f8"]),
    share=st.booleans(),
    calls=st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=6), min_size=1, max_size=14
    ),
    asked=st.lists(st.tuples(st.integers(1, 8), st.sampled_from([0.0, 0.5, 0.97, 1.0])), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_any_sequence_agrees_with_the_definition(kind, capacity, reward, share, calls, asked, seed):
    buffer = kind(capacity, nested_schema(reward), share_successors=share, seed=seed)
    history, streams, given_asks = History(breaks_show=share), Streams(3, seed), itertools.cycle(asked)
    for call in calls:
        made = [streams.step(stream, end) for stream, end in call[:capacity]]
        columns = (
            nested([row.observation for row in made]),
            np.asarray([row.observation for row in made]),
            np.asarray([row.reward for row in made], reward),
            nested([row.successor for row in made]),
            np.asarray([row.terminated for row in made]),
            np.asarray([row.truncated for row in made]),
            np.asarray([row.stream for row in made]),
        )
        if len(made) == 1:  # one row has no leading axis
            row = made[0]
            columns = (nested(row.observation), row.observation, row.reward, nested(row.successor))
            columns += (row.terminated, row.truncated, row.stream)
        for handle, row in zip(buffer.insert(*columns).tolist(), made, strict=True):
            history.add(handle, row)
        n_step, discount = next(given_asks)
        if share and len(buffer) == 0:  # a tiny ring may hold nothing but observations
            continue
        everything = each_row(buffer, n_step=n_step, discount=discount)
        check(everything, history, n_step, discount, 1e-6 if reward == "f4" else 1e-12)
        if not share:
            assert sorted(everything.handles.tolist()) == sorted(history.rows)[-capacity:]
        check(buffer.sample(9, n_step=n_step, discount=discount), history, n_step, discount, 1e-6)
    assert buffer.audit() == []


def chain(n: int, ends=(), streams=None, **options) -> ReplayBuffer:
    """Rows 0 ... n - 1 of one stream with the reward 2**row, so that a sum names its members."""
    buffer = ReplayBuffer(n, {**SCHEMA, "rewards": ((), "f8")}, **options)
    observations, actions, _, _, _ = rows(np.arange(n))
    successors = rows(np.arange(1, n + 1))[0]
    truncated = np.isin(np.arange(n), ends)
    buffer.insert(observations, actions, 2.0 ** np.arange(n), successors, np.zeros(n, bool), truncated, streams)
    return buffer


def test_windows_sum_up_to_the_end_and_the_newest_row():
    buffer = chain(8, ends=[4], n_step=3, discount=1.0)
    batch = each_row(buffer)
    order = batch.handles.argsort()
    assert batch.steps[order].tolist() == [3, 3, 3, 2, 1, 3, 2, 1]
    assert batch.rewards[order].tolist() == [7, 14, 28, 24, 16, 224, 192, 128]
    # Truncation bootstraps from the final observation of its episode, not from the next one's first.
    assert batch.next_observations[order][:, 0].tolist() == [3, 4, 5, 5, 5, 8, 8, 8]
    assert (batch.discounts == 1).all()


def test_n_step_and_discount_of_the_buffer_hold_unless_a_call_says_otherwise():
    buffer = chain(6, n_step=2, discount=0.5)
    assert buffer.sample(32).steps.max() == 2
    assert buffer.sample(32, n_step=4).steps.max() == 4
    assert set(buffer.sample(32, n_step=1, discount=0.25).discounts.tolist()) == {0.25}
    buffer.n_step, buffer.discount = 3, 1.0
    batch = each_row(buffer)
    assert batch.steps.max() == 3
    assert (batch.discounts == 1).all()
    assert (buffer.sample(32, n_step=2**20).rewards <= 63).all()


def test_a_window_goes_round_the_ring():
    buffer = ReplayBuffer(5, {**SCHEMA, "rewards": ((), "f8")}, n_step=5, discount=1.0)
    for start in range(23):
        observations, actions, _, _, ended = rows([start])
        buffer.insert(observations, actions, [2.0**start], rows([start + 1])[0], ended)
    batch = each_row(buffer)
    for handle, reward, steps in zip(batch.handles.tolist(), batch.rewards.tolist(), batch.steps.tolist(), strict=True):
        assert steps == 23 - handle
        assert reward == 2.0**23 - 2.0**handle


def test_streams_do_not_mix():
    streams = np.arange(12) % 3
    buffer = chain(12, streams=streams, n_step=3, discount=1.0)
    batch = each_row(buffer)
    for handle, reward in zip(batch.handles.tolist(), batch.rewards.tolist(), strict=True):
        members = range(handle, min(handle + 9, 12), 3)
        assert reward == sum(2.0**member for member in members)


def test_summing_is_done_in_double():
    buffer = ReplayBuffer(4096, SCHEMA, n_step=4000, discount=1.0)
    observations, actions, _, successors, ended = rows(np.arange(4000))
    values = np.full(4000, np.float32(0.1))
    values[0] = 2**20
    buffer.insert(observations, actions, values, successors, ended)
    batch = each_row(buffer, 4000)
    expected = np.float32(2**20 + 3999 * float(np.float32(0.1)))
    assert float(batch.rewards[batch.steps == 4000]) == expected


def test_out_takes_windows_too():
    buffer, twin = (chain(8, n_step=3, seed=5) for _ in range(2))
    out = twin.sample(16)
    buffer.sample(16)
    twin.sample(16, out=out)
    assert all(torch.equal(a, b) for a, b in zip(buffer.sample(16), out, strict=True))
    again = twin.sample(16, out=out, n_step=1)
    assert again is out
    assert (out.steps == 1).all()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [False, True])
def test_windows_are_whole_while_two_threads_insert(kind, share):
    """Every row follows from (stream, time); a window may only end early where its stream's newest row was."""
    life = 9
    buffer = kind(64, {**SCHEMA, "rewards": ((), "f8")}, share_successors=share)
    problems: list[str] = []
    stop = threading.Event()

    def observed(stream, time):  # the observation after an end is another episode's first
        return np.asarray([stream, time, time // life], np.float32)

    def step(stream, time):
        at_end = time % life == life - 1
        successor = np.asarray([stream, time + 1, time // life], np.float32)
        action = np.asarray([stream, -time], np.float32)
        reward = float(stream * 1000 + time)
        ended, cut = at_end and (time // life) % 2 == 0, at_end and (time // life) % 2 == 1
        return observed(stream, time), action, reward, successor, ended, cut, stream

    def insert(stream):
        try:
            for time in range(2500):
                buffer.insert(*step(stream, time))
        except Exception as error:
            problems.append(repr(error))

    def read():
        seen = 0
        while not stop.is_set() or seen == 0:
            n_step = 1 + seen % 12
            try:
                batch = buffer.sample(32, n_step=n_step, discount=0.5)
            except ValueError as error:
                if "weight" in str(error) or "empty" in str(error):
                    continue  # every row was being written
                problems.append(repr(error))
                return
            seen += 1
            for i in range(32):
                stream, time = int(batch.observations[i, 0]), int(batch.observations[i, 1])
                k = int(batch.steps[i])
                left = life - time % life
                ended = time % life + k == life and (time // life) % 2 == 0
                fits = (
                    (batch.observations[i].numpy() == observed(stream, time)).all()
                    and batch.actions[i].tolist() == [stream, -time]
                    and 1 <= k <= min(n_step, left)
                    and float(batch.rewards[i]) == sum(0.5**j * (stream * 1000 + time + j) for j in range(k))
                    and batch.next_observations[i].tolist() == [stream, time + k, time // life]
                    and float(batch.discounts[i]) == (0.0 if ended else 0.5**k)
                )
                if not fits:
                    problems.append(f"{[t[i].tolist() for t in batch]} of {n_step}")
                    return

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=insert, args=(stream,)) for stream in (1, 2)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert problems == []
    assert buffer.audit() == []
    assert buffer.stats()["inserts"] == 5000

"""What stats() counts, what audit() finds and repair() mends."""

from __future__ import annotations

import time

import gymnasium
import numpy as np
import pytest
import scipy.stats
import torch
from replay_rows import SCHEMA, filled, rows

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer
from angle_rl.types import RandomKey

pytestmark = pytest.mark.usefixtures("replay_place")


def test_each_counter_counts_its_own():
    buffer = PrioritizedReplayBuffer(8, SCHEMA, priority_epsilon=0.0, priority_exponent=1.0)
    zero = dict.fromkeys(
        [
            "inserts",
            "samples",
            "updates",
            "refused_updates",
            "removed",
            "busy_slots",
            "retries",
            "saturated_weights",
            "nan_observations",
            "held",
            "mean_sampled_age",
            "size",
        ],
        0,
    )
    empty = buffer.stats()
    assert {name: empty[name] for name in zero} == zero
    assert empty["weight_histogram"] == []
    assert (empty["capacity"], empty["nbytes"]) == (8, buffer.nbytes)
    assert set(empty) == {*zero, "weight_histogram", "capacity", "nbytes"}
    observations, *rest = rows(np.arange(12))
    observations[3, 1] = np.nan
    buffer.insert(observations[:8], *(part[:8] for part in rest))
    old = buffer.insert(observations[8:], *(part[8:] for part in rest)) - 8
    buffer.sample(5)
    buffer.sample(6)
    buffer.update_priorities([4, 5, 6, 6], [1.0, 2.0, 1e30, 3.0])
    buffer.update_priorities(old, np.ones(4))
    buffer.remove([7, 0, 1])
    counted = buffer.stats()
    expected = {
        "inserts": 12,
        "samples": 11,
        "updates": 4,
        "refused_updates": 6,
        "removed": 1,
        "saturated_weights": 1,
        "nan_observations": 1,
        "size": 8,
        "held": 0,
        "busy_slots": 0,
        "retries": 0,
    }
    assert {name: counted[name] for name in expected} == expected


def test_the_histogram_counts_every_row_by_its_weight():
    buffer = PrioritizedReplayBuffer(400, SCHEMA, priority_exponent=1.0, priority_epsilon=0.0)
    buffer.insert(*rows(np.arange(300)))
    td_errors = np.random.default_rng(0).pareto(1.0, 200)
    td_errors[:7] = 0.0
    buffer.update_priorities(np.arange(200), td_errors)
    buffer.remove([50, 250])
    for _ in range(2):
        histogram = buffer.stats()["weight_histogram"]
        weights = buffer._core.weights() / 2**20
        edges = [edge for edge, _ in histogram] + [np.inf]
        assert edges == sorted(edges)
        assert sum(count for _, count in histogram) == np.count_nonzero(weights)
        for (edge, count), above in zip(histogram, edges[1:], strict=True):
            inside = weights[(weights >= edge) & (weights < above)]
            assert len(inside) == count
            assert (inside <= edge * 33 / 32 + 2**-20).all()
        buffer.insert(*rows(np.arange(300)))  # overwrites half
    assert buffer.stats()["size"] == 400


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
def test_the_mean_age_of_sampled_rows_is_exact(kind):
    buffer = kind(6, SCHEMA, stratified=False)
    ages = []
    for value in range(20):
        buffer.insert(*rows([value]))
        batch = buffer.sample(3)
        ages += (value + 1 - batch.handles).tolist()
        assert buffer.stats()["mean_sampled_age"] == pytest.approx(np.mean(ages), rel=1e-12)
    assert 1.0 < np.mean(ages) < 6.0
    one = kind(1, SCHEMA)
    one.insert(*rows([0]))
    one.sample(7)
    assert one.stats()["mean_sampled_age"] == 1.0


@pytest.mark.usefixtures("on_cpu")
def test_batches_that_nobody_took_do_not_count():
    buffer, twin = filled(8, 8), filled(8, 8)
    with buffer.prefetch(4, depth=5) as batches:
        next(batches)
        for _ in range(10_000):
            if buffer.stats()["samples"] == 6 * 4:  # the one that was taken and five that are ready
                break
            time.sleep(0.001)
    twin.sample(4)
    assert buffer.stats() == twin.stats()


def damaged_sum(buffer: PrioritizedReplayBuffer) -> np.ndarray:
    """The sum over the first eight rows, in the buffer's own memory."""
    words = buffer.export_state()[0]["index"].view(np.int64)
    places = np.flatnonzero(words == buffer._core.weights()[:8].sum())
    assert len(places) == 1
    return words[places[0] : places[0] + 1]


@pytest.mark.usefixtures("on_cpu")
def test_audit_names_what_is_off_and_repair_mends_it():
    buffer = filled(64, 64, priority_exponent=1.0)
    buffer.update_priorities(np.arange(64), np.random.default_rng(0).exponential(size=64))
    buffer.remove([9])
    assert buffer.audit() == []
    assert buffer.repair() == 0
    before = buffer.export_state()[0]["index"].copy()
    damaged_sum(buffer)[:] += 12345
    (finding,) = buffer.audit()
    assert finding.startswith("1 sums of level 0")
    assert buffer.repair() == 1
    assert buffer.audit() == []
    assert (buffer.export_state()[0]["index"] == before).all()
    leaf = damaged_sum(buffer)  # the same words seen from the leaves' side: a row's weight
    words = buffer.export_state()[0]["index"].view(np.uint64)
    mask = np.uint64(2**40 - 1)
    place = np.flatnonzero((words & mask) == np.uint64(buffer._core.weights()[3]))
    assert len(place) == 1
    words[place] += np.uint64(1000)
    assert any("another weight than their priority" in finding for finding in buffer.audit())
    assert buffer.repair() == 1
    assert buffer.audit() == []
    assert leaf[0] == buffer._core.weights()[:8].sum()
    assert (buffer.export_state()[0]["index"] == before).all()


def test_stats_of_shared_successors_count_rows_and_held_observations():
    buffer = ReplayBuffer(10, SCHEMA, share_successors=True)
    buffer.insert(*rows(np.arange(3), [False, False, True]))
    buffer.insert(*rows([5.0]))
    stats = buffer.stats()
    assert (stats["size"], stats["inserts"], stats["held"]) == (4, 4, 2)
    assert len(buffer) == 4
    for start in range(20):
        buffer.insert(*rows([start * 1.0], [start % 4 == 3]))
    stats = buffer.stats()
    assert stats["inserts"] == 24
    assert stats["size"] == len(buffer) < 10
    assert buffer.audit() == []


# Batches of a key ---------------------------------------------------------------------------------------------


BOX = gymnasium.spaces.Box(-100, 100, (1,))


def numbered(kind=PrioritizedReplayBuffer):
    buffer = kind(64, observation_space=BOX, action_space=BOX, seed=3)
    rows = np.arange(40, dtype=np.float32)[:, None]
    handles = buffer.insert(rows, rows, rows[:, 0], rows, np.zeros(40, bool))
    if kind is PrioritizedReplayBuffer:
        buffer.update_priorities(handles, np.linspace(0.1, 5.0, 40))
    return buffer


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
@pytest.mark.parametrize("replacement", [True, False])
def test_a_batch_of_a_key_is_the_keys_and_leaves_the_buffer_as_it_was(kind, replacement):
    asked, other = numbered(kind), numbered(kind)
    before = asked.stats()
    first, again, another = (asked.sample(16, key=RandomKey(k), replacement=replacement) for k in (7, 7, 8))
    assert first.handles.equal(again.handles)
    assert not first.handles.equal(another.handles)
    assert asked.stats() == before
    for left, right in zip(asked.sample(16), other.sample(16), strict=True):
        assert left.equal(right)


def test_a_batch_of_a_key_follows_the_priorities():
    buffer = numbered()
    drawn = torch.cat([buffer.sample(32, key=RandomKey(k)).handles for k in range(400)])
    counts = torch.bincount(drawn, minlength=40).numpy()
    due = (np.linspace(0.1, 5.0, 40) + 1e-6) ** 0.6
    assert scipy.stats.chisquare(counts, due / due.sum() * counts.sum()).pvalue > 1e-4  # stratified: below independent


def test_a_batch_of_a_key_is_not_for_out():
    buffer = numbered()
    with pytest.raises(ValueError, match="key and out are both given"):
        buffer.sample(4, key=RandomKey(0), out=buffer.sample(4))

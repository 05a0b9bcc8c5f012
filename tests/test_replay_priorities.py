"""Weights that change while running: exponents, defaults, given priorities, removal, batches without replacement."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
import torch
from reference.replay import UNIT, fixed_weight, importance_weights
from reference.successive import set_probabilities
from replay_rows import SCHEMA, each_row, filled, rows, values_of
from scipy.stats import chi2

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer

pytestmark = pytest.mark.usefixtures("replay_place")

EPSILON = 1e-6
EXACT = {"priority_exponent": 1.0, "priority_epsilon": 0.0}


def require_fit(counts, probabilities) -> None:
    """The counts fit the probabilities, by a chi-square at 1e-4."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    expected = probabilities * counts.sum()
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-4, len(counts) - 1)


def drawn_counts(buffer, n, batches, batch_size=1000, **options) -> np.ndarray:
    counts = np.zeros(n, np.int64)
    for _ in range(batches):
        counts += np.bincount(buffer.sample(batch_size, **options).handles.numpy(), minlength=n)
    return counts


# ---- the priority exponent ----


@pytest.mark.parametrize("stratified", [True, False])
def test_the_exponent_can_be_annealed(stratified):
    n = 300
    buffer = filled(n, 512, default_priority=0.75, stratified=stratified, seed=2)
    td_errors = np.random.default_rng(0).exponential(size=n) + 0.2
    buffer.update_priorities(np.arange(0, n, 2), td_errors[::2])
    td_errors[1::2] = 0.75
    buffer.remove([5, 8])
    for exponent in (0.6, 1.0, 0.0, 0.3, 2.5, 0.6):
        buffer.priority_exponent = exponent
        assert buffer.priority_exponent == exponent
        weights = buffer._core.weights()
        expected = fixed_weight(td_errors, exponent, EPSILON)
        expected[[5, 8]] = 0
        np.testing.assert_allclose(weights[:n], expected, rtol=0, atol=1)
        assert (weights[n:] == 0).all()
        assert buffer.audit() == []
        require_fit(drawn_counts(buffer, n, 60 if exponent < 2 else 400), weights[:n] / weights.sum())
        # New priorities follow the new exponent, and all buckets moved with their rows.
        buffer.update_priorities([0], [td_errors[0]])
        assert abs(int(buffer._core.weights()[0]) - int(expected[0])) <= 1
    histogram = buffer.stats()["weight_histogram"]
    assert sum(count for _, count in histogram) == n - 2


def test_default_weights_follow_the_exponent():
    buffer = PrioritizedReplayBuffer(8, SCHEMA, priority_exponent=1.0)
    buffer.insert(*rows([0, 1]))
    buffer.update_priorities([0], [9.0])
    buffer.priority_exponent = 0.5
    buffer.insert(*rows([2]))
    weights = buffer._core.weights()
    assert abs(int(weights[0]) - 3 * UNIT) <= 2
    assert 3 * UNIT <= weights[2] + 2 <= 3 * UNIT * 1.033
    assert abs(int(weights[1]) - UNIT) <= 1


@pytest.mark.usefixtures("on_cpu")
def test_the_exponent_is_annealed_while_rows_come_and_change():
    capacity = 200
    buffer = PrioritizedReplayBuffer(capacity, SCHEMA, default_priority=1.0)
    td_errors = dict.fromkeys(buffer.insert(*rows(np.arange(5.0))).tolist(), 1.0)
    stop, problems = threading.Event(), []

    def work():
        random = np.random.default_rng(1)
        try:
            for turn in range(600):
                given = random.exponential(size=5) if turn % 2 else None
                handles = buffer.insert(*rows(np.arange(5.0)), priorities=given)
                td_errors.update(zip(handles.tolist(), [1.0] * 5 if given is None else given, strict=True))
                chosen = handles[-1] - random.permutation(min(capacity, int(handles[-1]) + 1))[:20]
                fresh = random.exponential(size=len(chosen))
                assert buffer.update_priorities(chosen, fresh) == 0
                td_errors.update(zip(chosen.tolist(), fresh, strict=True))
        except BaseException as error:
            problems.append(error)
        finally:
            stop.set()

    def draw():
        try:
            while not stop.is_set():
                values_of(buffer.sample(32))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=target) for target in (work, draw)]
    for thread in threads:
        thread.start()
    exponents = [0.0, 0.4, 1.0, 0.7]
    for turn in range(10**9):
        buffer.priority_exponent = exponents[turn % 4]
        if stop.is_set():
            break
    for thread in threads:
        thread.join()
    assert problems == []
    live = range(2805, 3005)
    expected = fixed_weight(np.asarray([td_errors[h] for h in live]), buffer.priority_exponent, EPSILON)
    weights = buffer._core.weights()[np.asarray(live) % capacity]
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1)
    assert buffer.audit() == []


# ---- what new rows weigh ----


def default_priority(buffer) -> float:
    return buffer._core.default_weight() / UNIT


@pytest.mark.parametrize("given_at_insert", [False, True])
@pytest.mark.parametrize("ended_by", ["overwriting", "removal", "another priority"])
def test_an_outlier_ends_with_its_row_and_never_under_historic(given_at_insert, ended_by):
    live, historic = (
        PrioritizedReplayBuffer(4, SCHEMA, default_priority=f"{kind}_maximum", **EXACT) for kind in ("live", "historic")
    )
    for buffer in (live, historic):
        assert default_priority(buffer) == 1.0
        if given_at_insert:
            buffer.insert(*rows(np.arange(3)), priorities=[500.0, 2.0, 0.5])
        else:
            buffer.update_priorities(buffer.insert(*rows(np.arange(3))), [500.0, 2.0, 0.5])
        assert 500 <= default_priority(buffer) <= 500 * 1.033
        buffer.insert(*rows([3.0]))  # with the default, which does not keep the outlier alive
        if ended_by == "overwriting":
            buffer.insert(*rows([4.0]), priorities=[0.25])
        elif ended_by == "removal":
            buffer.remove([0])
        else:
            buffer.update_priorities([0], [0.25])
        assert buffer._core.weights()[3] >= 500 * UNIT
    assert 2 <= default_priority(live) <= 2 * 1.033
    assert default_priority(historic) == 500.0
    live.update_priorities([1, 2], [0.0, 0.0])
    if ended_by == "removal":
        assert default_priority(live) == 1.0  # nothing computed is left


@pytest.mark.parametrize("given", [0.0, 0.125, 3.0, np.float32(0.5)])
def test_a_given_default_stays(given):
    buffer = PrioritizedReplayBuffer(4, SCHEMA, default_priority=given, **EXACT)
    handles = buffer.insert(*rows([0, 1]))
    assert (buffer._core.weights()[:2] == given * UNIT).all()
    buffer.update_priorities(handles, [100.0, 200.0])
    buffer.insert(*rows([2]))
    assert buffer._core.weights()[2] == given * UNIT


def test_rows_come_with_their_priorities():
    buffer = PrioritizedReplayBuffer(8, SCHEMA, **EXACT)
    buffer.insert(*rows([0, 1, 2]), priorities=np.asarray([0.5, 0.0, 4.0], np.float32))
    observation, action, reward, successor, ended = rows(3)
    buffer.insert(observation, action, reward, successor, ended, priorities=2.5)
    buffer.insert(*rows([4, 5]), priorities=torch.tensor([1.0, 3.0]))
    assert (buffer._core.weights() == np.asarray([0.5, 0, 4, 2.5, 1, 3, 0, 0]) * UNIT).all()
    assert buffer.audit() == []
    assert set(values_of(buffer.sample(500))) == {0.0, 2.0, 3.0, 4.0, 5.0}


def test_a_given_priority_is_taken_as_update_takes_it():
    odd = [1e-50, 1e-42, 1e39, 1.0 + 1e-12, 0.0]
    inserted, updated = (PrioritizedReplayBuffer(8, SCHEMA, priority_epsilon=0.0) for _ in range(2))
    inserted.insert(*rows(np.arange(5)), priorities=odd)
    updated.update_priorities(updated.insert(*rows(np.arange(5))), np.asarray(odd))
    assert (inserted._core.weights() == updated._core.weights()).all()
    assert (inserted._core.weights()[:3] > 0).all()
    assert inserted.stats()["saturated_weights"] == updated.stats()["saturated_weights"] == 1


# ---- importance weights ----


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_importance_weights_are_bound_by_the_batch_or_by_the_buffer(exponent):
    td_errors = np.random.default_rng(3).exponential(size=100) + 0.01
    for bound in ("batch", "buffer"):
        buffer = filled(importance_bound=bound, importance_exponent=exponent)
        buffer.update_priorities(np.arange(100), td_errors)
        weights = buffer._core.weights()
        for _ in range(20):
            batch = buffer.sample(3)  # seldom holds the least weight of all
            drawn = weights[batch.handles.numpy()].astype(float)
            if bound == "batch":
                expected = importance_weights(drawn, weights.sum(), 100, exponent)
                np.testing.assert_allclose(batch.importance_weights, expected, rtol=1e-6)
            else:
                exact = (weights[:100].min() / drawn) ** exponent
                assert (batch.importance_weights.numpy() <= exact * (1 + 1e-6)).all()
                assert (batch.importance_weights.numpy() >= exact * 1.032**-exponent).all()


def test_the_importance_exponent_can_be_set_and_scheduled():
    buffer = filled()
    buffer.update_priorities(np.arange(50), np.full(50, 5.0))
    buffer.importance_exponent = 0.0
    assert (buffer.sample(64).importance_weights == 1).all()
    buffer.importance_exponent = lambda inserts: inserts / 200
    assert callable(buffer.importance_exponent)
    least = buffer.sample(64).importance_weights.min()
    buffer.insert(*rows(np.arange(100)))
    buffer.update_priorities(np.arange(150, 200), np.full(50, 5.0))
    assert float(buffer.sample(64).importance_weights.min()) == pytest.approx(float(least) ** 2, rel=0.05)
    assert float(buffer.sample(64, importance_exponent=0.0).importance_weights.min()) == 1.0


# ---- stratified and independent draws ----


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
def test_a_call_can_ask_for_strata_or_for_independent_draws(kind):
    for own in (True, False):
        buffer = kind(64, SCHEMA, stratified=own)
        buffer.insert(*rows(np.arange(64)))
        for asked in (True, False, None):
            once = len(buffer.sample(64, stratified=asked).handles.unique()) == 64
            assert once == (own if asked is None else asked)


# ---- removal ----


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
def test_removed_rows_are_never_drawn_again(kind):
    buffer = kind(128, SCHEMA)
    handles = buffer.insert(*rows(np.arange(100)))
    gone = handles[10:90]
    assert buffer.remove(gone) == 0
    assert buffer.remove(torch.from_numpy(gone[:3])) == 3
    assert buffer.remove([0, 0, 1]) == 1  # the same row twice in one call
    assert buffer.stats()["removed"] == 82
    left = set(range(2, 10)) | set(range(90, 100))
    assert set(values_of(buffer.sample(2000))) == left
    assert set(values_of(each_row(buffer, 18))) == left
    if kind is PrioritizedReplayBuffer:
        before = buffer._core.weights()
        assert buffer.update_priorities([5, 50], [9.0, 9.0]) == 1
        assert (np.flatnonzero(buffer._core.weights() != before) == [5]).all()
        buffer.priority_exponent = 0.9
        assert buffer._core.weights()[50] == 0
    buffer.insert(*rows(np.arange(100, 200)))  # overwrites what was removed
    assert buffer.remove(gone[:5]) == 5
    assert buffer.audit() == []
    buffer.remove(np.arange(100, 200))
    assert buffer.audit() == []
    buffer.remove(np.arange(72, 100))
    with pytest.raises(ValueError, match="no row of the buffer has positive weight"):
        buffer.sample(1)
    buffer.insert(*rows([7]))
    assert set(values_of(buffer.sample(5))) == {7.0}


def test_windows_pass_through_removed_rows():
    buffer = ReplayBuffer(16, SCHEMA, n_step=3, discount=1.0)
    values = np.arange(10)
    buffer.insert(*rows(values))
    buffer.remove([4, 5, 6, 7, 8, 9])
    batch = each_row(buffer, 4)
    order = batch.handles.argsort()
    assert batch.handles[order].tolist() == [0, 1, 2, 3]
    assert batch.rewards[order].tolist() == [3, 6, 9, 12]
    assert batch.steps.tolist() == [3] * 4


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("batch_size", [2, 8, 64, 200])
def test_rows_beside_removed_ones_are_drawn_no_more_than_others(stratified, batch_size):
    buffer = ReplayBuffer(100, SCHEMA, stratified=stratified, seed=batch_size)
    buffer.insert(*rows(np.arange(100)))
    gone = np.r_[0:30, 40:60, 70:75]
    buffer.remove(gone)
    left = np.setdiff1d(np.arange(100), gone)
    counts = drawn_counts(buffer, 100, 20_000 // batch_size, batch_size)
    assert (counts[gone] == 0).all()
    require_fit(counts[left], np.full(len(left), 1 / len(left)))


@pytest.mark.parametrize("replacement", [True, False])
def test_few_rows_among_many_removed_are_drawn_evenly(replacement):
    buffer = ReplayBuffer(3000, SCHEMA, seed=1)
    buffer.insert(*rows(np.arange(3000)))
    left = np.asarray([3, 4, 5, 6, 1500, 2999])
    buffer.remove(np.setdiff1d(np.arange(3000), left))
    counts = drawn_counts(buffer, 3000, 4000, 2, replacement=replacement)[left]
    require_fit(counts, np.full(6, 1 / 6))


@pytest.mark.parametrize("stratified", [True, False])
def test_a_uniform_buffer_of_images_draws_evenly_beside_held_observations(stratified):
    buffer = ReplayBuffer(100, {"observations": ((2, 2), "u1"), "actions": ((), "i4")}, stratified=stratified)
    for episode, length in enumerate([1, 1, 1, 20, 1, 30, 1, 1, 9]):
        image = np.full((length + 1, 2, 2), episode, np.uint8)
        end = np.arange(length) == length - 1
        buffer.insert(image[:-1], np.zeros(length, np.int32), np.zeros(length), image[1:], end)
    assert len(buffer) == 65
    counts = drawn_counts(buffer, 74, 500, 64)
    assert np.count_nonzero(counts) == 65
    require_fit(counts[counts > 0], np.full(65, 1 / 65))


# ---- without replacement ----


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
def test_a_batch_without_replacement_holds_no_row_twice(kind, stratified):
    buffer, twin = (kind(1000, SCHEMA, replacement=False, stratified=stratified) for _ in range(2))
    for each in (buffer, twin):
        handles = each.insert(*rows(np.arange(700)))
        if kind is PrioritizedReplayBuffer:
            each.update_priorities(handles, np.random.default_rng(0).pareto(1.0, 700))
    before = buffer._core.weights()
    for batch_size in (1, 30, 349, 350, 351, 699, 700):
        batch = buffer.sample(batch_size)
        values_of(batch)
        assert len(batch.handles.unique()) == batch_size
        assert torch.equal(batch.handles, twin.sample(batch_size).handles)
    with pytest.raises(ValueError, match="batch_size is 701, but only 700 rows have positive weight"):
        buffer.sample(701)
    assert (buffer._core.weights() == before).all()  # nothing of it shows in what is shared
    assert buffer.audit() == []
    assert buffer.stats() == twin.stats()
    assert torch.equal(buffer.sample(64).handles, twin.sample(64).handles)
    assert len(buffer.sample(800, replacement=True).handles) == 800


@pytest.mark.usefixtures("on_cpu")
def test_a_failed_batch_leaves_out_as_it_was():
    buffer = filled(20)
    out = buffer.sample(30)
    before = [tensor.clone() for tensor in out]
    with pytest.raises(ValueError, match="only 20 rows"):
        buffer.sample(30, out=out, replacement=False)
    assert all(torch.equal(a, b) for a, b in zip(before, out, strict=True))


@pytest.mark.parametrize("weights", [[1, 2, 3, 4, 5, 6], [10_000, 1, 1, 2, 1, 3], [5, 0, 5, 5, 0, 20]])
@pytest.mark.parametrize("draws", [1, 2, 3, 4])
def test_rows_drawn_without_replacement_have_the_chances_of_successive_draws(weights, draws):
    # One row in each group of the tree's leaves but two.
    buffer = PrioritizedReplayBuffer(64, SCHEMA, stratified=False, replacement=False, default_priority=0.0, **EXACT)
    places = [0, 1, 17, 30, 45, 63]
    buffer.insert(*rows(np.arange(64)))
    buffer.update_priorities(places, np.asarray(weights, float))
    found = Counter(frozenset(buffer.sample(draws).handles.tolist()) for _ in range(30_000))
    chances = {frozenset(places[i] for i in s): p for s, p in set_probabilities(weights, draws).items()}
    assert set(found) <= set(chances)
    seldom = [s for s, p in chances.items() if p * 30_000 < 8]  # in one class
    counts = [found[s] for s in chances if s not in seldom]
    expected = [p for s, p in chances.items() if s not in seldom]
    if seldom and sum(chances[s] for s in seldom) * 30_000 >= 8:
        counts.append(sum(found[s] for s in seldom))
        expected.append(sum(chances[s] for s in seldom))
    if len(counts) > 1:
        require_fit(counts, np.asarray(expected) / sum(expected))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("draws", [1, 2, 4, 5])
def test_uniform_sets_without_replacement_are_equally_likely(held, draws):
    buffer = ReplayBuffer(40, SCHEMA, share_successors=held, replacement=False, stratified=False)
    for value in range(8):  # held: each an episode of its own, with an observation beside it
        buffer.insert(*rows([value], [True]))
    buffer.remove(buffer.sample(8).handles.sort().values[2:4])
    found = Counter(frozenset(buffer.sample(draws).handles.tolist()) for _ in range(6000))
    chances = set_probabilities([1.0] * 6, draws)
    assert len(found) == len(chances)
    require_fit(list(found.values()), np.full(len(found), 1 / len(found)))


@pytest.mark.parametrize("batch_size", [20, 50])
def test_few_rows_among_many_removed_are_drawn_once(batch_size):
    """Some draws of a batch meet a row by themselves, others only in the list of those that are left."""
    buffer = ReplayBuffer(2000, SCHEMA, replacement=False, seed=batch_size)
    random = np.random.default_rng(0)
    buffer.insert(*rows(np.arange(2000)))
    gone = random.permutation(2000)[: 2000 - batch_size - 5]
    buffer.remove(gone)
    left = np.setdiff1d(np.arange(2000), gone)
    counts = np.zeros(2000, np.int64)
    for _ in range(1000):
        handles = buffer.sample(batch_size).handles
        assert len(handles.unique()) == batch_size
        counts[handles.numpy()] += 1
    assert (counts[gone] == 0).all()
    assert (counts[left] > 0).all()
    # A batch leaves five out, so counts vary by less than those of independent draws, which this allows.
    require_fit(counts[left], np.full(len(left), 1 / len(left)))
    with pytest.raises(ValueError, match=f"but only {batch_size + 5} rows have positive weight"):
        buffer.sample(batch_size + 6)


def test_one_row_of_nearly_all_weight_is_drawn_once():
    n = 20_000
    buffer = PrioritizedReplayBuffer(n, SCHEMA, default_priority=1e-3, replacement=False, **EXACT)
    buffer.insert(*rows(np.arange(n)))
    buffer.update_priorities([n // 3], [1e6])
    weights = buffer._core.weights()
    assert weights[n // 3] / weights.sum() > 0.9999
    for _ in range(5):
        handles = buffer.sample(512).handles
        assert len(handles.unique()) == 512
        assert n // 3 in handles
    assert buffer.stats()["retries"] == 0
    assert buffer.audit() == []


@pytest.mark.usefixtures("on_cpu")
def test_batches_without_replacement_while_rows_come():
    buffer = PrioritizedReplayBuffer(300, SCHEMA, replacement=False)
    buffer.insert(*rows(np.arange(300)))
    stop, problems = threading.Event(), []

    def insert():
        try:
            for start in range(300, 6300, 3):
                buffer.insert(*rows(np.arange(start, start + 3)), priorities=np.asarray([1.0, 50.0, 0.01]))
        except BaseException as error:
            problems.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=insert)
    thread.start()
    while not stop.is_set():
        batch = buffer.sample(64)
        values_of(batch)
        assert len(batch.handles.unique()) == 64
        buffer.update_priorities(batch.handles, batch.rewards % 7)
    thread.join()
    assert problems == []
    assert buffer.audit() == []

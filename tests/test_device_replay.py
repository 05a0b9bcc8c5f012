"""A replay on a device against one in host memory: the same calls give the same integers, rows and files.

On a device if there is one, and everywhere under its kernels as compiled for the host.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference.frames import StackedEnvironment
from replay_rows import SCHEMA, rows, values_of
from torch.utils._pytree import tree_leaves

from angle_rl import AgentConfig, device
from angle_rl.agents.replays import check_replay
from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer
from angle_rl.replay.device import DeviceCore
from angle_rl.replay.resident import rows_after, rows_before
from angle_rl.types import RandomKey

PLACES = ["host kernels", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=PLACES, autouse=True)
def place(request):
    """The device that buffers of a test are on, as tensors know it."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield device.memory_device("cuda")
        return
    with device.emulated():
        yield torch.device("cpu")


def wait(buffer):
    """What was launched is done, and what was refused has been noted."""
    if buffer._core.device.type == "cuda":
        torch.cuda.synchronize(buffer._core.device)


def pair(kind=PrioritizedReplayBuffer, capacity=1000, schema=SCHEMA, **options):
    return kind(capacity, schema, **options), kind(capacity, schema, device="cuda", **options)


def assert_same(batch, other):
    leaves = zip(tree_leaves(batch), tree_leaves(other), strict=True)
    for index, (own, theirs) in enumerate(leaves):
        np.testing.assert_array_equal(own, theirs.cpu(), err_msg=str(index))


def assert_alike(host, there):
    """Weights, rows, counters and counts of rows by weight."""
    copy = there._core.pull()
    np.testing.assert_array_equal(copy.weights(), host._core.weights())
    assert copy.sums_are_exact()
    assert there.audit() == []
    own, theirs = host.stats(), there.stats()
    assert {**theirs, "nbytes": 0} == {**own, "nbytes": 0}  # the description of a buffer names its device
    own, theirs = host.export_arrays(), there.export_arrays()
    assert own.keys() == theirs.keys()
    for name, array in own.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


ODD = {
    "observations": {"camera": ((3, 5), "u1"), "joints": ((3,), "f8")},
    "actions": ((2,), "f2"),
    "rewards": ((), "f8"),
}


def odd_rows(random, n):
    """Rows of bytes, halves and doubles, whose lengths are no multiples of a word."""
    looks = [
        {"camera": random.integers(0, 256, (n, 3, 5), np.uint8), "joints": random.normal(size=(n, 3))} for _ in range(2)
    ]
    actions = random.normal(size=(n, 2)).astype(np.float16)
    return looks[0], actions, random.normal(size=n), looks[1], random.random(n) < 0.1, random.random(n) < 0.1


def plain_rows(random, n):
    observations, actions, rewards, successors, _ = rows(random.normal(size=n))
    return observations, actions, rewards, successors, random.random(n) < 0.1, random.random(n) < 0.1


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
@pytest.mark.parametrize("capacity", [1, 7, 1000])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_calls_give_the_same_rows(kind, capacity, odd, seed):
    random = np.random.default_rng(seed)
    options = {"share_successors": False}
    if kind is PrioritizedReplayBuffer:
        options |= {
            "default_priority": ["live_maximum", "historic_maximum", 0.5][seed],
            "importance_bound": ["batch", "buffer"][seed % 2],
            "priority_epsilon": [1e-6, 0.0, 0.1][seed],
        }
    schema = ODD if odd else SCHEMA
    host, there = pair(kind, capacity, schema, seed=seed, **options)
    handles = np.empty(0, np.int64)
    for call in range(40):
        n = int(random.integers(1, min(capacity, 70) + 1))
        made = odd_rows(random, n) if odd else plain_rows(random, n)
        streams = random.integers(0, 4, n) if call % 3 else None
        graded = random.exponential(size=n) if kind is PrioritizedReplayBuffer and call % 4 == 3 else None
        new = host.insert(*made, streams, priorities=graded)
        np.testing.assert_array_equal(there.insert(*made, streams, priorities=graded), new)
        handles = np.concatenate([handles, new])[-3 * capacity - 9 :]  # some of them overwritten
        asked = {
            "n_step": int(random.integers(1, 6)),
            "stratified": bool(random.integers(2)),
            "discount": float(random.choice([0.0, 0.9, 1.0])),
            "importance_exponent": float(random.choice([0.0, 0.4, 1.0])),
        }
        size = int(random.integers(1, 300))
        key = RandomKey(call) if call % 5 == 0 else None
        batch, other = host.sample(size, **asked, key=key), there.sample(size, **asked, key=key)
        assert_same(batch, other)
        if kind is PrioritizedReplayBuffer:
            some = random.choice(handles, int(random.integers(1, 200)))  # with repetitions
            td_errors = random.exponential(size=len(some)).astype(random.choice(["f4", "f8"]))
            td_errors[random.random(len(some)) < 0.05] = 0.0
            refused = there.update_priorities(some, td_errors)
            assert isinstance(refused, torch.Tensor)
            assert int(refused) == host.update_priorities(some, td_errors)
        if call % 7 == 6 and capacity > 1:
            some = random.choice(handles, 3)
            assert there.remove(some) == host.remove(some)
            if kind is ReplayBuffer and host._core.weights().sum() == 0:
                break
        if call == 20 and kind is PrioritizedReplayBuffer:
            host.priority_exponent = there.priority_exponent = 0.3
            assert there.priority_exponent == 0.3
    assert_alike(host, there)


# ---- shared successors, stacks of frames ----


class Looks:
    """Rows of a few environments whose observations have so many stacked frames, or none, and a vector beside."""

    def __init__(self, stack, shape, dtype, beside, seed):
        self.random, self.beside, self.dtype = np.random.default_rng(seed), beside, dtype
        self.environments = [StackedEnvironment(stack, shape, seed + i, shades=3) for i in range(3)]
        observation = ((stack, *shape) if stack > 1 else shape, dtype)
        joints = {"look": observation, "joints": ((3,), "f4")}
        self.schema = {"observations": joints if beside else observation, "actions": ((), "i4")}

    def rows(self):
        """From one environment, several in a row or one of each."""
        one = self.random.integers(2) == 0
        who = [0] * int(self.random.integers(1, 5)) if one else list(self.random.permutation(3))
        pairs, ends = [], []
        for i in who:
            pairs.append(self.environments[i].step())
            ends.append(self.random.random(2) < 0.15)
            if any(ends[-1]) or self.random.random() < 0.1:  # or it breaks off
                self.environments[i].reset()
        n = len(who)
        numbers = self.random.integers(0, 100, n)
        looks = [np.stack([pair[side] for pair in pairs]).astype(self.dtype) for side in range(2)]
        if self.beside:
            joints = self.random.integers(0, 2, (2, n, 3)).astype("f4")
            joints[self.random.random((2, n, 3)) < 0.02] = np.nan
            looks = [{"look": look, "joints": joint} for look, joint in zip(looks, joints, strict=True)]
        terminated, truncated = np.array(ends).T
        return looks[0], numbers.astype("i4"), numbers.astype("f4"), looks[1], terminated, truncated, np.array(who)


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
@pytest.mark.parametrize("capacity", [2, 5, 11, 60, 1000])
@pytest.mark.parametrize(
    ("stack", "shape", "dtype", "beside", "options"),
    [
        (1, (3, 5), "u1", False, {}),
        (4, (3, 5), "u1", False, {}),
        (2, (8, 8), "u1", True, {}),
        (3, (2, 1), "f4", False, {"frame_stack": 3}),
        (1, (2,), "f8", True, {"share_successors": True}),
    ],
)
def test_the_same_calls_give_the_same_shared_rows(kind, capacity, stack, shape, dtype, beside, options):
    random = np.random.default_rng(capacity)
    made = Looks(stack, shape, dtype, beside, capacity)
    host, there = pair(kind, capacity, made.schema, seed=stack, **options)
    assert there._core.stack == stack
    assert there._core.shares_successors
    handles, drawn = np.empty(0, np.int64), 0
    for call in range(120):
        *row, streams = made.rows()
        if len(streams) > capacity:
            continue
        graded = random.exponential(size=len(streams)) if kind is PrioritizedReplayBuffer and call % 4 == 3 else None
        single = streams if streams.any() or call % 2 else None
        new = host.insert(*row, single, priorities=graded)
        theirs = there.insert(*row, single, priorities=graded)
        np.testing.assert_array_equal(theirs.cpu(), new)
        assert len(there) == len(host)
        handles = np.concatenate([handles, new])[-3 * capacity - 9 :]
        asked = {
            "n_step": 1 + call % 4,
            "stratified": bool(call % 2),
            "key": RandomKey(call) if call % 5 == 0 else None,
        }
        usable = int((host._core.weights() > 0).sum())
        if usable > 0:  # not everything is an observation alone, or has lost frames
            drawn += 1
            n = 1 + call % 70
            assert_same(host.sample(n, **asked), there.sample(n, **asked))
            n = int(random.integers(1, usable + 1))
            asked["replacement"] = False
            assert_same(host.sample(n, **asked), there.sample(n, **asked))
        if kind is PrioritizedReplayBuffer:
            some = random.choice(handles, 20)
            td_errors = random.exponential(size=20)
            assert int(there.update_priorities(some, td_errors)) == host.update_priorities(some, td_errors)
        if call % 13 == 12:
            some = random.choice(handles, 2)
            assert there.remove(some) == host.remove(some)
        if call == 60 and kind is PrioritizedReplayBuffer:
            host.priority_exponent = there.priority_exponent = 0.3
    assert drawn > 60 or capacity < 5
    assert_alike(host, there)


@pytest.mark.parametrize("stack", [1, 4])
def test_frames_that_are_there_stay_there(place, tmp_path, stack):
    """Inserted from tensors, and again after a file, on either side."""
    made = Looks(stack, (4, 4), "u1", False, 0)
    host, there = pair(capacity=40, schema=made.schema, n_step=3)
    for call in range(60):
        if call == 40:
            host, there = (
                PrioritizedReplayBuffer.load(buffer.save(tmp_path / str(to)), device=to)
                for buffer, to in ((there, "cpu"), (host, "cuda"))
            )
        rows = made.rows()
        new = there.insert(*(torch.as_tensor(column).to(place) for column in rows))
        assert new.device == place
        np.testing.assert_array_equal(new.cpu(), host.insert(*rows))
        ones = torch.ones(len(new), device=place)
        assert int(there.update_priorities(new, ones)) == host.update_priorities(new.cpu(), ones.cpu())
        assert_same(host.sample(30), there.sample(30))
    assert_alike(host, there)


def test_refused_frames_leave_everything_as_it_was(place):
    made = Looks(4, (4, 4), "u1", False, 0)
    host, there = pair(capacity=40, schema=made.schema)
    for _ in range(5):
        rows = made.rows()
        host.insert(*rows)
        there.insert(*rows)
    wrong = [torch.as_tensor(column).to(place) for column in rows]
    wrong[2] = torch.full_like(wrong[2], torch.inf)
    assert (there.insert(*wrong) == -1).all()
    refused(there, r"rewards\[0\] is inf; rewards must be finite")
    host.sample(2)
    rows = made.rows()
    np.testing.assert_array_equal(there.insert(*rows).cpu(), host.insert(*rows))
    assert_alike(host, there)


# ---- large calls ----


@pytest.mark.parametrize("n", [1024, 1025, 20_000])
def test_many_handles_with_many_of_them_equal(n):
    """In one block and in many: of equal handles the last one wins, and sums and counts stay exact."""
    random = np.random.default_rng(n)
    host, there = pair(capacity=3001)
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(3001)))
        buffer.insert(*rows(np.arange(500)))
    handles = random.integers(0, 3501, n)
    td_errors = random.exponential(size=n).astype(np.float32)
    assert int(there.update_priorities(handles, td_errors)) == host.update_priorities(handles, td_errors) > 0
    assert_alike(host, there)


@pytest.mark.parametrize("capacity", [200_001, 2_500_003])
def test_large_batches_from_a_tree_of_more_levels(capacity):
    random = np.random.default_rng(0)
    schema = {"observations": ((1,), "f4"), "actions": ((1,), "f4")}
    host, there = pair(capacity=capacity, schema=schema)
    n = 150_000
    column = random.normal(size=(n, 1)).astype(np.float32)
    for buffer in (host, there):
        buffer.insert(column, column, column[:, 0], column, np.zeros(n, bool), priorities=np.abs(column[:, 0]))
    for stratified in (False, True):
        batch, other = host.sample(30_001, stratified=stratified), there.sample(30_001, stratified=stratified)
        assert_same(batch, other)
        td_errors = torch.rand(30_001, generator=torch.Generator().manual_seed(0))
        refused = there.update_priorities(other.handles, td_errors)
        assert host.update_priorities(batch.handles, td_errors) == int(refused)
    assert_alike(host, there)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("stratified", [False, True])
def test_few_rows_among_many_removed(stratified, replacement):
    """So few that draws give up on slots at random and count the rows that are left."""
    host, there = pair(ReplayBuffer, 2000, seed=3, stratified=stratified, replacement=replacement)
    gone = np.random.default_rng(3).permutation(2000)[:1990]
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(2000)))
        buffer.remove(gone)
    for n in (1, 33, 200) if replacement else (1, 5, 9, 10):
        for _ in range(4):
            assert_same(host.sample(n), there.sample(n))
    assert host.stats()["retries"] > 64 or not replacement
    assert_alike(host, there)


def test_tensors_that_are_there_stay_there(place):
    host, there = pair(capacity=50)
    random = np.random.default_rng(1)
    for n in (1, 33, 50):
        made = plain_rows(random, n)
        streams, graded = random.integers(0, 3, n), random.exponential(size=n).astype(np.float32)
        moved = [torch.as_tensor(column).to(place) for column in (*made, streams)]
        new = there.insert(*moved, priorities=torch.as_tensor(graded).to(place))
        np.testing.assert_array_equal(new, host.insert(*made, streams, priorities=graded))
    one = [column[0] for column in made[:4]]
    there.insert(*(torch.as_tensor(value).to(place) for value in one), True)
    host.insert(one[0], one[1], one[2], one[3], True)
    assert_same(host.sample(64, n_step=3), there.sample(64, n_step=3))
    assert_alike(host, there)
    with pytest.raises(ValueError, match="actions has the shape"):
        there.insert(*(torch.zeros(4, 3, device=place) for _ in range(2)), torch.zeros(4), torch.zeros(4, 3), False)


def test_a_batch_is_filled_where_it_is(place):
    host, there = pair(capacity=64)
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(40)))
    out = there.sample(16)
    host.sample(16)
    addresses = [tensor.data_ptr() for tensor in out]
    again = there.sample(16, out=out)
    assert again is out
    assert addresses == [tensor.data_ptr() for tensor in again]
    assert_same(host.sample(16), out)
    assert out.rewards.device == place
    assert there.sample(4, device="cpu").rewards.device.type == "cpu"
    with pytest.raises(ValueError, match=r"out\.actions is torch.float64"):
        there.sample(16, out=out._replace(actions=out.actions.double()))


# ---- without replacement ----


def fill_for_distinct(buffers, random, n, weights):
    """Rows of which some may be removed, some weigh nothing, and some weigh nearly all."""
    graded = {
        "even": lambda: np.ones(n),
        "varied": lambda: random.exponential(size=n) * (random.random(n) < 0.8),
        "skewed": lambda: random.pareto(0.2, n).clip(1e-6, 1e9) * (random.random(n) < 0.8),
    }[weights]()
    gone = np.flatnonzero(random.random(n) < random.choice([0.0, 0.1, 0.6]))
    for buffer in buffers:
        handles = buffer.insert(*rows(np.arange(n)))
        if isinstance(buffer, PrioritizedReplayBuffer):
            buffer.update_priorities(handles, graded)
        buffer.remove(handles[gone])


def drawn_alike(host, there, n, **asked):
    """One batch of both; False, and the same words, where there are too few rows for it."""
    try:
        batch = host.sample(n, **asked)
    except ValueError as refusal:
        other = there.sample(n, **asked)
        assert (other.handles == -1).all()
        assert all((leaf.cpu() == 0).all() for leaf in tree_leaves(other.observations))
        wait(there)
        with pytest.raises(ValueError, match=f"nothing of it was applied: {refusal}"):
            there.sample(n, **asked)
        return False
    other = there.sample(n, **asked)
    assert_same(batch, other)
    assert len(batch.handles.unique()) == n
    return True


@pytest.mark.parametrize("capacity", [1, 7, 1000])
@pytest.mark.parametrize(
    ("kind", "weights"),
    [(ReplayBuffer, "even"), *((PrioritizedReplayBuffer, weights) for weights in ("even", "varied", "skewed"))],
)
@pytest.mark.parametrize("seed", range(4))
def test_draws_without_replacement_are_the_hosts(capacity, kind, weights, seed):
    random = np.random.default_rng(100 * capacity + seed)
    options = {"importance_bound": "buffer", "priority_epsilon": 0.0} if kind is PrioritizedReplayBuffer else {}
    host, there = pair(kind, capacity, seed=seed, replacement=False, **options)
    drawn = 0
    for call in range(30):
        if call % 6 == 0:
            fill_for_distinct((host, there), random, int(random.integers(1, capacity + 1)), weights)
        live = int((host._core.weights() > 0).sum())
        n = int(random.choice([1, live // 10, live // 2, live // 2 + 1, live - 1, live, live + 1]))
        asked = {"stratified": bool(random.integers(2)), "n_step": int(random.integers(1, 4))}
        if call % 5 == 0:
            asked["key"] = RandomKey(call)
        drawn += drawn_alike(host, there, max(n, 1), **asked)
    assert drawn > 5
    assert_alike(host, there)


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
def test_large_batches_without_replacement_from_a_tree_of_more_levels(kind):
    random = np.random.default_rng(0)
    schema = {"observations": ((1,), "f4"), "actions": ((1,), "f4")}
    host, there = pair(kind, 2_500_003, schema)
    n = 150_000
    column = random.normal(size=(n, 1)).astype(np.float32)
    for buffer in (host, there):
        buffer.insert(column, column, column[:, 0], column, np.zeros(n, bool))
        if kind is PrioritizedReplayBuffer:
            buffer.update_priorities(np.arange(n), np.abs(column[:, 0]) ** 8)
        buffer.remove(np.arange(n - 20_000, n - 4))
    for size in (1, 512, 513, 9_001, 75_001 if kind is ReplayBuffer else 30_001):
        for stratified in (False, True):
            assert drawn_alike(host, there, size, stratified=stratified, replacement=False)
    assert_alike(host, there)


@pytest.mark.parametrize("left", [100, 300])
def test_some_draws_meet_a_row_and_others_only_in_the_list(left):
    host, there = pair(ReplayBuffer, 20_000, seed=left, replacement=False)
    gone = np.random.default_rng(left).permutation(20_000)[left:]
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(20_000)))
        buffer.remove(gone)
    for n in (1, left // 2, left - 1, left):
        for stratified in (False, True):
            assert drawn_alike(host, there, n, stratified=stratified)
    assert not drawn_alike(host, there, left + 1)
    assert drawn_alike(host, there, left)
    assert_alike(host, there)


def test_one_row_of_nearly_all_weight_is_met_by_all_first_choices():
    host, there = pair(capacity=3000, default_priority=1e-3, priority_exponent=1.0, replacement=False)
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(3000)))
        buffer.update_priorities([1000], [1e6])
    for n in (2, 600, 1500):
        assert drawn_alike(host, there, n)
    assert_alike(host, there)


def test_too_few_rows_are_told_by_a_later_call_and_not_counted():
    for kind in (ReplayBuffer, PrioritizedReplayBuffer):
        host, there = pair(kind, 100, replacement=False)
        for buffer in (host, there):
            buffer.insert(*rows(np.arange(100)))
        out = there.sample(10)
        assert_same(host.sample(10), out)
        before = there.stats()
        batch = there.sample(120)
        assert batch.handles.tolist() == [-1] * 120
        assert batch.discounts.tolist() == [0.0] * 120
        wait(there)
        with pytest.raises(ValueError, match="batch_size is 120, but only 100 rows have positive weight; draw fewer"):
            there.sample(10)
        assert there.stats() == before
        assert_same(host.sample(10), there.sample(10, out=out))
        for buffer in (host, there):
            buffer.remove(np.arange(100))
        assert not drawn_alike(host, there, 3)
        assert_alike(host, there)
        with pytest.raises(ValueError, match=r"batch_size is 16777217; without replacement .* at most 2\*\*24 rows"):
            there.sample(2**24 + 1)


# ---- what is refused ----


def refused(buffer, match):
    """The next call raises what an earlier one was refused for, and the one after that goes on."""
    wait(buffer)
    with pytest.raises(ValueError, match=match):
        buffer.sample(2)
    buffer.sample(2)


@pytest.mark.parametrize("n", [8, 2000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_priorities_are_told_by_a_later_call_and_nothing_is_applied(n, bad):
    host, there = pair(capacity=2000)
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(2000)))
    td_errors = np.ones(n, np.float32)
    td_errors[[3, n - 1]] = bad
    there.update_priorities(np.arange(n), td_errors)
    refused(there, rf"td_errors\[3\] is {bad}; priorities must be finite and not negative")
    there.update_priorities([0, 1, 2000, 5], [1.0, 2.0, 3.0, 4.0])
    refused(there, r"handles\[2\] is 2000, which was never issued; handles so far lie in \[0, 2000\)")
    for _ in range(2):
        host.sample(2)
    assert_alike(host, there)


@pytest.mark.parametrize("n", [8, 2000])
def test_a_call_is_left_out_where_the_device_says_so(place, n):
    host, there = pair(capacity=2000)
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(2000)))
    holds = torch.tensor(False, device=place)
    assert int(there.update_priorities(np.arange(n), np.full(n, np.nan), where=holds)) == 0
    holds.fill_(True)
    assert int(there.update_priorities(np.arange(n), np.arange(n), where=holds)) == 0
    host.update_priorities(np.arange(n), np.arange(n))
    assert_alike(host, there)
    for wrong in (torch.tensor([True, False]), torch.tensor(1)):
        with pytest.raises(ValueError, match=r"it must be one torch\.bool"):
            there.update_priorities(np.arange(n), np.arange(n), where=wrong.to(place))
    with pytest.raises(ValueError, match="only buffers on a device"):
        host.update_priorities(np.arange(n), np.arange(n), where=holds)


@pytest.mark.parametrize("n", [8, 5000])
@pytest.mark.parametrize("replacement", [True, False])
def test_a_draw_is_left_out_where_the_device_says_so(place, n, replacement):
    host, there = pair(capacity=5000)
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(5000)))
    out, holds = there.sample(n, replacement=replacement), torch.tensor(False, device=place)
    host.sample(n, replacement=replacement)
    before = [tensor.clone() for tensor in tree_leaves(out)]
    there.sample(n, replacement=replacement, out=out, where=holds)
    assert_same(before, tree_leaves(out))
    assert_alike(host, there)
    holds.fill_(True)
    there.sample(n, replacement=replacement, out=out, where=holds)
    assert_same(host.sample(n, replacement=replacement), out)
    with pytest.raises(ValueError, match="where is given without out"):
        there.sample(n, where=holds)
    with pytest.raises(ValueError, match=r"it must be one torch\.bool"):
        there.sample(n, out=out, where=holds.int())
    with pytest.raises(ValueError, match="only buffers on a device"):
        host.sample(n, where=holds)


def test_rows_that_do_not_fit_are_told_by_a_later_call_and_not_stored(place):
    there = PrioritizedReplayBuffer(8, SCHEMA, device="cuda")
    there.insert(*rows(np.arange(5)))
    made = [torch.as_tensor(column).to(place) for column in rows(np.arange(10, 14))]
    made[2][1] = torch.nan
    lost = there.insert(*made)
    refused(there, r"rewards\[1\] is nan; rewards must be finite")
    later = there.insert(*rows([20]))
    made[2][1] = 0.0
    there.insert(*made, priorities=torch.tensor([1.0, 2.0, -3.0, 4.0], device=place))
    refused(there, r"priorities\[2\] is -3.0; priorities must be finite and not negative")
    there.insert(*made, streams=torch.tensor([0, 0, 0, 65536], device=place))
    refused(there, r"streams\[3\] is 65536; it must be between 0 and 65535")
    # Tickets 0 to 4 were stored, 5 to 8 given up, 9 stored in the place of 1, and 10 to 17 given up.
    assert set(values_of(there.sample(100)).tolist()) == {0, 2, 3, 4, 20}
    assert int(there.update_priorities(lost, torch.ones(4))) == 4
    assert int(there.update_priorities(later, torch.ones(1))) == 0
    assert there.audit() == []


def test_an_empty_buffer_and_one_without_weight():
    there = PrioritizedReplayBuffer(8, SCHEMA, device="cuda", priority_epsilon=0.0)
    with pytest.raises(ValueError, match="the buffer is empty; insert rows before sampling"):
        there.sample(2)
    handles = there.insert(*rows([1, 2]))
    there.update_priorities(handles, torch.zeros(2))
    batch = there.sample(3)
    assert batch.handles.tolist() == [-1] * 3
    wait(there)
    with pytest.raises(ValueError, match="no row of the buffer has positive weight"):
        there.sample(3)
    there.update_priorities(handles, torch.tensor([0.0, 1.0]))
    assert there.sample(3).handles.tolist() == [1] * 3


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("n", [3, 300])
def test_a_draw_that_finds_no_row_counts_as_on_the_host(kind, replacement, n):
    """What follows is what would have been drawn in its place."""
    host, there = pair(kind, 64, replacement=replacement)
    for buffer in (host, there):
        handles = buffer.insert(*rows(np.arange(50)))
        buffer.remove(handles)
    with pytest.raises(ValueError, match="positive weight"):
        host.sample(n)
    assert (there.sample(n).handles == -1).all()
    wait(there)
    with pytest.raises(ValueError, match="positive weight"):
        there.sample(n)
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(50)))
    assert_same(host.sample(3), there.sample(3))
    assert_alike(host, there)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shared": True}, "the memory is to be shared"),
        ({"path": "rows"}, "the memory is to be file"),
    ],
)
def test_what_only_host_memory_has_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        PrioritizedReplayBuffer(8, SCHEMA, device="cuda", **options)


def test_calls_that_only_host_memory_has_are_refused():
    there = PrioritizedReplayBuffer(8, SCHEMA, device="cuda")
    there.insert(*rows(np.arange(8)))
    with pytest.raises(ValueError, match="on a device"):
        there.prefetch(4)


def test_without_a_device_the_error_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_emulated", False)
        with pytest.raises(RuntimeError, match="CUDA"):
            PrioritizedReplayBuffer(8, SCHEMA, device="cuda")


def test_an_agent_takes_a_buffer_on_its_own_device_alone(place):
    config = AgentConfig().replace(device=place.type)
    there = PrioritizedReplayBuffer(8, SCHEMA, device="cuda", discount=config.hyperparameters.discount)
    assert there.memory_device == place
    check_replay(there, config)
    other = "cuda" if place.type == "cpu" else "cpu"
    with pytest.raises(ValueError, match=f"replay is on {place} and device is '{other}'"):
        check_replay(there, config.replace(device=other))
    with pytest.raises(ValueError, match="where one thread uses it, and overlap takes two"):
        check_replay(there, config.replace(overlap=True))


# ---- to the host and back ----


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
@pytest.mark.parametrize("inserted", [0, 30, 100])
def test_files_go_both_ways(tmp_path, kind, inserted):
    host, there = pair(kind, 64, seed=5, n_step=2)
    for buffer in (host, there):
        for start in range(0, inserted, 10):
            buffer.insert(*rows(np.arange(start, start + 10)))
            batch = buffer.sample(16)
            if kind is PrioritizedReplayBuffer:
                buffer.update_priorities(batch.handles, batch.rewards.abs())
    from_there = kind.load(there.save(tmp_path / "there"), device="cpu")
    from_host = kind.load(host.save(tmp_path / "host"), device="cuda")
    again = kind.load(tmp_path / "there")
    assert not from_there.resident
    assert from_host.resident
    assert again.resident
    if inserted > 0:
        assert_same(host.sample(50), there.sample(50))
        expected = kind.load(tmp_path / "host").sample(50)
        for buffer in (from_there, from_host, again):
            assert_same(expected, buffer.sample(50))
    for buffer in (from_there, from_host, again):
        buffer.insert(*rows(np.arange(20)))
    batch = from_there.sample(50)
    assert_same(batch, from_host.sample(50))
    assert_same(batch, again.sample(50))
    for buffer in (from_there, from_host, again):
        assert buffer.audit() == []


def test_states_and_exports_go_both_ways():
    host, there = pair(capacity=40)
    host.insert(*rows(np.arange(40)))
    host.insert(*rows(np.arange(40, 60)))
    host.update_priorities(np.arange(20, 60), np.arange(40.0))
    there.import_state(*host.export_state())
    assert_same(host.sample(32), there.sample(32))
    back = PrioritizedReplayBuffer(40, SCHEMA)
    back.import_state(*there.export_state())
    assert_same(back.sample(32), host.sample(32))
    copy = PrioritizedReplayBuffer(40, SCHEMA, device="cuda")
    copy.insert_arrays(there.export_arrays())
    theirs = there._core.pull().weights()
    np.testing.assert_array_equal(copy._core.pull().weights(), np.roll(theirs, -20))


def test_what_is_off_is_found_and_mended():
    there = PrioritizedReplayBuffer(64, SCHEMA, device="cuda")
    there.insert(*rows(np.arange(64)))
    at = there._core._layout["sums_at"][0]
    there._core._memory[at] += 1
    assert there.audit() != []
    assert there.repair() > 0
    assert there.audit() == []
    assert there.sample(8).handles.min() >= 0


def test_rows_beyond_two_gigabytes():
    """Offsets of 64 bits: a row of 2 MiB, 1,100 of them."""
    schema = {"observations": ((1 << 20,), "u1"), "actions": ((1,), "f4")}
    there = ReplayBuffer(1100, schema, device="cuda")
    assert there.nbytes > 2**31
    look = np.zeros((1, 1 << 20), np.uint8)
    for i in range(1100):
        look[:] = i % 251
        there.insert(look, np.full((1, 1), i), np.full(1, i, np.float32), look + 1, np.zeros(1, bool))
    batch = there.sample(64)
    assert batch.rewards.max() > 1050
    for i, reward in enumerate(batch.rewards.tolist()):
        assert (batch.observations[i] == int(reward) % 251).all()
        assert (batch.next_observations[i] == int(reward) % 251 + 1).all()


# ---- streams of rows, streams of the device ----


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_the_order_within_streams(n):
    random = np.random.default_rng(n)
    for streams in (np.zeros(n, int), np.arange(n), random.integers(0, 3, n)):
        following, last = (part.tolist() for part in rows_after(torch.from_numpy(streams)))
        (before,) = (part.tolist() for part in rows_before(torch.from_numpy(streams)))
        for i in range(n):
            later = [j for j in range(i + 1, n) if streams[j] == streams[i]]
            assert following[i] == (later[0] if later else -1)
            first = all(streams[j] != streams[i] for j in range(i))
            assert last[i] == ([i, *later][-1] if first else -1)
            assert before[i] == max((j for j in range(i) if streams[j] == streams[i]), default=-1)


@pytest.mark.cuda
def test_calls_on_other_streams_come_in_order(place):
    if place.type != "cuda":
        pytest.skip("no CUDA device")
    host, there = pair(capacity=100_000)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for call in range(30):
        made = rows(np.arange(1000 * call, 1000 * call + 1000))
        host.insert(*made)
        with torch.cuda.stream(streams[call % 3]):
            there.insert(*made)
        batch = host.sample(512)
        with torch.cuda.stream(streams[(call + 1) % 3]):
            other = there.sample(512)
            there.update_priorities(other.handles, other.rewards.abs())
        torch.cuda.synchronize()
        assert_same(batch, other)
        host.update_priorities(batch.handles, batch.rewards.abs())
    assert_alike(host, there)


@pytest.mark.cuda
@pytest.mark.parametrize("replacement", [True, False])
def test_draws_and_updates_are_captured(place, replacement):
    if place.type != "cuda":
        pytest.skip("no CUDA device")
    host, there = pair(capacity=10_000, replacement=replacement)
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(10_000)))
    out = there.sample(256)
    there.update_priorities(out.handles, out.rewards.abs())
    batch = host.sample(256)
    host.update_priorities(batch.handles, batch.rewards.abs())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        there.sample(256, out=out)
        there.update_priorities(out.handles, out.rewards.abs())
    for launch in range(5):
        host.importance_exponent = there.importance_exponent = 0.2 * launch
        there.refresh()
        graph.replay()
        there.launched()
        batch = host.sample(256)
        host.update_priorities(batch.handles, batch.rewards.abs())
        torch.cuda.synchronize()
        assert_same(batch, out)
    assert_alike(host, there)


@pytest.mark.cuda
def test_captured_draws_without_replacement_follow_a_buffer_that_grows(place):
    if place.type != "cuda":
        pytest.skip("no CUDA device")
    host, there = pair(ReplayBuffer, 10_000, replacement=False)
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(300)))
    out = there.sample(256)
    host.sample(256)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        there.sample(256, out=out)
    for _ in range(5):
        there.refresh()
        graph.replay()
        there.launched()
        batch = host.sample(256)
        torch.cuda.synchronize()
        assert_same(batch, out)
        for buffer in (host, there):
            buffer.insert(*rows(np.arange(2000)))
            buffer.remove(np.arange(len(buffer) - 2000, len(buffer) - 10))
    assert_alike(host, there)


def test_a_schedule_is_asked_with_the_rows_inserted():
    asked = []
    host, there = pair(capacity=50, importance_exponent=lambda inserts: asked.append(inserts) or 0.5)
    for buffer in (host, there):
        buffer.insert(*rows(np.arange(30)))
        buffer.insert(*rows(np.arange(30)))
    assert_same(host.sample(8), there.sample(8))
    assert asked == [60, 60]


def test_nothing_waits_for_the_device():
    """Inserts, draws and updates never ask a tensor for its value."""
    there = PrioritizedReplayBuffer(64, SCHEMA, device="cuda", importance_exponent=lambda inserts: inserts / 100)

    class Refuses(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            name = str(function)
            assert "_local_scalar_dense" not in name, name
            assert "nonzero" not in name, name
            assert "masked_select" not in name, name
            return function(*arguments, **(kwargs or {}))

    made = [torch.as_tensor(column) for column in rows(np.arange(20))]
    streams = torch.arange(20) % 3
    with Refuses():
        there.insert(*made, streams=streams)
        there.insert(*rows(np.arange(4)))
        batch = there.sample(16, n_step=2)
        there.sample(16, out=batch)
        there.sample(16, replacement=False)
        there.update_priorities(batch.handles, batch.rewards)
        there.update_priorities(torch.arange(24).repeat(60), torch.ones(24 * 60))
    assert isinstance(there._core, DeviceCore)

"""The memory of fresh batches: nobody's batch is overwritten, and what is given back is bounded."""

from __future__ import annotations

import gc
import itertools
import threading

import numpy as np
import pytest
import torch
from replay_rows import filled, values_of

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer


@pytest.mark.parametrize("batch_size", [1, 8, 4096])
def test_a_kept_batch_keeps_its_memory(batch_size):
    buffer = filled()
    kept = [buffer.sample(batch_size) for _ in range(5)]
    copies = [[t.clone() for t in batch] for batch in kept]
    for _ in range(50):
        buffer.sample(batch_size)
    for batch, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, copy, strict=True))
        values_of(batch)


@pytest.mark.parametrize("batch_size", [8, 4096])
@pytest.mark.parametrize("part", range(8))
def test_a_view_of_one_tensor_keeps_that_memory(batch_size, part):
    buffer = filled()
    batch = buffer.sample(batch_size)
    view = batch[part][2:5]
    array = batch[part].numpy()[3:4]
    expected, expected_array = view.clone(), array.copy()
    del batch
    for _ in range(20):
        buffer.sample(batch_size)
    assert torch.equal(view, expected)
    np.testing.assert_array_equal(array, expected_array)


def test_a_graph_keeps_the_memory_that_it_needs():
    buffer = filled()
    weight = torch.ones(3, requires_grad=True)
    loss = (buffer.sample(4096).observations * weight).sum()
    expected = buffer.sample(4096).observations.sum(0)  # other rows, so that reuse would show
    gradient = torch.autograd.grad(loss, weight)[0]
    assert not torch.equal(gradient, expected)
    first = filled().sample(4096).observations.sum(0)
    torch.testing.assert_close(gradient, first)


def test_a_batch_outlives_its_buffer():
    buffer = filled()
    batch = buffer.sample(512)
    copy = [t.clone() for t in batch]
    del buffer
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(batch, copy, strict=True))


def test_memory_is_used_again_and_bounded():
    buffer = filled(capacity=1024)
    first = buffer.sample(64)
    place = first.observations.data_ptr()
    assert buffer._core.pooled_bytes == 0
    del first
    assert 0 < buffer._core.pooled_bytes < 64 * 128
    assert buffer.sample(64).observations.data_ptr() == place
    many = [buffer.sample(100_000) for _ in range(8)]
    assert sum(t.nbytes for batch in many for t in batch) > 2**25
    del many
    assert buffer._core.pooled_bytes <= 2**25


def test_tensors_are_aligned_and_do_not_overlap():
    buffer = filled()
    for batch_size in (1, 7, 300, 5000):
        batch = buffer.sample(batch_size)
        spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in batch)
        assert all(start % 64 == 0 for start, _ in spans)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", [*DTYPES, "float16", "float32", "float64", "complex64"])
def test_every_dtype_arrives_as_itself(dtype):
    buffer = ReplayBuffer(4, {"observations": ((2, 3), dtype), "actions": ((), dtype)})
    values = np.arange(6).reshape(2, 3).astype(dtype)
    buffer.insert(values, values[1, 1], 1.0, values, False)
    batch = buffer.sample(2)
    assert batch.observations.dtype == torch.from_numpy(values).dtype
    assert batch.observations.shape == (2, 2, 3)
    assert batch.observations.is_contiguous()
    np.testing.assert_array_equal(batch.observations[1].numpy(), values)
    np.testing.assert_array_equal(batch.actions[0].numpy(), values[1, 1])


def test_a_row_may_have_many_fields():
    names = [f"part{i:02d}" for i in range(30)]
    schema = {"observations": {name: ((2,), np.float32) for name in names}, "actions": ((), np.int64)}
    buffer = PrioritizedReplayBuffer(4, schema)
    parts = {name: np.full(2, i, np.float32) for i, name in enumerate(names)}
    buffer.insert(parts, np.int64(3), 1.0, parts, False)
    out = buffer.sample(5)
    for batch in (buffer.sample(5), buffer.sample(5, out=out)):
        assert [int(batch.observations[name][0, 0]) for name in names] == list(range(30))
        assert batch.actions.tolist() == [3] * 5


def test_a_batch_beyond_all_memory_is_an_error_and_nothing_is_drawn():
    schema = {"observations": ((2**20,), np.uint8), "actions": ((), np.float32)}
    buffer, twin = (PrioritizedReplayBuffer(64, schema) for _ in range(2))
    for each in (buffer, twin):
        each.insert(*(np.zeros((64, *f.shape), f.dtype) for f in each.schema.fields), np.zeros(64, bool))
    with pytest.raises(MemoryError):
        buffer.sample(2**31 - 1)
    assert buffer._core.pooled_bytes <= 2**25
    assert torch.equal(buffer.sample(16).handles, twin.sample(16).handles)


def test_tensors_may_die_in_any_thread():
    buffer = filled()
    failures = []

    def work():
        try:
            for turn in range(200):
                batch = buffer.sample(1 + turn % 3 * 2000)
                values_of(batch)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    handed_over = [buffer.sample(64) for _ in range(100)]
    dropper = threading.Thread(target=handed_over.clear)
    dropper.start()
    for thread in (*threads, dropper):
        thread.join()
    assert not failures


def test_an_out_that_was_moved_or_resized_is_noticed():
    buffer = filled()
    out = buffer.sample(16)
    buffer.sample(16, out=out)
    out.rewards.set_(torch.zeros(16, dtype=torch.float64).float())
    buffer.sample(16, out=out)
    values_of(out)
    out.rewards.resize_(4)
    with pytest.raises(ValueError, match="rewards"):
        buffer.sample(16, out=out)


def test_two_outs_in_turns_and_in_threads_each_get_their_own_rows():
    buffer, twin = filled(seed=1), filled(seed=1)
    outs = [buffer.sample(n) for n in (16, 16, 8)]
    for out in outs:
        twin.sample(len(out.rewards))
    for turn in range(12):
        out = outs[turn % 3]
        assert buffer.sample(len(out.rewards), out=out) is out
        expected = twin.sample(len(out.rewards))
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    failures = []

    def work(out):
        try:
            for _ in range(500):
                out.handles.fill_(-1)
                buffer.sample(len(out.handles), out=out)
                assert (out.handles >= 0).all()
                values_of(out)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_an_out_that_is_no_batch_is_refused():
    buffer = filled()
    with pytest.raises(TypeError, match="out is list"):
        buffer.sample(16, out=list(buffer.sample(16)))
    with pytest.raises(TypeError, match="out is tuple"):
        buffer.sample(16, out=tuple(buffer.sample(16)))

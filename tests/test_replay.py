"""The replay buffers: contents, distributions, promises and refusals."""

from __future__ import annotations

import os
import threading

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.replay import UNIT, Model, fixed_weight, importance_weights
from replay_rows import SCHEMA, filled, rows, values_of
from scipy.stats import chi2

from angle_rl import _core
from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer

pytestmark = pytest.mark.usefixtures("replay_place")

# ---- contents ----


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
def test_rows_come_back_under_their_handles(kind):
    buffer = kind(50, SCHEMA)
    inserted = {}
    for start in range(0, 210, 7):
        values = np.arange(start, start + 7)
        for handle, value in zip(buffer.insert(*rows(values)), values, strict=True):
            inserted[int(handle)] = value
        batch = buffer.sample(64)
        assert [inserted[int(h)] for h in batch.handles] == values_of(batch).tolist()
        assert int(batch.handles.min()) >= len(inserted) - 50
    assert len(buffer) == 50


def test_batch_dtypes_and_shapes():
    batch = filled().sample(17)
    assert batch.observations.shape == (17, 3)
    assert batch.actions.shape == (17, 2)
    for tensor, dtype in (
        (batch.rewards, torch.float32),
        (batch.discounts, torch.float32),
        (batch.importance_weights, torch.float32),
        (batch.handles, torch.int64),
        (batch.steps, torch.int64),
    ):
        assert tensor.shape == (17,)
        assert tensor.dtype == dtype
    assert (batch.steps == 1).all()


def test_termination_stops_the_bootstrap_and_truncation_does_not():
    buffer = ReplayBuffer(8, SCHEMA, discount=0.9)
    buffer.insert(*rows([0, 1, 2, 3], [False, True, False, True]), [False, False, True, True])
    batch = buffer.sample(64)
    expected = np.asarray([0.9, 0.0, 0.9, 0.0], np.float32)[values_of(batch).astype(int)]
    np.testing.assert_array_equal(batch.discounts, expected)
    other = buffer.sample(64, discount=0.5)
    assert set(other.discounts.tolist()) == {0.0, 0.5}


def test_one_row_and_a_batch_are_the_same_method():
    one, many = ReplayBuffer(8, SCHEMA), ReplayBuffer(8, SCHEMA)
    for value in range(5):
        observation, action, reward, successor, ended = rows(value)
        handles = one.insert(observation, action, float(reward), successor, bool(ended))
        assert handles.dtype == np.int64
        assert handles.tolist() == [value]
    assert many.insert(*rows(np.arange(5))).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(one.sample(32).observations, many.sample(32).observations)


def test_no_rows_are_no_rows():
    buffer = filled()
    handles = buffer.insert(*rows(np.zeros(0)))
    assert handles.shape == (0,)
    assert handles.dtype == np.int64
    assert buffer.update_priorities(np.zeros(0, np.int64), np.zeros(0)) == 0
    assert len(buffer) == 100


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.astype(np.float64) if a.dtype.kind == "f" else a,
        torch.from_numpy,
        lambda a: np.asfortranarray(a),
        lambda a: a[::-1].copy()[::-1],
        lambda a: a.tolist(),
        lambda a: a.astype(a.dtype.newbyteorder(">")) if a.dtype.kind == "f" else a,
    ],
    ids=["float64", "torch", "fortran", "reversed", "lists", "big-endian"],
)
def test_inputs_that_convert_are_taken(convert):
    buffer = ReplayBuffer(8, SCHEMA)
    buffer.insert(*(convert(a) for a in rows(np.arange(6))))
    assert set(values_of(buffer.sample(60))) == set(range(6))


def test_integer_rewards_and_scalars_are_taken():
    buffer = ReplayBuffer(8, SCHEMA)
    observation, action, _, successor, _ = rows(3)
    for reward, ended in (
        (3, False),
        (np.float32(3), np.bool_(False)),
        (np.int64(3), np.asarray(False)),
        (3.0, True),
    ):
        buffer.insert(observation, action, reward, successor, ended)
    assert set(values_of(buffer.sample(16))) == {3.0}
    assert sorted(set(buffer.sample(64).discounts.tolist())) == pytest.approx([0.0, 0.99])


def test_nested_observations_and_images():
    space = gym.spaces.Dict(
        camera=gym.spaces.Box(0, 255, (4, 5), np.uint8),
        joints=gym.spaces.Tuple((gym.spaces.Box(-1, 1, (2,), np.float64), gym.spaces.Discrete(3))),
    )
    buffer = ReplayBuffer(10, observation_space=space, action_space=gym.spaces.Discrete(4))
    assert [f.name for f in buffer.schema.observations] == [
        "observations.camera",
        "observations.joints.0",
        "observations.joints.1",
    ]
    rng = np.random.default_rng(0)
    camera = rng.integers(0, 256, (10, 4, 5), np.uint8)
    for i in range(10):
        observation = {"camera": camera[i], "joints": (np.asarray([i, -i], np.float64), i % 3)}
        buffer.insert(observation, i % 4, float(i), observation, False)
    batch = buffer.sample(40)
    index = batch.rewards.long()
    assert batch.observations["camera"].dtype == torch.uint8
    assert torch.equal(batch.observations["camera"], torch.from_numpy(camera)[index])
    assert torch.equal(batch.next_observations["joints"][0], torch.stack([batch.rewards, -batch.rewards], 1))
    assert torch.equal(batch.observations["joints"][1], index % 3)
    assert torch.equal(batch.actions, index % 4)
    as_batch = {"camera": camera, "joints": (np.zeros((10, 2), np.float32), np.zeros(10, np.int64))}
    assert len(buffer.insert(as_batch, np.zeros(10, np.int64), np.ones(10), as_batch, np.zeros(10, bool))) == 10
    with pytest.raises(ValueError, match="camera, joints"):
        buffer.insert({"camera": camera[0]}, 0, 0.0, {"camera": camera[0]}, False)


def test_a_list_of_names_shapes_and_dtypes_is_a_schema():
    buffer = ReplayBuffer(4, [("observations", (3,), "f8"), ("actions", (), "i4")])
    observation = np.arange(3.0)
    buffer.insert(observation, 2, 1.0, observation, False)
    batch = buffer.sample(2)
    assert batch.observations.dtype == torch.float64
    assert batch.actions.dtype == torch.int32


def test_streams_are_taken_and_bounded():
    buffer = ReplayBuffer(8, SCHEMA)
    buffer.insert(*rows([0, 1]), None, np.asarray([0, 65535]))
    buffer.insert(*rows([0, 1]), None, [3, 4])
    for bad in ([0, 65536], [-1, 0]):
        with pytest.raises(ValueError, match=r"streams\[\d\] is"):
            buffer.insert(*rows([0, 1]), None, bad)
    assert len(buffer) == 4


def test_out_is_filled_and_nothing_is_aliased():
    buffer = filled()
    out = buffer.sample(32)
    other = buffer.sample(32)
    before = [t.clone() for t in other]
    pointers = [t.data_ptr() for t in out]
    again = buffer.sample(32, out=out)
    assert again is out
    assert [t.data_ptr() for t in out] == pointers
    values_of(out)
    assert all(torch.equal(a, b) for a, b in zip(before, other, strict=True))
    assert not {t.data_ptr() for t in other} & set(pointers)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("rewards", torch.empty(31)),
        ("rewards", torch.empty(32, dtype=torch.float64)),
        ("observations", torch.empty(3, 32).T),
        ("handles", torch.empty(32, dtype=torch.int64, device="meta")),
    ],
)
def test_an_out_that_does_not_fit_is_refused(field, wrong):
    buffer = filled()
    out = buffer.sample(32)._replace(**{field: wrong})
    with pytest.raises(ValueError, match=f"out.{field}"):
        buffer.sample(32, out=out)
    with pytest.raises(ValueError, match=r"out\.observations"):
        buffer.sample(16, out=buffer.sample(32))
    good = buffer.sample(32)
    with pytest.raises(ValueError, match="twice"):
        buffer.sample(32, out=good._replace(discounts=good.rewards))


# ---- priorities ----


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 70),
    exponent=st.sampled_from([0.0, 0.4, 0.6, 1.0]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("insert"), st.integers(0, 20)),
            st.tuples(st.just("update"), st.lists(st.tuples(st.integers(0, 200), st.floats(0, 1e4)), max_size=20)),
        ),
        max_size=30,
    ),
)
def test_any_sequence_agrees_with_the_model(capacity, exponent, steps):
    buffer = PrioritizedReplayBuffer(capacity, SCHEMA, priority_exponent=exponent)
    model = Model(capacity, exponent, 1e-6)
    for step, argument in steps:
        if step == "insert":
            values = [float(model.tickets + i) for i in range(min(argument, capacity))]
            assert buffer.insert(*rows(values)).tolist() == model.insert(values)
        else:
            known = [(h, p) for h, p in argument if h < model.tickets]
            handles, td_errors = [h for h, _ in known], [p for _, p in known]
            assert buffer.update_priorities(np.asarray(handles, np.int64), np.asarray(td_errors)) == model.update(
                handles, td_errors
            )
    weights = buffer._core.weights()
    assert len(buffer) == len(model.values)
    for handle, td_error in model.priorities.items():
        expected = fixed_weight(np.asarray(td_error), exponent, 1e-6)
        assert abs(int(weights[handle % capacity]) - int(expected)) <= 1
    assert buffer._core.sums_are_exact()
    if model.values:
        batch = buffer.sample(32)
        assert [model.values[int(h)] for h in batch.handles] == values_of(batch).tolist()
    if model.priorities:
        largest = fixed_weight(np.asarray(max(model.priorities.values())), exponent, 1e-6)
        assert largest <= buffer._core.default_weight() + 1 <= 1.05 * largest + 2


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("isa", _core.available_isas())
def test_rows_are_drawn_in_proportion(stratified, isa, run_python):
    script = f"""
import numpy as np, torch
from angle_rl.replay import PrioritizedReplayBuffer
schema = {{"observations": ((1,), "f4"), "actions": ((1,), "f4")}}
b = PrioritizedReplayBuffer(3000, schema, stratified={stratified}, seed=3)
z = np.zeros((2500, 1), np.float32)
b.insert(z, z, z[:, 0], z, np.zeros(2500, bool))
td = np.random.default_rng(0).exponential(size=2500) + 0.01
b.update_priorities(np.arange(2500), td)
count = np.zeros(2500, np.int64)
for _ in range(200):
    count += np.bincount(b.sample(1000).handles.numpy(), minlength=2500)
print(" ".join(map(str, count)), "|", " ".join(map(str, b._core.weights()[:2500])))
"""
    counts, weights = (np.asarray(part.split(), float) for part in run_python(script, ANGLE_ISA=isa).split("|"))
    expected = weights / weights.sum() * counts.sum()
    assert counts.sum() == 200_000
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < chi2.isf(1e-4, 2499)
    if not stratified:
        assert statistic > chi2.isf(1 - 1e-4, 2499)


def test_draws_do_not_depend_on_the_instruction_set(run_python):
    script = """
import numpy as np
from angle_rl.replay import PrioritizedReplayBuffer
b = PrioritizedReplayBuffer(70000, {"observations": ((3,), "f4"), "actions": ((1,), "f4")}, seed=9)
rng = np.random.default_rng(0)
for _ in range(9):
    n = 10000
    o = rng.normal(size=(n, 3))
    b.insert(o, rng.normal(size=(n, 1)), rng.normal(size=n), o + 1, np.zeros(n, bool))
    x = b.sample(777)
    b.update_priorities(x.handles, x.rewards.abs())
x = b.sample(4096)
print(x.handles.tolist(), x.importance_weights.double().sum().item(), x.observations.double().sum().item())
"""
    printed = {run_python(script, ANGLE_ISA=isa) for isa in _core.available_isas()}
    assert len(printed) == 1


def test_an_unknown_instruction_set_is_refused(run_python):
    script = """
from angle_rl import _core
try:
    _core.isa()
except RuntimeError as error:
    print(error)
"""
    assert "ANGLE_ISA is 'sse9'" in run_python(script, ANGLE_ISA="sse9")


def test_small_weights_keep_their_share_in_both_halves():
    n, draws = 100_000, 400
    buffer = PrioritizedReplayBuffer(
        n,
        {"observations": ((1,), "f4"), "actions": ((1,), "f4")},
        priority_exponent=1.0,
        priority_epsilon=0.0,
        stratified=False,
    )
    z = np.zeros((n, 1), np.float32)
    buffer.insert(z, z, z[:, 0], z, np.zeros(n, bool))
    td_errors = np.where(np.arange(n) % 10 == 0, 1e-3, 1.0)
    buffer.update_priorities(np.arange(n), td_errors)
    count = np.zeros(n, np.int64)
    for _ in range(draws):
        count += np.bincount(buffer.sample(10_000).handles.numpy(), minlength=n)
    share = 1e-3 * (n / 20) / td_errors.sum()
    total = draws * 10_000
    for half in (slice(0, n // 2), slice(n // 2, n)):
        low = count[half][::10].sum()
        assert abs(low - total * share) < 4 * np.sqrt(total * share)


def test_importance_weights_follow_the_equation():
    buffer = filled(seed=1)
    buffer.update_priorities(np.arange(100), np.linspace(0.01, 7, 100))
    weights = buffer._core.weights()
    for exponent in (0.0, 0.4, 1.0, 2.5):
        batch = buffer.sample(512, importance_exponent=exponent)
        drawn = weights[batch.handles.numpy() % 128].astype(np.float64)
        expected = importance_weights(drawn, weights.sum(), 100, exponent)
        np.testing.assert_allclose(batch.importance_weights, expected, rtol=1e-6)


def test_the_importance_exponent_can_be_a_schedule():
    buffer = filled(importance_exponent=lambda inserts: 0.0 if inserts <= 100 else 1.0)
    buffer.update_priorities(np.arange(50), np.full(50, 5.0))
    assert (buffer.sample(64).importance_weights == 1).all()
    buffer.insert(*rows([1]))
    assert (buffer.sample(64).importance_weights < 1).any()
    with pytest.raises(ValueError, match="importance_exponent is -1"):
        filled(importance_exponent=lambda inserts: -1).sample(4)


def test_one_zero_priority_does_not_shrink_the_weights():
    buffer = filled(priority_epsilon=0.0)
    buffer.update_priorities(np.arange(100), np.where(np.arange(100) == 7, 0.0, 1.0))
    batch = buffer.sample(1000)
    assert 7 not in batch.handles
    assert (batch.importance_weights == 1).all()


def test_an_outlier_counts_only_while_its_row_lives():
    buffer = PrioritizedReplayBuffer(4, SCHEMA, priority_exponent=1.0, priority_epsilon=0.0)
    assert buffer._core.default_weight() == UNIT
    buffer.insert(*rows([0, 1, 2, 3]))
    buffer.update_priorities(np.arange(4), np.asarray([1e5, 2.0, 2.0, 2.0]))
    assert buffer._core.default_weight() >= 1e5 * UNIT
    buffer.insert(*rows([4]))
    assert 2 * UNIT <= buffer._core.default_weight() <= 2.1 * UNIT


def test_stale_handles_are_refused_and_counted():
    buffer = PrioritizedReplayBuffer(4, SCHEMA)
    old = buffer.insert(*rows([0, 1, 2, 3]))
    buffer.insert(*rows([4, 5]))
    before = buffer._core.weights()
    assert buffer.update_priorities(old, np.full(4, 9.0)) == 2
    after = buffer._core.weights()
    assert (after[:2] == before[:2]).all()
    assert (after[2:] != before[2:]).all()
    assert buffer.stats()["refused_updates"] == 2
    assert buffer.stats()["updates"] == 2


def test_the_last_of_equal_handles_wins():
    buffer = filled(priority_exponent=1.0, priority_epsilon=0.0)
    buffer.update_priorities(np.asarray([5, 5, 6, 5]), np.asarray([1.0, 2.0, 3.0, 4.0]))
    assert buffer._core.weights()[5] == 4 * UNIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_priorities_come_in_any_real_dtype(dtype):
    buffer = filled(priority_exponent=1.0, priority_epsilon=0.0)
    td_errors = torch.tensor([1.0, 2.0, 4.0], dtype=dtype, requires_grad=True)
    assert buffer.update_priorities(torch.tensor([1, 2, 3]), td_errors) == 0
    assert (buffer._core.weights()[1:4] == np.asarray([1, 2, 4]) * UNIT).all()


# ---- order, state, threads ----


def test_one_seed_gives_one_sequence():
    first, second, other = (filled(seed=s) for s in (4, 4, 5))
    for _ in range(5):
        a, b, c = first.sample(64), second.sample(64), other.sample(64)
        assert torch.equal(a.handles, b.handles)
        assert not torch.equal(a.handles, c.handles)


@pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
def test_exported_state_goes_on_with_the_same_batches(kind):
    source = kind(64, SCHEMA, seed=2)
    source.insert(*rows(np.arange(50)))
    source.insert(*rows(np.arange(50, 80)))
    if kind is PrioritizedReplayBuffer:
        source.update_priorities(np.arange(40, 70), np.linspace(0, 3, 30))
    source.sample(8)
    arrays, facts = source.export_state()
    arrays = {name: array.copy() for name, array in arrays.items()}
    target = kind(64, SCHEMA, seed=77)
    target.import_state(arrays, facts)
    for _ in range(10):
        a, b = source.sample(32), target.sample(32)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert source.insert(*rows([1])).tolist() == target.insert(*rows([1])).tolist()
    assert {**source.stats()} == {**target.stats()}


@pytest.mark.usefixtures("on_cpu")
def test_a_state_fits_whatever_a_buffer_says_of_itself():
    """A segment carries its buffer's description, which may be longer or shorter than the other's."""
    source = PrioritizedReplayBuffer(64, SCHEMA, seed=1)
    source.insert(*rows(np.arange(50)))
    target = PrioritizedReplayBuffer(64, SCHEMA, seed=2**64 - 1, importance_exponent=0.123456789012345, shared=True)
    arrays, facts = source.export_state()
    target.import_state(arrays, facts)
    assert target.audit() == []
    assert torch.equal(source.sample(32).handles, target.sample(32).handles)
    again = type(target)._attach_to(target._place, os.dup(target._descriptor()), None)
    assert again._options()["seed"] == 2**64 - 1
    assert torch.equal(source.sample(32).handles, again.sample(32).handles)


def test_a_state_that_does_not_fit_is_refused():
    source = filled()
    arrays, facts = source.export_state()
    other = PrioritizedReplayBuffer(128, {**SCHEMA, "actions": ((3,), np.float32)})
    with pytest.raises(ValueError, match="fields"):
        other.import_state(arrays, facts)
    with pytest.raises(ValueError, match="capacity"):
        PrioritizedReplayBuffer(64, SCHEMA).import_state(arrays, facts)
    with pytest.raises(ValueError, match="prioritized"):
        ReplayBuffer(128, SCHEMA).import_state(arrays, facts)
    target = PrioritizedReplayBuffer(128, SCHEMA)
    with pytest.raises(ValueError, match="records"):
        target.import_state({**arrays, "records": arrays["records"][:-1]}, facts)
    with pytest.raises(ValueError, match="index"):
        target.import_state({**arrays, "index": arrays["index"][:-8]}, facts)
    broken = arrays["header"].copy()
    broken[0] ^= 1
    with pytest.raises(ValueError, match="magic"):
        target.import_state({**arrays, "header": broken}, facts)
    assert len(target) == 0


@pytest.mark.usefixtures("on_cpu")
def test_threads_insert_sample_and_update_together():
    buffer = PrioritizedReplayBuffer(500, SCHEMA)
    buffer.insert(*rows(np.arange(100)))
    problems: list[str] = []

    def insert(start: int) -> None:
        for i in range(300):
            buffer.insert(*rows(np.arange(start + i, start + i + 5)))

    def learn() -> None:
        try:
            for _ in range(300):
                batch = buffer.sample(64)
                values_of(batch)
                buffer.update_priorities(batch.handles, batch.rewards.abs())
        except Exception as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=insert, args=(s,)) for s in (0, 1000)]
    threads += [threading.Thread(target=learn) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert buffer._core.sums_are_exact()
    assert buffer.stats()["inserts"] == 3100


def test_memory_is_what_the_record_needs():
    space = gym.spaces.Box(-np.inf, np.inf, (17,), np.float64)
    buffer = PrioritizedReplayBuffer(100_000, observation_space=space, action_space=gym.spaces.Box(-1, 1, (6,)))
    assert buffer._core.record_bytes == 192
    assert buffer.nbytes <= 100_000 * (192 + 16) + 2**20
    assert buffer.stats()["nbytes"] == buffer.nbytes


def test_sample_to_a_device_moves_every_tensor():
    batch = filled().sample(8, device="cpu")
    assert all(t.device.type == "cpu" for t in batch)
    with pytest.raises(ValueError, match="out and device"):
        filled().sample(8, device="cpu", out=batch)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sample_to_cuda():
    buffer = filled(seed=3)
    twin = filled(seed=3)
    batch, expected = buffer.sample(64, device="cuda"), twin.sample(64)
    torch.cuda.synchronize()
    assert all(t.is_cuda for t in batch)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(batch, expected, strict=True))
    assert buffer.update_priorities(batch.handles, batch.rewards.abs()) == 0


def test_a_stream_may_be_a_plain_number():
    buffer = ReplayBuffer(8, SCHEMA)
    observations, actions, rewards, successors, terminated = rows([3.0])
    row = (observations[0], actions[0], float(rewards[0]), successors[0], bool(terminated[0]))
    handle = buffer.insert(*row, streams=7)
    assert buffer._core.rows(0, 1)[-4].tolist() == [7]
    assert buffer.sample(2).handles.tolist() == [int(handle[0])] * 2
    for bad in (-1, 65536, 2**70):
        with pytest.raises((ValueError, OverflowError), match=r"streams|int"):
            buffer.insert(*row, streams=bad)
    assert len(buffer) == 1

"""A replay's rows as plain arrays: out, in, and through npz files."""

from __future__ import annotations

import os

import gymnasium as gym
import numpy as np
import pytest
import torch
from replay_rows import SCHEMA, filled, rows

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer, ReplayFileError, export
from angle_rl.schema import make_schema

KINDS = pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
NESTED = gym.spaces.Dict(
    camera=gym.spaces.Box(0, 255, (4, 5), np.uint8),
    joints=gym.spaces.Tuple((gym.spaces.Box(-1, 1, (2,), np.float64), gym.spaces.Discrete(3))),
)


def nested(capacity=10, count=15, share=False):
    actions = gym.spaces.Discrete(4)
    buffer = ReplayBuffer(capacity, observation_space=NESTED, action_space=actions, share_successors=share)
    for i in range(count):
        observation = {"camera": np.full((4, 5), i, np.uint8), "joints": (np.zeros(2) + i, i % 3)}
        after = {"camera": np.full((4, 5), 100 + i, np.uint8), "joints": (np.zeros(2) - i, 2)}
        buffer.insert(observation, i % 4, float(i), after, i % 5 == 0, i % 5 == 1, i * 11)
    return buffer


@KINDS
@pytest.mark.parametrize("count", [0, 1, 8, 10, 23])
def test_rows_are_exported_oldest_first(kind, count):
    buffer = kind(10, SCHEMA)
    for value in range(count):
        buffer.insert(*rows([value], [value % 3 == 0]), [value % 3 == 1], [value * 7])
    arrays = buffer.export_arrays()
    kept = np.arange(max(0, count - 10), count)
    expected = dict(zip(["observations", "actions", "rewards", "next_observations"], rows(kept)[:4], strict=True))
    expected |= {"terminated": kept % 3 == 0, "truncated": kept % 3 == 1, "streams": kept * 7, "handles": kept}
    if kind is PrioritizedReplayBuffer:
        expected["priorities"] = np.ones(len(kept), np.float32)
    assert set(arrays) == set(expected)
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], name)
        assert not np.shares_memory(array, buffer._core.parts()["records"])


def test_nested_names_have_dots():
    arrays = nested().export_arrays()
    kept = np.arange(5, 15)
    assert arrays["observations.camera"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["observations.camera"], np.broadcast_to(kept[:, None, None], (10, 4, 5)))
    np.testing.assert_array_equal(arrays["observations.joints.1"], kept % 3)
    np.testing.assert_array_equal(arrays["next_observations.joints.0"], -kept[:, None] * np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(arrays["next_observations.camera"][:, 0, 0], 100 + kept)


@pytest.mark.parametrize(
    "make",
    [nested, lambda: nested(share=True), lambda: filled(100), lambda: PrioritizedReplayBuffer(7, SCHEMA)],
    ids=["nested", "shared", "flat", "empty"],
)
def test_through_a_file_and_back(tmp_path, make):
    source = make()
    assert source.save_npz(tmp_path / "rows.data") == tmp_path / "rows.data"  # no suffix is added
    with np.load(tmp_path / "rows.data", allow_pickle=False) as plain:
        assert set(plain.files) == set(source.export_arrays())
    share = source._options()["share_successors"]
    target = type(source)(source.capacity, source.schema, share_successors=share)
    handles = target.insert_npz(tmp_path / "rows.data")
    assert len(handles) == len(source)
    assert share or handles.tolist() == list(range(len(source)))
    there, here = source.export_arrays(), target.export_arrays()
    for name in set(there) - {"handles"}:
        assert there[name].dtype == here[name].dtype
        np.testing.assert_array_equal(there[name], here[name], name)


def test_long_rings_come_out_in_order():
    buffer = ReplayBuffer(10_000, SCHEMA)
    for first in (0, 7000, 14_000):
        buffer.insert(*rows(np.arange(first, first + 7000)))
    arrays = buffer.export_arrays()
    assert arrays["handles"].tolist() == list(range(11_000, 21_000))
    np.testing.assert_array_equal(arrays["rewards"], arrays["handles"])
    np.testing.assert_array_equal(arrays["next_observations"][:, 1], arrays["handles"] + np.float32(1.25))


def test_removed_rows_are_left_out():
    buffer = filled(100)
    buffer.remove([0, 7, 99])
    arrays = buffer.export_arrays()
    assert arrays["handles"].tolist() == sorted(set(range(100)) - {0, 7, 99})
    np.testing.assert_array_equal(arrays["rewards"], arrays["handles"])


def test_a_row_that_a_later_lap_left_standing_comes_first():
    """Ticket 5 was given up, since the slot of ticket 1 was being written."""
    handles = np.asarray([4, 1, 2, 3])

    class Core:
        next_ticket, capacity = 6, 4

        def rows(self, first, n):
            found = handles[first : first + n]
            none = np.zeros(len(found), bool)
            return [found, found, found, found, found, found, none, none, found]

    schema = make_schema({name: ((), np.int64) for name in ("observations", "actions")})
    arrays = export._rows(Core(), schema)
    assert arrays["handles"].tolist() == arrays["rewards"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("capacity", [30, 200])
def test_rows_with_shared_successors_are_whole(capacity):
    shared, plain = (ReplayBuffer(capacity, SCHEMA, share_successors=share) for share in (True, False))
    for start in range(0, 60, 4):
        for buffer in (shared, plain):
            buffer.insert(*rows(np.arange(start, start + 4), [False] * 3 + [start % 8 == 0]), streams=np.arange(4) % 2)
    a, b = shared.export_arrays(), plain.export_arrays()
    kept = len(a["handles"])
    assert kept == len(shared) <= capacity
    for name in set(a) - {"handles"}:
        np.testing.assert_array_equal(a[name], b[name][len(b[name]) - kept :], name)


def test_priorities_come_out_and_go_in():
    source = filled(50)
    source.update_priorities(np.arange(0, 50, 2), np.linspace(0, 5, 25))
    target = PrioritizedReplayBuffer(128, SCHEMA)
    assert source.export_arrays()["priorities"][:4].tolist() == [0, 1, np.float32(5 / 24), 1]
    target.insert_arrays(source.export_arrays())
    np.testing.assert_array_equal(target.export_arrays()["priorities"], source.export_arrays()["priorities"])
    np.testing.assert_array_equal(target._core.weights(), source._core.weights())


def test_priorities_decide_the_draws():
    arrays = filled(50).export_arrays()
    arrays["priorities"] = np.where(np.arange(50) == 7, 1.0, 0.0)
    target = PrioritizedReplayBuffer(64, SCHEMA, priority_epsilon=0.0)
    target.insert_arrays(arrays)
    assert set(target.sample(100).handles.tolist()) == {7}
    uniform = ReplayBuffer(64, SCHEMA)
    uniform.insert_arrays(arrays)
    assert len(set(uniform.sample(100).handles.tolist())) == 50


def test_only_the_needed_arrays_are_needed():
    arrays = filled(5).export_arrays()
    for name in ("truncated", "streams", "handles"):
        del arrays[name]
    target = ReplayBuffer(8, SCHEMA)
    target.insert_arrays({**arrays, "observations": torch.from_numpy(arrays["observations"])})
    assert not target.export_arrays()["truncated"].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": None}, ValueError, "lack 'rewards'"),
        ({"terminated": None}, ValueError, "lack 'terminated'"),
        ({"next_observations": None}, ValueError, "lack 'next_observations'"),
        ({"dones": np.zeros(5)}, ValueError, "hold 'dones'"),
        ({"rewards": np.zeros(4, np.float32)}, ValueError, r"\['rewards'\] has the shape \(4,\)"),
        ({"handles": np.zeros(4, np.int64)}, ValueError, r"\['handles'\] has the shape \(4,\)"),
        ({"rewards": np.float32(3)}, ValueError, r"\['rewards'\] has the shape \(\)"),
        ({"actions": np.zeros((5, 3), np.float32)}, ValueError, "actions has the shape"),
        ({"rewards": np.full(5, np.nan)}, ValueError, r"rewards\[0\]"),
        ({"priorities": np.asarray([0, 1.0, -1, 2, -1])}, ValueError, r"priorities\[2\] is -1"),
        ({"priorities": np.asarray([0, np.nan, 1, 1, 1])}, ValueError, r"priorities\[1\] is -?nan"),
        ({"priorities": np.zeros((5, 1))}, ValueError, "priorities has the shape"),
        ({"streams": np.full(5, 70_000)}, ValueError, r"streams\[0\] is 70000"),
        ({"terminated": np.zeros(5)}, TypeError, "terminated has the dtype"),
    ],
)
def test_arrays_that_do_not_fit_change_nothing(change, error, message):
    arrays = {**filled(5).export_arrays(), **change}
    target = PrioritizedReplayBuffer(8, SCHEMA)
    with pytest.raises(error, match=message):
        target.insert_arrays({name: array for name, array in arrays.items() if array is not None})
    assert len(target) == 0


def test_more_rows_than_the_capacity_are_refused():
    with pytest.raises(ValueError, match="capacity is 8"):
        ReplayBuffer(8, SCHEMA).insert_arrays(filled(50).export_arrays())


def test_a_call_beside_an_export_is_an_error(monkeypatch):
    buffer = filled()
    original = export._rows

    def beside(core, schema):
        buffer.insert(*rows([1]))
        return original(core, schema)

    monkeypatch.setattr(export, "_rows", beside)
    with pytest.raises(RuntimeError, match="export_arrays: another call"):
        buffer.export_arrays()


def test_files_that_are_no_npz_are_refused_by_name(tmp_path):
    target = filled(5)
    path = tmp_path / "rows.npz"
    with pytest.raises(ReplayFileError, match=r"rows\.npz: no such file"):
        target.insert_npz(path)
    with pytest.raises(ReplayFileError, match="no such file"):
        target.insert_npz(tmp_path)
    target.save_npz(path)
    good = path.read_bytes()
    cases = [good[:-1], good[: len(good) // 2], b"", b"text", good.replace(b"\x93NUMPY", b"\x93NUMPX", 1)]
    places = (good.index(b"\x93NUMPY") + 130, good.index(b"PK\x01\x02") + 8)  # a number; the mark of encryption
    cases += [good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :] for place in places]
    for content in cases:
        path.write_bytes(content)
        with pytest.raises(ReplayFileError, match=r"rows\.npz is no npz file"):
            target.insert_npz(path)
    np.save(path.with_suffix(".npy"), np.zeros(3))
    with pytest.raises(ReplayFileError, match="one array and no names"):
        target.insert_npz(path.with_suffix(".npy"))
    np.savez(path, observations=np.asarray([{"a": 1}], object))
    with pytest.raises(ReplayFileError, match=r"rows\.npz is no npz file of plain arrays"):
        target.insert_npz(path)
    assert len(target) == 5


def test_a_failed_save_leaves_the_old_npz(tmp_path, monkeypatch):
    path = tmp_path / "rows.npz"
    filled(5).save_npz(path)
    good = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        filled(7).save_npz(path)
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["rows.npz"]
    with pytest.raises(ReplayFileError, match="is a folder"):
        filled(5).save_npz(tmp_path)


def test_rows_of_weight_zero_are_exported():
    buffer = PrioritizedReplayBuffer(8, SCHEMA, priority_epsilon=0.0)
    handles = buffer.insert(*rows([1.0, 2.0, 3.0]))
    buffer.update_priorities(handles[:1], np.zeros(1))
    buffer.remove(handles[1:2])
    arrays = buffer.export_arrays()
    assert arrays["handles"].tolist() == [handles[0], handles[2]]
    assert arrays["priorities"][0] == 0.0

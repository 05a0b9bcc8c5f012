"""Checkpoints: what goes in comes out, what is damaged is refused, a crash leaves the old or the new one."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from angle_rl import checkpoint
from angle_rl.checkpoint import CheckpointError, find, load, load_state, remove, save


def example():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    tensors = {
        "policy.weight": base,
        "view": base[1:3],  # shares memory with the one above
        "transposed": base.T,
        "rows": np.arange(7, dtype=np.uint8),
        "handles": np.arange(5),
        "flags": torch.tensor([True, False, True]),
        "step": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "words": np.array([2**64 - 1, 0], np.uint64),
        "double": torch.randn(3, dtype=torch.float64, generator=generator),
    }
    state = {
        "steps": 12,
        "key": 2**64 - 1,
        "rate": 1e-7,
        "bad": [math.nan, math.inf, -math.inf],
        "note": "ü\n",
    }
    return tensors, state


def same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor, right[name]), name


def test_what_goes_in_comes_out(tmp_path):
    tensors, state = example()
    path = save(tmp_path / "deep" / "one", tensors, state)
    loaded, read = load(path)
    same(tensors, loaded)
    assert repr(read) == repr(state)  # NaN included
    assert repr(load_state(path)) == repr(state)
    assert sorted(os.listdir(path)) == ["state.json", "tensors.safetensors"]
    assert os.listdir(path.parent) == ["one"]


def test_any_reader_of_the_formats_opens_it(tmp_path):
    tensors, state = example()
    path = save(tmp_path / "one", tensors, state)
    same(tensors, load_file(path / "tensors.safetensors"))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    body = json.loads((path / "state.json").read_text(), parse_constant=refuse)
    assert body["format"] == "angle-rl-checkpoint"
    assert body["version"] == 1
    assert body["tensors"]["rows"] == ["U8", [7]]


def test_read_only_foreign_order_and_reversed_arrays(tmp_path):
    frozen = np.arange(4, dtype=np.float32)
    frozen.flags.writeable = False
    tensors = {"frozen": frozen, "big": np.arange(4, dtype=">i4"), "back": np.arange(4)[::-1]}
    loaded, _ = load(save(tmp_path / "one", tensors, {}))
    assert loaded["frozen"].tolist() == loaded["big"].tolist() == [0, 1, 2, 3]
    assert loaded["back"].tolist() == [3, 2, 1, 0]


def test_no_tensors_at_all(tmp_path):
    assert load(save(tmp_path / "one", {}, {"a": None})) == ({}, {"a": None})


def test_loaded_tensors_are_private_and_outlive_the_folder(tmp_path):
    path = save(tmp_path / "one", {"a": torch.arange(10_000.0)}, {})
    loaded, _ = load(path)
    loaded["a"][0] = 5.0
    assert load(path)[0]["a"][0] == 0.0
    shutil.rmtree(path)
    assert loaded["a"].double().sum() == 5.0 + 9_999 * 5_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_any_state_survives(tmp_path_factory, state):
    path = save(tmp_path_factory.mktemp("state") / "one", {}, state)
    assert repr(load(path)[1]) == repr(state)


@pytest.mark.parametrize(
    ("tensors", "state", "match"),
    [
        ({}, {"a": {"b": [1, object()]}}, r"state\['a'\]\['b'\]\[1\] is a object"),
        ({}, {"a": {3: 1}}, r"state\['a'\] has the key 3"),
        ({}, {"a": {"$float": 1}}, r"\$float"),
        ({}, {"a": torch.zeros(2)}, r"state\['a'\] is a Tensor"),
        ({"a": [1.0]}, {}, r"tensors\['a'\] is a list"),
        ({"a": np.array(["x"])}, {}, r"tensors\['a'\] has dtype"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, {}, r"tensors\['a'\] is torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, {}, r"tensors\['a'\]"),
        ({3: torch.eye(2)}, {}, "named 3"),
        ({"__metadata__": torch.eye(2)}, {}, "__metadata__"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_changes(tmp_path, tensors, state, match):
    save(tmp_path / "one", {"a": torch.ones(2)}, {"old": True})
    with pytest.raises(TypeError, match=match):
        save(tmp_path / "one", tensors, state)
    assert load(tmp_path / "one")[1] == {"old": True}
    assert os.listdir(tmp_path) == ["one"]


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path, file):
    tensors, state = example()
    path = save(tmp_path / "one", tensors, state)
    whole = (path / file).read_bytes()
    cuts = [0, 1, 7, 8, 9, *range(10, len(whole), max(1, len(whole) // 60)), len(whole) - 1]
    for cut in cuts:
        (path / file).write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=file):
            load(path)
    (path / file).write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=file):
        load(path)
    (path / file).unlink()
    with pytest.raises(CheckpointError):
        load(path)


def test_every_flipped_bit_of_the_tensors_is_refused(tmp_path):
    path = save(tmp_path / "one", {"a": torch.arange(6.0), "b": torch.tensor([True])}, {})
    file = path / "tensors.safetensors"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tensors\.safetensors"):
            load(path)


def test_no_flipped_bit_of_the_state_changes_what_is_read(tmp_path):
    state = {"steps": 1000, "rate": 1e-7, "name": "a\u00e9", "nan": math.nan, "on": True}
    path = save(tmp_path / "one", {"a": torch.arange(3)}, state)
    file = path / "state.json"
    whole = file.read_bytes()
    refused = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            read = load_state(path)
        except CheckpointError:
            refused += 1
        else:  # another spelling of the same JSON: 1E-07, \u00E9
            assert repr(read) == repr(state)
    assert refused > 0.99 * 8 * len(whole)


def test_foreign_folders_are_refused_and_left_alone(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no checkpoint here"):
        load(tmp_path / "nowhere")
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("words")
    with pytest.raises(CheckpointError, match="thesis: no checkpoint here"):
        load(folder)
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
        save(folder, {}, {})
    assert (folder / "chapter.txt").read_text() == "words"
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
        save(tmp_path / "file", {}, {})
    for text in ("[]", "{}", '{"format": "other"}', "\x80PICKLE", "[" * 100_000):
        (folder / "state.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"state\.json"):
            load(folder)


def test_a_newer_version_says_so(tmp_path):
    path = save(tmp_path / "one", {}, {})
    body = json.loads((path / "state.json").read_text())
    body["version"] = 2
    body["library_version"] = "9.8.7"
    (path / "state.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=r"version 2, written by angle-rl 9\.8\.7"):
        load(path)


def test_tensors_of_another_checkpoint_are_refused(tmp_path):
    one = save(tmp_path / "one", {"a": torch.zeros(3)}, {})
    two = save(tmp_path / "two", {"a": torch.ones(3)}, {})
    shutil.copy(one / "tensors.safetensors", two / "tensors.safetensors")
    with pytest.raises(CheckpointError, match=r"two/tensors\.safetensors"):
        load(two)


class Crash(BaseException):
    pass


def crash_at(monkeypatch, number):
    """Raise Crash in place of the ``number``-th call that touches the disk for good."""
    calls = iter(range(1, 1_000))

    def wrap(function):
        def called(*arguments, **options):
            if next(calls) == number:
                raise Crash
            return function(*arguments, **options)

        return called

    monkeypatch.setattr(checkpoint.os, "fsync", wrap(os.fsync))
    monkeypatch.setattr(checkpoint.os, "replace", wrap(os.replace))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", wrap(shutil.rmtree))


def test_a_crash_at_any_call_leaves_the_old_or_the_new_one_whole(tmp_path, monkeypatch):
    outcomes = []
    for number in range(1, 20):
        path = tmp_path / str(number) / "one"
        save(path, {"a": torch.zeros(1000)}, {"which": "old"})
        with monkeypatch.context() as patch:
            crash_at(patch, number)
            try:
                save(path, {"a": torch.ones(1000)}, {"which": "new"})
                crashed = False
            except Crash:
                crashed = True
        tensors, state = load(path)
        assert tensors["a"].sum() == {"old": 0, "new": 1000}[state["which"]]
        outcomes.append((crashed, state["which"]))
        save(path, {"a": torch.full((1000,), 2.0)}, {"which": "next"})  # and one can go on
        assert load(path)[1] == {"which": "next"}
        if not crashed:
            break
    assert outcomes[-1] == (False, "new")
    assert {which for crashed, which in outcomes if crashed} == {"old", "new"}
    assert len(outcomes) >= 7


def test_a_first_save_that_crashes_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_at(patch, 1)
        with pytest.raises(Crash):
            save(tmp_path / "one", {}, {})
    assert find(tmp_path / "one") is None


def test_a_replacement_killed_between_its_renames_is_found(tmp_path):
    path = save(tmp_path / "one", {}, {"which": "old"})
    os.replace(path, tmp_path / ".one.previous")  # where a power cut would leave it
    (tmp_path / ".one.new-1-abcd").mkdir()
    assert load(path)[1] == {"which": "old"}
    save(path, {}, {"which": "next"})
    assert os.listdir(tmp_path) == ["one"]
    remove(path)
    assert find(path) is None
    assert os.listdir(tmp_path) == []
    remove(path)

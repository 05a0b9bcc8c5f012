"""Buffers saved and loaded: everything comes back, or the file is refused by name."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_rows import SCHEMA, filled, rows

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer, ReplayFileError, files

KINDS = pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
NESTED = gym.spaces.Dict(
    camera=gym.spaces.Box(0, 255, (4, 5), np.uint8),
    joints=gym.spaces.Tuple((gym.spaces.Box(-1, 1, (2,), np.float64), gym.spaces.Discrete(3))),
)


def overfull(**options):
    """A buffer of 128 rows, which took 200."""
    buffer = filled(**options)
    buffer.insert(*rows(np.arange(100, 200)))
    return buffer


def tensors_of(batch):
    """All tensors of a batch, nested ones too."""
    left = list(batch)
    while left:
        item = left.pop()
        if isinstance(item, torch.Tensor):
            yield item
        else:
            left += item.values() if isinstance(item, dict) else item


def assert_same_future(a, b, batches=1000, insert=None):
    """The two buffers draw, take and answer the same, with inserts and updates in between."""
    assert a.stats() == b.stats()
    rng = np.random.default_rng(1)
    for step in range(batches):
        x, y = a.sample(32), b.sample(32)
        assert all(torch.equal(p, q) for p, q in zip(tensors_of(x), tensors_of(y), strict=True)), step
        if isinstance(a, PrioritizedReplayBuffer):
            errors = rng.exponential(size=32)
            assert a.update_priorities(x.handles, errors) == b.update_priorities(y.handles, errors)
        if insert is not None and step % 3 == 0:
            value = rng.integers(0, 1000)
            assert insert(a, value).tolist() == insert(b, value).tolist()
    assert a.stats() == b.stats()
    assert np.array_equal(a._core.weights(), b._core.weights())
    if isinstance(a, PrioritizedReplayBuffer):
        assert a._core.sums_are_exact()
        assert b._core.sums_are_exact()


def insert_some(buffer, value):
    n = int(value) % 5
    return buffer.insert(*rows(np.arange(n) + value, np.arange(n) % 3 == 1), np.arange(n) % 3 == 2, np.arange(n) * 7)


@KINDS
@pytest.mark.parametrize("count", [1, 50, 64, 200])
@pytest.mark.parametrize("stratified", [True, False])
def test_the_next_batches_are_the_same(tmp_path, kind, count, stratified):
    source = kind(64, SCHEMA, seed=2**64 - 1, stratified=stratified, discount=0.8)
    for value in range(0, count, 7):
        n = min(7, count - value)
        handles = source.insert(*rows(np.arange(value, value + n)), streams=np.arange(n) * 9000)
        if kind is PrioritizedReplayBuffer:
            source.update_priorities(handles, np.full(n, 0.5 + value))
        source.sample(5)
    assert source.save(tmp_path / "a.replay") == tmp_path / "a.replay"
    loaded = kind.load(tmp_path / "a.replay")
    assert type(loaded) is kind
    assert (loaded.schema, loaded.discount, loaded.stratified) == (source.schema, 0.8, stratified)
    assert loaded._core.default_weight() == source._core.default_weight()
    assert_same_future(source, loaded, insert=insert_some)


@KINDS
def test_an_empty_buffer_comes_back_empty(tmp_path, kind):
    source = kind(10, SCHEMA, seed=3)
    source.save(tmp_path / "a")
    loaded = kind.load(str(tmp_path / "a"))
    assert len(loaded) == 0
    with pytest.raises(ValueError, match="empty"):
        loaded.sample(1)
    for buffer in (source, loaded):
        buffer.insert(*rows(np.arange(4)))
    assert_same_future(source, loaded, 10, insert_some)


def test_nested_spaces_and_arguments_come_back(tmp_path):
    source = PrioritizedReplayBuffer(
        9,
        observation_space=NESTED,
        action_space=gym.spaces.Discrete(4),
    )

    def insert(buffer, value):
        observation = {"camera": np.full((4, 5), value % 256, np.uint8), "joints": (np.zeros(2) + value, value % 3)}
        return buffer.insert(observation, value % 4, float(value), observation, value % 5 == 0)

    for value in range(20):
        insert(source, value)
    source.save(tmp_path / "a")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "a")
    assert loaded.schema == source.schema
    assert_same_future(source, loaded, 100, insert)


def test_a_second_generation_equals_the_first(tmp_path):
    overfull().save(tmp_path / "a")
    PrioritizedReplayBuffer.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_schedule_is_set_anew(tmp_path):
    source = filled(importance_exponent=lambda inserted: 0.5)
    source.save(tmp_path / "a")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "a")
    with pytest.raises(ValueError, match="importance_exponent is a schedule"):
        loaded.sample(3)
    loaded.save(tmp_path / "b")
    again = PrioritizedReplayBuffer.load(tmp_path / "b")
    again.importance_exponent = 0.5
    assert_same_future(source, again, 10, insert_some)


def test_every_argument_comes_back_as_it_is_now(tmp_path):
    source = PrioritizedReplayBuffer(
        64,
        SCHEMA,
        priority_exponent=0.3,
        importance_exponent=0.9,
        priority_epsilon=0.25,
        default_priority="historic_maximum",
        importance_bound="buffer",
        n_step=2,
        discount=0.5,
        stratified=False,
        replacement=False,
        share_successors=True,
        seed=11,
    )
    source.priority_exponent, source.importance_exponent, source.n_step, source.discount = 0.7, 0.1, 3, 0.9
    source.insert(*rows(np.arange(40)))
    source.update_priorities([3, 4], [9.0, 1.0])
    source.remove([5])
    source.save(tmp_path / "a")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "a")
    assert loaded._options() == source._options()
    assert loaded._options()["priority_exponent"] == 0.7
    assert loaded._options()["n_step"] == 3
    assert_same_future(source, loaded, 100, insert_some)
    with pytest.raises(ValueError, match="draw fewer"):
        loaded.sample(65)


def test_numbers_of_numpy_as_options_come_back(tmp_path):
    source = PrioritizedReplayBuffer(
        np.int64(64),
        SCHEMA,
        seed=np.uint64(2**63),
        priority_epsilon=np.float32(0.1),
        default_priority=np.float64(2),
        importance_exponent=np.float32(0.3),
        discount=np.float32(0.5),
        n_step=np.int32(2),
    )
    source.insert(*rows(np.arange(40)))
    source.save(tmp_path / "a")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "a")
    assert loaded._options() == source._options()
    assert_same_future(source, loaded, 20, insert_some)


def test_shared_successors_and_stacks_come_back(tmp_path):
    images = {"observations": ((4, 6, 5), np.uint8), "actions": ((), np.int64)}
    source = ReplayBuffer(50, images, frame_stack=4, n_step=3, seed=4)

    def episode(buffer, length):
        length = int(length) % 12 + 1
        frames = np.arange(length + 4, dtype=np.uint8)[:, None, None] + np.zeros((6, 5), np.uint8)
        stacks = np.stack([frames[[max(0, i - 3 + k) for k in range(4)]] for i in range(length + 1)])
        ends = np.arange(length) == length - 1
        return buffer.insert(stacks[:-1], np.arange(length), np.arange(length) * 1.0, stacks[1:], ends)

    for length in range(20):
        episode(source, length)
    source.save(tmp_path / "a")
    loaded = ReplayBuffer.load(tmp_path / "a")
    assert len(loaded) == len(source) < 50
    assert_same_future(source, loaded, 200, episode)
    there, here = source.export_arrays(), loaded.export_arrays()
    assert all(np.array_equal(there[name], here[name]) for name in there)


@pytest.mark.parametrize("where", [{"shared": True}, {"shared": "name"}, {"backing": "file"}])
def test_into_other_memory_and_out_of_it(tmp_path, where):
    if where.get("shared") == "name":
        where = {"shared": f"angle-test-{os.getpid()}"}
    if "backing" in where:
        where = {"backing": tmp_path / "memory"}
    source = overfull()
    source.save(tmp_path / "a")
    with PrioritizedReplayBuffer.load(tmp_path / "a", **where) as loaded:
        loaded.save(tmp_path / "b")
        if isinstance(where.get("shared"), str):
            attached = PrioritizedReplayBuffer.attach(where["shared"])
            assert len(attached) == 128
            attached.close()
        private = PrioritizedReplayBuffer.load(tmp_path / "b")
        assert_same_future(loaded, private, 20, insert_some)
        if "backing" in where:
            with pytest.raises(OSError, match="memory"):
                PrioritizedReplayBuffer.load(tmp_path / "a", **where)
    good = (tmp_path / "a").read_bytes()
    (tmp_path / "c").write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    if "backing" in where:
        where["backing"].unlink()
    for _ in range(2):  # nothing is left behind of a refused one
        with pytest.raises(ReplayFileError, match="damaged"):
            PrioritizedReplayBuffer.load(tmp_path / "c", **where)
    if isinstance(where.get("shared"), str):
        with pytest.raises(FileNotFoundError):
            PrioritizedReplayBuffer.attach(where["shared"])
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_a_closed_buffer_is_not_saved(tmp_path):
    buffer = filled()
    buffer.close()
    with pytest.raises(ValueError, match="closed"):
        buffer.save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


# ---- refusals ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved buffer's bytes, and a path to put others at."""
    path = tmp_path_factory.mktemp("saved") / "a.replay"
    source = overfull()
    source.update_priorities(np.arange(100, 150), np.linspace(0, 3, 50))
    source.save(path)
    return path.read_bytes(), path.with_name("damaged.replay")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_or_a_cut_is_refused(saved, data):
    good, path = saved
    size = len(good)
    regions = [(0, 64), (0, 4095), (4096, size - 1), (size - 9000, size - 65), (size - 64, size - 1)]
    offset = data.draw(st.one_of([st.integers(*region) for region in regions]))
    if data.draw(st.booleans(), "cut"):
        damaged = bytearray(good[:offset])
    else:
        damaged = bytearray(good)
        damaged[offset] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    with pytest.raises(ReplayFileError, match=r"damaged\.replay"):
        PrioritizedReplayBuffer.load(path)


def altered(path, change, header=None):
    """The file again, with other facts and another header, all checksums right."""
    manifest = files.read_manifest(path)
    parts = {name: np.empty(part.bytes, np.uint8) for name, part in manifest.parts.items()}
    files.read_into(path, manifest, parts)
    change(manifest.facts)
    if header is not None:
        header(parts["header"])
    other = path.with_name("altered.replay")
    files.write(other, manifest.facts, parts)
    return other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(byte_order="other"), "byte_order is 'other'"),
        (lambda f: f.pop("schema"), "schema"),
        (lambda f: f.update(schema={}), "schema must be an object"),
        (lambda f: f["schema"]["actions"].update(shape=[3]), "schema hash|records"),
        (lambda f: f["schema"]["actions"].update(shape=[-1]), "at least 1"),
        (lambda f: f["schema"]["actions"].update(dtype="O"), "dtype object"),
        (lambda f: f["schema"]["actions"].update(dtype="nonsense"), "nonsense"),
        (lambda f: f.update(slots=99), "part 'records'"),
        (lambda f: f.update(slots=1000), "slots is 1000"),
        (lambda f: f.update(slots="100"), "slots is '100'"),
        (lambda f: f["options"].update(capacity=99), "slots is 100"),
        (lambda f: f["options"].update(capacity=1024), "index"),
        (lambda f: f["options"].update(capacity=127), "capacity is 128, this buffer's is 127"),
        (lambda f: f["options"].update(capacity=0), "capacity is 0"),
        (lambda f: f["options"].update(discount=7), "discount is 7"),
        (lambda f: f["options"].update(device="nowhere"), "nowhere"),
        (lambda f: f["options"].update(share_successors=True), "schema hash|records|part"),
        (lambda f: f["options"].update(shared="name"), r"options \['shared'\] are unknown"),
        (lambda f: f["options"].pop("stratified"), "stratified"),
        (lambda f: f.update(options=[1]), "does not fit"),
        (lambda f: f.pop("options"), "options"),
    ],
)
def test_facts_that_do_not_fit_are_refused(tmp_path, change, message):
    filled().save(tmp_path / "a.replay")
    with pytest.raises(ReplayFileError, match=rf"altered\.replay.*({message})"):
        PrioritizedReplayBuffer.load(altered(tmp_path / "a.replay", change))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 1, "magic number is"),
        (8, 1, "format version is 1"),
        (128, 127, "has 128 records; its tickets say 127"),
        (512, 1 << 40, "highest bucket is 1099511627776"),
    ],
)
def test_a_header_that_is_no_state_is_refused(tmp_path, place, value, message):
    overfull().save(tmp_path / "a.replay")

    def header(part):
        part.view(np.uint64)[place // 8] = value

    with pytest.raises(ReplayFileError, match=rf"altered\.replay.*{message}"):
        PrioritizedReplayBuffer.load(altered(tmp_path / "a.replay", lambda facts: None, header))


def test_another_kind_of_buffer_is_refused(tmp_path):
    filled().save(tmp_path / "a")
    with pytest.raises(ReplayFileError, match="its kind is 'prioritized', not 'uniform'"):
        ReplayBuffer.load(tmp_path / "a")
    ReplayBuffer(4, SCHEMA).save(tmp_path / "b")
    with pytest.raises(ReplayFileError, match="its kind is 'uniform', not 'prioritized'"):
        PrioritizedReplayBuffer.load(tmp_path / "b")


def test_a_state_is_taken_only_where_it_fits():
    source, target = overfull(), PrioritizedReplayBuffer(128, SCHEMA)
    saved = {name: part.copy() for name, part in source._core.parts().items()}
    with pytest.raises(ValueError, match="slots is 129"):
        target._core.parts(129)
    with pytest.raises(ValueError, match="header has 8 bytes"):
        target._core.adopt(saved["header"][:8], 128)
    with pytest.raises(ValueError, match="has 127 records; its tickets say 128"):
        target._core.adopt(saved["header"], 127)
    target.insert(*rows(np.arange(3)))  # nothing was taken
    assert target.sample(8).handles.max() < 3
    assert target._core.sums_are_exact()
    for name, part in target._core.parts(128).items():
        part[:] = saved[name] if name != "header" else part
    target._core.adopt(saved["header"], 128)
    assert_same_future(source, target, 10, insert_some)


# ---- while others write ----


@pytest.mark.parametrize("call", ["insert", "sample", "update"])
@pytest.mark.parametrize("there", [False, True])
def test_a_call_beside_a_save_is_an_error_and_leaves_no_file(tmp_path, monkeypatch, call, there):
    buffer = filled()
    path = tmp_path / "a.replay"
    if there:
        buffer.save(path)
    before = path.read_bytes() if there else None
    calls = {
        "insert": lambda: buffer.insert(*rows([1])),
        "sample": lambda: buffer.sample(1),
        "update": lambda: buffer.update_priorities([1], [2.0]),
    }
    write_all = files._write_all

    def interrupted(file, data):
        write_all(file, data)
        calls[call]()

    monkeypatch.setattr(files, "_write_all", interrupted)
    with pytest.raises(RuntimeError, match="another call changed the buffer meanwhile"):
        buffer.save(path)
    assert os.listdir(tmp_path) == (["a.replay"] if there else [])
    assert before is None or path.read_bytes() == before


KILLED = """
import os, sys, time
import numpy as np
from angle_rl.replay import PrioritizedReplayBuffer

buffer = PrioritizedReplayBuffer.load(sys.argv[1])
width = buffer.schema.observations[0].shape[0]
for _ in range(3):
    some = np.ones((50, width), np.float32)
    buffer.insert(some, some[:, :2].copy(), some[:, 0].copy(), some, np.zeros(50, bool))

def wait(descriptor):
    print("all written, not renamed", flush=True)
    time.sleep(600)

os.fsync = wait
buffer.save(sys.argv[1])
"""


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.replay"
    source = filled()
    source.save(path)
    good = path.read_bytes()
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "all written, not renamed\n"
        assert len(os.listdir(tmp_path)) == 2
        source.save(path)  # a second writer leaves the first one's file alone
        assert len(os.listdir(tmp_path)) == 2
        writer.send_signal(signal.SIGKILL)
    assert path.read_bytes() == good
    assert len(os.listdir(tmp_path)) == 2
    assert_same_future(source, PrioritizedReplayBuffer.load(path), 3)
    source.save(path)
    assert os.listdir(tmp_path) == ["a.replay"]


# ---- memory ----

MEMORY = """
import sys
import numpy as np
from angle_rl.replay import PrioritizedReplayBuffer

def highest():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

start = highest()
buffer = PrioritizedReplayBuffer(200_000, {"observations": ((120,), np.float32), "actions": ((6,), np.float32)})
some = np.ones((1000, 120), np.float32)
for _ in range(200):
    buffer.insert(some, some[:, :6].copy(), some[:, 0].copy(), some, np.zeros(1000, bool))
filled = highest()
assert filled - start > 0.9 * buffer.nbytes, (filled - start, buffer.nbytes)
assert buffer.nbytes > 200e6
buffer.save(sys.argv[1])
saved = highest()
del buffer
loaded = PrioritizedReplayBuffer.load(sys.argv[1])
assert len(loaded) == 200_000
print(saved - filled, highest() - saved)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see the highest memory use")
def test_neither_saving_nor_loading_takes_memory(tmp_path):
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    saving, loading = map(int, done.stdout.split())
    assert saving < 20e6  # of 200e6
    assert loading < 20e6
    assert all(word not in done.stderr for word in itertools.chain(["Error", "Warning"]))


def test_a_buffer_with_a_dead_writers_slot_is_mended_before_it_is_saved(tmp_path):
    buffer = filled()
    header = buffer._core.parts()["header"].view(np.uint64)
    header[np.flatnonzero(header == buffer._core.next_ticket)[0]] += 1  # as if a writer had taken a ticket and died
    with pytest.raises(RuntimeError, match="after repair"):
        buffer.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    buffer.repair()
    buffer.save(tmp_path / "a")
    assert len(PrioritizedReplayBuffer.load(tmp_path / "a")) == len(buffer)

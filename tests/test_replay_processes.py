"""One buffer in several processes: how it gets there, who sees what, what is refused, and what stays behind."""

from __future__ import annotations

import contextlib
import copy
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import replay_children
import torch
from replay_rows import SCHEMA, rows, values_of

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared buffers need Linux")

numbers = itertools.count()
PREFIX = f"angle-test-{os.getpid()}"


def segments() -> set[str]:
    """What lies in /dev/shm, without multiprocessing's own semaphores."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("sem.mp-", "torch_"))}


@pytest.fixture(autouse=True)
def nothing_is_left():
    """After each test /dev/shm is as before, and as many descriptors are open."""
    before, descriptors = segments(), len(os.listdir("/proc/self/fd"))
    yield
    assert segments() <= before
    end = time.monotonic() + 30
    while (left := len(os.listdir("/proc/self/fd"))) > descriptors + 2:  # multiprocessing keeps a socket for passing on
        assert time.monotonic() < end, f"{left} descriptors are open, {descriptors} were"
        time.sleep(0.01)  # its thread closes what it has passed on a little later


@pytest.fixture
def name():
    """A name of its own."""
    return f"{PREFIX}.{next(numbers)}"


@pytest.fixture(params=["shared", "named", "file"])
def place(request, name, tmp_path):
    """Arguments of a constructor for each kind of memory that processes share."""
    return {"shared": {"shared": True}, "named": {"shared": name}, "file": {"path": tmp_path / "replay"}}[request.param]


# How it gets there ----------


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_every_kind_passes_to_a_process_and_through_a_queue(method, name, tmp_path):
    context = multiprocessing.get_context(method)
    kinds = [{"shared": True}, {"shared": name}, {"path": tmp_path / "replay"}]
    buffers = [PrioritizedReplayBuffer(64, SCHEMA, **kind) for kind in kinds]
    queue = context.Queue()
    child = context.Process(target=replay_children.insert_into, args=(buffers, queue, 100))
    child.start()
    for buffer in buffers:
        queue.put(buffer)
    child.join(120)
    assert child.exitcode == 0
    queue.close()
    queue.join_thread()
    for buffer in buffers:
        assert len(buffer) == 10
        assert set(values_of(buffer.sample(300))) == set(range(100, 110))
        assert buffer.audit() == []
        buffer.close()


def test_a_pipe_gives_a_buffer_with_the_same_memory_and_options(place):
    options = {"discount": 0.9, "priority_exponent": 0.5, "importance_exponent": 0.7, "seed": 5}
    buffer = PrioritizedReplayBuffer(64, SCHEMA, **options, **place)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send(buffer)
        other = theirs.recv()
    assert type(other) is PrioritizedReplayBuffer
    assert (other.capacity, other.nbytes, other.discount) == (64, buffer.nbytes, 0.9)
    handles = buffer.insert(*rows(np.arange(20)))
    assert other.update_priorities(handles, np.arange(20.0)) == 0
    batch = buffer.sample(500)
    assert values_of(batch).min() >= 1  # the row of priority 1e-6 hardly ever
    expected = (batch.rewards.double() + 1e-6) ** (-0.5 * 0.7)
    torch.testing.assert_close(batch.importance_weights.double(), expected / expected.max(), rtol=1e-4, atol=0)
    other.close()
    buffer.close()


def test_another_program_attaches_by_name_alone(name, run_python):
    space = gym.spaces.Dict({"b": gym.spaces.Box(-1, 1, (2,)), "a": gym.spaces.Tuple((gym.spaces.Discrete(3),) * 2)})
    buffer = PrioritizedReplayBuffer(
        64, observation_space=space, action_space=gym.spaces.Discrete(4), discount=0.5, shared=name
    )
    row = {"b": np.ones(2, np.float32), "a": (1, 2)}
    buffer.insert(row, 3, 1.5, row, False)
    script = f"""
import numpy as np
from angle_rl.replay import PrioritizedReplayBuffer
buffer = PrioritizedReplayBuffer.attach({name!r})
batch = buffer.sample(3)
assert set(batch.observations) == {{"a", "b"}}, batch.observations
assert batch.observations["a"][1].tolist() == [2, 2, 2]
assert batch.discounts.tolist() == [0.5] * 3
handles = buffer.insert({{"b": np.zeros(2, np.float32), "a": (0, 0)}}, 1, 7.0,
                        {{"b": np.zeros(2, np.float32), "a": (0, 0)}}, True)
buffer.update_priorities(handles, [100.0])
"""
    run_python(script)
    assert name in segments()  # whoever attached takes nothing away when it ends
    assert len(buffer) == 2
    batch = buffer.sample(100)
    assert (batch.rewards == 7).sum() > 60
    assert batch.observations["a"][0].dtype == torch.int64
    buffer.close()
    assert name not in segments()


def test_a_uniform_buffer_is_shared_as_well(name):
    buffer = ReplayBuffer(64, SCHEMA, shared=name)
    other = ReplayBuffer.attach(name)
    other.insert(*rows(np.arange(10)))
    assert set(values_of(buffer.sample(300))) == set(range(10))
    assert buffer.audit() == []
    buffer.close()


def test_a_subclass_passes_as_itself():
    buffer = replay_children.OwnBuffer(64, SCHEMA, shared=True)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send(buffer)
        other = theirs.recv()
    assert type(other) is replay_children.OwnBuffer


def test_a_name_passes_through_any_pickle(name):
    buffer = PrioritizedReplayBuffer(64, SCHEMA, shared=name)
    other = pickle.loads(pickle.dumps(buffer))
    other.insert(*rows(np.arange(3)))
    assert len(buffer) == 3
    buffer.close()


def test_a_schedule_stays_in_its_process(name):
    buffer = PrioritizedReplayBuffer(64, SCHEMA, importance_exponent=0.3, shared=name)
    buffer.insert(*rows(np.arange(5)))
    buffer.importance_exponent = lambda inserted: 0.2  # which no pickle takes
    others = [pickle.loads(pickle.dumps(buffer)), PrioritizedReplayBuffer.attach(name)]
    with pytest.raises(ValueError, match="importance_exponent is a schedule"):
        others[0].sample(4)
    again = pickle.loads(pickle.dumps(others[0]))
    with pytest.raises(ValueError, match="importance_exponent is a schedule"):
        again.sample(4)
    assert others[1].importance_exponent == 0.3  # its maker's at first
    assert len(others[0].sample(4, importance_exponent=0.5).rewards) == 4
    others[0].importance_exponent = 0.1
    assert len(others[0].sample(4).rewards) == 4
    buffer.close()


def test_a_file_is_reopened_with_everything_in_it(tmp_path, run_python):
    path = tmp_path / "replay"
    buffer = PrioritizedReplayBuffer(64, SCHEMA, path=path, seed=3)
    handles = buffer.insert(*rows(np.arange(100)[:60]))
    buffer.update_priorities(handles, np.arange(60.0))
    buffer.close()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError, match="replay"):
        PrioritizedReplayBuffer(64, SCHEMA, path=path)
    printed = run_python(f"""
from angle_rl.replay import PrioritizedReplayBuffer
buffer = PrioritizedReplayBuffer.attach(path={str(path)!r})
print(len(buffer), buffer.audit(), buffer.sample(8).rewards.tolist())
""")
    assert printed.startswith("60 [] ")
    again = PrioritizedReplayBuffer.attach(path=path)
    assert len(again) == 60
    assert values_of(again.sample(64)).mean() > 29  # by the priorities that were saved
    again.insert(*rows(np.arange(10)))
    again.close()
    assert len(PrioritizedReplayBuffer.attach(path=path)) == 64


# Several at once ----------


def test_two_processes_insert_while_one_samples_and_updates(place):
    buffer = PrioritizedReplayBuffer(500, SCHEMA, **place)
    buffer.insert(*rows(np.arange(500)))
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=replay_children.insert_many, args=(buffer, 1000, 300, 32)),
        context.Process(target=replay_children.insert_many, args=(buffer, 50_000, 300, 32)),
        context.Process(target=replay_children.sample_and_update, args=(buffer, 1000, 0)),
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert buffer.audit() == []
    assert buffer.stats()["inserts"] == 500 + 2 * 300 * 32
    left = values_of(buffer.sample(5000))
    assert ((left >= 1000) & (left < 1000 + 300 * 32) | (left >= 50_000) & (left < 50_000 + 300 * 32)).all()
    buffer.close()


# Pickles and copies that are refused ----------


def test_a_private_buffer_stays_in_its_process():
    buffer = PrioritizedReplayBuffer(64, SCHEMA)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        for send in (pickle.dumps, ours.send):
            with pytest.raises(TypeError, match="shared=True"):
                send(buffer)
    buffer.close()


def test_memory_without_a_name_passes_through_multiprocessing_only():
    buffer = PrioritizedReplayBuffer(64, SCHEMA, shared=True)
    with pytest.raises(TypeError, match="multiprocessing only"):
        pickle.dumps(buffer)


@pytest.mark.parametrize("shared", [None, True])
def test_buffers_are_not_copied(shared):
    buffer = ReplayBuffer(64, SCHEMA, shared=shared)
    for function in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not copied"):
            function(buffer)


# The end ----------


def test_close_takes_the_name_and_leaves_the_others_their_memory(name):
    buffer = PrioritizedReplayBuffer(64, SCHEMA, shared=name)
    other, third = PrioritizedReplayBuffer.attach(name), PrioritizedReplayBuffer.attach(name)
    third.close()
    assert name in segments()
    buffer.close()
    assert name not in segments()
    buffer.close()  # again does nothing
    other.insert(*rows(np.arange(5)))
    assert set(values_of(other.sample(100))) == set(range(5))
    with pytest.raises(FileNotFoundError, match=name):
        PrioritizedReplayBuffer.attach(name)
    with PrioritizedReplayBuffer(64, SCHEMA, shared=name) as anew:  # and the name is free
        assert len(anew) == 0
    assert name not in segments()


def test_a_closed_buffer_refuses_everything(place):
    buffer = PrioritizedReplayBuffer(64, SCHEMA, **place)
    handles = buffer.insert(*rows(np.arange(5)))
    batch = buffer.sample(4)
    buffer.close()
    calls = [
        lambda: buffer.insert(*rows(np.arange(5))),
        lambda: buffer.insert(*map(torch.as_tensor, rows(np.arange(5)))),
        lambda: buffer.sample(4),
        lambda: buffer.sample(4, out=batch),
        lambda: buffer.update_priorities(handles, np.ones(5)),
        lambda: len(buffer),
        lambda: buffer.capacity,
        lambda: buffer.nbytes,
        buffer.stats,
        buffer.audit,
        buffer.repair,
        buffer.export_state,
        lambda: pickle.dumps(buffer),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_name_goes_with_the_last_reference(name):
    buffer = PrioritizedReplayBuffer(64, SCHEMA, shared=name)
    assert name in segments()
    del buffer
    assert name not in segments()


@pytest.mark.parametrize(("end", "status"), [("", 0), ("raise ValueError('on purpose')", 1), ("sys.exit(3)", 3)])
def test_a_name_goes_with_its_creator(name, end, status):
    script = f"""
import os, sys
from angle_rl.replay import ReplayBuffer
buffer = ReplayBuffer(16, [("observations", 3, "f4"), ("actions", 2, "f4")], shared={name!r})
assert os.path.exists("/dev/shm/{name}")
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300, check=False)
    assert done.returncode == status, done.stderr
    assert name not in segments()


def test_forked_children_leave_the_name_to_its_creator(name):
    buffer = PrioritizedReplayBuffer(64, SCHEMA, shared=name)
    child = os.fork()
    if child == 0:
        try:
            buffer.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert name in segments()
    child = multiprocessing.get_context("fork").Process(target=len, args=(buffer,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert name in segments()
    buffer.close()


def test_forked_children_that_end_like_any_program_leave_the_name_as_well(name, run_python):
    run_python(f"""
import os, sys
from angle_rl.replay import ReplayBuffer
buffer = ReplayBuffer(16, [("observations", 3, "f4"), ("actions", 2, "f4")], shared={name!r})
for end in range(3):
    child = os.fork()
    if child == 0:
        if end == 0:
            del buffer
        sys.exit(0 if end < 2 else "on purpose")
    os.waitpid(child, 0)
    assert os.path.exists("/dev/shm/{name}"), end
""")
    assert name not in segments()


def test_what_a_killed_maker_left_is_taken_away_by_name(name):
    script = f"""
import os, signal
from angle_rl.replay import ReplayBuffer
buffer = ReplayBuffer(16, [("observations", 3, "f4"), ("actions", 2, "f4")], shared={name!r})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert name in segments()
    with pytest.raises(FileExistsError, match=name):
        ReplayBuffer(16, SCHEMA, shared=name)
    buffer = ReplayBuffer.attach(name)
    assert ReplayBuffer.unlink(name)
    assert name not in segments()
    assert not ReplayBuffer.unlink(name)
    buffer.insert(*rows(np.arange(3)))  # whoever has it keeps it
    assert len(buffer) == 3
    with pytest.raises(TypeError, match="name is 3"):
        ReplayBuffer.unlink(3)
    with pytest.raises(ValueError, match="'a/b'"):
        ReplayBuffer.unlink("a/b")


def test_a_maker_leaves_alone_what_another_made_under_its_name(name):
    first = PrioritizedReplayBuffer(64, SCHEMA, shared=name)
    assert PrioritizedReplayBuffer.unlink(name)
    second = PrioritizedReplayBuffer(64, SCHEMA, shared=name)
    first.close()
    assert name in segments()
    second.close()
    assert name not in segments()


def test_a_child_takes_away_what_it_made(name):
    arguments = (PrioritizedReplayBuffer, SCHEMA, name)
    child = multiprocessing.get_context("fork").Process(target=replay_children.create_named, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert name not in segments()


# What is refused ----------


def test_arguments_that_do_not_fit(name, tmp_path):
    refused = [
        (ValueError, "one place", lambda: ReplayBuffer(8, SCHEMA, shared=True, path=tmp_path / "a")),
        (ValueError, "one place", lambda: ReplayBuffer(8, SCHEMA, shared=name, path=tmp_path / "a")),
        (TypeError, "shared is 3", lambda: ReplayBuffer(8, SCHEMA, shared=3)),
        (TypeError, "path is 3", lambda: ReplayBuffer(8, SCHEMA, path=3)),
        (ValueError, "exactly one", lambda: ReplayBuffer.attach()),
        (ValueError, "exactly one", lambda: ReplayBuffer.attach(name, path=tmp_path / "a")),
        (TypeError, "name is 3", lambda: ReplayBuffer.attach(3)),
        (ValueError, "'a/b'", lambda: ReplayBuffer(8, SCHEMA, shared="a/b")),
        (ValueError, "0 characters", lambda: ReplayBuffer(8, SCHEMA, shared="")),
        (ValueError, "201 characters", lambda: ReplayBuffer.attach("a" * 201)),
        (FileNotFoundError, name, lambda: ReplayBuffer.attach(name)),
        (FileNotFoundError, "missing", lambda: ReplayBuffer.attach(path=tmp_path / "missing")),
        (FileNotFoundError, "missing", lambda: ReplayBuffer(8, SCHEMA, path=tmp_path / "missing" / "replay")),
    ]
    for error, match, call in refused:
        with pytest.raises(error, match=match):
            call()


def test_a_name_is_not_taken_twice(name):
    buffer = ReplayBuffer(64, SCHEMA, shared=name)
    buffer.insert(*rows(np.arange(3)))
    with pytest.raises(FileExistsError, match=name):
        ReplayBuffer(64, SCHEMA, shared=name)
    assert len(ReplayBuffer.attach(name)) == 3  # as it was
    buffer.close()


def damaged(content: bytes, damage: str) -> bytes:
    if damage == "empty":
        return b""
    if damage == "foreign":
        return bytes(range(256)) * (len(content) // 256)
    if damage == "truncated":
        return content[: len(content) // 2]
    if damage == "cut in its header":
        return content[:40]
    if damage == "magic":
        return b"\0" + content[1:]
    assert damage == "version"
    version = int.from_bytes(content[8:12], sys.byteorder)
    return content[:8] + (version + 1).to_bytes(4, sys.byteorder) + content[12:]


@pytest.mark.parametrize("damage", ["empty", "foreign", "truncated", "cut in its header", "magic", "version"])
def test_what_is_no_whole_buffer_of_this_version_is_refused(damage, name, tmp_path):
    path = tmp_path / "replay"
    ReplayBuffer(64, SCHEMA, path=path).close()
    content = damaged(path.read_bytes(), damage)
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match="version" if damage == "version" else "replay"):
        ReplayBuffer.attach(path=path)
    with open(f"/dev/shm/{name}", "wb") as file:
        file.write(content)
    try:
        with pytest.raises((ValueError, OSError), match="version" if damage == "version" else name):
            ReplayBuffer.attach(name)
        assert name in segments()  # refused, not removed
    finally:
        os.unlink(f"/dev/shm/{name}")


def test_a_buffer_of_the_other_kind_is_refused(name):
    with (
        contextlib.closing(PrioritizedReplayBuffer(64, SCHEMA, shared=name)),
        pytest.raises(ValueError, match=r"PrioritizedReplayBuffer\.attach"),
    ):
        ReplayBuffer.attach(name)


def test_nobody_else_may_look(name):
    old = os.umask(0)
    try:
        buffer = ReplayBuffer(64, SCHEMA, shared=name)
    finally:
        os.umask(old)
    assert os.stat(f"/dev/shm/{name}").st_mode & 0o777 == 0o600
    if os.geteuid() == 0:
        os.chown(f"/dev/shm/{name}", 12345, -1)
        with pytest.raises(PermissionError, match="12345"):
            ReplayBuffer.attach(name)
    buffer.close()


def test_descriptors_are_not_inherited_by_programs(place):
    with PrioritizedReplayBuffer(64, SCHEMA, **place) as buffer:
        assert not os.get_inheritable(buffer._descriptor())


def test_a_full_device_is_an_error_and_leaves_nothing(name, tmp_path, run_python):
    """The device is made full by a limit on the size of files, which counts for every kind."""
    run_python(f"""
import os, resource, pathlib
from angle_rl.replay import ReplayBuffer
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
schema = [("observations", 3, "f4"), ("actions", 2, "f4")]
before = len(os.listdir("/proc/self/fd"))
for place in ({{"shared": True}}, {{"shared": {name!r}}}, {{"path": {str(tmp_path / "replay")!r}}}):
    try:
        ReplayBuffer(2**16, schema, **place)
    except OSError as error:
        assert "cannot reserve" in str(error), error
    else:
        raise AssertionError(f"{{place}} was not refused")
assert not os.path.exists("/dev/shm/{name}")
assert not os.path.exists({str(tmp_path / "replay")!r})
assert len(os.listdir("/proc/self/fd")) == before
""")


def test_more_than_there_is_is_refused(name, tmp_path):
    for place in ({"shared": True}, {"shared": name}, {"path": tmp_path / "replay"}):
        with pytest.raises((MemoryError, OSError), match=r"bytes|GiB"):
            ReplayBuffer(2**36, SCHEMA, **place)
    assert not (tmp_path / "replay").exists()


@pytest.mark.parametrize(("sharing", "row_bytes"), [(False, 2 * 4 * 84 * 84), (True, 84 * 84)])
def test_memory_is_asked_for_by_what_rows_take(sharing, row_bytes, monkeypatch):
    """Successors that are shared and the frames of a stack are kept once, so far more rows fit."""
    schema = {"observations": ((4, 84, 84), np.uint8), "actions": ((), np.int64)}
    monkeypatch.setattr("angle_rl.replay.arrays.available_memory", lambda: 1000 * (row_bytes + 200))
    for shared in (None, True):
        buffer = ReplayBuffer(1000, schema, share_successors=sharing, shared=shared)
        assert buffer.nbytes > 1000 * row_bytes
        buffer.close()
        with pytest.raises(MemoryError, match="1100 rows"):
            ReplayBuffer(1100, schema, share_successors=sharing, shared=shared)

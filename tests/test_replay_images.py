"""Images: shared successors and stacks of frames give back what was inserted, byte for byte, in a fraction of it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from reference.frames import StackedEnvironment
from reference.n_step import History, Row

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer

pytestmark = pytest.mark.usefixtures("replay_place")

KINDS = [ReplayBuffer, PrioritizedReplayBuffer]
SHAPE = (5, 6)


def schema(*shape, dtype="u1") -> dict:
    return {"observations": (shape, dtype), "actions": ((), "i4")}


def key(observation) -> bytes:
    return np.ascontiguousarray(observation).tobytes()


class Recorder:
    """Steps environments into buffers and keeps the history of the first."""

    def __init__(self, environments, buffers, seed=0, breaks_show=True) -> None:
        self.environments, self.buffers, self.random = environments, buffers, np.random.default_rng(seed)
        self.history, self.time = History(breaks_show), 0
        self.actions: dict[int, int] = {}

    def step(self, end: float = 0.1, broken: float = 0.0) -> None:
        """One row of every environment in one call, as a vector environment gives them."""
        pairs = [environment.step() for environment in self.environments]
        n = len(pairs)
        chance = self.random.random(n)
        terminated, truncated = chance < end / 2, (chance > end / 4) & (chance < end)
        actions = np.arange(self.time, self.time + n, dtype=np.int32)
        arguments = (
            np.stack([before for before, _ in pairs]),
            actions,
            actions.astype(np.float32) % 32,
            np.stack([after for _, after in pairs]),
            terminated,
            truncated,
            np.arange(n),
        )
        self.time += n
        every = [buffer.insert(*arguments) for buffer in self.buffers]
        handles = every[0]
        for i, (before, after) in enumerate(pairs):
            row = Row(i, key(before), key(after), float(actions[i] % 32), bool(terminated[i]), bool(truncated[i]))
            self.history.add(int(handles[i]), row)
            self.actions[int(handles[i])] = int(actions[i])
            if row.ended or self.random.random() < broken:
                self.environments[i].reset()

    def check(self, batch, n_step=1, discount=0.99) -> None:
        for i, handle in enumerate(batch.handles.tolist()):
            expected = self.history.window(handle, n_step, discount)
            assert key(batch.observations[i]) == self.history.rows[handle].observation
            assert key(batch.next_observations[i]) == expected.successor
            assert int(batch.actions[i]) == self.actions[handle]
            assert int(batch.steps[i]) == expected.steps
            assert float(batch.rewards[i]) == pytest.approx(expected.reward, rel=1e-6)
            assert float(batch.discounts[i]) == pytest.approx(expected.discount, rel=1e-6)


def contents(batch) -> set[tuple]:
    """Rows as values, whatever their handles."""
    return {tuple(key(part[i]) for part in (*batch[:5], batch.steps)) for i in range(len(batch.handles))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_step", [1, 4])
def test_every_way_of_keeping_stacks_gives_the_same_rows(kind, n_step):
    options = [
        {"share_successors": False},
        {"share_successors": True, "frame_stack": 1},
        {"frame_stack": 4},
        {},
    ]
    buffers = [kind(2000, schema(4, *SHAPE), n_step=n_step, seed=3, **each) for each in options]
    assert [buffer._core.stack for buffer in buffers] == [1, 1, 4, 4]
    recorder = Recorder([StackedEnvironment(4, SHAPE, seed) for seed in range(3)], buffers)
    for _ in range(100):
        recorder.step()
    batches = [buffer.sample(300, replacement=False) for buffer in buffers]
    assert [len(buffer) for buffer in buffers] == [300] * 4
    first = contents(batches[0])
    assert len(first) == 300
    assert all(contents(batch) == first for batch in batches[1:])
    recorder.check(batches[0], n_step)
    for buffer in buffers:
        out = buffer.sample(64)
        again = buffer.sample(64, out=out)
        assert again is out
        assert contents(out) <= first
        assert buffer.audit() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stack", "shape", "options"),
    [
        (1, (*SHAPE, 3), {}),  # colour images, either way round
        (1, (3, *SHAPE), {}),
        (3, SHAPE, {"frame_stack": 3}),
        (2, SHAPE, {}),
        (4, (2, 3, 4), {"frame_stack": 4}),
        (4, SHAPE, {}),
    ],
)
@pytest.mark.parametrize("capacity", [2, 7, 40])
def test_rows_stay_right_on_a_small_ring(kind, stack, shape, options, capacity):
    whole = (stack, *shape) if stack > 1 else shape
    buffer = kind(capacity, schema(*whole), **options)
    assert buffer._core.stack == stack
    # Few shades: frames repeat within episodes, and episodes begin as others ended.
    recorder = Recorder([StackedEnvironment(stack, shape, seed, shades=3) for seed in range(2)], [buffer], capacity)
    drawn = 0
    for turn in range(120):
        recorder.step(end=0.15, broken=0.1)
        try:
            batch = buffer.sample(16, n_step=1 + turn % 5)
        except ValueError as error:
            if "positive weight" not in str(error):
                raise
            continue  # nothing but observations and rows whose frames are gone
        drawn += 1
        recorder.check(batch, 1 + turn % 5)
    assert drawn > 60 or capacity == 2
    assert buffer.audit() == []
    assert buffer._core.sums_are_exact()


def test_an_atari_row_costs_one_frame():
    frame = 84 * 84
    capacity = 1000
    nbytes = {}
    for name, options in {"kept": {"share_successors": False}, "shared": {"frame_stack": 1}, "frames": {}}.items():
        buffer = ReplayBuffer(capacity, schema(4, 84, 84), **options)
        nbytes[name] = (buffer.nbytes - ReplayBuffer(1, schema(4, 1, 1), share_successors=False).nbytes) / capacity
    assert 8 * frame < nbytes["kept"] < 8 * frame + 128
    assert 4 * frame < nbytes["shared"] < 4 * frame + 128
    assert frame < nbytes["frames"] < frame + 128


def test_an_environment_that_breaks_off_without_a_flag_ends_the_window():
    buffer = ReplayBuffer(64, schema(4, *SHAPE), n_step=3, discount=1.0)
    recorder = Recorder([StackedEnvironment(4, SHAPE, 1)], [buffer])
    for turn in range(12):
        recorder.step(end=0.0)
        if turn == 4:
            recorder.environments[0].reset()
    batch = buffer.sample(12, replacement=False)
    recorder.check(batch, 3, 1.0)
    order = batch.handles.argsort()
    assert batch.steps[order].tolist() == [3, 3, 3, 2, 1, 3, 3, 3, 3, 3, 2, 1]
    assert (batch.discounts == 1).all()


def test_stacks_that_do_not_continue_are_kept_whole():
    """Newest frame first, or every row a stack of its own: more records, the same rows."""
    random = np.random.default_rng(0)
    for made in (lambda: random.integers(0, 256, (21, 4, *SHAPE), np.uint8), lambda: newest_first(random)):
        stacks = made()
        buffer = ReplayBuffer(400, schema(4, *SHAPE))
        buffer.insert(stacks[:-1], np.arange(20), np.arange(20.0), stacks[1:], np.zeros(20, bool))
        batch = buffer.sample(20, replacement=False)
        time = batch.rewards.long().numpy()
        np.testing.assert_array_equal(batch.observations, stacks[time])
        np.testing.assert_array_equal(batch.next_observations, stacks[time + 1])
        assert buffer.stats()["held"] > 20
        assert buffer.audit() == []


def newest_first(random) -> np.ndarray:
    frames = random.integers(0, 256, (24, *SHAPE), np.uint8)
    return np.stack([frames[time + 3 : (time - 1 if time else None) : -1] for time in range(21)])


def test_an_image_beside_a_vector():
    part = {"camera": ((4, *SHAPE), "u1"), "joints": ((3,), "f4")}
    buffer = PrioritizedReplayBuffer(50, {"observations": part, "actions": ((), "i4")})
    assert buffer._core.stack == 4
    environment, seen = StackedEnvironment(4, SHAPE, 2, shades=4), {}
    for time in range(130):
        before, after = environment.step()
        ended = time % 11 == 10
        now, then = np.full(3, time, np.float32), np.full(3, time + 0.5 if ended else time + 1, np.float32)
        observation, successor = {"camera": before, "joints": now}, {"camera": after, "joints": then}
        buffer.insert(observation, time, float(time), successor, ended)
        seen[time] = (observation, successor)
        if ended:
            environment.reset()
    batch = buffer.sample(200)
    for i, time in enumerate(batch.actions.tolist()):
        for name in part:
            np.testing.assert_array_equal(batch.observations[name][i], seen[time][0][name])
            np.testing.assert_array_equal(batch.next_observations[name][i], seen[time][1][name])
    assert len(set(batch.actions.tolist())) > 20


def test_the_same_camera_beside_another_vector_is_no_continuation():
    part = {"camera": (SHAPE, "u1"), "joints": ((1,), "f4")}
    buffer = ReplayBuffer(20, {"observations": part, "actions": ((), "i4")}, n_step=2)
    camera = np.zeros((3, *SHAPE), np.uint8)
    first = {"camera": camera, "joints": np.asarray([[0.0], [1.0], [2.5]])}
    then = {"camera": camera, "joints": np.asarray([[1.0], [2.0], [3.0]])}
    buffer.insert(first, np.arange(3), np.ones(3), then, np.zeros(3, bool))
    batch = buffer.sample(3, replacement=False)
    order = batch.handles.argsort()
    assert batch.steps[order].tolist() == [2, 1, 1]
    assert batch.next_observations["joints"][order][:, 0].tolist() == [2.0, 2.0, 3.0]


def test_floats_share_and_stack_on_request():
    buffer = ReplayBuffer(64, schema(4, 2, 3, dtype="f4"), frame_stack=4)
    assert buffer._core.stack == 4
    frames = np.random.default_rng(0).normal(size=(14, 2, 3)).astype(np.float32)
    stacks = np.stack([frames[time : time + 4] for time in range(11)])
    buffer.insert(stacks[:-1], np.arange(10), np.arange(10.0), stacks[1:], np.zeros(10, bool))
    batch = buffer.sample(10, replacement=False)
    np.testing.assert_array_equal(batch.observations, stacks[batch.actions.numpy()])
    np.testing.assert_array_equal(batch.next_observations, stacks[batch.actions.numpy() + 1])


def test_what_is_a_stack_is_guessed_only_where_it_is_sure():
    for shape, stack in {(1, 8, 8): 1, (3, 8, 8): 1, (8, 8, 3): 1, (8, 8): 1, (2, 8, 8): 2, (4, 8, 8): 4}.items():
        assert ReplayBuffer(8, schema(*shape))._core.stack == stack, shape
    assert ReplayBuffer(8, schema(4, 8, 8, dtype="f4"))._core.stack == 1
    two = {"left": ((4, 8, 8), "u1"), "right": ((2, 8, 8), "u1")}
    assert ReplayBuffer(8, {"observations": two, "actions": ((), "i4")})._core.stack == 1
    both = {"left": ((4, 8, 8), "u1"), "right": ((4, 6, 6), "u1")}
    assert ReplayBuffer(8, {"observations": both, "actions": ((), "i4")})._core.stack == 4


def test_observations_alone_count_as_held_and_not_as_rows():
    buffer = ReplayBuffer(100, schema(*SHAPE))
    recorder = Recorder([StackedEnvironment(1, SHAPE, seed) for seed in range(4)], [buffer])
    for _ in range(10):
        recorder.step(end=0.0)
    assert len(buffer) == 40
    assert buffer.stats()["held"] == 4
    assert buffer.stats()["inserts"] == 40
    assert len(buffer.sample(40, replacement=False).handles.unique()) == 40
    for _ in range(100):
        recorder.step(end=0.2)
        assert len(buffer) <= buffer.capacity
    assert len(buffer) == len(buffer.sample(len(buffer), replacement=False).handles)


@pytest.mark.usefixtures("on_cpu")
def test_stacks_are_whole_while_two_threads_insert():
    """A frame is its number in every pixel; of a stack, only the first frames of an episode repeat."""
    life, stack = 7, 4
    buffer = PrioritizedReplayBuffer(96, schema(stack, 3, 4))
    assert buffer._core.stack == stack
    problems: list[str] = []
    stop = threading.Event()

    def observed(stream, time):  # frames are numbered 0 ... life within an episode
        numbers = [stream * 100 + max(time - back, 0) for back in reversed(range(stack))]
        return np.stack([np.full((3, 4), number, np.uint8) for number in numbers])

    def insert(stream):
        try:
            for turn in range(1500):
                time = turn % life
                arguments = (observed(stream, time), stream * 100 + time, 1.0, observed(stream, time + 1))
                buffer.insert(*arguments, time == life - 1, False, stream)
        except Exception as error:
            problems.append(repr(error))

    def read():
        done = 0
        while not stop.is_set() or done == 0:
            try:
                batch = buffer.sample(32, n_step=1 + done % 9, discount=1.0)
            except ValueError:
                continue  # every row was being written
            done += 1
            buffer.update_priorities(batch.handles, torch.rand(32))
            for i, number in enumerate(batch.actions.tolist()):
                stream, time = divmod(number, 100)
                k = int(batch.steps[i])
                fits = (
                    (batch.observations[i].numpy() == observed(stream, time)).all()
                    and (batch.next_observations[i].numpy() == observed(stream, time + k)).all()
                    and float(batch.rewards[i]) == k
                    and float(batch.discounts[i]) == float(time + k < life)
                )
                if not fits:
                    problems.append(f"{number} and {k} steps")
                    return

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=insert, args=(stream,)) for stream in (0, 1)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert problems == []
    assert buffer.audit() == []

"""Environments whose tensors stay on a device: the same rows as from arrays, and nothing read but rewards and flags.

On a device if there is one, and everywhere under its kernels as compiled for the host.
"""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from engine_parts import small
from graph_parts import READING

from angle_rl import device, runs
from angle_rl.feed import FunctionFeed, HistoryFeed, NormalizedFeed, ResetsFeed, make_evaluation_feed, make_feed
from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer
from angle_rl.testing import check_feed
from angle_rl.trainer import AgentTrainer
from angle_rl.types import RandomKey

N = 5
PLACES = ["host kernels", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=PLACES, autouse=True)
def place(request):
    """The device that a test's tensors are on, as tensors know it."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not device.CUDA_KERNELS:
            pytest.skip("this build has no kernels for CUDA devices")
        yield device.memory_device("cuda")
        return
    with device.emulated():
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(runs.Run, "plot", lambda run: None)


def first(key):
    return (2 * key.uniform(4) - 1).float()


def glide(observation, action):
    """Of arrays or of tensors, in steps that are rounded the same way everywhere."""
    push = action.reshape(N if len(action) == N else 1, -1)[:, :1]
    observation = 0.5 * observation + 0.25 * push
    low = observation[:, 0] < -0.25
    return observation, -(observation[:, 0] ** 2), low, observation[:, 1] > 0.35


def steer(observation, action):
    """The same by whole numbers."""
    return glide(observation, action.float() if isinstance(action, torch.Tensor) else action.astype(np.float32))


def look(observation, action):
    """The same of nested observations."""
    eye, rest = observation["eye"], observation["rest"][0]
    observation, *others = glide(eye, action)
    return {"eye": observation, "rest": (rest + 1,)}, *others


def first_look(key):
    return {"eye": first(key), "rest": (np.zeros(2, np.float32),)}


BOX = gymnasium.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 2.0], np.float32))
FEW = gymnasium.spaces.Discrete(3, start=-1)
CASES = [
    ("sac", BOX, glide, first),
    ("sac", BOX, look, first_look),
    ("td3", BOX, glide, first),
    ("ddpg", BOX, glide, first),
    ("dqn", FEW, steer, first),
    ("sac_discrete", FEW, steer, first),
]


def feed_of(where, function=glide, initial=first, action_space=BOX, n=N):
    return make_feed(
        function,
        batched=True,
        num_environments=n,
        initial_observation=initial,
        action_space=action_space,
        step_limit=6,
        device=where,
    )


def trainer_of(folder, feed, place, *, steps=100, resident=True, **hyperparameters):
    config = small(folder, steps, **hyperparameters).replace(device=str(place), parallel_environments=N)
    kind = PrioritizedReplayBuffer if config.hyperparameters.replay == "prioritized" else ReplayBuffer
    replay = kind(
        1000,
        observation_space=feed.observation_space,
        action_space=feed.action_space,
        discount=config.hyperparameters.discount,
        device="cuda" if resident else "cpu",
    )
    return AgentTrainer(config, feed, replay=replay)


def assert_same_rows(one, other):
    own, theirs = one.replay.export_arrays(), other.replay.export_arrays()
    assert own.keys() == theirs.keys()
    assert len(own["handles"]) > 0
    for name, array in own.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("replay", ["prioritized", "uniform"])
@pytest.mark.parametrize(("agent", "actions", "function", "initial"), CASES)
def test_a_run_gives_the_rows_and_the_evaluation_of_one_with_arrays(
    agent, actions, function, initial, replay, place, tmp_path
):
    runs_of = []
    for where in (None, "cuda"):
        feed = feed_of(where, function, initial, actions)
        options = {"agent": agent, "replay": replay}
        trainer = trainer_of(tmp_path, feed, place, **options)
        runs_of.append((trainer, trainer.train()))
    (one, evaluation), (other, its) = runs_of
    assert one.updates == other.updates > 0
    assert_same_rows(one, other)
    assert evaluation == its
    rows = one.replay.export_arrays()
    assert set(rows["streams"].tolist()) == set(range(N))
    assert rows["terminated"].any()
    assert rows["truncated"].any()


def test_episodes_rest_where_they_have_ended(place, tmp_path):
    trainers = []
    for where in (None, "cuda"):
        trainers.append(trainer_of(tmp_path, feed_of(where), place))
        trainers[-1].train(num_episodes=4, max_iterations=5)
    assert_same_rows(*trainers)
    assert trainers[1].rl_state.environment_state.observation.device == place


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_replay_in_host_memory_gets_arrays(where, place, tmp_path):
    trainers = []
    for each in (None, where):
        trainers.append(trainer_of(tmp_path, feed_of(each), place, resident=False))
        insert = trainers[-1].replay.insert
        kinds = set()
        trainers[-1].replay.insert = lambda *rows, insert=insert, kinds=kinds, **more: (
            kinds.update(map(type, rows)),
            insert(*rows, **more),
        )
        trainers[-1].advance(60)
        assert kinds == {np.ndarray}
    assert_same_rows(*trainers)


def test_a_run_is_resumed(place, tmp_path):
    trainer = trainer_of(tmp_path, feed_of("cuda"), place)
    trainer.train()
    again = trainer_of(tmp_path, feed_of("cuda"), place, steps=200)
    again.load(trainer.run_folder)
    assert_same_rows(trainer, again)
    assert again.train() is not None
    assert again.steps >= 200


class Reads(torch.overrides.TorchFunctionMode):
    """Writes down which tensors on a device the host looks at: the function, the dtype and how many numbers."""

    def __init__(self, place):
        super().__init__()
        self.place = place
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        where = [*args[1:], *(kwargs or {}).values()] if name == "to" else []
        leaves = any(str(one) == "cpu" for one in where) and args[0].device.type == "cuda"
        if (name in READING or leaves) and args[0].device == self.place:
            self.seen.append((name, args[0].dtype, args[0].numel()))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("agent", "actions", "function", "initial"), CASES)
@pytest.mark.parametrize("acting", [False, True])
def test_the_host_reads_nothing_but_rewards_and_flags(agent, actions, function, initial, acting, place, tmp_path):
    starts = 1 if acting else 1000
    feed = feed_of("cuda", function, initial, actions)
    trainer = trainer_of(tmp_path, feed, place, steps=2000, agent=agent, learning_starts=starts)
    trainer.advance(2 * N, learn=False)
    reads = Reads(place)
    inserted = []
    insert = trainer.replay.insert
    trainer.replay.insert = lambda *rows, **more: inserted.append(rows) or insert(*rows, **more)
    with reads:
        trainer.advance(12 * N, learn=False)
    assert trainer.steps == 14 * N
    assert len(inserted) == 12
    assert [numel for name, dtype, numel in reads.seen if (name, dtype) == ("cpu", torch.float64)] == [3 * N] * 12
    chosen = [(name, numel) for name, dtype, numel in reads.seen if dtype == torch.int64]
    assert set(chosen) <= ({("cpu", N), ("numpy", N)} if agent == "dqn" else set())  # its choice is made on the host
    # Under the host kernels two more lie there, too: the orders of streams, and memory that arrays are collected in.
    assert {dtype for _, dtype, _ in reads.seen} <= {torch.float64, torch.int64, torch.int32, torch.uint8}
    assert {name for name, _, _ in reads.seen} <= {"cpu", "numpy"}
    for observations, taken, rewards, successors, *flags in inserted:
        leaves = [observations, successors] if function is not look else [observations["eye"], successors["rest"][0]]
        leaves += [] if agent == "dqn" else [taken]
        assert all(isinstance(leaf, torch.Tensor) and leaf.device == place for leaf in leaves)
        assert all(isinstance(number, np.ndarray) for number in (rewards, *flags))


# The feed ----------


@pytest.mark.parametrize("outputs", [2, 3, 4])
@pytest.mark.parametrize("takes_time", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_every_signature_of_a_function_of_tensors(outputs, takes_time, n, place):
    seen, own = [], torch.zeros(n, 2, device=place)

    def advance(observation, action, *time):
        seen.extend(time)
        assert observation.device == action.device == place
        assert action.dtype == torch.float32
        own.copy_(observation.add_(1))  # in place, and into memory that it keeps: it must have been given a copy
        action.zero_()
        count = own[:, 0]
        return (own, count * 10, count == 4, (count == 3).all())[:outputs]

    def two(observation, action):
        return advance(observation, action)

    def three(observation, action, time_step):
        return advance(observation, action, time_step)

    feed = make_feed(
        three if takes_time else two,
        num_environments=n,
        batched=True,
        initial_observation=torch.zeros(2, device=place),
        initial_action=0.0,
        step_limit=4,
        device="cuda",
    )
    state, key = feed.init(RandomKey(0))
    count = 0
    for _ in range(10):
        before, actions = state, torch.ones(n, device=place)
        seen.clear()
        state, key = feed.step(key, before, actions if count % 2 else np.ones(n, np.float32))
        assert before.observation.tolist() == [[count] * 2] * n
        assert actions.tolist() == [1.0] * n
        if takes_time:
            assert seen[0].dtype == torch.int64
            assert seen[0].device == place
            assert seen[0].tolist() == [count] * n
        count += 1
        assert state.final_observation.tolist() == [[count] * 2] * n
        assert state.reward.dtype == np.float64
        assert state.reward.tolist() == [count * 10] * n
        assert state.terminated.tolist() == [outputs >= 3 and count == 4] * n
        truncated = count == 4 or (outputs == 4 and count == 3)
        assert state.truncated.tolist() == [truncated] * n
        count = 0 if truncated else count
        assert state.observation.tolist() == [[count] * 2] * n
        assert state.observation.device == state.final_observation.device == place
    assert all(getattr(state, name).dtype == np.bool_ for name in ("terminated", "truncated", "stepped"))


@pytest.mark.parametrize("n", [1, N])
def test_first_observations_are_those_of_a_feed_of_arrays(n, place):
    """From a function of a key, on the device or not, in all rows and in those that ended."""
    arrays = feed_of(None, n=n)
    for initial in (first, lambda key: first(key).to(place), lambda key: first(key).numpy()):
        tensors = feed_of("cuda", initial=initial, n=n)
        (one, key), (other, same) = arrays.init(RandomKey(3)), tensors.init(RandomKey(3))
        for _ in range(20):
            assert key == same
            for name, left, right in zip(one._fields, one, other, strict=True):
                right = right.cpu().numpy() if isinstance(right, torch.Tensor) else right
                assert left.dtype == right.dtype, name
                np.testing.assert_array_equal(left, right, err_msg=name)
            actions = np.tile(np.float32([0.5, 1.0]), (n, 1))
            one, key = arrays.step(key, one, actions)
            other, same = tensors.step(same, other, torch.from_numpy(actions).to(place))


@pytest.mark.parametrize(("function", "initial"), [(glide, first), (look, first_look)])
def test_it_keeps_what_feeds_promise(function, initial, place):
    check_feed(feed_of("cuda", function, initial), steps=40)


def test_the_feed_to_evaluate_on_shows_tensors(place):
    feed = make_evaluation_feed(feed_of("cuda"))
    assert feed.num_environments == 1
    assert feed.device == place
    state, _ = feed.init(RandomKey(0))
    assert state.observation.device == place


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (lambda o, a: (o[:, :2], o[:, 0]), ValueError, r"observations has shape \[5, 2\]"),
        (lambda o, a: (o.to(torch.complex64), o[:, 0]), TypeError, "dtype torch.complex64"),
        (lambda o, a: (o, o[:2, 0]), ValueError, r"rewards has shape \[2\]"),
        (lambda o, a: (o, o[:, 0], o[:3, 0] > 0), ValueError, r"terminated has shape \[3\]"),
        (lambda o, a: o, TypeError, "function returned a Tensor"),
    ],
)
def test_functions_that_return_nonsense(result, error, match, place):
    feed = feed_of("cuda", result)
    state, key = feed.init(RandomKey(0))
    with pytest.raises(error, match=match):
        feed.step(key, state, torch.zeros(N, 2, device=place))


def test_refusals(place):
    with pytest.raises(ValueError, match="batched is False"):
        FunctionFeed(glide, initial_observation=first, initial_action=[0.0], device="cuda")
    with pytest.raises(ValueError, match="device is meta"):
        feed_of("meta")
    feed = feed_of("cuda")
    state, key = feed.init(RandomKey(0))
    with pytest.raises(ValueError, match=r"actions has shape \[5, 3\]"):
        feed.step(key, state, torch.zeros(N, 3, device=place))
    for wrap in (lambda feed: HistoryFeed(feed, 2), NormalizedFeed, ResetsFeed):
        with pytest.raises(ValueError, match=r"glide shows tensors on .*takes arrays"):
            wrap(feed)


# The replay ----------

SCHEMA = {
    "observations": {"eye": ((2, 2), "f4"), "joints": ((3,), "f8")},
    "actions": ((2,), "f4"),
    "rewards": ((), "f4"),
}


def some_rows(random, n):
    looks = [{"eye": random.normal(size=(n, 2, 2)).astype("f4"), "joints": random.normal(size=(n, 3))} for _ in "ab"]
    columns = [looks[0], random.normal(size=(n, 2)), random.normal(size=n), looks[1]]
    return [*columns, random.random(n) < 0.1, random.random(n) < 0.1, random.integers(0, 4, n)]


def there(value, place):
    if isinstance(value, dict):
        return {name: there(part, place) for name, part in value.items()}
    return torch.as_tensor(value).to(place)


@pytest.mark.parametrize("kept", [(0, 3), (0, 1, 3), (0,), (0, 2, 6), (0, 4, 5), (1,)])
def test_arrays_accompany_tensors(kept, place):
    random = np.random.default_rng(len(kept))
    host, on_device = PrioritizedReplayBuffer(100, SCHEMA), PrioritizedReplayBuffer(100, SCHEMA, device="cuda")
    for n in (1, 17, 60, 90):
        rows, graded = some_rows(random, n), random.exponential(size=n) * 10.0 ** random.integers(-50, 50, n)
        mixed = [there(row, place) if index in kept else row for index, row in enumerate(rows)]
        handles = on_device.insert(*mixed, priorities=graded)
        np.testing.assert_array_equal(handles, host.insert(*rows, priorities=graded))
    one = [{name: part[0] for name, part in row.items()} if isinstance(row, dict) else row[0] for row in rows]
    mixed = [there(row, place) if index in kept else row for index, row in enumerate(one)]
    on_device.insert(*mixed[:4], True, streams=3)
    host.insert(*one[:4], True, streams=3)
    own, theirs = host.export_arrays(), on_device.export_arrays()
    for name in ("rewards", "streams", "terminated", "truncated", "priorities", "handles", "actions"):
        np.testing.assert_array_equal(own[name], theirs[name], err_msg=name)
    one, other = host.sample(64, n_step=3), on_device.sample(64, n_step=3)
    assert torch.equal(one.observations["joints"], other.observations["joints"].cpu())
    assert torch.equal(one.next_observations["eye"], other.next_observations["eye"].cpu())
    assert on_device.audit() == []


@pytest.mark.parametrize(
    ("index", "change", "error", "match"),
    [
        (2, lambda value: np.where(np.arange(6) == 4, np.nan, value), ValueError, r"rewards\[4\] is nan"),
        (2, lambda value: value[:3], ValueError, r"rewards has the shape \(3,\)"),
        (2, lambda value: value.astype("c8"), TypeError, "rewards has the dtype complex64"),
        (4, lambda value: None, TypeError, "terminated is None"),
        (4, lambda value: value.astype("f4"), TypeError, "terminated has the dtype float32"),
        (6, lambda value: value - 9, ValueError, r"streams\[0\] is -"),
        (6, lambda value: -1, ValueError, r"streams has the shape \(\)"),
        (1, lambda value: np.zeros((6, 3)), ValueError, r"actions has the shape \(6, 3\)"),
    ],
)
def test_what_is_on_the_host_is_refused_at_once(index, change, error, match, place):
    random = np.random.default_rng(0)
    buffer = PrioritizedReplayBuffer(100, SCHEMA, device="cuda")
    rows = some_rows(random, 6)
    rows[0], rows[3] = there(rows[0], place), there(rows[3], place)
    with pytest.raises(error, match=match):
        buffer.insert(*rows[:index], change(rows[index]), *rows[index + 1 :])
    with pytest.raises(ValueError, match=r"priorities\[0\] is -1.0"):
        buffer.insert(*rows, priorities=np.full(6, -1.0))
    many = some_rows(random, 101)
    with pytest.raises(ValueError, match="capacity is 100"):
        buffer.insert(there(many[0], place), *many[1:])
    assert len(buffer) == 0
    buffer.insert(*rows)
    assert len(buffer) == 6
    buffer.insert(*rows[:2], torch.full((6,), torch.nan, device=place), *rows[3:])  # there: noted, and raised later
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    with pytest.raises(ValueError, match=r"rewards\[\d\] is nan"):
        buffer.sample(4)

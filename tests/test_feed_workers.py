"""Vector environments of which one raises or dies: named, and no process left. Each test has a time limit of its
own, as what goes wrong here is waiting for ever.
"""

import multiprocessing
import os
import signal

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from angle_rl.feed import GymnasiumFeed, VectorEnvironmentError, VectorFeed, make_evaluation_feed, make_feed
from angle_rl.types import RandomKey

LIMIT = 60  # seconds


@pytest.fixture(autouse=True)
def no_hang_and_no_process_left():
    def stop(*_):
        raise TimeoutError(f"not done after {LIMIT} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
        process.join()
    assert not left


class Needy(ValueError):
    """Cannot be made from a message alone."""

    def __init__(self, message, more):
        super().__init__(message)
        self.more = more


class Unlucky(gymnasium.Env):
    """Fails in its third step, as ``how`` says; writes down that it was closed."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, how=None, folder=None, index=0):
        self.how, self.folder, self.index = how, folder, index
        self.time = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.how == "raise in reset":
            raise RuntimeError("no first state")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        if self.time == 3:
            if self.how == "raise":
                raise RuntimeError("the simulator blew up")
            if self.how == "needy":
                raise Needy("too needy", 1)
            if self.how == "local":

                class Local(RuntimeError):
                    pass

                raise Local("nobody will hear this")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "exit":
                os._exit(3)
            if self.how == "interrupt":
                raise KeyboardInterrupt
        return np.zeros(2, np.float32), 1.0, False, False, {}

    def close(self):
        if self.folder is not None:
            (self.folder / f"closed {self.index}").touch()


def unlucky(kind, how, folder=None, n=3, bad=(1,), **options):
    functions = [lambda i=i: Unlucky(how if i in bad else None, folder, i) for i in range(n)]
    return kind(functions, **options)


def run(feed, steps=5):
    state, key = feed.init(RandomKey(0))
    for _ in range(steps):
        state, key = feed.step(key, state, np.zeros((feed.num_environments, 1), np.float32))


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_one_that_raises_is_named_and_the_others_closed(kind, owned, mode, tmp_path):
    environment = unlucky(kind, "raise", tmp_path, autoreset_mode=mode)
    for path in tmp_path.iterdir():  # of the one that was made for its spaces
        path.unlink()
    feed = VectorFeed(environment, owned=owned)
    with pytest.raises(
        VectorEnvironmentError, match=r"environment 1 of \w+ raised RuntimeError: the simulator blew up"
    ) as caught:
        run(feed)
    assert caught.value.index == 1
    assert environment.closed
    assert {path.name for path in tmp_path.iterdir()} == {"closed 0", "closed 1", "closed 2"}
    feed.close()
    environment.close()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill", r"environment 1 of \w+ died: its process was killed by SIGKILL"),
        ("exit", r"environment 1 of \w+ died: its process ended with exit code 3"),
        ("raise in reset", r"environment 1 of \w+ raised RuntimeError: no first state"),
        ("needy", r"environment 1 of \w+ raised an error that cannot be sent between processes"),
        ("interrupt", r"environment 1 of \w+ raised KeyboardInterrupt"),
    ],
)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_worker_that_fails_in_other_ways(how, message, shared_memory):
    environment = unlucky(AsyncVectorEnv, how, shared_memory=shared_memory)
    with pytest.raises(VectorEnvironmentError, match=message):
        run(make_feed(environment))
    assert environment.closed


def test_an_exception_that_cannot_be_pickled_does_not_hang(monkeypatch):
    monkeypatch.setattr("angle_rl.feed.workers._PATIENCE", 1.0)
    environment = unlucky(AsyncVectorEnv, "local")
    with pytest.raises(VectorEnvironmentError, match=r"environment 1 of \w+ raised an error that cannot be sent"):
        run(make_feed(environment))


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_several_at_once(kind):
    environment = gymnasium.wrappers.vector.RecordEpisodeStatistics(unlucky(kind, "raise", bad=(0, 2)))
    with pytest.raises(VectorEnvironmentError, match=r"environment [02] of \w+ raised") as caught:
        run(make_feed(environment))
    if kind is AsyncVectorEnv:
        assert f"(and so did {2 - caught.value.index})" in str(caught.value)


def test_one_killed_from_outside_between_steps():
    environment = unlucky(AsyncVectorEnv, None)
    feed = make_feed(environment)
    state, key = feed.init(RandomKey(0))
    os.kill(environment.processes[2].pid, signal.SIGKILL)
    with pytest.raises(VectorEnvironmentError, match=r"environment 2 of \w+ died: its process was killed by SIGKILL"):
        feed.step(key, state, np.zeros((3, 1), np.float32))


def test_one_that_hangs_on_closing_is_ended(monkeypatch):
    monkeypatch.setattr("angle_rl.feed.workers._PATIENCE", 0.5)

    class Stubborn(Unlucky):
        def close(self):
            if multiprocessing.parent_process() is not None:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.pause()

    feed = VectorFeed(AsyncVectorEnv([Stubborn, Stubborn]), owned=True)
    run(feed, 1)
    feed.close()


def test_closing_after_one_was_killed_unnoticed():
    environment = unlucky(AsyncVectorEnv, None)
    feed = VectorFeed(environment, owned=True)
    run(feed, 1)
    os.kill(environment.processes[0].pid, signal.SIGKILL)
    environment.processes[0].join()
    feed.close()
    assert environment.closed


def test_errors_that_are_no_environments_pass_through():
    class Whole(VectorEnv):
        num_envs = 2
        single_observation_space = Unlucky.observation_space
        single_action_space = Unlucky.action_space

        def __init__(self):
            self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

        def reset(self, *, seed=None, options=None):
            raise LookupError("all of it failed")

    with pytest.raises(LookupError, match="all of it failed"):
        make_feed(Whole()).init(RandomKey(0))
    environment = unlucky(AsyncVectorEnv, None)
    feed = make_feed(environment)
    run(feed, 1)
    environment.step_async(np.zeros((3, 1), np.float32))
    with pytest.raises(gymnasium.error.AlreadyPendingCallError):
        feed.init(RandomKey(0))
    assert not environment.closed
    environment.close(terminate=True)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("source", ["Pendulum-v1", Unlucky])
def test_make_feed_makes_vectors(source, vectorization):
    feed = make_feed(source, num_environments=2, vectorization=vectorization)
    assert isinstance(feed, VectorFeed)
    assert feed.name == ("Pendulum-v1" if source == "Pendulum-v1" else "Unlucky")
    run(feed, 205)
    state, _ = feed.init(RandomKey(3))
    again, _ = feed.init(RandomKey(3))
    assert np.array_equal(state.observation, again.observation)
    evaluation = make_evaluation_feed(feed)
    assert isinstance(evaluation, GymnasiumFeed)
    evaluation.close()
    feed.close()
    feed.close()


def test_workers_made_here_leave_the_interrupt_to_the_parent():
    before = signal.getsignal(signal.SIGINT)
    feed = make_feed(Unlucky, num_environments=2, vectorization="async")
    state, key = feed.init(RandomKey(0))
    for process in feed._environment.processes:
        os.kill(process.pid, signal.SIGINT)
    feed.step(key, state, np.zeros((2, 1), np.float32))
    feed.close()
    assert signal.getsignal(signal.SIGINT) is before


def test_vectorization_is_checked():
    with pytest.raises(ValueError, match="vectorization is 'threads'"):
        make_feed("Pendulum-v1", vectorization="threads")
    for source in (Unlucky(), make_feed(Unlucky), lambda o, a: (o, 0.0)):
        with pytest.raises(TypeError, match="vectorization is 'sync'; it applies to"):
            make_feed(source, vectorization="sync")
    with pytest.raises(TypeError, match="must make an Env"):
        make_feed(lambda: 3, vectorization="async")

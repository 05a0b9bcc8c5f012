"""Updates in a thread of their own: how many, with which keys, how far behind, and by which weights others act."""

from __future__ import annotations

import os
import signal
import threading
import time

import gymnasium
import numpy as np
import pytest
import torch
from engine_parts import assert_same, small, walk_feed
from gymnasium import spaces

from angle_rl import overlap, runs
from angle_rl.agents import DDPG, SAC, QLearning
from angle_rl.agents.state import LossNotFiniteError
from angle_rl.engines.native import usable_threads
from angle_rl.feed import FunctionFeed
from angle_rl.overlap import LearnerThread, Weights, tensors_of
from angle_rl.trainer import AgentTrainer


def trainer_of(folder, steps=120, *, overlap=True, feed=None, kind=None, training=None, **hyperparameters):
    config = small(folder, steps, **hyperparameters).replace(
        **{"engine": "torch", "learner_threads": 1} | (training or {})
    )
    feed = walk_feed() if feed is None else feed
    return AgentTrainer(config, feed, agent=kind and kind(config), overlap=overlap)


def watched(trainer):
    """The arguments of all updates that the trainer's engine takes, and the threads that it takes them in."""
    engine = trainer.rl_state.agent_state.engine
    update_many, calls, threads = engine.update_many, [], set()

    def watch(given):
        calls.extend(given)
        threads.add(threading.current_thread().name)
        return update_many(given)

    engine.update_many = watch
    return calls, threads


def tensors(trainer):
    exported = trainer.agent.export_state(trainer.rl_state.agent_state)[0]
    return {name: tensor.clone() for name, tensor in exported.items()}


def learner_threads():
    return [thread for thread in threading.enumerate() if thread.name == "angle-learner"]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(runs.Run, "plot", lambda run: None)


# How many, and which --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"updates_per_step": 0.5},
        {"updates_per_step": 4.0},
        {"updates_per_step": 2.5, "updates_per_call": 4},
        {"updates_per_call": 7, "learning_starts": 33},
        {"agent": "sac", "learning_rate_schedule": "linear"},
        {"agent": "td3", "updates_per_call": 50, "target_update_interval": 11},
    ],
)
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_the_updates_are_as_many_and_have_the_same_keys_as_without(tmp_path, options, engine):
    plain = trainer_of(tmp_path, overlap=False, training={"engine": engine}, **options)
    expected, own = watched(plain)
    plain.train()
    trainer = trainer_of(tmp_path, training={"engine": engine}, **options)
    calls, threads = watched(trainer)
    trainer.train()
    assert own == {threading.current_thread().name}
    assert threads == {"angle-learner"}
    assert len(expected) > 30
    assert calls == expected
    assert trainer.updates == plain.updates == len(expected)
    first, second = plain.rl_state.agent_state, trainer.rl_state.agent_state
    for name in ("steps", "learned_steps", "held_back", "policy_updates", "skipped_updates"):
        assert getattr(first, name) == getattr(second, name), name
    assert trainer.rl_state.random_key == plain.rl_state.random_key
    assert all(torch.isfinite(tensor).all() for tensor in trainer.critics.state_dict().values())
    assert learner_threads() == []


class Eager(LearnerThread):
    """Lets nobody go on before all is done."""

    def submit(self, works):
        super().submit(works)
        self.rest()


@pytest.mark.parametrize("agent", ["sac", "td3", "ddpg", "dqn", "sac_discrete"])
def test_without_a_lead_an_overlapped_run_equals_a_plain_one(tmp_path, monkeypatch, agent):
    monkeypatch.setattr(overlap, "LearnerThread", Eager)
    results = []
    for wanted in (False, True, None):
        feed = gymnasium.make("angle/Gridworld-v0") if agent in ("dqn", "sac_discrete") else None
        options = {"agent": agent, "updates_per_call": 3}
        trainer = trainer_of(tmp_path, 150, overlap=wanted, feed=feed, **options)
        evaluation = trainer.train()
        learned = tensors(trainer)
        del learned["replay.header"]  # counts for each thread, whose sums `stats` has
        results.append((learned, (evaluation, trainer.replay.stats())))
    plain, overlapped, default = results
    assert_same(plain[0], overlapped[0])
    assert_same(plain[0], default[0])
    assert plain[1] == overlapped[1] == default[1]


def test_the_argument_wins_over_the_config_and_none_leaves_it(tmp_path):
    config = small(tmp_path, 100).replace(overlap=True)
    assert AgentTrainer(config, walk_feed()).config.training.overlap
    assert not AgentTrainer(config, walk_feed(), overlap=False).config.training.overlap
    assert AgentTrainer(small(tmp_path, 100), walk_feed(), overlap=True).config.training.overlap
    assert not AgentTrainer(small(tmp_path, 100), walk_feed()).config.training.overlap


@pytest.mark.parametrize("wanted", [None, 2])
def test_a_core_is_left_to_the_environments_where_the_engine_may_choose(tmp_path, wanted):
    trainer = trainer_of(tmp_path, training={"engine": "native", "learner_threads": wanted}, batch_size=1000)
    own = usable_threads(busy=1, batch_size=1000)
    assert trainer.rl_state.agent_state.engine.threads == (own if wanted is None else wanted)


# How far behind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "most"), [({}, 32), ({"updates_per_call": 40}, 40)])
def test_steps_run_ahead_of_the_updates_by_the_lead_at_most(tmp_path, options, most):
    trainer = trainer_of(tmp_path, 150, **options)
    state, leads, step = trainer.rl_state.agent_state, [], trainer.feed.step
    update_many = state.engine.update_many

    def slow(calls):
        still = 20 if state.updates > 0 else 0
        while still < 20:  # the first waits until the steps have stood still for a while
            steps = state.steps
            time.sleep(0.01)
            still = still + 1 if state.steps == steps else 0
        return update_many(calls)

    def watch(*arguments):
        due = max(0, state.steps - 20) - state.held_back
        leads.append(due - state.updates)
        return step(*arguments)

    state.engine.update_many, trainer.feed.step = slow, watch
    trainer.train()
    assert min(leads) >= 0  # learning is never ahead of the steps
    assert max(leads) == most
    assert trainer.updates == 130


def test_work_is_done_in_order_and_waits_until_no_more_than_the_lead_or_one_call_is_left():
    done = []
    learner = LearnerThread(torch.nn.Linear(1, 1), lead=4)
    go = threading.Event()
    learner.submit([(3, lambda: (go.wait(10), done.append(0))), (1, lambda: done.append(1))])
    assert done == []
    threading.Timer(0.05, go.set).start()
    learner.submit([(1, lambda: done.append(2))])  # waits for the first
    assert done[:1] == [0]
    go.clear()
    learner.submit([(9, lambda: (go.wait(10), done.append(3)))])  # alone it may wait
    assert done == [0, 1, 2]
    go.set()
    learner.rest()
    assert done == [0, 1, 2, 3]
    assert learner.close() == 0
    assert learner_threads() == []


# By which weights -----------------------------------------------------------------------------------------------


def filled(value):
    network = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 300))
    for tensor in tensors_of(network):
        tensor.fill_(value)
    return network


def test_weights_are_always_those_of_one_moment():
    network, reader = filled(0), filled(-1)
    weights, own = Weights(network), tensors_of(reader)
    seen, stop = [], threading.Event()

    def publish():
        value = 0
        while not stop.is_set():
            value = (value + 1) % 100  # BatchNorm counts in int64; all dtypes hold these
            for tensor in tensors_of(network):
                tensor.fill_(value)
            weights.publish()

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        number, until = -1, time.monotonic() + 2
        while time.monotonic() < until:
            before, number = number, weights.fetch(own, number)
            assert number >= before
            values = {float(value) for tensor in own for value in tensor.unique()}
            assert values == {number % 100}
            seen.append(number)
    finally:
        stop.set()
        thread.join()
    assert len(set(seen)) > 20


def test_a_copy_cut_by_newer_weights_is_taken_again(monkeypatch):
    network, reader = filled(1), filled(-1)
    weights, own, copy, cuts = Weights(network), tensors_of(reader), overlap._copy, []

    def cut(source, destination):
        if destination is own and len(cuts) < 3:  # after half of it, two newer copies: the second in the same buffer
            cuts.append(len(cuts))
            copy(source[:2], destination[:2])
            for _ in range(2):
                for tensor in tensors_of(network):
                    tensor.fill_(10 + len(cuts))
                weights.publish()
            copy(source[2:], destination[2:])
        else:
            copy(source, destination)

    monkeypatch.setattr(overlap, "_copy", cut)
    assert weights.fetch(own, -1) == 6
    assert len(cuts) == 3
    assert {float(tensor.min()) for tensor in own} | {float(tensor.max()) for tensor in own} == {13.0}


def test_actions_come_from_the_newest_weights_and_the_learners_own_are_left_alone(tmp_path):
    trainer = trainer_of(tmp_path)
    state = trainer.rl_state.agent_state
    assert state.acting() is state.policy
    with overlap.learning_apart(state):
        first = state.acting()
        assert first is not state.policy
        before = [tensor.clone() for tensor in tensors_of(first)]

        def change():
            for tensor in tensors_of(state.policy):
                tensor.add_(1)

        change()
        assert all(torch.equal(*pair) for pair in zip(before, tensors_of(state.acting()), strict=True))
        state.learner.submit([(1, change)])
        state.learner.rest()
        assert state.acting() is first
        assert all(torch.equal(*pair) for pair in zip(tensors_of(state.policy), tensors_of(first), strict=True))
    assert state.acting() is state.policy
    assert state.learner is None


# What goes wrong ------------------------------------------------------------------------------------------------


class Broken(DDPG):
    """DDPG whose 40th update, or all from then on, goes wrong."""

    failure: Exception | None = None
    asked, ever = 0, True

    def next_values(self, state, batch, key):
        self.asked += 1
        values = super().next_values(state, batch, key)
        if not self.ever or self.asked < 40:
            return values
        if self.failure is not None:
            raise self.failure
        return values._replace(q=values.q * float("nan"))


def test_an_error_of_the_learner_is_raised_and_the_trainer_goes_on_afterwards(tmp_path):
    trainer = trainer_of(tmp_path, 300, kind=Broken)
    trainer.agent.failure = OSError("no more numbers")
    with pytest.raises(OSError, match="no more numbers"):
        trainer.train()
    assert learner_threads() == []
    state = trainer.rl_state.agent_state
    assert trainer.updates == 39
    assert state.steps - 20 == trainer.updates + state.held_back + 1  # the one that failed is lost
    trainer.agent.ever = False
    trainer.train()
    assert trainer.steps == 300
    assert trainer.updates == state.steps - 20 - 1
    assert state.held_back == 0


def test_losses_that_are_not_finite_name_the_last_checkpoint(tmp_path):
    trainer = trainer_of(tmp_path, 300, kind=Broken)
    with pytest.raises(LossNotFiniteError, match="in 3 updates in a row; the last good checkpoint: there is no"):
        trainer.train()
    assert (trainer.updates, trainer.skipped_updates) == (39, 3)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_saves_at_rest_and_twice_ends_at_once(tmp_path, presses):
    trainer = trainer_of(tmp_path, 100_000)
    state, step = trainer.rl_state.agent_state, trainer.feed.step

    def press(*arguments):
        if trainer.steps == 60:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
        return step(*arguments)

    trainer.feed.step = press
    if presses == 1:
        assert trainer.train() is None
        resumed = AgentTrainer.resume(trainer.run_folder, feed=walk_feed())
        assert resumed.config.training.overlap
        assert (resumed.steps, resumed.updates) == (61, 41)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trainer.updates + state.held_back == 40
    assert learner_threads() == []
    trainer.feed.step = step
    trainer.train(num_episodes=1)  # also after the second, nothing is lost
    assert trainer.updates == state.steps - 20
    assert state.held_back == 0


def test_where_the_environment_fails_the_run_is_saved_at_rest(tmp_path):
    def fails(observation, action):
        if trainer.steps == 90:
            raise RuntimeError("out of order")
        return observation, 0.0

    feed = FunctionFeed(
        fails,
        initial_observation=np.array([0.5], np.float32),
        action_space=spaces.Box(-1, 1, (1,), np.float32),
        step_limit=10,
    )
    trainer = trainer_of(tmp_path, 1000, feed=feed)
    with pytest.raises(RuntimeError, match="out of order"):
        trainer.train()
    resumed = trainer_of(tmp_path, 1000)
    resumed.load(trainer.run_folder)
    assert (resumed.steps, resumed.updates) == (90, 70)


def test_what_cannot_be_taken_apart_is_refused(tmp_path):
    class Own(SAC):
        def explore(self, state, observations, n, key):
            return super().explore(state, observations, n, key)

    class Else:
        def init(self, random_key, **options):
            return {}, random_key

    with pytest.raises(ValueError, match="overlap is True; Own has its own explore"):
        trainer_of(tmp_path, kind=Own)
    with pytest.raises(ValueError, match="overlap is True; Else does not keep what it learns apart"):
        trainer_of(tmp_path, kind=lambda _: Else())
    with pytest.raises(ValueError, match="overlap is True; QLearning does not"):
        trainer_of(tmp_path, kind=QLearning, feed=gymnasium.make("angle/Gridworld-v0"))
    trainer_of(tmp_path, kind=Own, overlap=False)


# Everything else ------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_taken_at_rest_and_a_resumed_run_counts_on(tmp_path):
    config = small(tmp_path, 100, updates_per_step=2.0, updates_per_call=3)
    config = config.replace(overlap=True, checkpoint_interval=40, log_interval=10, evaluation_interval=30)
    trainer = AgentTrainer(config, walk_feed())
    trainer.train()
    assert trainer.updates == 160
    resumed = AgentTrainer.resume(trainer.run_folder, config.replace(steps=170), feed=walk_feed())
    assert (resumed.steps, resumed.updates) == (100, 160)
    resumed.train()
    assert (resumed.steps, resumed.updates) == (170, 300)
    early = AgentTrainer(config, walk_feed())
    early.load(sorted((trainer.run_folder / "checkpoints").iterdir())[0])
    state = early.rl_state.agent_state
    assert early.updates + state.held_back == 2 * (early.steps - 20)
    assert early.updates % 3 == 0  # nothing was under way


def test_what_the_caller_sees_is_at_rest(tmp_path):
    """Meta steps, trajectories and completed episodes."""

    class Meta:
        def update_meta_learning_model(self, states, q):
            seen.append(trainer.updates == trainer.rl_state.agent_state.steps - 20)

    seen = []
    config = small(tmp_path, 1000, meta_update_interval=7)
    trainer = AgentTrainer(config, walk_feed(), meta=Meta(), overlap=True)
    episodes = []
    trainer.train(num_episodes=12, episode_completed=lambda state, *_: episodes.append(trainer.updates))
    assert episodes == [0, 0, *range(10, 110, 10)]
    assert len(seen) >= 13
    assert all(seen)
    rows = []
    note = lambda state: rows.append(trainer.updates - (state.agent_state.steps - 20))  # noqa: E731
    trainer.train(num_episodes=2, state_to_trajectory=note)
    assert set(rows) == {0}


@pytest.mark.parametrize(("agent", "engine"), [("sac", "native"), ("dqn", "torch")])
def test_it_learns(tmp_path, agent, engine):
    feed = None
    options = {"agent": agent, "batch_size": 32, "hidden_sizes": (32,), "learning_rate": 3e-3, "learning_starts": 100}
    if agent == "dqn":
        feed = gymnasium.make("angle/Gridworld-v0")
        options |= {"exploration_epsilon": 0.2}
    trainer = trainer_of(tmp_path, 1200, feed=feed, training={"engine": engine}, **options)
    before = trainer.evaluate(1).mean_return
    after = trainer.train().mean_return
    assert trainer.updates == 1100
    assert np.isfinite(float(trainer.rl_state.agent_state.last_update.critic_loss))
    assert after > before

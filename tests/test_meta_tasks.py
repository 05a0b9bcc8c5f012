"""Initialisations for families of tasks: their gradients and moves, visits, adaptation, checkpoints, bad input."""

from __future__ import annotations

import copy

import gymnasium
import numpy as np
import pytest
import torch
from meta_parts import batch_of, learning_of_agent

from angle_rl import AgentConfig, Hyperparameters, Service, Training, ops
from angle_rl.agents.state import learned_tensors
from angle_rl.feed import FunctionFeed
from angle_rl.meta import MAML, MetaEntropy, Reptile
from angle_rl.meta_trainer import MetaLearnerTrainer
from angle_rl.trainer import AgentTrainer
from angle_rl.types import RandomKey

BOX = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
KEY = RandomKey(9)
BATCHES = [batch_of(seed) for seed in (11, 12, 14)]
VALIDATION = batch_of(13)


# MAML's outer gradient -----------------------------------------------------------------------------------------


def outer_gradient(maml, network, learning, inner_steps):
    """The outer gradient of one network, where the other's part in it is a constant."""
    batches = BATCHES[:inner_steps]
    if network == "critics":
        return maml.critic_gradient(learning, batches, VALIDATION, KEY)
    critics = dict(learning.networks["critics"].named_parameters())
    return maml.policy_gradient(learning, batches, VALIDATION, KEY, critics)


@pytest.mark.parametrize("inner", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("network", ["critics", "policy"])
@pytest.mark.parametrize("agent", ["sac", "td3"])
def test_the_full_outer_gradient_is_that_of_the_outer_loss(agent, network, inner):
    learning = learning_of_agent(agent)
    maml = MAML(inner_steps=2, inner=inner, inner_learning_rate=0.02 if inner == "sgd" else 0.01)
    found = outer_gradient(maml, network, learning, 2).gradients
    generator = torch.Generator().manual_seed(0)
    step, differences, gradients = 1e-5, [], []
    for name, parameter in learning.networks[network].named_parameters():
        flat = parameter.detach().view(-1)
        for place in torch.randperm(len(flat), generator=generator)[:2]:
            sides = []
            for move in (step, -step):
                flat[place] += move
                sides.append(float(outer_gradient(maml, network, learning, 2).loss))
                flat[place] -= move
            differences.append((sides[0] - sides[1]) / (2 * step))
            gradients.append(float(found[name].view(-1)[place]))
    expected, found_there = torch.tensor(differences, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)
    assert float(expected.norm()) > 1e-3
    assert float((found_there - expected).norm() / expected.norm()) <= 1e-5
    first_order = outer_gradient(
        MAML(first_order=True, inner_steps=2, inner=inner, inner_learning_rate=maml.inner_learning_rate),
        network,
        learning,
        2,
    )
    assert float(first_order.loss) == pytest.approx(float(outer_gradient(maml, network, learning, 2).loss), rel=1e-12)
    apart = torch.cat([(first_order.gradients[name] - found[name]).flatten() for name in found])
    assert float(apart.norm()) > 1e-3 * float(expected.norm()), "the second derivatives change nothing"


def test_the_first_order_gradient_is_that_at_the_adapted_parameters():
    learning = learning_of_agent("td3")
    critics, rate = learning.networks["critics"], 0.03
    start_key, outer_key = KEY.split(2)

    def loss_at(module, batch, key):
        with torch.no_grad():
            td_target = ops.twin_q_target(batch.rewards, batch.discounts, *learning.next_values(batch, key))
        q = module(batch.observations, batch.actions)
        return (batch.importance_weights * (q - td_target).square().sum(0)).mean()

    adapted = copy.deepcopy(critics)
    loss_at(adapted, BATCHES[0], start_key).backward()
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter -= rate * parameter.grad
            parameter.grad = None
    loss = loss_at(adapted, VALIDATION, outer_key)
    loss.backward()
    found = outer_gradient(MAML(first_order=True, inner="sgd", inner_learning_rate=rate), "critics", learning, 1)
    assert float(found.loss) == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in adapted.named_parameters():
        torch.testing.assert_close(found.gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.adapted[name], parameter, rtol=1e-9, atol=1e-12)


def test_without_inner_curvature_first_order_is_the_full_gradient():
    """A vanishing inner step leaves no second derivatives: both are the plain gradient of the validation loss."""
    learning = learning_of_agent("sac")
    full, first = (
        outer_gradient(
            MAML(first_order=order, inner="sgd", inner_learning_rate=1e-12), "critics", learning, 1
        ).gradients
        for order in (False, True)
    )
    for name, gradient in full.items():
        torch.testing.assert_close(first[name], gradient, rtol=1e-8, atol=1e-10)


def test_outer_gradients_touch_nothing():
    learning = learning_of_agent("sac")
    before = {name: copy.deepcopy(network.state_dict()) for name, network in learning.networks.items()}
    torch_state = torch.get_rng_state()
    found = MAML(inner_steps=3).outer_gradients(learning, BATCHES, VALIDATION, KEY)
    assert found.critics.is_finite()
    assert found.policy.is_finite()
    assert torch.get_rng_state().equal(torch_state)
    for name, network in learning.networks.items():
        assert all(network.state_dict()[key].equal(tensor) for key, tensor in before[name].items())
        assert all(parameter.grad is None for parameter in network.parameters())


# Reptile's move ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_size", [0.0, 0.25, 0.7, 1.0])
def test_reptile_moves_its_share_of_the_way(step_size):
    generator = torch.Generator().manual_seed(1)
    start, learned = (
        {"weight": torch.randn(5, 3, generator=generator, dtype=torch.float64), "count": torch.tensor(count)}
        for count in (3, 8)
    )
    own = {name: tensor.clone() for name, tensor in start.items()}
    Reptile(step_size=step_size).move(own, learned)
    expected = start["weight"] + step_size * (learned["weight"] - start["weight"])
    torch.testing.assert_close(own["weight"], expected, rtol=1e-15, atol=1e-15)
    if step_size in (0.0, 1.0):
        whole = learned if step_size else start
        assert all(own[name].equal(whole[name]) for name in own)


# Visits --------------------------------------------------------------------------------------------------------


def pull(strength):
    """A task: a point that the action moves, as strongly as the task has it, punished for its distance from 0."""

    def walk(observation, action):
        observation = np.clip(observation + strength * action, -1, 1).astype(np.float32)
        return observation, -float(np.abs(observation).sum())

    return FunctionFeed(walk, initial_observation=np.array([0.5], np.float32), action_space=BOX, step_limit=10)


def small(folder, steps=150, seed=0, **fields):
    config = AgentConfig(
        hyperparameters=Hyperparameters(
            hidden_sizes=(8,), batch_size=8, learning_starts=10, learning_rate=0.01, replay_capacity=1000
        ),
        training=Training(steps=steps, seed=seed, evaluation_interval=None, evaluation_episodes=2, threads=1),
        service=Service(run_folder=str(folder), tensorboard=False, progress=False, checkpoint_interval=None),
    )
    return config.replace(learner_threads=1, **fields)


METHODS = {
    "reptile": lambda: Reptile(step_size=0.5, steps=20),
    "first order": lambda: MAML(first_order=True, updates=2, steps=20),
    "maml": lambda: MAML(inner_steps=2, updates=2, steps=20),
}


def over_tasks(folder, method="reptile", strengths=(0.1, 0.2, 0.3), **fields):
    return MetaLearnerTrainer(
        small(folder, **fields), tasks=[pull(one) for one in strengths], initialization=METHODS[method]()
    )


def copies(trainer):
    """All that an initialisation is: networks, entropy coefficient, moments."""
    state = trainer.rl_state.agent_state
    moments = {
        f"{name}.{index}.{slot}": tensor
        for name, optimizer in state.optimizers.items()
        for index, slots in optimizer.state_dict()["state"].items()
        for slot, tensor in slots.items()
    }
    return {name: tensor.clone() for name, tensor in (learned_tensors(state) | moments).items()}


def same(first, second):
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("agent", ["sac", "td3"])
def test_training_over_tasks_moves_the_initialisation_and_is_reproducible(tmp_path, agent, method):
    first, again, other = (
        over_tasks(tmp_path, method, agent=agent, seed=seed, evaluation_episodes=1) for seed in (3, 3, 4)
    )
    begun = copies(first)
    evaluation = first.train()
    again.train()
    other.advance(150)
    assert first.steps == again.steps == other.steps == 150
    assert first.meta_steps == first.tasks.visits > 3
    assert len(evaluation.returns) == 3  # an episode of every task
    assert same(copies(first), copies(again))
    assert not same(copies(first), copies(other))
    moved = copies(first)
    for network in ("policy.", "critics.", "target_critics."):
        assert any(not moved[name].equal(begun[name]) for name in begun if name.startswith(network)), network
    assert sum(len(trainer.replay) for trainer in first.tasks.trainers) == 150


def test_a_visit_begins_at_the_initialisation_and_moves_it_by_what_it_learned(tmp_path):
    trainer = over_tasks(tmp_path, strengths=(0.2,), updates_per_step=1.0)
    (task,) = trainer.tasks.trainers
    for steps in (30, 20):  # a visit each: the first takes the 10 random steps besides
        before = learned_tensors(trainer.rl_state.agent_state)
        before = {name: tensor.clone() for name, tensor in before.items()}
        trainer.advance(steps)
        learned, now = (learned_tensors(one.rl_state.agent_state) for one in (task, trainer))
        for name, start in before.items():
            torch.testing.assert_close(now[name], start + 0.5 * (learned[name] - start), rtol=1e-5, atol=1e-6)
        assert any(not now[name].equal(start) for name, start in before.items())
    assert float(trainer.rl_state.agent_state.entropy_coefficient) == pytest.approx(
        float(now["log_entropy_coefficient"].exp())
    )


def test_a_step_size_of_0_leaves_the_networks_bit_identical(tmp_path):
    trainer = MetaLearnerTrainer(
        small(tmp_path), tasks=[pull(0.1), pull(0.2)], initialization=Reptile(step_size=0.0, steps=20)
    )
    before = {name: tensor.clone() for name, tensor in learned_tensors(trainer.rl_state.agent_state).items()}
    trainer.advance(100)
    assert same(before, learned_tensors(trainer.rl_state.agent_state))


def test_an_outer_loss_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch):
    trainer = over_tasks(tmp_path, "maml", strengths=(0.2,))
    before = {name: tensor.clone() for name, tensor in learned_tensors(trainer.rl_state.agent_state).items()}
    through = MAML._through

    def spoiled(self, *args):
        found = through(self, *args)
        return found._replace(loss=found.loss * float("nan"))

    monkeypatch.setattr(MAML, "_through", spoiled)
    trainer.advance(40)
    now = learned_tensors(trainer.rl_state.agent_state)
    assert all(now[name].equal(before[name]) for name in before if name != "log_entropy_coefficient")
    assert trainer.skipped_meta_steps == trainer.meta_steps > 0
    assert trainer.meta_metrics()["meta/skipped"] == trainer.meta_steps


def test_metrics_of_visits_are_logged(tmp_path):
    trainer = over_tasks(tmp_path, "maml", log_interval=30)
    trainer.train()
    text = (trainer.run_folder / "metrics.jsonl").read_text()
    assert "meta/visits" in text
    assert "meta/loss/critics" in text
    assert "evaluation/mean_return" in text


# Adaptation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reptile", "maml"])
def test_adapting_begins_at_the_initialisation_and_leaves_it_as_it_is(tmp_path, method):
    trainer = over_tasks(tmp_path, method)
    trainer.advance(100)
    before = copies(trainer)
    adapted = trainer.adapt(pull(0.25), 30)
    assert isinstance(adapted, AgentTrainer)
    assert adapted.steps == len(adapted.replay) == 30
    assert adapted.updates == 30 - 8  # the first batch_size steps are recorded only
    assert same(before, copies(trainer))
    assert not same(before, copies(adapted))
    assert same(copies(adapted), copies(trainer.adapt(pull(0.25), 30)))
    assert not same(copies(adapted), copies(trainer.adapt(pull(0.25), 30, seed=5)))
    adapted.advance(10)
    assert adapted.steps == 40
    assert same(before, copies(trainer))
    # A policy step every thousand steps leaves the policy where it began: at the initialisation.
    still = over_tasks(tmp_path, policy_update_interval=1000, steps=2000)
    still.advance(60)
    policy = still.adapt(pull(0.25), 30).policy.state_dict()
    assert same(policy, still.policy.state_dict())


def test_adapting_goes_on_with_the_moments(tmp_path):
    trainer = over_tasks(tmp_path)
    trainer.advance(100)
    steps = {name: int(tensor) for name, tensor in copies(trainer).items() if name.endswith(".step")}
    assert min(steps.values()) > 0
    adapted = {name: int(t) for name, t in copies(trainer.adapt(pull(0.25), 7)).items() if name.endswith(".step")}
    assert adapted == {name: count + 4 for name, count in steps.items()}


# Checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reptile", "maml"])
def test_the_initialisation_and_its_counters_are_saved_and_come_back(tmp_path, method):
    trainer = over_tasks(tmp_path, method)
    trainer.advance(100)
    trainer.save(tmp_path / "saved")
    fresh = over_tasks(tmp_path, method, seed=0)
    fresh.load(tmp_path / "saved")
    assert same(copies(fresh), copies(trainer))
    assert (fresh.steps, fresh.tasks.visits) == (trainer.steps, trainer.tasks.visits)
    assert same(fresh.tasks.export_state()[0], trainer.tasks.export_state()[0])
    assert fresh.tasks.export_state()[1] == trainer.tasks.export_state()[1]
    assert same(copies(fresh.adapt(pull(0.25), 20)), copies(trainer.adapt(pull(0.25), 20)))
    fresh.advance(50)
    assert fresh.steps == 150


def test_a_run_over_tasks_is_resumed(tmp_path):
    trainer = over_tasks(tmp_path, "maml", steps=60)
    trainer.train()
    tasks = [pull(one) for one in (0.1, 0.2, 0.3)]
    config = small(tmp_path, steps=120)
    resumed = MetaLearnerTrainer.resume(trainer.run_folder, config, tasks=tasks, initialization=METHODS["maml"]())
    assert same(copies(resumed), copies(trainer))
    resumed.train()
    assert resumed.steps == 120
    assert resumed.tasks.visits > trainer.tasks.visits


def test_a_checkpoint_of_other_tasks_is_refused_and_changes_nothing(tmp_path):
    trainer = over_tasks(tmp_path, "maml")
    trainer.advance(60)
    trainer.save(tmp_path / "saved")
    fewer, reptile = over_tasks(tmp_path, "maml", strengths=(0.1, 0.2)), over_tasks(tmp_path, "reptile")
    learner = MetaLearnerTrainer(small(tmp_path, entropy_coefficient=0.2), MetaEntropy(), pull(0.1))
    for other, message in ((fewer, "number of tasks is 3"), (reptile, "initialization of tasks is 'maml'")):
        before = copies(other)
        with pytest.raises(ValueError, match=message):
            other.load(tmp_path / "saved")
        assert same(before, copies(other))
        assert other.steps == 0
    with pytest.raises(ValueError, match="learners are"):
        learner.load(tmp_path / "saved")


# Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": []}, ValueError, "tasks is empty; at least 1"),
        ({"tasks": "Pendulum-v1"}, TypeError, "tasks is a str"),
        ({"tasks": [3]}, TypeError, "source is a int"),
        ({"tasks": ["Pendulum-v1"], "learner": MetaEntropy()}, ValueError, "learner and tasks are both given"),
        ({"tasks": ["Pendulum-v1"], "feed": "Pendulum-v1"}, ValueError, "feed and tasks are both given"),
        ({"tasks": ["Pendulum-v1"], "replay": object()}, ValueError, "replay is given with tasks"),
        ({"tasks": ["Pendulum-v1"], "initialization": 3}, TypeError, "initialization is a int"),
        ({"learner": MetaEntropy(), "initialization": Reptile()}, ValueError, "initialization is given without tasks"),
        (
            {"tasks": ["Pendulum-v1", "MountainCarContinuous-v0"]},
            ValueError,
            r"tasks\[1\] \(MountainCarContinuous-v0\) has the observation_space .* and tasks\[0\] \(Pendulum-v1\)",
        ),
    ],
)
def test_tasks_that_make_no_sense_are_refused(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        MetaLearnerTrainer(small(tmp_path), **arguments)


def test_tasks_with_other_actions_or_the_same_feed_are_refused(tmp_path):
    wide = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    other = FunctionFeed(lambda o, a: (o, 0.0), initial_observation=np.zeros(1, np.float32), action_space=wide)
    with pytest.raises(ValueError, match=r"tasks\[1\] .* has the action_space"):
        MetaLearnerTrainer(small(tmp_path), tasks=[pull(0.1), other])
    feed = pull(0.1)
    with pytest.raises(ValueError, match=r"tasks\[1\] is the same feed"):
        MetaLearnerTrainer(small(tmp_path), tasks=[feed, feed])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"agent": "q_learning"}, "agent is 'q_learning', which has no policy"),
        ({"agent": "dqn"}, "agent is 'dqn', which has no policy"),
        ({"learning_rate_schedule": "linear"}, "learning_rate_schedule is 'linear'"),
        ({"normalize_observations": True}, "normalize_observations is True"),
        ({"overlap": True}, "overlap is True"),
        ({"meta": "entropy"}, "meta is 'entropy' and tasks are given"),
    ],
)
def test_configs_that_an_initialisation_cannot_learn_with_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        over_tasks(tmp_path, **fields)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Reptile, {"step_size": 1.5}),
        (Reptile, {"step_size": -0.1}),
        (Reptile, {"step_size": float("nan")}),
        (Reptile, {"steps": 0}),
        (MAML, {"steps": 0}),
        (MAML, {"learning_rate": -1.0}),
        (MAML, {"inner_steps": 0}),
        (MAML, {"updates": 0}),
        (MAML, {"inner": "newton"}),
        (MAML, {"inner_learning_rate": 0.0}),
    ],
)
def test_numbers_out_of_range_are_named(kind, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} is"):
        kind(**arguments)


def test_calls_that_make_no_sense_are_refused(tmp_path):
    trainer = over_tasks(tmp_path)
    before = copies(trainer)
    for steps in (0, -3, 1.5):
        with pytest.raises(ValueError, match="steps is"):
            trainer.adapt(pull(0.1), steps)
    with pytest.raises(ValueError, match=r"the feed to adapt to \(Pendulum-v1\) has the observation_space"):
        trainer.adapt("Pendulum-v1", 10)
    with pytest.raises(ValueError, match="num_episodes belong to training by episodes"):
        trainer.train(num_episodes=3)
    for arguments in ({"steps": 0}, {"steps": 10, "learn": False}):
        with pytest.raises(ValueError, match="tasks are visited"):
            trainer.advance(**arguments)
    with pytest.raises(ValueError, match="has tasks; it cannot learn about another"):
        AgentTrainer(small(tmp_path), pull(0.1), meta=trainer)
    assert same(before, copies(trainer))
    learner = MetaLearnerTrainer(small(tmp_path, entropy_coefficient=0.2), MetaEntropy(), pull(0.1))
    with pytest.raises(ValueError, match="has no tasks"):
        learner.adapt(pull(0.1), 10)


def test_an_environment_that_fails_leaves_a_checkpoint(tmp_path):
    calls = []

    def failing(observation, action):
        calls.append(1)
        if len(calls) > 60:
            raise RuntimeError("broken")
        return observation, 0.0

    feed = FunctionFeed(failing, initial_observation=np.zeros(1, np.float32), action_space=BOX, step_limit=10)
    trainer = MetaLearnerTrainer(small(tmp_path), tasks=[feed], initialization=Reptile(steps=20))
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert list((trainer.run_folder / "checkpoints").iterdir())

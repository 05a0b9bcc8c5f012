"""Native critics beside a policy that learns in torch: the torch engine's numbers, for losses of the user's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_native_engine import PRECISIONS, Learner, assert_close, changed, clones, go_beside

from angle_rl import _core
from angle_rl.agents import DDPG, DQN, SAC, TD3
from angle_rl.engines import NativeCriticsEngine, TorchEngine, describe_engine, make_engine
from angle_rl.types import RandomKey


def near_the_middle(kind):
    """The agent, with a loss that keeps actions small besides its own."""

    class Own(kind):
        def policy_loss(self, state, batch, key):
            learned = super().policy_loss(state, batch, key)
            return learned._replace(loss=learned.loss + 0.1 * learned.actions.square().mean())

    return Own


OWN = {"sac": near_the_middle(SAC), "td3": near_the_middle(TD3), "ddpg": near_the_middle(DDPG)}


class OwnFollowing(SAC):
    """A coefficient that falls in steps of its own."""

    def after_policy_step(self, state, learned):
        state.set_entropy_coefficient(state.entropy_coefficient * 0.9)


def pair(name, kind=None, threads=1, **options):
    kind = OWN[name] if kind is None else kind
    reference = Learner(name, kind=kind, **options)
    native = Learner(name, kind=kind, threads=threads, engine="native", **options)
    assert isinstance(reference.state.engine, TorchEngine)
    assert isinstance(native.state.engine, NativeCriticsEngine)
    assert native.state.engine.threads == threads
    return reference, native


CASES = [
    ("sac", {}),
    ("sac", {"entropy_coefficient": 0.2, "replay": "uniform", "activation": "silu", "critics": 3}),
    ("sac", {"layer_norm": True, "activation": "tanh", "target_update_interval": 5, "critic_subset": 1}),
    ("sac", {"policy_batch": "fresh", "huber_delta": 0.5, "max_gradient_norm": 0.3, "n_step": 3}),
    ("td3", {}),
    ("td3", {"policy_batch": "fresh", "policy_update_interval": None}),
    ("ddpg", {"optimizer": "adamw", "weight_decay": 0.01}),
    ("ddpg", {"critics": 2, "replay": "uniform", "target_update_interval": 5}),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_each_update_equals_the_torch_engines(name, options, threads):
    reference, native = pair(name, None, threads, **options)
    go_beside(reference, native, 12, policy_every=2 if name == "td3" else 1)


@pytest.mark.parametrize("name", OWN)
def test_many_updates_on_its_own_stay_beside(name):
    reference, native = pair(name, activation="tanh", learning_rate=1e-4, replay="uniform")
    for index in range(200):
        steps = 2 if index % 3 == 0 else index % 2
        first, second = reference.update(index, steps), native.update(index, steps)
        torch.testing.assert_close(second.q, first.q, rtol=1e-3, atol=1e-4)
        assert torch.equal(second.batch.handles, first.batch.handles)
    for key, tensor in reference.tensors().items():
        if "exp_avg" not in key:
            torch.testing.assert_close(native.tensors()[key], tensor, rtol=1e-3, atol=1e-4)


def test_what_follows_a_policy_step_is_the_agents_own():
    reference, native = pair("sac", OwnFollowing)
    for index in range(5):
        reference.update(index)
        native.update(index)
    expected = torch.tensor(0.9**5)
    torch.testing.assert_close(native.state.entropy_coefficient, expected)
    torch.testing.assert_close(reference.state.entropy_coefficient, expected)
    assert_close(reference, native, 1e-4)


def test_an_optimizer_of_the_coefficient_that_native_does_not_know_is_torchs():
    learner = Learner("sac", kind=OWN["sac"])
    learner.state.optimizers["entropy_coefficient"] = torch.optim.SGD([learner.state.log_entropy_coefficient], 0.1)
    engine = make_engine(learner.agent._spec(learner.state), learner.agent._update_parts(learner.state), "native")
    assert isinstance(engine, NativeCriticsEngine)
    assert engine.update(RandomKey(0), 1).finite
    assert learner.state.log_entropy_coefficient.detach() != 0.0
    assert float(learner.state.entropy_coefficient) == learner.state.log_entropy_coefficient.detach().exp()


def test_several_updates_in_one_call_equal_one_after_the_other():
    one, many = (Learner("sac", kind=OWN["sac"], engine="native") for _ in range(2))
    calls = [(RandomKey(index), index % 3, False) for index in range(6)]
    for call in calls:
        one.state.engine.update(*call)
    assert len(list(many.state.engine.update_many(calls))) == 6
    ours, theirs = one.tensors(), many.tensors()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert np.array_equal(one.priorities(), many.priorities())


@pytest.mark.parametrize("name", OWN)
def test_a_critic_loss_that_is_not_finite_ends_the_update(name):
    learner = Learner(name, kind=OWN[name], engine="native")
    learner.update(0)
    learner.state.critics.weights[-1].data[0, 0, 0] = np.nan
    before, priorities = clones(learner), learner.priorities()
    results = list(learner.state.engine.update_many([(RandomKey(index), 1, False) for index in range(3)]))
    assert [result.finite for result in results] == [False]
    assert results[0].policy_loss is None
    assert changed(before, learner) == set()
    assert np.array_equal(priorities, learner.priorities())


@pytest.mark.parametrize("name", OWN)
def test_a_policy_loss_that_is_not_finite_leaves_the_critics_step_and_nothing_after(name):
    class Lost(OWN[name]):
        def policy_loss(self, state, batch, key):
            learned = super().policy_loss(state, batch, key)
            return learned._replace(loss=learned.loss * float("nan"))

    learner = Learner(name, kind=Lost, engine="native")
    before, priorities = clones(learner), learner.priorities()
    result = learner.update(1)
    assert not result.finite
    assert np.isnan(float(result.policy_loss))
    of_critics = {"critics", "policy"}  # of the policy no more than Adam's empty state
    assert {key.split(".")[0] for key in changed(zeros_added(before, learner), learner)} == {"critics"}
    assert {key.split(".")[0] for key in learner.tensors().keys() - before.keys()} <= of_critics
    assert np.array_equal(priorities, learner.priorities())


def zeros_added(before, learner):
    """With zeros for what was not there before."""
    return {key: before.get(key, torch.zeros_like(tensor)) for key, tensor in learner.tensors().items()}


def test_priorities_follow_the_policy_step():
    """Nothing writes them before: an update cut short must leave them."""
    learner = Learner("sac", kind=OWN["sac"], engine="native")
    seen = []
    policy_loss = learner.agent.policy_loss
    learner.agent.policy_loss = lambda *given: seen.append(learner.priorities()) or policy_loss(*given)
    before = learner.priorities()
    learner.update(0)
    assert np.array_equal(seen[0], before)
    assert not np.array_equal(learner.priorities(), before)


# Which engine is made -----------------------------------------------------------------------------------------


def test_a_loss_of_ones_own_leaves_the_critics_native_and_says_so():
    learner = Learner("sac", kind=OWN["sac"], engine="auto", threads=2)
    assert describe_engine("auto", learner.state.engine) == (
        "engine native critics (auto: policy step in torch, since its loss is not one that native knows; "
        f"{_core.isa()}, 2 threads)"
    )
    native = Learner("sac", kind=OWN["sac"], engine="native")
    assert native.state.engine.why.startswith("as configured; policy step in torch, since")
    assert native.state.engine.nbytes > 0
    assert isinstance(Learner("sac", kind=OWN["sac"], engine="torch").state.engine, TorchEngine)


def test_whatever_else_is_against_native_is_named():
    learner = Learner("sac", kind=OWN["sac"])
    spec, update = learner.agent._spec(learner.state), learner.agent._update_parts(learner.state)
    handle = update.critics.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match=r"engine is 'native', .*: critics has a hook on its TwinQ"):
        make_engine(spec, update, "native")
    engine = make_engine(spec, update)
    assert describe_engine("auto", engine) == "engine torch (auto: not native, since critics has a hook on its TwinQ)"
    handle.remove()
    assert isinstance(make_engine(spec, update), NativeCriticsEngine)
    with pytest.raises(ValueError, match="target's value is not computed in one of the ways"):
        make_engine(dataclasses.replace(spec, next_value="other"), update, "native")


def test_a_target_of_dqns_own_is_still_torchs():
    class OwnChoice(DQN):
        def next_values(self, state, batch):
            return super().next_values(state, batch)

    assert isinstance(Learner("dqn", kind=OwnChoice, engine="auto").state.engine, TorchEngine)


@pytest.mark.skipif(not _core.has_bfloat16(), reason="this CPU has no bfloat16 products")
def test_bfloat16_is_the_critics():
    exact, rounded = (
        Learner("sac", kind=OWN["sac"], engine="native", hidden_sizes=(64, 64), replay="uniform", precision=precision)
        for precision in PRECISIONS
    )
    assert "bfloat16" in rounded.state.engine.why
    for index in range(5):
        first, second = exact.update(index), rounded.update(index)
    torch.testing.assert_close(second.q, first.q, rtol=0.05, atol=0.02)
    assert not torch.equal(first.q, second.q)


def test_bfloat16_asks_for_a_cpu_that_has_it(monkeypatch):
    learner = Learner("sac", kind=OWN["sac"])
    spec, update = learner.agent._spec(learner.state), learner.agent._update_parts(learner.state)
    monkeypatch.setattr(_core, "has_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="has no bfloat16 products"):
        make_engine(spec, update, "native", precision="bfloat16")

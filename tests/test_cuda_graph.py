"""The engine that records updates: the numbers of the torch engine, and nothing in between that waits or is fixed."""

from __future__ import annotations

import math

import pytest
import torch
from engine_parts import NAMES
from graph_parts import CASES, Learner, NothingIsRead, NothingWaits, assert_beside, pair, record_on_tape
from torch._dynamo.testing import CompileCounterWithBackend

from angle_rl import device
from angle_rl.agents import DDPG, DQN, SAC, TD3
from angle_rl.agents.state import scale_learning_rates
from angle_rl.replay import PrioritizedReplayBuffer


@pytest.fixture(autouse=True)
def emulated():
    """The device's kernels, compiled for the host: for the replay, the fused operations and the normals."""
    with device.emulated():
        yield


# The numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_updates_are_the_torch_engines(kind, options, updates):
    reference, graph = pair(kind, **options)
    for call in range(24 // updates):
        # TD3's policy steps come late, so that plans differ from call to call.
        steps = [int(kind is not TD3 or (call * updates + n) % 2) for n in range(updates)]
        expected = reference.take(call * updates, steps, call % 3 == 2)
        found = graph.take(call * updates, steps, call % 3 == 2)
        assert len(found) == len(expected) == updates
        assert all(result.finite for result in found)
        for name in ("q", "critic_loss", "policy_loss", "log_prob"):
            one, other = getattr(expected[-1], name), getattr(found[-1], name)
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert_beside(reference, graph)
    assert graph.state.replay.refreshed == 24 // updates
    assert graph.state.engine.name == "cuda_graph"


@pytest.mark.parametrize("kind", [SAC, TD3, DQN])
@pytest.mark.parametrize("engine", ["torch", "graph"])
def test_compiled_networks_learn_the_same(kind, engine, monkeypatch):
    """Up to the backend, which makes other kernels of the same operations."""
    torch._dynamo.reset()  # other tests have networks of these shapes, too
    backend = CompileCounterWithBackend("aot_eager")
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend=backend))
    plain, compiled = Learner(kind, "torch"), Learner(kind, engine, compile=True)
    for learner in (plain, compiled):
        for call in range(6):
            learner.take(call, [1, 1])
    assert_beside(plain, compiled)
    assert backend.frame_count >= (2 if kind is DQN else 4)


def test_what_changes_between_calls_needs_no_new_recording():
    reference, graph = pair(SAC, critics=3, entropy_coefficient=0.2)
    for learner in (reference, graph):
        state = learner.state
        for call in range(24):
            if call == 6:
                scale_learning_rates(state.optimizers.values(), 0.5)
            if call == 10:
                state.reward_scale = 0.7
            if call == 14:
                state.loss_weights = torch.tensor([0.3, 1.1, 1.6], dtype=torch.float64)
            if call == 18:
                state.set_entropy_coefficient(torch.tensor(0.4))
            if call == 20:
                state.loss_weights = torch.ones(3, dtype=torch.float64)
            learner.take(call, [1])
    assert_beside(reference, graph)
    assert len(graph.state.engine._recorded) == 2  # with weights and without
    assert graph.state.optimizers["critics"].param_groups[0]["lr"] == 0.0005
    assert type(graph.state.optimizers["critics"].param_groups[0]["lr"]) is float


@pytest.mark.parametrize("kind", NAMES)
def test_an_update_whose_loss_is_not_finite_changes_nothing(kind):
    reference, graph = pair(kind)
    for learner in (reference, graph):
        for call in range(4):
            learner.take(call, [1])
        before = learner.tensors()
        learner.state.reward_scale = math.nan
        (result,) = learner.take(4, [1])
        assert not result.finite
        assert result.policy_loss is None
        assert math.isnan(result.critic_loss)
        after = learner.tensors()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        learner.state.reward_scale = 1.0
        for call in range(5, 9):
            learner.take(call, [1])
    assert_beside(reference, graph)


class Poisoned(SAC):
    """Its policy's losses are multiplied by these in turn."""

    factors = ()

    def policy_loss(self, state, batch, key):
        learned = super().policy_loss(state, batch, key)
        factor, *self.factors = self.factors
        return learned._replace(loss=learned.loss * factor)


def test_where_the_policys_loss_is_not_finite_the_critics_step_stays_and_all_after_it_is_left_out():
    reference, graph = pair(Poisoned)
    for learner in (reference, graph):
        learner.agent.factors = [1.0, 1.0, 1.0, math.inf, 1.0, 1.0]
        for call in range(3):
            learner.take(call, [1])
        before = learner.tensors()
        (result,) = learner.take(3, [1])
        assert not result.finite
        assert math.isinf(result.policy_loss)
        after = learner.tensors()
        changed = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(after[name], tensor)}
        assert changed == {"critics", "optimizers"}
        stays = [name for name in before if name.startswith(("optimizers.policy", "optimizers.entropy"))]
        assert stays
        assert all(torch.equal(after[name], before[name]) for name in stays)
        for call in range(4, 6):
            learner.take(call, [1])
    assert_beside(reference, graph)


def test_a_call_ends_with_the_update_that_is_not_finite():
    reference, graph = pair(Poisoned)
    for learner, left in ((reference, 0), (graph, 2)):
        learner.agent.factors = [1.0] * 4
        learner.take(0, [1] * 4)
        learner.agent.factors = [1.0, math.nan, 1.0, 1.0]
        results = learner.take(4, [1] * 4)
        assert [result.finite for result in results] == [True, False]
        assert math.isnan(results[-1].policy_loss)
        assert len(learner.agent.factors) == 2 - left  # the graph goes through them all, and they change nothing
    assert_beside(reference, graph)


def test_of_two_policy_steps_the_one_that_failed_is_reported():
    reference, graph = pair(Poisoned)
    for learner in (reference, graph):
        learner.agent.factors = [1.0, 1.0, math.nan, 1.0, 1.0, math.nan]
        assert [result.finite for result in learner.take(0, [2])] == [True]
        for first in (1, 2):
            learner.agent.factors = learner.agent.factors[-2 * (3 - first) :]
            (result,) = learner.take(first, [2])
            assert not result.finite
            assert math.isnan(result.policy_loss)
    assert_beside(reference, graph)


# Played from a tape, as a graph is launched ----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_what_was_recorded_once_gives_each_later_call_its_own_numbers(kind, options, monkeypatch):
    """Nothing that changes from call to call may have gone into the recording."""
    reference, graph = pair(kind, **options)
    record_on_tape(graph, monkeypatch)
    # With a batch of its own, the policy's is drawn even after the critics failed: draws would differ from there on.
    scales = {7: 1.0 if options.get("policy_batch") == "fresh" else math.nan, 10: 0.5}
    poisoned = 0
    for call in range(14):
        copies = call % 5 == 4
        for learner in (reference, graph):
            state = learner.state
            state.reward_scale = scales.get(call, 1.0)
            if call == 4:
                scale_learning_rates(state.optimizers.values(), 0.5)
            if call == 6 and state.optimizers.keys() == {"critics", "policy"} and kind is SAC:
                state.set_entropy_coefficient(torch.tensor(0.4))
            results = learner.take(2 * call, [1] if call == 7 else [1, int(kind is not TD3)], copies)
            poisoned += not results[-1].finite
    assert poisoned == 2 * math.isnan(scales[7])
    assert_beside(reference, graph)
    recorded = graph.state.engine._recorded.values()
    launches = [one.graph.launches for one in recorded if one.graph is not None]
    assert max(launches) >= 9
    assert graph.state.replay.drawn == sum(
        one.graph.launches * one.samples for one in recorded if one.graph is not None
    )


def test_a_taped_update_that_is_not_finite_changes_nothing(monkeypatch):
    learner = Learner(SAC, "graph")
    record_on_tape(learner, monkeypatch)
    for call in range(4):
        learner.take(call, [1])
    before = learner.tensors()
    learner.state.reward_scale = math.inf
    (result,) = learner.take(4, [1])
    assert not result.finite
    after = learner.tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    (recorded,) = learner.state.engine._recorded.values()
    assert recorded.graph.launches == 4


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(("kind", "options"), CASES[::2], ids=str)
def test_the_replay_on_a_device_gives_the_same_updates(kind, options, recorded, monkeypatch):
    """Its kernels, compiled for the host, beside a replay in the host's memory."""
    reference = Learner(kind, "torch", buffer=PrioritizedReplayBuffer, **options)
    graph = Learner(kind, "graph", **options)
    assert graph.state.replay.resident
    assert not reference.state.replay.resident
    if recorded:
        record_on_tape(graph, monkeypatch)
    for call in range(12):
        for learner in (reference, graph):
            learner.state.reward_scale = math.nan if call in (0, 6) else 1.0
            results = learner.take(2 * call, [1, 1], call % 3 == 2)
            assert [result.finite for result in results] == ([False] if call in (0, 6) else [True, True])
    assert_beside(reference, graph)
    assert graph.state.engine.name == "cuda_graph"


# Nothing waits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_nothing_in_an_update_waits_for_the_device(kind, options):
    graph = Learner(kind, "graph", critics=3 if kind is DDPG else options.get("critics", "auto"), **_rest(options))
    if kind is not DQN:
        graph.state.loss_weights = torch.full((options.get("critics", 3 if kind is DDPG else 2),), 0.5)
    engine = graph.state.engine
    body, watched = engine._body, []

    def watch(*arguments):
        watched.append(arguments)
        with NothingWaits(), NothingIsRead():
            return body(*arguments)

    for call in range(3):
        if call > 0:  # the first is not recorded
            engine._body = watch
        graph.take(call * 2, [1, 1], copies=True)
    assert len(watched) == 2


def test_the_watch_sees_what_waits():
    tensor = torch.ones(3)
    for look in (lambda: tensor[0].item(), lambda: bool(tensor[0]), lambda: tensor.nonzero()):
        with pytest.raises(AssertionError), NothingWaits():
            look()
        with pytest.raises(AssertionError), NothingIsRead():
            look()
    with pytest.raises(AssertionError), NothingWaits():
        tensor[tensor > 0]
    for look in (lambda: tensor.cpu(), lambda: tensor.to("cpu"), lambda: tensor.numpy(), lambda: tensor.tolist()):
        with pytest.raises(AssertionError), NothingIsRead():
            look()


def _rest(options):
    return {name: value for name, value in options.items() if name != "critics"}

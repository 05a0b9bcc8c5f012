"""Updates that are really recorded and launched: on a CUDA device, with the replay there."""

from __future__ import annotations

import math

import pytest
import torch
from engine_parts import made, spec_of
from graph_parts import CASES, Learner

from angle_rl.agents import DDPG, DQN, SAC, TD3
from angle_rl.agents.state import scale_learning_rates
from angle_rl.engines import CudaGraphEngine

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_device(kind, engine, **options):
    """A learner whose replay is on the device. Skips where this build has none there."""
    agent, state = made(kind, device="cuda", **options)
    if not getattr(state.replay, "resident", False):
        pytest.skip("this build keeps no replay on the device")
    if engine == "graph":
        state.engine = CudaGraphEngine(spec_of(agent, state), agent._update_parts(state))
    learner = Learner.__new__(Learner)
    learner.agent, learner.state = agent, state
    learner.kind = kind
    return learner


@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_launched_updates_are_the_torch_engines(kind, options, updates):
    reference, graph = (on_device(kind, engine, **options) for engine in ("torch", "graph"))
    for call in range(24 // updates):
        for learner in (reference, graph):
            learner.state.reward_scale = 1.0 if call < 12 else 0.7
            if call == 4:
                scale_learning_rates(learner.state.optimizers.values(), 0.5)
            results = learner.take(call * updates, [1] * updates, call % 3 == 2)
            assert all(result.finite for result in results)
    assert graph.state.engine.name == "cuda_graph"
    assert any(recorded.graph is not None for recorded in graph.state.engine._recorded.values())
    assert_same_networks(reference, graph)


@pytest.mark.parametrize("kind", [SAC, TD3, DDPG, DQN])
def test_a_launched_update_that_is_not_finite_changes_nothing(kind):
    graph = on_device(kind, "graph")
    for call in range(4):
        graph.take(call, [1])
    before = {name: tensor.clone() for name, tensor in networks_of(graph).items()}
    graph.state.reward_scale = math.nan
    (result,) = graph.take(4, [1])
    assert not result.finite
    assert all(torch.equal(before[name], tensor) for name, tensor in networks_of(graph).items())
    graph.state.reward_scale = 1.0
    (result,) = graph.take(5, [1])
    assert result.finite


def test_a_policy_that_waits_for_the_device_goes_on_in_torch():
    class Waiting(SAC):
        def policy_loss(self, state, batch, key):
            learned = super().policy_loss(state, batch, key)
            return learned._replace(loss=learned.loss * (2.0 if learned.loss.item() > 1e9 else 1.0))

    graph = on_device(Waiting, "graph")
    graph.kind = SAC
    graph.take(0, [1])
    with pytest.warns(RuntimeWarning, match="recording failed"):
        graph.take(1, [1])
    assert graph.take(2, [1])[0].finite
    assert graph.state.engine.name == "torch"


def networks_of(learner):
    tensors, _ = learner.agent.export_state(learner.state)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("replay.")}


def assert_same_networks(reference, graph):
    found = networks_of(graph)
    for name, tensor in networks_of(reference).items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )

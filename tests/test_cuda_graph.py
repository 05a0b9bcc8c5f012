"""The engine that records updates: the numbers of the torch engine, nothing that waits, and what it does not take."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from engine_parts import NAMES, OBSERVATIONS, made, spec_of
from graph_parts import Learner, NothingIsRead, NothingWaits, assert_beside, engine_of, pair, record_on_tape
from gymnasium import spaces

from angle_rl import engines, ops
from angle_rl.agents import DDPG, DQN, SAC, TD3, DiscreteSAC
from angle_rl.agents.actor_critic import rows_on_device
from angle_rl.agents.state import scale_learning_rates
from angle_rl.config import AgentConfig, Training
from angle_rl.engines import CudaGraphEngine, TorchEngine, cuda_graph, describe_engine, graph_refusal, make_engine
from angle_rl.engines.graph_keys import CannotCaptureError, Draws
from angle_rl.engines.masked import has_switch, kept_where_failed, mark_not_finite, step_refusal
from angle_rl.types import RandomKey

CASES = [
    (SAC, {}),
    (SAC, {"entropy_coefficient": 0.2, "huber_delta": 0.5, "max_gradient_norm": 0.5}),
    (SAC, {"critics": 5, "critic_subset": 2, "policy_batch": "fresh", "optimizer": "adamw", "weight_decay": 0.01}),
    (SAC, {"target_update_interval": 3, "layer_norm": True, "activation": "silu"}),
    (TD3, {}),
    (TD3, {"policy_batch": "fresh", "huber_delta": 1.0}),
    (DDPG, {}),
    (DDPG, {"max_gradient_norm": 0.1}),
    (DQN, {}),
    (DQN, {"double_q": False, "target_update_interval": 3, "dueling": True}),
    (DiscreteSAC, {}),
]


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
    monkeypatch.setattr(ops, "_has_kernel", lambda *_: False)
    monkeypatch.setattr(ops, "_has_pairs_kernel", lambda *_: False)
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
    monkeypatch.setattr(ops, "_has_kernel", lambda *_: False)
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


# Nothing waits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_nothing_in_an_update_waits_for_the_device(kind, options, monkeypatch):
    # As on a device: the formulas in torch, not the kernels for the host's memory.
    monkeypatch.setattr(ops, "_has_kernel", lambda *_: False)
    monkeypatch.setattr(ops, "_has_pairs_kernel", lambda *_: False)
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


# Keys -----------------------------------------------------------------------------------------------------------


def drawn(keys):
    """What an update might draw with two keys."""
    first, second = keys
    one, other = first.split(2)
    deep = other.split(3)[1]
    subset = second.subset(5, 2)
    return [
        one.normal(4, 3),
        deep.normal(2, 5, dtype=torch.float64),
        deep.split(2)[0].uniform(7),
        subset if isinstance(subset, torch.Tensor) else torch.tensor(subset),
    ]


def test_recorded_draws_are_those_of_the_keys_of_the_launch():
    device = torch.device("cpu")
    first, second = (RandomKey(2**63 + 11), RandomKey(4)), (RandomKey(2**64 - 1), RandomKey(9))
    draws = Draws(first, device)
    for one, other in zip(drawn(draws.keys()), drawn(first), strict=True):
        assert torch.equal(one, other)
    program = draws.finish()
    assert program.entries == 5
    numbers = torch.tensor(program.values(second))
    again = Draws(first, device, program, numbers)
    for one, other in zip(drawn(again.keys()), drawn(second), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert again.finish() == program


def test_draws_that_change_are_not_recorded():
    device, keys = torch.device("cpu"), (RandomKey(1),)
    draws = Draws(keys, device)
    draws.keys()[0].normal(3)
    program = draws.finish()
    numbers = torch.tensor(program.values(keys))

    def again(draw):
        draws = Draws(keys, device, program, numbers)
        draw(draws.keys()[0])
        draws.finish()

    again(lambda key: key.normal(5))  # the shape is the graph's
    for draw in (lambda key: [key.normal(3), key.split(2)[1].normal(3)], lambda key: None, lambda key: key.split(2)):
        with pytest.raises(CannotCaptureError, match="same random numbers"):
            again(draw)
    (key,) = Draws(keys, device, program, numbers).keys()
    with pytest.raises(ValueError, match="n is 0"):
        key.split(0)
    with pytest.raises(TypeError, match="float16"):
        key.normal(2, dtype=torch.float16)
    with pytest.raises(CannotCaptureError, match="seeds a generator"):
        key.seed()


# Optimisers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p),
    ],
)
def test_a_step_that_failed_leaves_an_optimizer_as_it_was(make):
    parameter, beside = (torch.nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    optimizer, reference = make([parameter]), make([beside])
    assert step_refusal(optimizer) is None
    failed, one = torch.zeros(()), torch.ones(())
    for gradient in ([math.nan, 1.0], [1.0, 2.0], [3.0, -math.inf], [0.5, 0.5]):
        failed.zero_()
        parameter.grad = torch.tensor(gradient)
        mark_not_finite([parameter.grad, torch.ones((), dtype=torch.float64)], failed, one)
        assert failed.item() == (0.0 if np.isfinite(gradient).all() else 1.0)
        with kept_where_failed(failed, [optimizer]):
            optimizer.step()
        if np.isfinite(gradient).all():
            beside.grad = torch.tensor(gradient)
            reference.step()
        assert torch.equal(parameter, beside)
    assert not hasattr(optimizer, "found_inf")
    for slot, value in reference.state[beside].items():
        if isinstance(value, torch.Tensor) and (slot != "step" or has_switch(optimizer)):
            assert torch.equal(optimizer.state[parameter][slot], value), slot


def test_an_optimizer_that_torch_cannot_record_is_refused():
    assert step_refusal(torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))])) == (
        "is a Adagrad, whose steps torch does not record"
    )


# What is recorded, and what is not ------------------------------------------------------------------------------


def test_each_plan_is_known_by_itself_and_the_oldest_go(monkeypatch):
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    reference, graph = pair(TD3)
    plans = [[0], [1], [0, 1], [1, 0], [0], [0], [1, 0], [1, 1, 1]]
    for index, steps in enumerate(plans):
        for learner in (reference, graph):
            learner.take(10 * index, steps)
    assert_beside(reference, graph)
    assert [which[0] for which in graph.state.engine._recorded] == [
        ((1, False), (0, False)),
        ((1, False), (1, False), (1, False)),
    ]


def test_what_a_checkpoint_puts_elsewhere_is_recorded_anew():
    reference, graph = pair(SAC)
    for call in range(4):
        for learner in (reference, graph):
            learner.take(call, [1])
    (recorded,) = graph.state.engine._recorded.values()
    assert recorded.inputs is not None
    for learner in (reference, graph):
        tensors, values = learner.agent.export_state(learner.state)
        learner.agent.import_state(learner.state, {name: tensor.clone() for name, tensor in tensors.items()}, values)
        learner.take(4, [1])
    (anew,) = graph.state.engine._recorded.values()
    assert anew is not recorded
    assert anew.inputs is None
    for call in range(5, 9):
        for learner in (reference, graph):
            learner.take(call, [1])
    assert_beside(reference, graph)


class Seeding(TD3):
    """Its target draws from a generator of torch's."""

    def next_values(self, state, batch, key):
        generator = torch.Generator().manual_seed(key.seed())
        values = super().next_values(state, batch, key)
        return values._replace(q=values.q + torch.rand(values.q.shape, generator=generator))


def test_what_cannot_be_recorded_goes_on_in_torch_and_says_so():
    reference, graph = pair(Seeding)
    reference.take(0, [1])
    with pytest.warns(RuntimeWarning, match=r"engine cuda_graph: it seeds a generator .*; updates go on in torch"):
        graph.take(0, [1])
    assert graph.state.engine.name == "torch"
    assert "seeds a generator" in graph.state.engine.why
    for call in range(1, 4):
        for learner in (reference, graph):
            learner.take(call, [1])
    assert_beside(reference, graph)


def test_a_module_that_recording_breaks_off_in_goes_on_in_torch(monkeypatch):
    """Recording itself, as far as it goes without a device: what breaks off must leave everything as it was."""

    class Breaking:
        def __init__(self, body, device):
            raise CannotCaptureError("recording failed (operation not permitted when stream is capturing)")

    monkeypatch.setattr(cuda_graph, "_Graph", Breaking)
    reference, graph = pair(SAC)
    graph.state.engine = engine_of(graph, capture=True)
    for learner in (reference, graph):
        learner.take(0, [1])
    reference.take(1, [1])
    with pytest.warns(RuntimeWarning, match="operation not permitted"):
        graph.take(1, [1])
    for call in range(2, 5):
        for learner in (reference, graph):
            learner.take(call, [1])
    assert_beside(reference, graph)


def test_the_engine_says_what_it_does_not_take():
    learner = Learner(SAC, "torch")
    spec, on_host = spec_of(learner.agent, learner.state), learner.agent._update_parts(learner.state)
    assert graph_refusal(spec, on_host) == "the networks are on cpu"
    update = dataclasses.replace(on_host, device=torch.device("cuda"))
    assert graph_refusal(spec, update) is None

    class WithoutNoise(torch.nn.Linear):
        def sample_actions(self, observations, deterministic=False):
            return self(observations), None

    adagrad = {"policy": torch.optim.Adagrad(learner.state.policy.parameters())}
    _, plain = made(SAC)
    for changed, reason in [
        ({"replay": plain.replay}, "the replay keeps its rows in the host's memory"),
        ({"policy": WithoutNoise(3, 2)}, "the policy's sample_actions takes no noise="),
        ({"changes_on_host": "it counts"}, "it counts"),
        ({"optimizers": adagrad}, "the optimizer of policy is a Adagrad, whose steps torch does not record"),
    ]:
        assert graph_refusal(spec, dataclasses.replace(update, **changed)) == reason
    with pytest.raises(
        ValueError, match="engine is 'cuda_graph', which does not take this update: the networks are on"
    ):
        make_engine(spec, on_host, "cuda_graph")


def test_auto_takes_it_on_a_device_where_it_can(monkeypatch):
    learner = Learner(SAC, "torch")
    spec = spec_of(learner.agent, learner.state)
    update = dataclasses.replace(learner.agent._update_parts(learner.state), device=torch.device("cuda"))
    made_of = []
    monkeypatch.setattr(engines, "CudaGraphEngine", lambda *_, why: made_of.append(why) or "the engine")
    assert make_engine(spec, update) == "the engine"
    assert make_engine(spec, update, "cuda_graph") == "the engine"
    assert made_of == ["auto: networks and replay on a CUDA device", "as configured"]
    own = dataclasses.replace(spec, policy_loss="other")
    engine = make_engine(own, update)
    assert isinstance(engine, TorchEngine)
    assert describe_engine("auto", engine) == (
        "engine torch (auto: not cuda_graph, since it has equations of its own, which are recorded where engine is "
        "'cuda_graph')"
    )
    assert make_engine(own, update, "cuda_graph") == "the engine"
    assert describe_engine("auto", device="cuda:1").startswith("engine cuda_graph (auto")
    assert describe_engine("auto").startswith("engine native (auto")


def test_the_config_takes_it_with_a_device_alone():
    assert Training(engine="cuda_graph", device="cuda:1").engine == "cuda_graph"
    with pytest.raises(ValueError, match="engine is 'cuda_graph' and device 'cpu'; it needs a CUDA device"):
        Training(engine="cuda_graph")
    with pytest.raises(ValueError, match="precision is 'bfloat16' and engine 'cuda_graph'"):
        Training(engine="cuda_graph", device="cuda", precision="bfloat16")


def test_the_replay_lies_where_the_networks_learn_but_for_what_the_host_alone_can_do():
    image = spaces.Box(0, 255, (4, 8, 8), np.uint8)
    config = AgentConfig(training=Training(device="cuda"))
    assert rows_on_device(config, OBSERVATIONS)
    assert rows_on_device(config, spaces.Dict({"a": OBSERVATIONS, "b": spaces.Discrete(3)}))
    assert not rows_on_device(config, image)
    assert not rows_on_device(config, spaces.Dict({"a": OBSERVATIONS, "b": image}))
    assert not rows_on_device(config.replace(overlap=True), OBSERVATIONS)
    assert not rows_on_device(AgentConfig(), OBSERVATIONS)


# On a device ----------------------------------------------------------------------------------------------------


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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

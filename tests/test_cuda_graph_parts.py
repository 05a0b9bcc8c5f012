"""What the engine that records updates is made of, which updates it takes, and what becomes of the others."""

from __future__ import annotations

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch
from engine_parts import ACTIONS, OBSERVATIONS, made, small, spec_of, walk_feed
from graph_parts import Learner, ResidentReplay, assert_beside, engine_of, pair
from gymnasium import spaces

from angle_rl import device, engines
from angle_rl.agents import SAC, TD3, actor_critic
from angle_rl.agents.replays import rows_on_device
from angle_rl.config import AgentConfig, Training
from angle_rl.engines import CudaGraphEngine, TorchEngine, cuda_graph, describe_engine, graph_refusal, make_engine
from angle_rl.engines.graph_keys import CannotCaptureError, Draws
from angle_rl.engines.masked import has_switch, kept_where_failed, mark_not_finite, step_refusal
from angle_rl.feed import GymnasiumFeed
from angle_rl.replay import PrioritizedReplayBuffer
from angle_rl.trainer import AgentTrainer
from angle_rl.types import RandomKey


@pytest.fixture(autouse=True)
def emulated():
    """The device's kernels, compiled for the host: for the replay, the fused operations and the normals."""
    with device.emulated():
        yield


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


def test_networks_are_compiled_where_asked_and_the_engine_is_torchs():
    agent, _ = made(SAC, compile=True)
    config = agent.config.replace(engine="auto")
    state, _ = SAC(config).init(RandomKey(1), observation_space=OBSERVATIONS, action_space=ACTIONS)
    assert state.engine.name == "torch"
    assert state.policy._compiled_call_impl is not None
    assert state.critics.state_dict().keys() == made(SAC)[1].critics.state_dict().keys()
    with pytest.raises(ValueError, match="compile is True and engine 'native'"):
        Training(engine="native", compile=True)


def test_the_config_takes_it_with_a_device_alone():
    assert Training(engine="cuda_graph", device="cuda:1").engine == "cuda_graph"
    with pytest.raises(ValueError, match="engine is 'cuda_graph' and device 'cpu'; it needs a CUDA device"):
        Training(engine="cuda_graph")
    with pytest.raises(ValueError, match="precision is 'bfloat16' and engine 'cuda_graph'"):
        Training(engine="cuda_graph", device="cuda", precision="bfloat16")


def test_the_replay_lies_where_the_networks_learn_if_it_fits(monkeypatch):
    config, actions = AgentConfig(training=Training(device="cuda")), spaces.Discrete(4)
    image = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    for observations in (OBSERVATIONS, image, spaces.Dict({"a": OBSERVATIONS, "b": spaces.Discrete(3), "c": image})):
        assert rows_on_device(config, observations, actions)
    assert not rows_on_device(config.replace(overlap=True), OBSERVATIONS, actions)
    assert not rows_on_device(AgentConfig(), OBSERVATIONS, actions)

    rows = config.hyperparameters.replay_capacity
    monkeypatch.setattr(device, "free_memory", lambda place: 10_000 * rows)  # more than a frame of each row takes
    assert rows_on_device(config, image, actions)
    assert not rows_on_device(config, spaces.Box(0, 255, (84, 84, 3), np.uint8), actions)
    monkeypatch.setattr(device, "free_memory", lambda place: 50 * rows)
    assert not rows_on_device(config, OBSERVATIONS, actions)

    def without(place):
        raise RuntimeError(f"device is {place}, but this build has no kernels")

    monkeypatch.setattr(device, "backend", without)
    assert not rows_on_device(config, OBSERVATIONS, actions)


@pytest.mark.parametrize("agent", ["sac", "td3"])
def test_a_run_on_it_is_a_run_on_the_torch_engine(agent, tmp_path, monkeypatch):
    found = []
    for engine in ("torch", "graph"):
        config = small(tmp_path / engine, 60, agent=agent, updates_per_call=4, learning_rate_schedule="linear")
        if engine == "graph":
            made_so = lambda spec, update, *_, **__: CudaGraphEngine(spec, update, capture=False)  # noqa: E731
            monkeypatch.setattr(actor_critic, "make_engine", made_so)
        feed = walk_feed()
        places = {"observation_space": feed.observation_space, "action_space": feed.action_space}
        trainer = AgentTrainer(config, feed, replay=ResidentReplay(1000, **places, seed=2))
        trainer.train()
        assert trainer.rl_state.agent_state.engine.name == {"torch": "torch", "graph": "cuda_graph"}[engine]
        found.append(
            (trainer.updates, [p.detach() for p in (*trainer.policy.parameters(), *trainer.critics.parameters())])
        )
    (updates, expected), (others, parameters) = found
    assert updates == others == 40
    for one, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Pictures(gymnasium.Env):
    """Frames of noise that the action shifts; an episode has ten to twenty."""

    observation_space, action_space = spaces.Box(0, 255, (12, 12), np.uint8), spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.frame = self.np_random.integers(0, 256, (12, 12), np.uint8)
        return self.frame.copy(), {}

    def step(self, action):
        self.frame = np.roll(self.frame, action - 1, 1)
        self.frame[0] = self.np_random.integers(0, 256, 12, np.uint8)
        return self.frame.copy(), float(action), bool(self.np_random.random() < 0.05), False, {}


def test_a_run_on_images_is_the_same_with_frames_on_the_device(tmp_path, monkeypatch):
    found = []
    for buffer in (PrioritizedReplayBuffer, ResidentReplay):
        config = small(tmp_path / buffer.__name__, 120, agent="dqn", observation_history=4, n_step=2)
        if buffer is ResidentReplay:
            made_so = lambda spec, update, *_, **__: CudaGraphEngine(spec, update, capture=False)  # noqa: E731
            monkeypatch.setattr(actor_critic, "make_engine", made_so)
        places = {"observation_space": spaces.Box(0, 255, (4, 12, 12), np.uint8), "action_space": Pictures.action_space}
        replay = buffer(100, **places, frame_stack=4, n_step=2, seed=2)
        trainer = AgentTrainer(config, GymnasiumFeed([Pictures()], factory=Pictures), replay=replay)
        trainer.train()
        found.append((trainer.updates, replay.stats()["held"], [p.detach() for p in trainer.critics.parameters()]))
    (updates, held, expected), (others, theirs, parameters) = found
    assert updates == others == 100
    assert held == theirs > 0
    for one, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

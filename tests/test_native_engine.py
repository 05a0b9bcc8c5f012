"""The native engine beside the torch engine: the same numbers, update by update, for all that it takes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.update import ReferenceUpdate

from angle_rl import _core
from angle_rl.agents import DDPG, DQN, SAC, TD3
from angle_rl.config import AgentConfig, Hyperparameters, Training
from angle_rl.engines import NativeEngine, TorchEngine, native
from angle_rl.replay import PrioritizedReplayBuffer
from angle_rl.types import RandomKey

AGENTS = {"sac": SAC, "td3": TD3, "ddpg": DDPG, "dqn": DQN}
LOW, HIGH = np.array([-1.0, 0.0, -3.0], np.float32), np.array([1.0, 10.0, -1.0], np.float32)
PRECISIONS = ("float32", "bfloat16")
NETWORKS = ("policy", "target_policy", "critics", "target_critics")


class Learner:
    """An agent with random rows in its replay."""

    def __init__(
        self,
        name,
        *,
        kind=None,
        seed=0,
        rows=300,
        width=5,
        threads=1,
        engine="torch",
        precision="float32",
        meta=None,
        **hyperparameters,
    ):
        options = {"hidden_sizes": (24, 16), "batch_size": 40, "replay_capacity": 512} | hyperparameters
        config = AgentConfig(
            hyperparameters=Hyperparameters(agent=name, **options),
            training=Training(engine=engine, learner_threads=threads, precision=precision),
        )
        self.discrete, self.threads = name == "dqn", threads
        actions = spaces.Discrete(4, start=2) if self.discrete else spaces.Box(LOW, HIGH)
        self.agent = (AGENTS[name] if kind is None else kind)(config)
        observations = spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.state, _ = self.agent.init(
            RandomKey(seed), observation_space=observations, action_space=actions, meta=meta
        )
        generator = np.random.default_rng(seed)
        self.state.replay.insert(
            generator.normal(size=(rows, width)).astype(np.float32),
            generator.integers(2, 6, rows)
            if self.discrete
            else generator.uniform(LOW, HIGH, (rows, 3)).astype(np.float32),
            generator.normal(size=rows).astype(np.float32),
            generator.normal(size=(rows, width)).astype(np.float32),
            generator.random(rows) < 0.2,
        )

    def update(self, key, policy_steps=1, copies=False):
        return self.state.engine.update(RandomKey(key), 0 if self.discrete else policy_steps, copies)

    def tensors(self):
        """All that an update changes, by name."""
        state = self.state
        found = {}
        for name in NETWORKS:
            network = None if self.discrete and "policy" in name else getattr(state, name)
            if network is not None:
                found |= {f"{name}.{key}": tensor for key, tensor in network.named_parameters()}
        for name, optimizer in state.optimizers.items():
            for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                slots = optimizer.state.get(parameter, {})
                found |= {f"{name}.{index}.{slot}": tensor for slot, tensor in slots.items()}
        if not self.discrete and state.log_entropy_coefficient is not None:
            found["log_entropy_coefficient"] = state.log_entropy_coefficient
        return {name: tensor.detach() for name, tensor in found.items()}

    def priorities(self):
        return self.state.replay._core.weights()

    def td_errors(self):
        """What the rows' weights stand for; ones under uniform sampling."""
        exponent = self.agent.config.hyperparameters.priority_exponent
        return (self.priorities() / 2.0**20) ** (1 / exponent)


def pair(name, threads=1, **options):
    """The same learner twice: with the torch engine and with the native one."""
    reference, native = Learner(name, **options), Learner(name, threads=threads, engine="native", **options)
    assert isinstance(reference.state.engine, TorchEngine)
    assert isinstance(native.state.engine, NativeEngine)
    return reference, native


def assert_close(reference, native, tolerance=1e-5):
    """Tensors of the same names, each near the other."""
    ours, theirs = native.tensors(), reference.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_near(ours[name], tensor, tolerance, name)


def resynchronize(reference, native):
    """The native learner's tensors and rows become the reference's, in place."""
    ours = native.tensors()
    for name, tensor in reference.tensors().items():
        ours[name].copy_(tensor)
    if not native.discrete and reference.state.entropy_coefficient is not None:
        native.state.entropy_coefficient = reference.state.entropy_coefficient.clone()
    native.state.replay.import_state(*copy.deepcopy(reference.state.replay.export_state()))


def go_beside(reference, native, updates, tolerance=1e-5, policy_every=1, first=0):
    for index in range(first, first + updates):
        steps = 1 if index % policy_every == 0 else 0
        one, two = reference.update(index, steps, index % 5 == 4), native.update(index, steps, index % 5 == 4)
        assert one.finite
        assert two.finite
        torch.testing.assert_close(two.q, one.q, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(two.critic_loss, one.critic_loss, rtol=1e-5, atol=1e-6)
        assert (one.policy_loss is None) == (two.policy_loss is None)
        if one.policy_loss is not None:
            torch.testing.assert_close(two.policy_loss, one.policy_loss, rtol=1e-5, atol=1e-5)
        if one.log_prob is not None and reference.state.engine.name == "torch" and two.log_prob is not None:
            torch.testing.assert_close(two.log_prob, one.log_prob, rtol=1e-5, atol=1e-5)
        assert torch.equal(one.batch.handles, two.batch.handles)
        assert_close(reference, native, tolerance)
        np.testing.assert_allclose(native.td_errors(), reference.td_errors(), rtol=1e-5, atol=1e-5)
        resynchronize(reference, native)


CASES = [
    ("sac", {}),
    ("sac", {"hidden_sizes": (17,), "critics": 5, "batch_size": 33}),
    ("sac", {"activation": "tanh", "hidden_sizes": (16, 16, 16)}),
    ("sac", {"activation": "silu", "entropy_coefficient": 0.2, "replay": "uniform"}),
    ("sac", {"activation": "gelu", "n_step": 3, "discount": 0.9}),
    ("sac", {"layer_norm": True, "critics": 3}),
    ("sac", {"layer_norm": True, "activation": "tanh", "target_update_interval": 5}),
    ("sac", {"policy_batch": "fresh", "huber_delta": 0.5}),
    ("sac", {"max_gradient_norm": 0.3, "target_entropy": -1.0, "policy_learning_rate": 1e-4}),
    ("sac", {"batch_size": 1, "hidden_sizes": (1,)}),
    ("td3", {}),
    ("td3", {"critics": 3, "layer_norm": True, "target_noise": 0.7, "target_noise_clip": 0.3}),
    ("td3", {"policy_batch": "fresh", "activation": "gelu", "max_gradient_norm": 1.0}),
    ("ddpg", {}),
    ("ddpg", {"critics": 2, "huber_delta": 1.0, "replay": "uniform", "activation": "silu"}),
    ("ddpg", {"layer_norm": True, "hidden_sizes": (40, 30)}),
    ("dqn", {}),
    ("dqn", {"double_q": False, "huber_delta": 1.0, "target_update_interval": 5}),
    ("dqn", {"dueling": True}),
    ("dqn", {"dueling": True, "hidden_sizes": (20,), "layer_norm": True, "n_step": 2}),
    ("dqn", {"dueling": True, "activation": "tanh", "hidden_sizes": (20, 12, 8), "max_gradient_norm": 0.1}),
]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_each_update_equals_the_torch_engines(name, options, threads):
    reference, native = pair(name, threads, **options)
    go_beside(reference, native, 12, policy_every=2 if name == "td3" else 1)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("name", AGENTS)
def test_a_thousand_updates_each_equal(name, activation):
    """Under ReLU a unit may be so near to 0 for some row (2e-8 here) that rounding decides on which side it is."""
    # Slow policies: where tanh saturates, 1 - tanh^2 has few right digits in float32, whoever computes it.
    options = {"hidden_sizes": (32, 32), "batch_size": 64, "policy_learning_rate": 1e-5, "activation": activation}
    reference, native = pair(name, **options)
    policy_every = 2 if name == "td3" else 1
    far = sum(not is_beside(reference, native, index, policy_every) for index in range(1000))
    assert far <= (3 if activation == "relu" else 0)


def is_beside(reference, native, index, policy_every):
    """Whether one update is; if not, its weights are near nevertheless."""
    try:
        go_beside(reference, native, 1, policy_every=policy_every, first=index)
    except AssertionError:
        for name, tensor in reference.tensors().items():
            if "exp_avg" not in name:
                assert_near(native.tensors()[name], tensor, 1e-3, name)
        resynchronize(reference, native)
        return False
    return True


def in_double(learner, name):
    """The learner's engine over float64 copies of its networks."""
    state = learner.state
    for field in NETWORKS:
        network = None if learner.discrete and "policy" in field else getattr(state, field)
        if network is not None:
            network.double()
    if name == "sac":
        state.log_entropy_coefficient.data = state.log_entropy_coefficient.data.double()
    spec = learner.agent._spec() if learner.discrete else learner.agent._spec(state)
    state.engine = NativeEngine(spec, learner.agent._update_parts(state), learner.threads)


REFERENCES = [
    ("sac", {}),
    ("sac", {"activation": "tanh", "critics": 4, "hidden_sizes": (20, 20, 20), "huber_delta": 0.3}),
    ("sac", {"layer_norm": True, "activation": "silu", "max_gradient_norm": 0.5}),
    ("td3", {}),
    ("td3", {"activation": "gelu", "layer_norm": True}),
    ("ddpg", {"max_gradient_norm": 0.5}),
    ("dqn", {}),
    ("dqn", {"dueling": True, "layer_norm": True, "activation": "gelu"}),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("name", "options"), REFERENCES, ids=str)
def test_updates_equal_autograd_in_float64(name, options, double, threads):
    """One update in float32 within 1e-5, two hundred on their own in float64 within 1e-8."""
    learner = Learner(name, engine="native", threads=threads, **options)
    reference = ReferenceUpdate(name, learner.state, learner.agent.config.hyperparameters)
    if double:
        in_double(learner, name)
    for index in range(200 if double else 1):
        step = name != "td3" or index % 2 == 0
        result = learner.update(index, int(step))
        reference.update(result.batch, RandomKey(index), step)
        tolerance = 1e-8 if double else 1e-5
        close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
        torch.testing.assert_close(result.critic_loss, reference.critic_loss.detach(), **close)
        torch.testing.assert_close(learner.state.engine._td_error, reference.priority, **close)
        if step and name != "dqn":
            torch.testing.assert_close(result.policy_loss, reference.policy_loss, **close)
    ours = learner.tensors()
    for field in NETWORKS:
        network = getattr(reference, field, None)
        for key, truth in [] if network is None else network.named_parameters():
            assert_near(ours[f"{field}.{key}"], truth.detach(), tolerance, f"{field}.{key}")
    for field, optimizer in reference.optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            for slot, truth in slots.items():
                assert_near(ours[f"{field}.{index}.{slot}"], truth, tolerance, f"{field}.{index}.{slot}")


def assert_near(tensor, truth, tolerance, name):
    """Within ``tolerance`` of the norm.

    A last layer's bias, one number a critic, may be a sum whose terms cancel: it may be 1e-8 off besides.
    """
    far = float(torch.linalg.vector_norm(tensor.double() - truth.double()))
    size = float(torch.linalg.vector_norm(truth.double()))
    assert far <= tolerance * size + (1e-8 if truth.shape[-1:].numel() == 1 else 1e-12), f"{name}: {far} beside {size}"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(list(AGENTS)),
    batch=st.integers(1, 300),
    hidden=st.lists(st.integers(1, 70), min_size=1, max_size=4).map(tuple),
    width=st.integers(1, 40),
    threads=st.integers(1, 4),
    activation=st.sampled_from(["relu", "tanh", "silu", "gelu"]),
    layer_norm=st.booleans(),
)
def test_any_shape(name, batch, hidden, width, threads, activation, layer_norm):
    if layer_norm and min(hidden) < 4:  # of few features the variance may be next to nothing, and errors grow with it
        hidden = tuple(size + 3 for size in hidden)
    reference, native = pair(
        name,
        threads,
        batch_size=batch,
        hidden_sizes=hidden,
        width=width,
        activation=activation,
        layer_norm=layer_norm,
    )
    # Adam's first step is about the gradient's sign. Where its terms cancel to less than epsilon that would be the sign
    # of a rounding error, which no two ways of adding share; so epsilon is above those here.
    for learner in (reference, native):
        for optimizer in learner.state.optimizers.values():
            for group in optimizer.param_groups:
                group["eps"] = 1e-4
    go_beside(reference, native, 2, tolerance=1e-4)


def test_a_gradient_that_all_but_cancels_moves_its_parameter_as_in_torch():
    """Once found: four layers of few features, whose bias has a gradient of 6e-9 among others of 6e-5."""
    shape = {"batch_size": 100, "hidden_sizes": (6, 4, 6, 9), "width": 1, "activation": "gelu", "layer_norm": True}
    reference, native = pair("ddpg", 1, **shape)
    reference.update(0)
    native.update(0)
    moments = {name: tensor for name, tensor in reference.tensors().items() if "exp_avg" in name and "_sq" not in name}
    assert len(moments) > 20
    for name, truth in moments.items():
        assert_near(native.tensors()[name], truth, 1e-5, name)


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_key_gives_the_same_bits(name, threads):
    first, second = (Learner(name, threads=threads, engine="native", batch_size=100) for _ in range(2))
    for index in range(5):
        first.update(index)
        second.update(index)
    ours, theirs = first.tensors(), second.tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", AGENTS)
def test_several_updates_in_one_call_equal_one_after_the_other(name):
    one, many = (Learner(name, engine="native") for _ in range(2))
    steps = 0 if name == "dqn" else 1
    calls = [(RandomKey(index), steps, index == 3) for index in range(6)]
    for call in calls:
        one.state.engine.update(*call)
    results = list(many.state.engine.update_many(calls))
    assert len(results) == 6
    ours, theirs = one.tensors(), many.tensors()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert np.array_equal(one.priorities(), many.priorities())


@pytest.mark.skipif(not _core.has_bfloat16(), reason="this CPU has no bfloat16 products")
@pytest.mark.parametrize("name", AGENTS)
def test_bfloat16_products_are_near(name):
    """Factors have 8 bits: parameters after an update are near, and not equal."""
    exact, rounded = (
        Learner(name, engine="native", hidden_sizes=(64, 64), replay="uniform", precision=p) for p in PRECISIONS
    )
    assert "bfloat16" in rounded.state.engine.why
    for index in range(10):
        first, second = exact.update(index), rounded.update(index)
        torch.testing.assert_close(second.q, first.q, rtol=0.05, atol=0.02)
    assert not torch.equal(first.q, second.q)
    assert rounded.state.critics.state_dict().keys() == exact.state.critics.state_dict().keys()
    assert all(parameter.dtype == torch.float32 for parameter in rounded.state.critics.parameters())


# Torch's tensors stay torch's ---------------------------------------------------------------------------------


def test_engines_take_turns():
    """Whichever engine takes an update, the next one goes on from it: Adam's state included."""
    reference, native = pair("sac")
    other = TorchEngine(native.agent._spec(native.state), native.agent._update_parts(native.state))
    compiled = native.state.engine
    for index in range(6):
        native.state.engine = compiled if index % 2 else other
        reference.update(index)
        native.update(index)
    assert_close(reference, native, 1e-4)


def moved_by_load(learner):
    state = learner.state
    for name in NETWORKS:
        network = getattr(state, name)
        if network is not None:
            network.load_state_dict({key: tensor.clone() for key, tensor in network.state_dict().items()}, assign=False)
    for optimizer in state.optimizers.values():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def moved_by_data(learner):
    for name in NETWORKS:
        network = getattr(learner.state, name)
        for parameter in [] if network is None else network.parameters():
            parameter.data = parameter.data.clone()


def moved_by_to(learner):
    for name in NETWORKS:
        network = getattr(learner.state, name)
        if network is not None:
            network.to(torch.float64).to(torch.float32)


def moved_to_shared_memory(learner):
    for name in NETWORKS:
        network = getattr(learner.state, name)
        if network is not None:
            network.share_memory()


@pytest.mark.parametrize("move", [moved_by_load, moved_by_data, moved_by_to, moved_to_shared_memory])
@pytest.mark.parametrize("name", ["sac", "td3"])
def test_tensors_may_move_between_updates(name, move):
    reference, native = pair(name)
    for index in range(4):
        reference.update(index)
        native.update(index)
        move(native)
    assert_close(reference, native, 1e-4)


def test_a_changed_dtype_or_layout_is_an_error_and_changes_nothing():
    learner = Learner("sac", engine="native")
    learner.update(0)
    for spoil, match in [
        (lambda p: p.data.double(), "float64"),
        (lambda p: p.data.t().contiguous().t(), r"contiguous"),
    ]:
        weight = learner.state.policy.body[2].weight
        kept = weight.data
        weight.data = spoil(weight)
        before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
        with pytest.raises(TypeError, match=match):
            learner.update(1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in learner.tensors().items())
        weight.data = kept
    learner.update(2)


def test_a_graph_from_before_an_update_is_stale():
    learner = Learner("sac", engine="native")
    batch = learner.state.replay.sample(8)
    q = learner.state.critics(batch.observations, batch.actions).sum()
    learner.update(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.backward()


def test_adams_state_is_made_as_adam_makes_it():
    reference, native = pair("sac")
    reference.update(0)
    native.update(0)
    for name, optimizer in reference.state.optimizers.items():
        ours = native.state.optimizers[name].state_dict()
        theirs = optimizer.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        for index, slots in theirs["state"].items():
            assert ours["state"][index].keys() == slots.keys()
            for slot, tensor in slots.items():
                assert ours["state"][index][slot].dtype == tensor.dtype
                assert ours["state"][index][slot].shape == tensor.shape


def test_learning_rates_are_each_groups_own():
    reference, native = pair("sac")
    for learner in (reference, native):
        policy = learner.state.optimizers["policy"]
        (group,) = policy.param_groups
        head = list(learner.state.policy.head.parameters())
        body = list(learner.state.policy.body.parameters())
        group["params"] = body
        policy.add_param_group({"params": head, "lr": 5e-2, "betas": (0.5, 0.9), "eps": 1e-3})
    go_beside(reference, native, 5)


# What is not finite -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_a_critic_loss_that_is_not_finite_ends_the_update(threads):
    learner = Learner("sac", engine="native", threads=threads)
    learner.update(0)
    learner.state.critics.weights[-1].data[0, 0, 0] = np.nan
    before, priorities = clones(learner), learner.priorities()
    results = list(learner.state.engine.update_many([(RandomKey(index), 1, False) for index in range(3)]))
    assert [result.finite for result in results] == [False]
    assert results[0].policy_loss is None
    assert np.isnan(float(results[0].critic_loss))
    assert changed(before, learner) == set()
    assert np.array_equal(priorities, learner.priorities())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_policy_loss_that_is_not_finite_leaves_the_critics_step_and_nothing_after(threads):
    learner = Learner("td3", engine="native", threads=threads)
    learner.update(0)
    learner.state.policy.head.bias.data[0] = np.nan
    before, priorities = clones(learner), learner.priorities()
    result = learner.update(1)
    assert not result.finite
    assert np.isnan(float(result.policy_loss))
    assert {name.split(".")[0] for name in changed(before, learner)} == {"critics"}
    assert np.array_equal(priorities, learner.priorities())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_gradient_that_is_not_finite_ends_the_update(threads):
    """Huge weights: the loss is finite, its gradient is not."""
    learner = Learner("ddpg", engine="native", threads=threads, huber_delta=1.0)
    learner.update(0)
    learner.state.critics.weights[-1].data[:] = 1e30
    learner.state.critics.weights[-2].data[:] = 1e-30
    learner.state.critics.weights[0].data[:] *= 1e20
    before = clones(learner)
    result = learner.update(1)
    if result.finite:
        pytest.fail("the gradient was finite")
    assert np.isfinite(float(result.critic_loss))
    assert changed(before, learner) == set()


def clones(learner):
    return {name: tensor.clone() for name, tensor in learner.tensors().items()}


def changed(before, learner):
    return {
        name
        for name, tensor in learner.tensors().items()
        if not torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0))
    }


def test_threads_are_the_cores_that_may_be_used(tmp_path, monkeypatch):
    for cpu in range(8):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    siblings, quota = native._siblings, native._quota
    monkeypatch.setattr(native, "_siblings", lambda cpu: siblings(cpu, tmp_path))
    monkeypatch.setattr(native, "_quota", lambda: quota(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert native.usable_threads() == 4  # eight logical CPUs are four cores
    assert native.usable_threads(busy=1) == 3
    assert native.usable_threads(batch_size=130) == 2
    assert native.usable_threads(busy=9, batch_size=1) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 2})
    assert native.usable_threads() == 2
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert native.usable_threads() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert native.usable_threads() == 2
    assert siblings(77, tmp_path) == "77"


def test_an_empty_replay_is_an_error_that_says_so():
    learner = Learner("sac", engine="native")
    state = learner.state
    empty = PrioritizedReplayBuffer(16, {"observations": ((5,), np.float32), "actions": ((3,), np.float32)})
    update = learner.agent._update_parts(state)
    engine = NativeEngine(learner.agent._spec(state), type(update)(**(vars(update) | {"replay": empty})), 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="empty"):
            engine.update(RandomKey(0), 1)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_gives_these_numbers(isa):
    if isa not in _core.available_isas():
        pytest.skip(f"this machine has no {isa}")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_native_engine import CASES, go_beside, pair\n"
        "for name, options in CASES:\n"
        "    go_beside(*pair(name, 2, **options), 3, policy_every=2 if name == 'td3' else 1)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    done = subprocess.run(command, env=dict(os.environ, ANGLE_ISA=isa), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""What agents hand to engines: plain data, their own parts, optimisers."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from engine_parts import NAMES, assert_same, made, spec_of, tensors_of

from angle_rl.agents import DDPG, DQN, SAC, TD3, DiscreteSAC
from angle_rl.agents.optimizers import moments_of, without_compiler
from angle_rl.config import Hyperparameters
from angle_rl.models import TwinQ
from angle_rl.types import RandomKey

# Plain data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "next_value", "policy_loss", "target_noise", "target_entropy"),
    [
        (SAC, {}, "soft", "soft", (0.0, 0.0), -2.0),
        (SAC, {"target_entropy": -0.5}, "soft", "soft", (0.0, 0.0), -0.5),
        (SAC, {"entropy_coefficient": 0.2}, "soft", "soft", (0.0, 0.0), None),
        (TD3, {"target_noise": 0.3, "target_noise_clip": 0.4}, "smoothed", "deterministic", (0.3, 0.4), None),
        (DDPG, {}, "deterministic", "deterministic", (0.0, 0.0), None),
        (DQN, {}, "double", "none", (0.0, 0.0), None),
        (DQN, {"double_q": False}, "maximum", "none", (0.0, 0.0), None),
        (DiscreteSAC, {}, "other", "other", (0.0, 0.0), 0.98 * np.log(4)),
    ],
)
def test_agents_say_their_equations_as_plain_data(kind, options, next_value, policy_loss, target_noise, target_entropy):
    spec = spec_of(*made(kind, rows=0, **options))
    assert (spec.next_value, spec.policy_loss) == (next_value, policy_loss)
    assert (spec.target_noise, spec.target_noise_clip) == target_noise
    assert spec.target_entropy == pytest.approx(target_entropy)


def test_an_equation_of_ones_own_is_another():
    class OwnTarget(SAC):
        def next_values(self, state, batch, key):
            return super().next_values(state, batch, key)

    class OwnFuture(TD3):
        def future_q(self, state, batch, next_actions):
            return super().future_q(state, batch, next_actions)

    class OwnLoss(SAC):
        def policy_loss(self, state, batch, key):
            return super().policy_loss(state, batch, key)

    class OwnFollowing(TD3):
        def after_policy_step(self, state, learned):
            pass

    class OwnChoice(DQN):
        def next_values(self, state, batch):
            return super().next_values(state, batch)

    class Renamed(SAC):
        """A subclass that changes no equation."""

    def first_only(target_critics, next_observations, next_actions):
        return target_critics(next_observations, next_actions)[0]

    for kind, expected in [
        (OwnTarget, ("other", "soft")),
        (OwnFuture, ("other", "deterministic")),
        (OwnLoss, ("soft", "other")),
        (OwnFollowing, ("smoothed", "other")),
        (OwnChoice, ("other", "none")),
        (Renamed, ("soft", "soft")),
    ]:
        spec = spec_of(*made(kind, rows=0))
        assert (spec.next_value, spec.policy_loss) == expected, kind
    assert spec_of(*made(q_future=first_only, rows=0)).next_value == "other"
    agent, state = made(rows=0)
    agent.next_values = lambda state, batch, key: None
    assert spec_of(agent, state).next_value == "other"


@pytest.mark.parametrize("kind", NAMES)
def test_the_default_networks_have_the_configs_layers_and_learn(kind):
    _, plain = made(kind, rows=0)
    agent, state = made(kind, activation="silu", layer_norm=True)
    networks = [state.critics] if kind is DQN else [state.critics, state.policy]
    for network, before in zip(networks, [plain.critics, plain.policy], strict=False):
        names = {type(module).__name__ for module in network.modules()}
        assert getattr(network, "activation", "") == "silu" or "SiLU" in names
        assert "ReLU" not in names
        assert len(list(network.parameters())) > len(list(before.parameters()))
    before = tensors_of(agent, state)
    assert state.engine.update(RandomKey(3), 0 if kind is DQN else 1).finite
    after = tensors_of(agent, state)
    learned = [name for name in after if name.startswith(("critics.", "policy."))]
    assert learned
    assert not any(torch.equal(before[name], after[name]) for name in learned)


@pytest.mark.parametrize("kind", NAMES)
def test_an_update_holds_the_states_own_parts(kind):
    agent, state = made(kind, rows=0)
    update = agent._update_parts(state)
    assert update.critics is state.critics
    assert update.target_critics is state.target_critics
    assert update.optimizers is state.optimizers
    assert update.replay is state.replay
    assert update.policy is (None if kind is DQN else state.policy)
    assert update.target_policy is getattr(state, "target_policy", None)
    assert update.first_action == (-1 if kind is DQN else None)
    learned = kind in (SAC, DiscreteSAC)
    assert (update.log_entropy_coefficient is not None) == learned
    assert "entropy_coefficient" in update.optimizers or not learned
    if kind is DQN:
        assert update.bounds is None
        assert update.entropy_coefficient() is None
        with pytest.raises(TypeError, match="no entropy coefficient"):
            update.set_entropy_coefficient(torch.ones(()))
        return
    assert torch.equal(update.bounds.half_range, (update.bounds.high - update.bounds.low) / 2)
    assert update.entropy_coefficient() is state.entropy_coefficient
    given = torch.tensor(0.25)
    update.set_entropy_coefficient(given)
    assert state.entropy_coefficient is given
    assert update.entropy_coefficient() is given


# A random subset of the target critics ----------------------------------------------------------------------


def test_a_subset_is_the_start_of_a_shuffle():
    for number in range(50):
        key = RandomKey(number)
        uniforms, numbers = key.uniform(5).tolist(), list(range(5))
        drawn = []
        for i in range(3):  # the same, by taking out instead of swapping
            place = int(uniforms[i] * (5 - i))
            drawn.append(numbers[i:][place])
            numbers[i], numbers[i + place] = numbers[i + place], numbers[i]
        assert key.subset(5, 3) == drawn
        assert sorted(key.subset(5, 5)) == [0, 1, 2, 3, 4]


def test_every_subset_is_equally_likely():
    counts = Counter(frozenset(key.subset(5, 2)) for key in RandomKey(7).split(5000))
    assert len(counts) == 10
    chi_square = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_square < 27.9  # 9 degrees of freedom, one in a thousand


@pytest.mark.parametrize("kind", [SAC, TD3, DDPG])
def test_the_target_takes_the_minimum_over_the_subset_drawn(kind):
    """Against the same agent without: the rest of its target is drawn with the other half of the key."""
    options = {"critics": 5, "target_noise": 0.3}
    agent, state = made(kind, critic_subset=2, **options)
    assert spec_of(agent, state).critic_subset == 2
    whole, whole_state = made(kind, **options)
    assert spec_of(whole, whole_state).critic_subset is None
    batch, seen = state.replay.sample(32), set()
    for number in range(20):
        key = RandomKey(number)
        subset_key, rest = key.split(2)
        members = subset_key.subset(5, 2)
        seen.add(frozenset(members))
        with torch.no_grad():
            values, everything = agent.next_values(state, batch, key), whole.next_values(whole_state, batch, rest)
        assert torch.equal(values.q, everything.q[members])
        assert (values.log_prob is None) == (kind is not SAC)
        if values.log_prob is not None:
            assert torch.equal(values.log_prob, everything.log_prob)
    assert len(seen) > 5
    assert state.engine.update(RandomKey(1), 1).finite


def test_a_subset_that_there_is_not_is_refused():
    for agent, critics, subset, says in [
        ("sac", "auto", 3, r"critic_subset is 3; it must be at most critics \(2\)"),
        ("ddpg", "auto", 2, r"critic_subset is 2; it must be at most critics \(1\)"),
        ("td3", 4, 5, r"critic_subset is 5; it must be at most critics \(4\)"),
        ("sac_discrete", 4, 2, "critic_subset is 2; agent 'sac_discrete' has no such ensemble"),
        ("dqn", "auto", 1, "agent 'dqn' has no such ensemble"),
    ]:
        with pytest.raises(ValueError, match=says):
            Hyperparameters(agent=agent, critics=critics, critic_subset=subset)
    with pytest.raises(ValueError, match="critic_subset is 2 and q_future is given"):
        made(q_future=lambda critics, o, a: critics(o, a), critic_subset=2)
    agent, state = made(critics=4, critic_subset=3)
    state.target_critics = TwinQ(3, 2, (16,), 2)
    with pytest.raises(ValueError, match="critic_subset is 3; there are 2 critics"):
        agent.next_values(state, state.replay.sample(32), RandomKey(0))


# Optimisers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SAC, TD3, DDPG, DQN])
def test_the_networks_optimizers_are_the_configs_and_the_entropy_coefficients_stays_adam(kind):
    for options, expected in [
        ({}, (torch.optim.Adam, 0.0)),
        ({"weight_decay": 0.1}, (torch.optim.Adam, 0.1)),
        ({"optimizer": "adamw", "weight_decay": 0.01}, (torch.optim.AdamW, 0.01)),
        ({"optimizer": "adamw"}, (torch.optim.AdamW, 0.0)),
    ]:
        _, state = made(kind, rows=0, **options)
        for name, optimizer in state.optimizers.items():
            (group,) = optimizer.param_groups
            found = type(optimizer), group["weight_decay"]
            assert found == ((torch.optim.Adam, 0.0) if name == "entropy_coefficient" else expected)
            assert group["fused"]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_made_without_the_compiler_is_the_one_that_torch_makes(kind, monkeypatch):
    parameters = list(torch.nn.Linear(2, 3).parameters())
    expected = kind(parameters, lr=0.1, fused=True)  # which imports the compiler
    with monkeypatch.context() as hiding:
        hiding.delitem(sys.modules, "torch._dynamo")
        found = without_compiler(kind, parameters, lr=0.1, fused=True)
    assert type(found) is kind
    assert vars(found) == vars(expected)
    assert list(vars(found)) == list(vars(expected))
    later = torch.nn.Parameter(torch.ones(1))
    found.add_param_group({"params": [later], "lr": 0.5})
    assert [group["lr"] for group in found.param_groups] == [0.1, 0.5]
    later.sum().backward()
    found.step()
    assert later.item() == pytest.approx(0.5 if kind is torch.optim.Adam else 0.495)


def test_an_optimizer_made_without_the_compiler_refuses_what_torch_refuses(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="empty parameter list"):
        without_compiler(torch.optim.Adam, [])
    with pytest.raises(ValueError, match="learning rate"):
        without_compiler(torch.optim.Adam, [parameter], lr=-1.0)
    with pytest.raises(ValueError, match="non-leaf"):
        without_compiler(torch.optim.Adam, [parameter * 2])


def test_only_torchs_own_wrapper_of_add_param_group_is_passed_by(monkeypatch):
    calls = []

    class Watched(torch.optim.Adam):
        @functools.wraps(torch.optim.Adam.add_param_group)
        def add_param_group(self, group):
            calls.append("around")
            self.param_groups.append(group)

    class Replaced(torch.optim.Adam):
        def add_param_group(self, group):
            calls.append("instead")
            self.param_groups.append(group)

    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    for kind in (Watched, Replaced):
        assert len(without_compiler(kind, [torch.nn.Parameter(torch.ones(1))]).param_groups) == 1
    assert calls == ["around", "instead"]


@pytest.mark.parametrize("loaded", [False, True])
def test_torchs_wrapper_is_passed_by_only_while_there_is_no_compiler(loaded, monkeypatch):
    class Wrapped(torch.optim.Adam):
        @torch._disable_dynamo
        def add_param_group(self, group):
            self.param_groups.append(group)

    kept_out = []
    compiler = importlib.import_module("torch._dynamo")
    monkeypatch.setattr(compiler, "disable", lambda function, *_, **__: kept_out.append(function) or function)
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert len(without_compiler(Wrapped, [torch.nn.Parameter(torch.ones(1))]).param_groups) == 1
    assert len(kept_out) == loaded


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_weight_decay_follows_its_equation(optimizer):
    """The first step, worked out: both moments are the gradient's own, so it is lr * sign(gradient)."""
    rate, decay = 0.01, 0.5
    _, state = made(DDPG, optimizer=optimizer, weight_decay=decay, learning_rate=rate, replay="uniform")
    before = [parameter.detach().clone().double() for parameter in state.critics.parameters()]
    assert state.engine.update(RandomKey(0), 0).finite
    for old, parameter in zip(before, state.critics.parameters(), strict=True):
        gradient = parameter.grad.double()
        if optimizer == "adamw":
            old = old * (1 - rate * decay)
        else:
            gradient = gradient + decay * old
        expected = old - rate * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-6)


def test_a_checkpoint_carries_adamw_on_bit_for_bit(tmp_path):
    options = {"optimizer": "adamw", "weight_decay": 0.1}
    agent, state = made(**options)
    for number in range(3):
        state.engine.update(RandomKey(number), 1)
    tensors, values = agent.export_state(state)
    other, restored = made(rows=0, **options)
    other.import_state(restored, {name: tensor.clone() for name, tensor in tensors.items()}, copy.deepcopy(values))
    for each in (state, restored):
        each.engine.update(RandomKey(9), 1)
    after, expected = tensors_of(other, restored), tensors_of(agent, state)
    assert_same(
        {name: tensor for name, tensor in after.items() if not name.startswith("replay.")},
        {name: tensor for name, tensor in expected.items() if not name.startswith("replay.")},
    )
    assert type(restored.optimizers["policy"]) is torch.optim.AdamW
    assert restored.optimizers["policy"].param_groups[0]["weight_decay"] == 0.1


def test_moments_are_those_of_the_state_dict():
    network = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(network.parameters())
    assert moments_of(optimizer) == {}
    network(torch.ones(1, 2)).sum().backward()
    network.bias.grad = None  # the second parameter takes no step
    optimizer.step()
    found, expected = moments_of(optimizer), optimizer.state_dict()["state"]
    assert found.keys() == expected.keys() == {0}
    assert all(found[0][slot] is tensor for slot, tensor in expected[0].items())

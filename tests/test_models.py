from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.squashed_gaussian import squashed_gaussian as reference_gaussian
from torch import nn

from angle_rl.models import LOG_STD_RANGE, DeterministicPolicy, PolicyModel, QNetwork, SquashedGaussianPolicy, TwinQ

LOW, HIGH = np.array([-2.0, 0.1, -1e-3], np.float32), np.array([2.0, 0.7, 5.0], np.float32)
KINDS = [SquashedGaussianPolicy, DeterministicPolicy]


def observations(batch=8, width=5, seed=0):
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_policy_shapes_bounds_and_gradients(kind):
    policy = kind(5, LOW, HIGH, hidden_sizes=(16, 12))
    actions, log_prob = policy.sample_actions(observations())
    assert actions.shape == (8, 3)
    assert log_prob.shape == (8,)
    assert policy.action_dim == 3
    assert policy.features(observations()).shape == (8, 12)
    (actions.sum() + log_prob.sum()).backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    extreme, _ = policy.sample_actions(1e6 * observations(64))
    assert (extreme >= torch.from_numpy(LOW)).all()
    assert (extreme <= torch.from_numpy(HIGH)).all()
    assert torch.equal(policy.sample_actions(observations(), True)[0], policy.sample_actions(observations(), True)[0])


@given(
    low=st.floats(-1e6, 1e6, width=32),
    width=st.floats(0.015625, 1e6, width=32),
    action=st.sampled_from([-1.0, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_scaling_never_leaves_the_bounds(low, width, action):
    low, high = np.float32([low]), np.float32([low]) + np.float32([width])
    if not low < high:
        return
    scaled = PolicyModel(low, high).scale_actions(torch.tensor([[action]])).item()
    assert low[0] <= scaled <= high[0]
    assert abs(scaled - (low[0] if action < 0 else high[0])) <= 1e-6 * (abs(low[0]) + abs(high[0]))


def test_gaussian_log_prob_is_of_the_unscaled_action():
    policy = SquashedGaussianPolicy(5, LOW, HIGH, hidden_sizes=(16,)).double()
    x, noise = observations().double(), torch.randn(policy.noise_shape(8), dtype=torch.float64)
    mean, log_std = policy(x)
    actions, log_prob = policy.sample_actions(x, noise=noise)
    unit, truth = reference_gaussian(mean.detach(), log_std.detach(), noise)
    np.testing.assert_allclose(log_prob.detach(), truth, rtol=1e-10)
    scaled = (LOW.astype(np.float64) + HIGH) / 2 + unit * (HIGH.astype(np.float64) - LOW) / 2
    np.testing.assert_allclose(actions.detach(), scaled, rtol=1e-5, atol=1e-6)
    still, _ = policy.sample_actions(x, deterministic=True, noise=noise)
    np.testing.assert_allclose(still.detach(), policy.scale_actions(mean.tanh()).detach(), rtol=1e-12)


def test_log_std_is_clamped():
    policy = SquashedGaussianPolicy(5, LOW, HIGH, hidden_sizes=())
    _, log_std = policy(1e4 * observations(64))
    assert (log_std.min().item(), log_std.max().item()) == LOG_STD_RANGE


def test_noise_decides_the_sample_and_torchs_generator_without_it():
    policy = SquashedGaussianPolicy(5, LOW, HIGH)
    noise = torch.randn(policy.noise_shape(8))
    state = torch.get_rng_state()
    first, second = (policy.sample_actions(observations(), noise=noise)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = policy.sample_actions(observations())[0]
    torch.set_rng_state(state)
    assert torch.equal(policy.sample_actions(observations())[0], drawn)
    assert not torch.equal(drawn, first)


def test_deterministic_policy_takes_no_noise():
    policy = DeterministicPolicy(5, LOW, HIGH)
    assert policy.noise_shape(8) is None
    actions, log_prob = policy.sample_actions(observations(), noise=torch.ones(8, 3))
    assert torch.equal(actions, policy(observations()))
    assert not log_prob.any()


def test_a_users_policy_needs_forward_only():
    class Linear(PolicyModel):
        def __init__(self, low, high):
            super().__init__(low, high)
            self.mean = nn.Linear(5, self.action_dim)
            self.log_std = nn.Parameter(torch.zeros(self.action_dim))

        def forward(self, observations):
            mean = self.mean(observations)
            return mean, self.log_std.expand_as(mean)

    class Direct(PolicyModel):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, observations):
            return self.layer(observations).tanh()

    for policy, width in ((Linear(LOW, HIGH), 3), (Direct(), 2)):
        actions, log_prob = policy.sample_actions(observations())
        assert (actions.shape, log_prob.shape) == ((8, width), (8,))
        (actions.sum() + log_prob.sum()).backward()
        assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())
    assert Direct().noise_shape(8) is None


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip_and_copy(kind):
    policy, other = kind(5, LOW, HIGH, (8,)), kind(5, LOW, HIGH, (8,))
    other.load_state_dict(policy.state_dict())
    assert not any("action_" in name for name in policy.state_dict())
    for twin in (other, copy.deepcopy(policy)):
        assert torch.equal(twin.sample_actions(observations(), True)[0], policy.sample_actions(observations(), True)[0])


@pytest.mark.parametrize("hidden_sizes", [(), (16,), (16, 8)])
@pytest.mark.parametrize("critics", [1, 2, 5])
def test_stacked_critics_equal_separate_networks(hidden_sizes, critics):
    torch.manual_seed(3)
    q = TwinQ(5, 3, hidden_sizes, critics)
    torch.manual_seed(3)
    sizes = [8, *hidden_sizes, 1]
    separate = []
    for _ in range(critics):
        layers = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]
        separate.append(nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1]))
    x, a = observations(), observations(8, 3, 1).requires_grad_()
    values = q(x, a)
    expected = torch.stack([network(torch.cat([x, a], 1)).squeeze(-1) for network in separate])
    assert values.shape == (critics, 8)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(
        torch.autograd.grad(values.square().sum(), a, retain_graph=True)[0],
        torch.autograd.grad(expected.square().sum(), a, retain_graph=True)[0],
    )
    values.square().sum().backward()
    expected.square().sum().backward()
    for layer, (weight, bias) in enumerate(zip(q.weights, q.biases, strict=True)):
        assert weight.shape == (critics, sizes[layer + 1], sizes[layer])
        assert bias.shape == (critics, sizes[layer + 1])
        assert weight.grad.is_contiguous()
        for member in range(critics):
            torch.testing.assert_close(weight.grad[member], separate[member][2 * layer].weight.grad)
            torch.testing.assert_close(bias.grad[member], separate[member][2 * layer].bias.grad)


LAYERS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU}


def stack(sizes, activation, layer_norm, last=True):
    """Linear layers of these sizes with what belongs between them, behind the last one too or not."""
    modules = []
    for inputs, outputs in itertools.pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), *([nn.LayerNorm(outputs)] if layer_norm else []), LAYERS[activation]()]
    return nn.Sequential(*(modules if last else modules[: -2 if layer_norm else -1]))


@pytest.mark.parametrize("activation", LAYERS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_stacked_critics_with_other_layers_equal_separate_networks(activation, layer_norm):
    """Values and the gradients by everything, scale and shift made different in every member."""
    torch.manual_seed(3)
    q = TwinQ(5, 3, (16, 8), 3, activation=activation, layer_norm=layer_norm).double()
    torch.manual_seed(3)
    separate = [stack([8, 16, 8, 1], activation, layer_norm, last=False).double() for _ in range(3)]
    if layer_norm:
        assert [tuple(p.shape) for p in (*q.scales, *q.shifts)] == [(3, 16), (3, 8)] * 2
        norms = [[module for module in network if type(module) is nn.LayerNorm] for network in separate]
        for layer, members in enumerate(zip(*norms, strict=True)):
            assert torch.equal(q.scales[layer], torch.ones_like(q.scales[layer]))
            assert torch.equal(q.shifts[layer], torch.zeros_like(q.shifts[layer]))
            for index, member in enumerate(members):
                for ours, theirs in [(q.scales[layer], member.weight), (q.shifts[layer], member.bias)]:
                    nn.init.normal_(theirs, 1.0, 0.3)
                    with torch.no_grad():
                        ours[index] = theirs
    x, a = observations().double(), observations(8, 3, 1).double().requires_grad_()
    values = q(x, a)
    expected = torch.stack([network(torch.cat([x, a], 1)).squeeze(-1) for network in separate])
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    wanted = torch.autograd.grad(expected.square().sum(), [a, *(p for net in separate for p in net.parameters())])
    by_action, *ours = torch.autograd.grad(values.square().sum(), [a, *q.parameters()])
    torch.testing.assert_close(by_action, wanted[0], rtol=1e-9, atol=1e-12)
    names = [name for name, _ in separate[0].named_parameters()]
    theirs = [dict(zip(names, wanted[1 + k * len(names) :], strict=False)) for k in range(3)]
    step = 3 if layer_norm else 2
    paths = {"weights": "{}.weight", "biases": "{}.bias"}
    for (name, _), gradient in zip(q.named_parameters(), ours, strict=True):
        kind, layer = name.split(".")
        if kind in paths:
            path = paths[kind].format(step * int(layer))
        else:
            path = f"{step * int(layer) + 1}.{'weight' if kind == 'scales' else 'bias'}"
        for member in range(3):
            torch.testing.assert_close(gradient[member], theirs[member][path], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", LAYERS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_policies_and_action_values_have_the_layers_that_were_asked_for(activation, layer_norm):
    layers = {"activation": activation, "layer_norm": layer_norm}
    torch.manual_seed(0)
    body = stack([5, 16, 12], activation, layer_norm)
    for kind in KINDS:
        torch.manual_seed(0)
        policy = kind(5, LOW, HIGH, (16, 12), **layers)
        torch.testing.assert_close(policy.features(observations()), body(observations()))
        actions, log_prob = policy.sample_actions(observations())
        assert (actions.shape, log_prob.shape) == ((8, 3), (8,))
        policy.head(policy.features(observations())).sum().backward()
        assert all(parameter.grad is not None for parameter in policy.parameters())
    space = spaces.Box(-1, 1, (5,), np.float32)
    torch.manual_seed(0)
    q = QNetwork(space, 4, (16, 12), **layers)
    torch.testing.assert_close(q(observations()), q.advantages[-1](body(observations())))
    q = QNetwork(space, 4, (16, 12), dueling=True, **layers)
    hidden = q.body(observations())
    kinds = [type(module) for module in stack([16, 12], activation, layer_norm)]
    for stream in (q.advantages, q.value):
        assert [type(module) for module in stream] == [*kinds, nn.Linear]
    advantages = q.advantages(hidden)
    expected = q.value(hidden) + advantages - advantages.mean(1, keepdim=True)
    torch.testing.assert_close(q(observations()), expected)


def test_the_names_of_default_networks_are_as_they_were():
    plain = TwinQ(5, 3, (16,), activation="tanh").state_dict()
    assert list(plain) == list(TwinQ(5, 3, (16,)).state_dict()) == ["weights.0", "weights.1", "biases.0", "biases.1"]
    assert list(DeterministicPolicy(5, LOW, HIGH, (16, 8)).state_dict()) == [
        *("body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"),
        *("head.weight", "head.bias"),
    ]
    assert list(TwinQ(5, 3, (16,), layer_norm=True).state_dict()) == [*plain, "scales.0", "shifts.0"]


def test_a_normalised_critic_takes_features_of_any_scale():
    q = TwinQ(2, 1, (16,), 2, layer_norm=True)
    x, a = 1e4 * observations(8, 2), 1e4 * observations(8, 1, 1)
    assert q(x, a).abs().max() < 10
    q = TwinQ(2, 1, (16,), 2, layer_norm=True, activation="relu")
    assert q(torch.zeros(3, 2), torch.zeros(3, 1)).isfinite().all()


def test_critics_start_different():
    q = TwinQ(5, 3, critics=3)
    for parameter in q.parameters():
        for first in range(3):
            for second in range(first):
                assert not torch.equal(parameter[first], parameter[second])
    values = q(observations(), observations(8, 3, 1))
    assert (values.std(0) > 0).all()


def test_critics_take_second_derivatives():
    q = TwinQ(2, 1, (4,)).double()
    x, a = observations(3, 2).double(), observations(3, 1, 1).double().requires_grad_()
    torch.autograd.gradgradcheck(lambda action: q(x, action).pow(2), (a,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    x, a = observations().to(dtype), observations(8, 3).to(dtype)
    assert TwinQ(5, 3).to(dtype)(x, a).dtype == dtype
    actions, log_prob = SquashedGaussianPolicy(5, LOW, HIGH).to(dtype).sample_actions(x)
    assert (actions.dtype, log_prob.dtype) == (dtype, dtype)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SquashedGaussianPolicy(0, LOW, HIGH), "observation_dim is 0; it must be at least 1"),
        (lambda: DeterministicPolicy(5, LOW, HIGH, (8, 0)), r"hidden_sizes is \(8, 0\)"),
        (lambda: SquashedGaussianPolicy(5, HIGH, LOW), "low must lie below high"),
        (lambda: SquashedGaussianPolicy(5, LOW, HIGH[:2]), r"low has shape \[3\] and high \[2\]"),
        (lambda: DeterministicPolicy(5, LOW * np.inf, HIGH), "every bound must be finite"),
        (lambda: DeterministicPolicy(5, LOW, HIGH * np.nan), "high is .*nan.*every bound must be finite"),
        (lambda: DeterministicPolicy(5, -1.0, 1.0), r"low has shape \[\]; it must be \[action_dim\]"),
        (lambda: PolicyModel(LOW), "give both bounds or neither"),
        (lambda: TwinQ(5, 0), "action_dim is 0"),
        (lambda: TwinQ(5, 3, activation="elu"), "activation is 'elu'; it must be one of relu, tanh, silu, gelu"),
        (lambda: DeterministicPolicy(5, LOW, HIGH, activation="Relu"), "activation is 'Relu'"),
        (lambda: TwinQ(5, 3, critics=0), "critics is 0; it must be at least 1"),
        (lambda: TwinQ(5, 3)(observations(8, 4), observations(8, 3)), r"observations has shape \[8, 4\]"),
        (lambda: TwinQ(5, 3)(observations(8, 5)[0], observations(8, 3)), r"must be \[batch, 5\]"),
        (lambda: TwinQ(5, 3)(observations(), observations(8, 2)), r"actions has shape \[8, 2\]"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()

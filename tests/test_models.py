from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.squashed_gaussian import squashed_gaussian as reference_gaussian
from torch import nn

from angle_rl.models import LOG_STD_RANGE, DeterministicPolicy, PolicyModel, SquashedGaussianPolicy, TwinQ

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
        (lambda: TwinQ(5, 3, critics=0), "critics is 0; it must be at least 1"),
        (lambda: TwinQ(5, 3)(observations(8, 4), observations(8, 3)), r"observations has shape \[8, 4\]"),
        (lambda: TwinQ(5, 3)(observations(8, 5)[0], observations(8, 3)), r"must be \[batch, 5\]"),
        (lambda: TwinQ(5, 3)(observations(), observations(8, 2)), r"actions has shape \[8, 2\]"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()

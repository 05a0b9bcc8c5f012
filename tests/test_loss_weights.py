"""Weights of the critics' losses: both engines beside each other, autograd in float64 and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference.twin_q_loss import twin_q_loss
from reference.update import ReferenceUpdate
from test_native_engine import Learner, assert_close, assert_near, go_beside, in_double, pair

from angle_rl.types import RandomKey

WEIGHTS = {"loss_weight_0": 0.3, "loss_weight_1": 1.1, "loss_weight_2": 1.6}
CASES = [
    ("sac", {}),
    ("sac", {"huber_delta": 0.5, "hidden_sizes": (17,), "batch_size": 33}),
    ("sac", {"activation": "silu", "layer_norm": True, "replay": "uniform", "max_gradient_norm": 0.5}),
    ("td3", {}),
    ("ddpg", {"huber_delta": 1.0}),
]


def weigh(learner, weights):
    """Set them as a meta-learner does."""
    learner.state.loss_weights = torch.tensor(list(weights.values()), dtype=torch.float64)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_each_weighted_update_equals_the_torch_engines(name, options, threads):
    reference, native = pair(name, threads, critics=3, **options)
    weigh(reference, WEIGHTS)
    weigh(native, WEIGHTS)
    go_beside(reference, native, 6, policy_every=2 if name == "td3" else 1)
    # From update to update they may change.
    for learner in (reference, native):
        weigh(learner, {"loss_weight_0": 2.0, "loss_weight_1": 0.5, "loss_weight_2": 0.5})
    go_beside(reference, native, 3, first=6)


@pytest.mark.parametrize("engine", ["torch", "native", "native in float64"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_weighted_updates_equal_autograd_in_float64_and_the_loss_numpys(name, options, engine):
    double = engine == "native in float64"
    learner = Learner(name, engine=engine.split()[0], critics=3, **options)
    reference = ReferenceUpdate(name, learner.state, learner.agent.config.hyperparameters)
    weigh(learner, WEIGHTS)
    reference.loss_weights = learner.state.loss_weights
    if double:
        in_double(learner, name)
    tolerance = 1e-8 if double else 1e-5
    for index in range(30 if double else 1):
        result = learner.update(index)
        reference.update(result.batch, RandomKey(index), True)
        weights = result.batch.importance_weights
        delta = learner.agent.config.hyperparameters.huber_delta
        loss, td_error, _ = twin_q_loss(result.q, reference.target, weights, delta, list(WEIGHTS.values()))
        np.testing.assert_allclose(result.critic_loss, loss, rtol=tolerance)
        np.testing.assert_allclose(reference.critic_loss.item(), loss, rtol=max(tolerance, 1e-6))
        np.testing.assert_allclose(reference.priority, td_error, rtol=tolerance, atol=tolerance)
    ours = learner.tensors()
    for key, truth in reference.critics.named_parameters():
        assert_near(ours[f"critics.{key}"], truth.detach(), tolerance, key)
    for index, slots in reference.optimizers["critics"].state_dict()["state"].items():
        assert_near(ours[f"critics.{index}.exp_avg"], slots["exp_avg"], tolerance, f"exp_avg of {index}")


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("name", ["sac", "td3"])
def test_weights_of_one_are_no_weights(name, engine):
    plain, weighted, other = (Learner(name, engine=engine) for _ in range(3))
    weigh(weighted, {"loss_weight_0": 1.0, "loss_weight_1": 1.0})
    weigh(other, {"loss_weight_0": 0.9, "loss_weight_1": 1.1})
    for index in range(4):
        one, two = plain.update(index), weighted.update(index)
        other.update(index)
        assert one.critic_loss.equal(two.critic_loss)
    assert_close(plain, weighted, 0.0)
    np.testing.assert_array_equal(plain.priorities(), weighted.priorities())
    with pytest.raises(AssertionError):
        assert_close(plain, other, 1e-5)


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_priorities_do_not_know_of_weights(engine):
    """They are the plain mean over critics of what these are off by."""
    plain, weighted = (Learner("sac", engine=engine) for _ in range(2))
    weigh(weighted, {"loss_weight_0": 0.2, "loss_weight_1": 1.8})
    plain.update(0)
    weighted.update(0)
    np.testing.assert_array_equal(plain.priorities(), weighted.priorities())


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_as_many_weights_as_critics(engine):
    learner = Learner("sac", engine=engine)
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    weigh(learner, WEIGHTS)
    with pytest.raises(ValueError, match="weight"):
        learner.update(0)
    after = learner.tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    learner.state.loss_weights = None
    assert learner.update(0).finite

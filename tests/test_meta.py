"""Meta-gradients against differences, and what meta steps leave alone."""

from __future__ import annotations

import pytest
import torch
from meta_parts import learning_of_agent, meta_inputs

from angle_rl.meta import MetaEntropy
from angle_rl.types import RandomKey

# Gradients -----------------------------------------------------------------------------------------------------


def check_gradients(learner, learning, inputs, *, step=1e-5, most=12):
    """Each meta-gradient against central differences: relative error of the whole vector at most 1e-5."""
    learner.adopt(learner.begin(learning, RandomKey(5)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from where it begins
        for parameter in learner.meta_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    _, gradients = learner.meta_gradient(learning, inputs)
    for name, parameter in learner.meta_parameters().items():
        flat = parameter.detach().view(-1)
        places = torch.randperm(len(flat), generator=generator)[:most]
        differences = []
        for place in places:
            sides = []
            for move in (step, -step):
                flat[place] += move
                sides.append(float(learner.meta_gradient(learning, inputs)[0]))
                flat[place] -= move
            differences.append((sides[0] - sides[1]) / (2 * step))
        expected, found = torch.tensor(differences, dtype=torch.float64), gradients[name].double().view(-1)[places]
        assert float(expected.norm()) > 1e-9, f"{name} has no gradient to compare"
        assert float((found - expected).norm() / expected.norm()) <= 1e-5, name


@pytest.mark.parametrize("inner", ["sgd", "adam", "rmsprop"])
def test_meta_entropy_has_the_gradient_of_its_loss(inner):
    learning = learning_of_agent("sac", entropy_coefficient=0.2)
    check_gradients(MetaEntropy(inner=inner), learning, meta_inputs())

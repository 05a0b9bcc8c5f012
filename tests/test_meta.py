"""Meta-gradients against differences, and what meta steps leave alone."""

from __future__ import annotations

import pytest
from meta_parts import check_gradients, learning_of_agent, meta_inputs

from angle_rl.meta import MetaEntropy

# Gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["sgd", "adam", "rmsprop"])
def test_meta_entropy_has_the_gradient_of_its_loss(inner):
    learning = learning_of_agent("sac", entropy_coefficient=0.2)
    check_gradients(MetaEntropy(inner=inner), learning, meta_inputs())

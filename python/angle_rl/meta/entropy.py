"""MetaEntropy: the entropy coefficient that leads to the best mean actions (Meta-SAC)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from angle_rl.meta.base import Learning, MetaInputs, MetaLearner, require
from angle_rl.meta.inner import Parameters, frozen
from angle_rl.types import Batch, RandomKey


class MetaEntropy(MetaLearner):
    """Learns SAC's entropy coefficient, in its logarithm, from the configured one on.

    Meta-SAC (Wang and Ni 2020, arXiv:2007.01932): theta'(alpha) = U(theta, grad L_pi(theta; batch, alpha)), and the
    meta loss is -mean min Q(s0, mean action of theta'), at states s0 that environments showed after resets. It takes
    the place of the automatic coefficient: ValueError where the agent learns that, or has none. Arguments as of
    `MetaLearner`; one meta-parameter, "log_entropy_coefficient", a float64 scalar.
    """

    name = "entropy"
    sets = ("entropy_coefficient",)

    def begin(self, learning: Learning, key: RandomKey) -> dict[str, Tensor]:
        """The configured coefficient's logarithm. ValueError where it is 0, learned, or there is none."""
        require(
            learning.entropy != "learned",
            "entropy_coefficient is 'auto' and MetaEntropy learns it, too; give it a number to begin with, such as 0.2",
        )
        require(learning.entropy == "fixed", f"{learning.agent} has no entropy coefficient for MetaEntropy to learn")
        require("policy" in learning.networks, f"{learning.agent} has no policy for MetaEntropy to look through")
        require(learning.continuous, f"{learning.agent}'s actions are discrete; MetaEntropy looks through mean actions")
        coefficient = learning.hyperparameters["entropy_coefficient"]
        require(coefficient > 0, f"entropy_coefficient is {coefficient}; MetaEntropy begins with one above 0")
        start = torch.tensor(math.log(coefficient), dtype=torch.float64, device=learning.device)
        return {"log_entropy_coefficient": start}

    def hyperparameters(self) -> dict[str, float]:
        """The coefficient, once it has been learned."""
        if not self.has_learned():
            return {}
        return {"entropy_coefficient": math.exp(self.meta_parameters()["log_entropy_coefficient"].item())}

    def inner_loss(self, learning: Learning, parameters: Parameters, batch: Batch, key: RandomKey) -> Tensor:
        """L_pi(theta; batch, alpha), the critics frozen."""
        coefficient = self.meta_parameters()["log_entropy_coefficient"].exp()
        critics = frozen(learning.networks["critics"])
        loss: Tensor = learning.policy_loss(
            batch, key, policy=parameters, critics=critics, entropy_coefficient=coefficient
        ).loss
        return loss

    def outer_loss(self, learning: Learning, parameters: Parameters, inputs: MetaInputs, key: RandomKey) -> Tensor:
        """-mean min Q(s0, mean action)."""
        states = inputs.initial_states
        q = learning.q_values(states, learning.actions(states, parameters), frozen(learning.networks["critics"]))
        return -q.amin(0).mean()
